"""Finds a checkpoint's chat template in the same files as transformers, and renders the template in
a process with limits on time and memory."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_fast.checkpoint.hub import read_json
from gemma_fast.text.chat import Message

SPECIAL_TOKENS = {
    "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
}  # fmt: skip
MAX_SECONDS = 5
MAX_BYTES = 512 << 20  # size of the process's address space, which includes Python itself
MAX_LENGTH = 1 << 20  # characters of a template; also of the text that it adds to the messages
RENDERER = Path(__file__).with_name("jinja_child.py")


@dataclass(frozen=True)
class JinjaTemplate:
    """Renders a checkpoint's own template, which is untrusted. Error messages contain `source`."""

    text: str
    source: str

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Returns the text, rendered in another process. Raises ValueError if the template fails or
        exceeds a limit."""
        request = {
            "template": self.text,
            "variables": {
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
                "tools": None,
                "documents": None,
                **SPECIAL_TOKENS,
            },
            "max_seconds": MAX_SECONDS,
            "max_bytes": MAX_BYTES,
            "max_length": sum(len(m["content"]) for m in messages) + MAX_LENGTH,
            "path": sys.path,
        }
        try:
            child = subprocess.run(
                [sys.executable, "-I", "-S", RENDERER],
                input=json.dumps(request),
                capture_output=True,
                encoding="ascii",
                errors="replace",
                timeout=MAX_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{self.source}: the chat template did not end within {MAX_SECONDS} s: correct it"
            ) from None
        if child.returncode:
            reason = child.stderr.strip().rpartition("\n")[2] or f"exit code {child.returncode}"
        else:
            reply = json.loads(child.stdout)
            if "text" in reply:
                return reply["text"]
            reason = reply["error"]
        raise ValueError(
            f"{self.source}: the chat template failed: {reason}"
            f" (limits: {MAX_SECONDS} s, {MAX_BYTES >> 20} MiB)"
        )


def read_template(directory: Path) -> JinjaTemplate | None:
    """Returns the chat template in a model's directory; None if there is none."""
    path: Path = directory / "chat_template.jinja"
    template: object = None
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            template = file.read(MAX_LENGTH + 1)
    elif (path := directory / "tokenizer_config.json").is_file():
        template = read_json(path).get("chat_template")
        if isinstance(template, list):  # several named templates
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
    return check_template(template, str(path))


def check_template(template: object, source: str) -> JinjaTemplate | None:
    """Returns `template` as a JinjaTemplate; None for None. Raises ValueError if `template` is
    neither None nor a str, or is too long."""
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > MAX_LENGTH:
        raise ValueError(
            f"{source}: the chat template must be a string of at most {MAX_LENGTH} characters"
        )
    return JinjaTemplate(template, source)
