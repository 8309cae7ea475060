"""Chooses and loads the model that is the truth of the certificate's model checks.

The truth is transformers' model in float32. transformers reads a directory itself, so a mistake of
gemma_fast's reader fails the certificate. It cannot read GGUF as llama.cpp does, so gguf_truth.py
reads GGUF for it. If none of this is possible, `reader` states who reads instead, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gemma_fast.benchmarks.measure.machine import installed_version
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.checkpoint.rounded import RoundedCheckpoint
from gemma_fast.reference import Reference

OLDEST = 5, 17  # the oldest version of transformers that is used
NOT_TEXT = (
    "vision_tower.", "multi_modal_projector.", "audio_tower.", "embed_vision.", "embed_audio.",
    "vision_embedder.",
)  # fmt: skip


class Truth(NamedTuple):
    """The implementation whose results count as correct.

    name    the implementation
    reader  how the checkpoint is read, as text for the title
    load    called with dtype and device, returns a model that is called like the reference
    ids     called with a text, returns its ids; None if they would be gemma_fast's own
    ends    ids that end a text; None: those of the model's generation_config
    """

    name: str
    reader: str
    load: Callable[..., Any]
    ids: Callable[[str], list[int]] | None = None
    ends: set[int] | None = None


def truth_of(checkpoint: Checkpoint, device: torch.device) -> tuple[Truth, Any]:
    """Returns the truth of a checkpoint, and its model in float32."""
    version = installed_version("transformers")
    if version is None or tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        found = "is not installed" if version is None else f"is {version}, older than {oldest}"
        reader = f"read by gemma_fast's own reader, because transformers {found}"
        truth = Truth("eager reference", reader, partial(Reference.from_checkpoint, checkpoint))
        return truth, truth.load(dtype=torch.float32, device=device)
    from gemma_fast.benchmarks.model.transformers_model import transformers_model

    name = f"transformers {version}"
    given = partial(transformers_model, checkpoint, attention="eager")
    problem = "random weights are in no file"
    if isinstance(checkpoint, RoundedCheckpoint) and checkpoint.rounded:
        problem = "--quantize rounded the weights"
    elif not isinstance(checkpoint, RandomCheckpoint):
        try:
            truth = Truth(name, *own_reader(checkpoint.path))
            return truth, truth.load(dtype=torch.float32, device=device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any error of transformers: report it and continue
            why = " ".join(f"{type(error).__name__}: {error}".split())
            problem = f"its own reading failed with {why}"
    truth = Truth(name, f"given what gemma_fast's reader read, because {problem}", given)
    return truth, truth.load(dtype=torch.float32, device=device)


def own_reader(path: Path) -> tuple[Any, ...]:
    """Returns the fields of a Truth, after its name, that does not use gemma_fast's reader."""
    if path.is_dir():
        load, ids = partial(read_directory, path), partial(ids_by_transformers, path)
        return "reading the checkpoint itself", load, ids
    from gemma_fast.benchmarks.verify.gguf_truth import GGUFTruth
    from gemma_fast.benchmarks.verify.llama_cpp_ids import llama_cpp_ends, llama_cpp_ids

    file = GGUFTruth(path)
    ids, ends = partial(llama_cpp_ids, file.metadata), llama_cpp_ends(file.metadata)
    return "reading the GGUF file by llama.cpp's rules", file.model, ids, ends


def read_directory(path: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Returns transformers' model of a directory. Raises ValueError if the files lack a
    weight of the model, or if a shape differs."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", experts_implementation="eager",
        local_files_only=True, use_safetensors=True, trust_remote_code=False,
        output_loading_info=True,
    )  # fmt: skip
    model, found = loaded
    missing = [x for x in found["missing_keys"] if not any(part in x for part in NOT_TEXT)]
    if missing or found["mismatched_keys"]:
        raise ValueError(f"no weights for {', '.join(sorted(map(str, missing))) or found}")
    return model.to(device).eval().requires_grad_(False)


def ids_by_transformers(path: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return list(tokenizer(text)["input_ids"])
