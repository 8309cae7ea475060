"""Converts chats to ids: chooses the template, renders it, and encodes the prompt."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from gemma_fast.text.chat import (
    GemmaTurns,
    Prompt,
    Template,
    check_messages,
    check_tools,
    render_prompt,
)
from gemma_fast.text.encoder import TextEncoder
from gemma_fast.text.jinja_template import JinjaTemplate
from gemma_fast.text.plain_data import plain
from gemma_fast.text.templates import Templates, check_templates, choose_template

ATTRIBUTE = "the attribute chat_template"  # source of a template in error messages
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
IMAGES = ("<start_of_image>", "<end_of_image>")
OPTIONS = ("pad_to_multiple_of", "padding_side", "return_attention_mask")  # of tokenizer_kwargs


class ChatEncoder(TextEncoder):
    """Encodes chats.

    chat_template        a template, or templates by name; None if there is none; can be set
    chat_control_tokens  added tokens that a message cannot contain, besides special tokens;
                         None: those in the template
    turns                Gemma's chat format, used without a template; None if the vocabulary lacks
                         its tokens
    """

    turns: GemmaTurns | None
    chat_control_tokens: list[str] | None
    _template_source: str
    _templates: Templates = None
    _warned: frozenset[str] = frozenset()

    @property
    def chat_template(self) -> Templates:
        return self._templates

    @chat_template.setter
    def chat_template(self, template: Any) -> None:
        self._templates = check_templates(template, ATTRIBUTE)
        if template is not None:
            self._template_source = ATTRIBUTE

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """Returns the template that apply_chat_template uses with the same arguments."""
        return choose_template(self._templates, chat_template, tools, self._template_source)[0]

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Converts a conversation, or a list of conversations, to prompts. Uses the checkpoint's
        template, or Gemma's official chat format if the checkpoint has no template.

        Returns the same as `tokenizer(text)`, or only its input_ids if return_dict=False. <bos>
        comes from the template only. tokenize=False returns the rendered str.

        tools                   JSON schemas of functions
        chat_template           a template, or the name of one of the checkpoint's
        sanitize_control_tokens
                                True: names of control tokens in messages, tools, documents and
                                `variables` are encoded as plain text; False: as control tokens
        continue_final_message  the prompt ends with the text of the last message, or with its field
                                of this name
        return_assistant_tokens_mask
                                adds assistant_masks: 1 for tokens of `{% generation %}` blocks
        variables               more variables for the template

        Raises ValueError if a message is malformed or out of order, or if the template fails.
        """
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError(
                "return_assistant_tokens_mask needs return_dict=True and tokenize=True"
            )
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "continue_final_message excludes add_generation_prompt and"
                " return_assistant_tokens_mask: pass one of them"
            )
        template = self._choose_template(chat_template, tools)
        control = self._control_tokens(template.text) if sanitize_control_tokens else {}
        if return_assistant_tokens_mask and not GENERATION.search(template.text):
            self._warn_once(NO_GENERATION)
        given = {name: plain(value, name) for name, value in variables.items()}
        given |= {"tools": check_tools(tools), "documents": plain(documents, "documents")}
        given["add_generation_prompt"] = bool(add_generation_prompt)
        several = _is_batch(conversation)
        prompts = [
            render_prompt(
                template, {**given, "messages": check_messages(chat)}, control,
                self.special_tokens_map, continue_final_message,
            )
            for chat in (conversation if several else [conversation])
        ]  # fmt: skip
        if not tokenize:
            texts = [prompt.text for prompt in prompts]
            return texts if several else texts[0]
        rows = [self._encode_prompt(prompt, frozenset(control.values())) for prompt in prompts]
        if self.add_bos_token and any(self.bos_token_id not in ids for ids, _ in rows):
            self._warn_once(NO_BOS)
        result = self._pack_prompts(
            rows, not several, padding, truncation, max_length, return_tensors,
            return_assistant_tokens_mask, dict(tokenizer_kwargs or {}),
        )  # fmt: skip
        return result if return_dict else result.input_ids

    def _choose_template(self, wanted: str | None, tools: Any) -> Template:
        if wanted is not None or self._templates is not None:
            return JinjaTemplate(
                *choose_template(self._templates, wanted, tools, self._template_source)
            )
        if self.turns is None:
            raise ValueError(
                f"{self.source} has no chat template, and no <start_of_turn> and <end_of_turn>: use"
                " an instruction-tuned (-it) model with its chat template, or pass chat_template=…"
            )
        self._warn_once(f"{self.source}: {NO_TEMPLATE}, or pass its chat_template=…", 4)
        return self.turns

    def _warn_once(self, message: str, stacklevel: int = 3) -> None:
        if message not in self._warned:
            self._warned |= {message}
            warnings.warn(message, stacklevel=stacklevel)

    def _control_tokens(self, template: str) -> dict[str, int]:
        """Returns the tokens that a message must not contain, with their ids."""
        listed = self.chat_control_tokens
        return {
            token.content: i
            for i, token in self._backend.get_added_tokens_decoder().items()
            if token.special
            or token.content in IMAGES
            or (
                token.content in template and not token.content.isspace()
                if listed is None
                else token.content in listed
            )
        }

    def _pack_prompts(
        self, rows: list[tuple[list[int], list[int]]], flat: bool, padding: Any, truncation: Any,
        max_length: int | None, return_tensors: str | None, masks: bool, options: dict[str, Any],
    ) -> Any:  # fmt: skip
        """Truncates, pads and packs rows of ids and assistant masks."""
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"tokenizer_kwargs: {name!r} is not supported, only {OPTIONS}")
        multiple = options.get("pad_to_multiple_of")
        length, limit = self._lengths(padding, truncation, max_length, multiple)
        with_mask = options.pop("return_attention_mask", True)
        if limit is not None:
            keep = slice(limit) if self.truncation_side == "right" else slice(-limit, None)
            rows = [(ids[keep], mask[keep]) for ids, mask in rows]
        columns = {"attention_mask": [[1] * len(ids) for ids, _ in rows]} if with_mask else {}
        if masks:
            columns["assistant_masks"] = [mask for _, mask in rows]
        ids = [ids for ids, _ in rows]
        return self._pack(
            ids, columns, flat, return_tensors, padding=padding, max_length=length, **options
        )

    def _encode_prompt(
        self, prompt: Prompt, control_ids: frozenset[int]
    ) -> tuple[list[int], list[int]]:
        """Returns the ids of a prompt, and for each id 1 if it overlaps a span, else 0."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        tokens = {token for _, token in prompt.pieces if token}
        as_text = {token: self._encode_plain(token, control_ids) for token in tokens}
        for piece, token in prompt.pieces:
            if token:
                new = as_text[token]
                ids += new
                offsets += [(position, position + len(piece))] * len(new)
            elif piece:
                found = self._split([piece])[0]
                ids += found.ids
                offsets += [(position + a, position + b) for a, b in found.offsets]
            position += len(piece)
        return ids, [*_overlaps(offsets, prompt.spans)]

    def _encode_plain(self, text: str, control_ids: frozenset[int]) -> list[int]:
        """Returns the ids of `text` from the BPE alone, which does not look for control tokens."""
        text = self._backend.normalizer.normalize_str(text)
        ids = [token.id for token in self.backend.model.tokenize(text)]
        if (control_ids - {self.unk_token_id}) & set(ids):
            raise ValueError(
                f"{self.source}: the BPE merges turn the plain text {text!r} into a control token:"
                " remove it from the messages"
            )
        return ids


NO_TEMPLATE = (
    "there is no chat template, so Gemma's turns are used. A base model was not trained for them,"
    " and does not answer: use an instruction-tuned (-it) model"
)
NO_BOS = (
    "the chat template writes no <bos>, so the prompt has none, as in transformers. Gemma answers"
    " badly without it: add {{ bos_token }} to the template"
)
NO_GENERATION = (
    "return_assistant_tokens_mask: the chat template has no {% generation %} block, so the mask is"
    " 0 everywhere"
)


def _is_batch(conversation: Any) -> bool:
    if not isinstance(conversation, list | tuple) or not conversation:
        return False
    return isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")


def _overlaps(offsets: list[tuple[int, int]], spans: list[list[int]]) -> Iterator[int]:
    """Yields for each token 1 if it overlaps a span, else 0. Both are in order."""
    left = iter(spans)
    span = next(left, None)
    for start, stop in offsets:
        while span is not None and start >= span[1]:
            span = next(left, None)
        yield int(span is not None and stop > span[0])
