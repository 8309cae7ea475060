"""Runs lm-evaluation-harness on GemmaForCausalLM.

Importing this module registers the model `gemma-fast` in lm_eval:

    import gemma_fast.lm_harness
    lm_eval.simple_evaluate(model="gemma-fast", model_args="pretrained=PATH,dtype=float32", …)

    python -m gemma_fast.lm_harness run --model gemma-fast --model_args pretrained=PATH --tasks …

Texts are split into tokens and windows by the rules of lm_eval's own model `hf`, so the scores of
both agree up to rounding. If the logits have 16 bits, this model still computes probabilities in
float32, but `hf` computes them in 16 bits.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from jinja2 import TemplateError

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.compat import FROM_PRETRAINED, LM_EVAL, ONE_TEXT, check_keywords, download_options
from gemma_fast.text.tokenizer import Tokenizer

try:
    from lm_eval import models
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from tqdm import tqdm

    from gemma_fast.lm_scoring import ScoringLM

    # lm_eval registers its own models only if no model is registered yet, so load them before ours.
    assert models.MODEL_MAPPING
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"gemma_fast.lm_harness needs lm-evaluation-harness ({error}): pip install lm_eval"
    ) from error

MAX_GEN_TOKS = 256  # new tokens if the task does not set their number, as in `hf`


@register_model("gemma-fast")
class GemmaFastLM(ScoringLM):
    """The model `gemma-fast` of lm_eval. Its model_args have the same names as those of `hf`:

    pretrained       argument of GemmaForCausalLM.from_pretrained, or a model
    tokenizer        argument of Tokenizer.from_pretrained, or a tokenizer; default: pretrained
    dtype, device, quantize  arguments of from_pretrained
    batch_size       texts that are scored or continued at the same time; "auto": max_batch_size,
                     halved when memory runs out
    max_length       maximum tokens of a prompt with its continuation; default: the model's context
    add_bos_token    False: put no <bos> before a text; default: put one
    prefix_token_id  token that precedes a text without a context; default: <bos>
    truncation       True: truncate prompts of generation tasks to the tokenizer's model_max_length
    think_end_token  token (str or id) after whose last occurrence an answer begins; needed by
                     enable_thinking=True, which allows only tasks that generate
    chat_template_args  variables of the chat template; enable_thinking is one of them
    others           arguments of `hf` that have no effect here, see `compat.LM_EVAL`, and keywords
                     of from_pretrained

    Raises the errors of from_pretrained, ValueError if `pretrained` is a model and `tokenizer` is
    missing, and TypeError, which names an alternative, for an argument that is not supported.
    """

    def __init__(
        self, pretrained: str | GemmaForCausalLM, *, tokenizer: str | Tokenizer | None = None,
        dtype: str | torch.dtype = "auto", device: str | None = None, quantize: str | None = None,
        batch_size: int | str = 1, max_batch_size: int | None = 64, max_length: int | None = None,
        add_bos_token: bool | None = None, prefix_token_id: int | None = None,
        truncation: bool | None = False, think_end_token: str | int | None = None,
        enable_thinking: bool | None = None, chat_template_args: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        known = {name: others.pop(name) for name in LM_EVAL if name in others}
        check_keywords("gemma-fast", known, LM_EVAL)
        if isinstance(pretrained, str):
            tokenizer = tokenizer or pretrained
            if device == "cuda:0" and not torch.cuda.is_available():
                device = None  # cuda:0 is lm_eval's default; without a GPU, `hf` ignores it, too
            pretrained = GemmaForCausalLM.from_pretrained(
                pretrained, dtype=dtype, device=device, quantize=quantize, **others
            )
        else:
            check_keywords("gemma-fast", others, FROM_PRETRAINED)
            if quantize is not None:
                raise ValueError("quantize=… is for a path: pass it to from_pretrained()")
        if tokenizer is None:
            raise ValueError(
                "tokenizer=… is needed if pretrained is a model: pass a Tokenizer or its path"
            )
        self.model = pretrained
        self._device = self.model.device
        if isinstance(tokenizer, str):
            tokenizer = Tokenizer.from_pretrained(tokenizer, **download_options(others))
            tokenizer.require_bos()
        self.tokenizer: Any = tokenizer
        self.automatic = str(batch_size).startswith("auto")
        self.batch_size = int((max_batch_size or 64) if self.automatic else batch_size)
        self.max_length = max_length or self.model.config.max_position_embeddings
        self.add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self.truncation = truncation
        digits = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(think_end_token) if digits else think_end_token  # type: ignore[arg-type]
        self.enable_thinking = enable_thinking
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        if enable_thinking and think_end_token is None:
            raise ValueError("enable_thinking=True needs think_end_token=…, where thinking ends")

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        ids = self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return next(token_id for token_id in ids if token_id is not None)

    @property
    def tokenizer_name(self) -> str:
        name = getattr(self.tokenizer, "source", None) or self.tokenizer.name_or_path
        return str(name).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a chat. Without `add_generation_prompt` the text ends with the last message. If
        the template fails, leaves out system messages, as `hf` does, and warns."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except (ValueError, TemplateError) as problem:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            warnings.warn(f"system messages are left out: {problem}", stacklevel=2)
            return self._render(others, add_generation_prompt)

    def _render(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt, **self.chat_template_args,
        )  # fmt: skip

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None, **kwargs: Any,
    ) -> list[int]:  # fmt: skip
        """Returns the last left_truncate_len ids of `string`, or all. They start with exactly one
        <bos>, unless add_special_tokens is False. If add_special_tokens is None, self.add_bos_token
        is used instead."""
        bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        ids = self.tokenizer.encode(string, add_special_tokens=bos is not False)
        if ids[:2] == 2 * [self.tokenizer.bos_token_id]:  # from a tokenizer of transformers
            ids = ids[1:]
        return ids[-(left_truncate_len or len(ids)) :]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns for each request what `_loglikelihood_tokens` returns for its tokens."""
        if self.enable_thinking:
            raise ValueError("enable_thinking=True needs tasks that only generate text")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns a continuation of each prompt, up to the first stop string. Requests with
        different options are decoded together, up to `batch_size` at the same time."""
        asked = [self._asked(*request.args) for request in requests]
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generating") as progress:
            for i, ids in self._answers([options for options, _ in asked]):
                texts[i] = self._text_of(ids, asked[i][1])
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                progress.update()
        return texts

    def _asked(self, prompt: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Returns the request of generate_many for a prompt, and the task's stop strings. If the
        prompt is too long, its beginning is cut off."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_GEN_TOKS))
        until = handle_stop_sequences(kwargs.pop("until", None), eos=self.tokenizer.eos_token)
        new = kwargs.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise ValueError(
                f"max_gen_toks={new} leaves no room for a prompt: it must be below"
                f" max_length={self.max_length}"
            )
        limit = getattr(self.tokenizer, "model_max_length", None) if self.truncation else None
        ids = self.tok_encode(prompt)[:limit][-room:]
        if "max_length" not in kwargs:  # in `hf`, it counts the prompt, and overrides max_gen_toks
            kwargs["max_new_tokens"] = new
        saved = getattr(self.model.generation_config, "stop_strings", None)
        stops = kwargs.pop("stop_strings", None) or saved or []
        stops = [*([stops] if isinstance(stops, str) else stops), *filter(None, until)]
        return {**kwargs, **ONE_TEXT, "input_ids": ids, "stop_strings": stops}, until

    def _answers(self, asked: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, list[int]]]:
        """Yields the index and the new tokens of each request as soon as its text ends. If memory
        runs out and batch_size is automatic, halves it, and starts the unfinished texts again."""
        left = dict(enumerate(asked))
        while left:
            numbers = [*left]
            many = self.model.generate_many(
                [*left.values()], tokenizer=self.tokenizer, batch_size=self.batch_size
            )
            try:
                with closing(many):
                    for found in many:
                        if found.error is not None:
                            raise found.error
                        del left[numbers[found.number]]
                        yield numbers[found.number], found.ids
            except torch.OutOfMemoryError as error:
                if not self.automatic or self.batch_size == 1:
                    raise
                traceback.clear_frames(error.__traceback__)  # frames keep the decoder alive
                self.batch_size //= 2
                self.model.free_memory()

    def _text_of(self, ids: list[int], until: list[str]) -> str:
        """Returns the text of an answer without its thinking, up to the first stop string."""
        end = self.think_end_token
        if isinstance(end, int):
            while end in ids:
                ids = ids[ids.index(end) + 1 :]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if isinstance(end, int):
            text, end = text.lstrip(), None
        return postprocess_generated_text(text, until, end)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
