"""Splits texts into tokens, and adds <bos> in front and the eos token at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import processors

from gemma_fast.text.batch import check_side
from gemma_fast.text.special_tokens import Vocabulary

GEMMA_4_TURN = "<|turn>"  # only Gemma 4's vocabulary has it
MAX_POST_PROCESSOR = 1 << 14  # bytes of its JSON; Gemma's takes less than 1000


class BosAdder(Vocabulary):
    """Adds <bos> and the eos token to texts.

    add_bos_token, add_eos_token  whether <bos> and the eos token are added to a text; can be set
    padding_side, truncation_side    "left" or "right"; can be set
    model_max_length                 limit of truncation=True and padding="max_length"
    model_input_names                names in the result of a call
    """

    source: str
    padding_side: str
    truncation_side: str
    model_max_length: int
    model_input_names: list[str]
    _post: processors.PostProcessor
    _added: list[int]  # the ids that are added to an empty text

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("padding_side", "truncation_side"):
            check_side(name, value)
        super().__setattr__(name, value)

    def _set_post_processor(self, bos: bool, eos: bool) -> None:
        """Makes the tokenizer add the bos token in front of a text, and the eos token after it."""
        bos, eos = bos and self.bos_token is not None, eos and self.eos_token is not None
        named = [(self.bos_token, self.bos_token_id)] * bos
        named += [(self.eos_token, self.eos_token_id)] * eos
        first = [f"{self.bos_token}:0"] * bos + ["$A:0"] + [f"{self.eos_token}:0"] * eos
        second = [f"{self.bos_token}:1"] * bos + ["$B:1"] + [f"{self.eos_token}:1"] * eos
        self._use(
            processors.TemplateProcessing(
                single=first, pair=first + second, special_tokens=[*dict.fromkeys(named)]
            )
        )

    def _use(self, post_processor: processors.PostProcessor) -> None:
        _check_post_processor(post_processor, self.source)
        self._post = post_processor
        self._added = post_processor.process(self._split([""])[0]).ids

    @property
    def add_bos_token(self) -> bool:
        return self.bos_token_id in self._added

    @add_bos_token.setter
    def add_bos_token(self, add: bool) -> None:
        self._set_post_processor(add, self.add_eos_token)

    def require_bos(self) -> None:
        """Adds <bos> to texts of a Gemma 4 whose tokenizer adds none, as those of its -it models,
        which leave it to the chat template. A prompt without <bos> ruins the model's answer."""
        if self.token_to_id(GEMMA_4_TURN) is not None and not self.add_bos_token:
            self.add_bos_token = True

    @property
    def add_eos_token(self) -> bool:
        return self.eos_token_id in self._added

    @add_eos_token.setter
    def add_eos_token(self, add: bool) -> None:
        self._set_post_processor(self.add_bos_token, add)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self._post.num_special_tokens_to_add(pair)

    @property
    def max_len_single_sentence(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def _pairs(self, pairs: Any, texts: list[Any], limit: int | None) -> list[Any]:
        if pairs is None:
            return [None] * len(texts)
        pairs = text_list("text_pair", pairs)
        if limit is not None:
            raise ValueError("truncation of text pairs is not supported: truncate them first")
        if len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts and {len(pairs)} text pairs do not match")
        return self._split(pairs)

    def _encode(
        self, texts: list[Any], pairs: list[Any], special: bool, limit: int | None
    ) -> list[tokenizers.Encoding]:
        """Encodes texts, and adds the tokens that belong around a text. A text that starts with
        <bos> does not get a second one."""
        found = self._split(texts)
        for encoding in found:
            count = len(encoding.ids)
            if special and self.add_bos_token and encoding.ids[:1] == [self.bos_token_id]:
                encoding.truncate(count - 1, direction="left")
                count -= 1
            room = (limit or 0) - (len(self._added) if special else 0)
            if limit is not None and count > room:
                encoding.truncate(max(room, 0), direction=self.truncation_side)
        return [
            self._post.process(encoding, pair, special)
            for encoding, pair in zip(found, pairs, strict=True)
        ]

    def _split(self, texts: list[Any]) -> list[tokenizers.Encoding]:
        for text in texts:
            try:
                text.encode("utf-8")
            except (AttributeError, UnicodeEncodeError):
                raise ValueError(f"text must be a str of valid Unicode, not {text!r:.60}") from None
        merges = self._merges  # another thread may find all merges meanwhile
        splitter = merges and merges.splitter(texts, self._backend)
        return (splitter or self.backend).encode_batch(texts, add_special_tokens=False)


def text_list(name: str, texts: Any) -> list[Any]:
    """Returns a text or several as a list. Raises ValueError for what cannot contain texts."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, Mapping | bytes) or not hasattr(texts, "__iter__"):
        raise ValueError(f"{name} must be a str or a list of str, not {texts!r:.60}")
    return [*texts]


def _check_post_processor(post_processor: processors.PostProcessor, source: str) -> None:
    """Raises ValueError if an untrusted post-processor could add a large number of ids to a text:
    if it is long, or repeats the text, which a sequence of post-processors would do repeatedly."""
    state = post_processor.__getstate__()
    if len(state) > MAX_POST_PROCESSOR:
        raise ValueError(
            f"{source}: post_processor has {len(state)} bytes; the limit is {MAX_POST_PROCESSOR}:"
            " Gemma's adds only <bos>"
        )
    for items in _templates(json.loads(state)):
        texts = [item["Sequence"]["id"] for item in items if "Sequence" in item]
        if len(texts) > len(set(texts)):
            raise ValueError(
                f"{source}: post_processor has the text {len(texts)} times; the limit is once:"
                " Gemma's adds only <bos>"
            )


def _templates(state: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    yield state.get("single") or []
    yield state.get("pair") or []
    for processor in state.get("processors") or ():
        yield from _templates(processor)
