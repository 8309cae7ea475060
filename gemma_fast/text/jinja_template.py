"""Renders a chat template in a process with limits on time and memory."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MAX_SECONDS = 5
MAX_BYTES = 512 << 20  # size of the process's address space, which includes Python itself
MAX_LENGTH = 1 << 20  # characters of a template; also of the text that it adds to its variables
RENDERER = Path(__file__).with_name("jinja_child.py")


class Rendered(NamedTuple):
    """A prompt, and start and stop, in characters, of the texts in `{% generation %}` blocks."""

    text: str
    spans: list[list[int]]


@dataclass(frozen=True)
class JinjaTemplate:
    """Renders a template, which is untrusted. Error messages contain `source`."""

    text: str
    source: str

    def render(self, variables: Mapping[str, Any]) -> Rendered:
        """Returns the prompt, rendered in another process. `variables` are plain JSON. Raises
        ValueError if the template fails or exceeds a limit."""
        given = json.dumps(variables)
        request = {
            "template": self.text,
            "max_seconds": MAX_SECONDS,
            "max_bytes": MAX_BYTES,
            "max_length": len(given) + MAX_LENGTH,
            "path": sys.path,
        }
        try:
            child = subprocess.run(
                [sys.executable, "-I", "-S", RENDERER],
                input=f"{json.dumps(request)}\n{given}",
                capture_output=True,
                encoding="ascii",
                errors="replace",
                timeout=MAX_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{self.source}: the template did not end within {MAX_SECONDS} s: correct it, or"
                " pass another chat_template=…"
            ) from None
        if child.returncode:
            reason = child.stderr.strip().rpartition("\n")[2] or f"exit code {child.returncode}"
        else:
            reply = json.loads(child.stdout)
            if "text" in reply:
                return Rendered(**reply)
            reason = reply["error"]
        stopped = child.returncode < 0 or "MemoryError" in reason  # < 0: ended by a signal
        limits = f" (limits: {MAX_SECONDS} s, {MAX_BYTES >> 20} MiB)" if stopped else ""
        raise ValueError(f"{self.source}: the template failed: {reason}{limits}")
