"""Text ↔ ids: Gemma's BPE on the package `tokenizers`, padding, chat turns and streaming.

    tokenizer = Tokenizer.from_pretrained("path/or/hub-id/or/file.gguf")
    tokenizer("I want to move", return_tensors="pt").input_ids  # [b, t]
    tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt")

Called as transformers' tokenizers are. Two things differ: <bos> is put first exactly once, also
where the text brings its own, and in a chat no message can make a control token.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from gemma_fast.chat import GemmaTurns, Template, check_messages, render_pieces
from gemma_fast.chat_template import check_template, read_template
from gemma_fast.checkpoint import open_gguf, read_json, resolve
from gemma_fast.gguf_tokenizer import gguf_backend

CORE = ("<pad>", "<eos>", "<bos>", "<unk>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
IMAGES = ("<start_of_image>", "<end_of_image>")
GEMMA_3_END_OF_TURN = 106  # 107 in Gemma 1 and 2


class Encoding(dict[str, Any]):
    """`input_ids` and `attention_mask` (1: a token, 0: padding), as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"an Encoding has no {name!r}, only {', '.join(self)}") from None

    def to(self, device: torch.device | str) -> "Encoding":
        """The same on `device`. Lists stay lists."""
        return Encoding({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.items()})


class Tokenizer:
    """Gemma's tokenizer.

    bos_token_id, eos_token_id, pad_token_id, unk_token_id :: int
    stop_token_ids :: list[int], <eos> and, where there is one, <end_of_turn>
    vocab_size     :: int, also len(tokenizer)
    chat           renders messages; None without a template and without turn tokens
    """

    def __init__(
        self,
        backend: Backend,
        source: str,
        *,
        model_type: str = "",
        template: Template | None = None,
    ):
        """Takes `backend` over; `source` is named in errors, `model_type` is config.json's.

        Raises ValueError unless it is a BPE with Gemma's core tokens.
        """
        names = {name: backend.token_to_id(name) for name in CORE + TURNS}
        ids = {name: token_id for name, token_id in names.items() if token_id is not None}
        missing = [name for name in CORE if name not in ids]
        if not isinstance(backend.model, models.BPE) or missing:
            raise ValueError(f"{source} is no Gemma tokenizer: it lacks {missing or 'BPE'}")
        self.backend, self.source = backend, source
        self.vocab_size = backend.get_vocab_size()
        self.pad_token_id, self.eos_token_id = ids["<pad>"], ids["<eos>"]
        self.bos_token_id, self.unk_token_id = ids["<bos>"], ids["<unk>"]
        self.stop_token_ids = [ids[name] for name in ("<eos>", "<end_of_turn>") if name in ids]

        # What surrounds the BPE is the same for every Gemma, so a file has no say in it.
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = None
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens([AddedToken(name, normalized=False) for name in ids])

        added = backend.get_added_tokens_decoder()
        self._control_ids = {i for i, t in added.items() if t.special or t.content in IMAGES}
        self.chat = template
        if template is None and ids.keys() >= set(TURNS):
            gemma_3 = ids["<end_of_turn>"] == GEMMA_3_END_OF_TURN
            self.chat = GemmaTurns(model_type.startswith("gemma3") if model_type else gemma_3)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str]) -> "Tokenizer":
        """Load tokenizer.json from a directory or the hub, or rebuild the tokenizer of a .gguf.

        Raises ValueError, naming the file, for anything malformed, and what
        `checkpoint.resolve` raises.
        """
        path = resolve(name_or_path, patterns=["*.json", "*.jinja"])
        if path.is_file():
            metadata = open_gguf(path).metadata
            return cls(
                gguf_backend(metadata, str(path)),
                str(path),
                model_type=str(metadata.get("general.architecture") or ""),
                template=check_template(metadata.get("tokenizer.chat_template"), str(path)),
            )
        config = read_json(path / "config.json") if (path / "config.json").exists() else {}
        return cls(
            _load(path / "tokenizer.json"),
            str(path / "tokenizer.json"),
            model_type=str(config.get("model_type") or ""),
            template=read_template(path),
        )

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(
        self,
        text: str | Iterable[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        add_special_tokens: bool = True,
    ) -> Encoding:
        """Encode one text or several.

        Gives lists of ids, flat for one str; with return_tensors="pt", int64 tensors [b, t].
        `padding`, True or "longest", puts <pad> on the left. Raises ValueError where texts of
        different lengths would have to fit one tensor.
        """
        texts = [text] if isinstance(text, str) else text
        rows = [self.encode(text, add_special_tokens) for text in texts]
        return self._pack(rows, return_tensors, padding, flat=isinstance(text, str))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, in which the names of special tokens mean those tokens.

        `add_special_tokens` puts <bos> first, unless it is there already. Raises ValueError for
        what is no str, or has half a surrogate pair in it.
        """
        ids = self._encode(text).ids
        if add_special_tokens and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: int | Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """The text of one row of ids. Ids past the vocabulary have none."""
        row = ids.tolist() if isinstance(ids, Tensor) else ids
        row = [row] if isinstance(row, int) else list(row)
        try:
            return self.backend.decode(row, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise ValueError(f"not a row of token ids: {ids!r:.60}") from None

    def batch_decode(
        self, rows: Iterable[Sequence[int] | Tensor], skip_special_tokens: bool = False
    ) -> list[str]:
        """The text of each row of ids, [b, t] or a list of lists."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name, such as "<end_of_turn>"; None if there is none."""
        return self.backend.token_to_id(token)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The id of a token, or those of several; as in transformers, <unk>'s if there is none."""
        names = [tokens] if isinstance(tokens, str) else tokens
        found = [self.token_to_id(name) for name in names]
        ids = [self.unk_token_id if token_id is None else token_id for token_id in found]
        return ids[0] if isinstance(tokens, str) else ids

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = True,
    ) -> Encoding | Tensor | list[int] | str:
        """A conversation as a prompt, by the checkpoint's template or else by Gemma's own turns.

        Gives what `tokenizer(text)` gives; its input_ids alone without `return_dict`. Control
        tokens come from the template only: their names in a message are encoded as plain text.
        tokenize=False gives the rendered str, in which both look alike.

        Raises ValueError for messages that Gemma has no turns for, and where a template fails.
        """
        if self.chat is None:
            raise ValueError(f"{self.source} has no chat template, and no {' and '.join(TURNS)}")
        checked = check_messages(messages)
        if not tokenize:
            return self.chat.render(checked, add_generation_prompt)

        pieces = render_pieces(self.chat, checked, add_generation_prompt, self._find_control_tokens)
        ids = self.encode(pieces[0])
        for token, text in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += self._encode_plain(token) + self.encode(text, add_special_tokens=False)
        encoding = self._pack([ids], return_tensors, padding=False, flat=True)
        return encoding if return_dict else encoding.input_ids

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except TypeError:
            raise ValueError(f"not a str of valid Unicode: {text!r:.60}") from None

    def _find_control_tokens(self, text: str) -> list[tuple[int, int]]:
        """Where in `text` encoding would find one: (start, stop) in characters."""
        found = self._encode(text)
        spans = zip(found.ids, found.offsets, strict=True)
        return [span for token_id, span in spans if token_id in self._control_ids]

    def _encode_plain(self, text: str) -> list[int]:
        """Ids from the BPE alone, which knows no control tokens."""
        text = self.backend.normalizer.normalize_str(text)
        ids = [token.id for token in self.backend.model.tokenize(text)]
        if (self._control_ids - {self.unk_token_id}) & set(ids):
            raise ValueError(f"{self.source}: its merges make a control token of {text!r}")
        return ids

    def _pack(
        self, rows: list[list[int]], return_tensors: str | None, padding: bool | str, flat: bool
    ) -> Encoding:
        if return_tensors not in (None, "pt") or padding not in (True, False, "longest"):
            raise ValueError(
                f'return_tensors must be None or "pt", padding a bool or "longest", not'
                f" {return_tensors!r} and {padding!r}"
            )
        lengths = [len(row) for row in rows]
        if return_tensors and len(set(lengths)) != 1 and not (padding and rows):
            raise ValueError(
                f"texts of {lengths} tokens do not fit one tensor: pass padding=True"
                if rows
                else "no texts to make a tensor of"
            )
        pads = [max(lengths) - length if padding else 0 for length in lengths]
        ids: Any = [[self.pad_token_id] * n + row for n, row in zip(pads, rows, strict=True)]
        mask: Any = [[0] * n + [1] * len(row) for n, row in zip(pads, rows, strict=True)]
        if return_tensors:
            ids, mask = torch.tensor(ids, dtype=torch.int64), torch.tensor(mask)
        elif flat:
            ids, mask = ids[0], mask[0]
        return Encoding(input_ids=ids, attention_mask=mask)


def _load(file: Path) -> Backend:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises the bare class
        raise ValueError(f"{file} is not a readable tokenizer: {error}") from error
