"""Runs transformers' continuous batching, `generate_batch`, with the settings that suit it best."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gemma_fast.benchmarks.model.cases import NO_SIZES, Sizes

PAGE = 256  # tokens of a page of the cache: transformers' default
CPU_BATCH_TOKENS = 512  # prompt tokens of a forward pass on a CPU, as in generate_many


class GenerateBatch:
    """Gives all prompts to transformers' generate_batch, with a manager that is kept.

    The cache has room for `batch` of the longest texts. By default transformers would fill the
    memory with it, and read more of it on a CPU. Blocks are not shared, because repeats have the
    same prompts: their keys and values would still be in the cache.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # Each call warns that the kept manager was sized for these prompts.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)

    def start(self, batch: int, max_length: int, kind: str) -> None:
        from transformers import ContinuousBatchingConfig

        self.model.destroy_cached_continuous_batching_manager()
        self.settings = ContinuousBatchingConfig(
            max_requests_per_batch=batch, num_blocks=batch * -(-max_length // PAGE) + 1,
            page_size=PAGE, allow_block_sharing=False,
            max_batch_tokens=CPU_BATCH_TOKENS if self.model.device.type == "cpu" else None,
        )  # fmt: skip

    def texts(self, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
        from transformers import GenerationConfig

        # No token has the id -1, so no text ends early.
        options = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1)
        found = self.model.generate_batch(
            [*prompts], generation_config=options, continuous_batching_config=self.settings,
            persistent_manager=True,
        ).values()  # fmt: skip
        errors = [text.error for text in found if text.error]
        if errors or len(found) < len(prompts):
            missing = f"{len(prompts) - len(found)} texts are missing"
            raise RuntimeError(f"generate_batch: {next(iter(errors), missing)}")
        return [text.generated_tokens for text in found]

    def memory(self) -> dict[str, float]:
        return {}

    def sizes(self) -> Sizes:
        return NO_SIZES
