"""`Job` has the settings of a batch job, and `Task` is one row of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from gemma_fast.batch.answers import Answer
from gemma_fast.batch.rows import Row

# Columns of a row that are neither options nor copied to the answer.
GENERATE_COLUMNS = ("id", "prompt", "messages")
SCORE_COLUMNS = ("id", "prompt", "text", "completion")
NOT_IN_RECORD = ("device", "batch_size")  # they may change when a job goes on


@dataclass(frozen=True, kw_only=True)
class Job:
    """The model, the mode and the options of a job.

    model, device, dtype, quantize  arguments of GemmaForCausalLM.from_pretrained
    score            True: log-probabilities of given texts; False: continue prompts
    options          options of generate() for rows that do not set them
    system           system message in front of each chat that has none
    seed             a row without a seed has the seed that `generate` gives to this row of a batch
    batch_size       texts that are computed at the same time
    max_length       maximum number of tokens of a text, prompt included; None: as generate_many()
    batch_invariant  True: a text has the same bits whatever runs beside it, see generate_many()
    """

    model: str
    device: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    score: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    seed: int = 0
    batch_size: int = 32
    max_length: int | None = None
    batch_invariant: bool = False

    def record(self) -> dict[str, Any]:
        """Returns what the answers depend on, as plain JSON."""
        return {k: v for k, v in asdict(self).items() if k not in NOT_IN_RECORD}


class Task(NamedTuple):
    """A row of the input, ready for the model.

    row      its number
    file     path of its file; None: the input is one file
    id       its column `id`; None: it has none
    columns  its columns that are copied to the answer
    ids      token ids of the prompt, or of the text to score
    options  arguments of a request for generate_many(), besides the ids
    scored   number of last ids that are scored
    chat     True: the prompt was a chat
    error    why the row is refused
    """

    row: int
    file: str | None = None
    id: Any = None
    columns: Row = {}  # noqa: RUF012
    ids: list[int] = []  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    scored: int = 0
    chat: bool = False
    error: Exception | None = None

    def answer(self, **columns: Any) -> Answer:
        """Returns the answer of the row with these columns of its own."""
        start = {"file": self.file, "row": self.row, "id": self.id}
        given = {name: value for name, value in start.items() if value is not None}
        return given | columns | ({"columns": self.columns} if self.columns else {})

    def failure(self, error: Exception) -> Answer:
        known = isinstance(error, ValueError | TypeError)
        return self.answer(error=str(error) if known else f"{type(error).__name__}: {error}")
