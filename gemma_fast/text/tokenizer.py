"""Converts text and chats to token ids and back, with Gemma's BPE on the package `tokenizers`.

    tokenizer = Tokenizer.from_pretrained("path/or/hub-id/or/file.gguf")
    tokenizer("I want to move", return_tensors="pt").input_ids  # [b, t]
    tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt")

Tokenizer has the interface of transformers' tokenizers, with two differences: ids start with
exactly one <bos>, even if the text starts with <bos>, and names of control tokens in a chat message
are encoded as plain text.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from gemma_fast.checkpoint.hub import read_json, resolve
from gemma_fast.compat import TOKENIZER, check_keywords
from gemma_fast.text.batch import Encoding, pack
from gemma_fast.text.chat import GemmaTurns, Template, check_messages, render_pieces
from gemma_fast.text.gguf_vocab import gguf_backend
from gemma_fast.text.jinja_template import check_template, read_template

CORE = ("<pad>", "<eos>", "<bos>", "<unk>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
IMAGES = ("<start_of_image>", "<end_of_image>")
GEMMA_3_END_OF_TURN = 106  # 107 in Gemma 1 and 2


class Tokenizer:
    """Gemma's tokenizer.

    bos_token_id, eos_token_id, pad_token_id, unk_token_id :: int
    stop_token_ids :: list[int], the ids of <eos>, and of <end_of_turn> if the vocabulary has it
    vocab_size     :: int, equal to len(tokenizer)
    pad_token      :: str, can be set, as in transformers
    padding_side   :: "left"
    chat           template for messages; None if there is no template and no turn tokens
    """

    bos_token, eos_token, unk_token = "<bos>", "<eos>", "<unk>"

    def __init__(
        self,
        backend: Backend,
        source: str,
        *,
        model_type: str = "",
        template: Template | None = None,
    ):
        """Changes `backend` in place. Error messages contain `source`. `model_type` is the field of
        config.json.

        Raises ValueError if `backend` is not a BPE with Gemma's core tokens.
        """
        names = {name: backend.token_to_id(name) for name in CORE + TURNS}
        ids = {name: token_id for name, token_id in names.items() if token_id is not None}
        missing = [name for name in CORE if name not in ids]
        if not isinstance(backend.model, models.BPE) or missing:
            raise ValueError(f"{source} is not a Gemma tokenizer: it lacks {missing or 'BPE'}")
        self.backend, self.source = backend, source
        self.vocab_size = backend.get_vocab_size()
        self.pad_token_id, self.eos_token_id = ids["<pad>"], ids["<eos>"]
        self.bos_token_id, self.unk_token_id = ids["<bos>"], ids["<unk>"]
        self.stop_token_ids = [ids[name] for name in ("<eos>", "<end_of_turn>") if name in ids]

        # Normalizer and decoder are the same for every Gemma, so those of the file are ignored.
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
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **others: Any) -> "Tokenizer":
        """Loads tokenizer.json from a directory or the hub, or rebuilds the tokenizer of a .gguf.

        `others` are transformers' keywords that have no effect here, see `compat.TOKENIZER`.
        Raises ValueError, with the path, for a malformed file, and the errors of `hub.resolve`.
        """
        check_keywords("from_pretrained()", others, TOKENIZER)
        path = resolve(name_or_path, patterns=["*.json", "*.jinja"])
        if path.is_file():
            from gemma_fast.checkpoint.gguf_reader import GGUFFile  # needs the extra `gguf`

            metadata = GGUFFile(path).metadata
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

    @property
    def pad_token(self) -> str:
        return self.backend.id_to_token(self.pad_token_id) or ""

    @pad_token.setter
    def pad_token(self, token: str) -> None:
        token_id = self.token_to_id(token)
        if token_id is None:
            raise ValueError(f"pad_token={token!r} is not in the vocabulary: use one of its tokens")
        self.pad_token_id = token_id

    @property
    def padding_side(self) -> str:
        return "left"

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        check_keywords("the tokenizer", {"padding_side": side}, TOKENIZER)

    def __call__(
        self,
        text: str | Iterable[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        add_special_tokens: bool = True,
    ) -> Encoding:
        """Encodes one text or several.

        Returns an Encoding. It contains lists of ids (one flat list for a str), or int64 tensors
        [b, t] if return_tensors="pt". padding=True or "longest" adds <pad> on the left. Raises
        ValueError if tensors are requested for texts of different lengths without padding.
        """
        texts = [text] if isinstance(text, str) else text
        rows = [self._ids(text, add_special_tokens) for text in texts]
        return pack(rows, self.pad_token_id, return_tensors, padding, flat=isinstance(text, str))

    def encode(
        self, text: str, add_special_tokens: bool = True, *, return_tensors: str | None = None
    ) -> Any:
        """Returns the ids of `text`: a list, or with return_tensors="pt" a tensor [1, t]. The
        name of a special token in the text is encoded as that token.

        `add_special_tokens` adds <bos> in front, unless the text starts with <bos>. Raises
        ValueError if `text` is not a str or contains half a surrogate pair.
        """
        ids = self._ids(text, add_special_tokens)
        return pack([ids], self.pad_token_id, return_tensors, False, flat=True).input_ids

    def decode(self, ids: int | Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """Returns the text of ids :: [t], or of one id. Skips ids outside the vocabulary."""
        row = ids.tolist() if isinstance(ids, Tensor) else ids
        row = [row] if isinstance(row, int) else list(row)
        try:
            return self.backend.decode(row, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise ValueError(
                f"ids must be one row of token ids, not {ids!r:.60}; for a batch, use batch_decode"
            ) from None

    def batch_decode(
        self, rows: Iterable[Sequence[int] | Tensor], skip_special_tokens: bool = False
    ) -> list[str]:
        """Returns one text per row. rows :: [b, t], or a list of lists of ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token such as "<end_of_turn>"; None for an unknown token."""
        return self.backend.token_to_id(token)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Returns the id of a token, or a list of ids. An unknown token has the id of <unk>."""
        names = [tokens] if isinstance(tokens, str) else tokens
        found = [self.token_to_id(name) for name in names]
        ids = [self.unk_token_id if token_id is None else token_id for token_id in found]
        return ids[0] if isinstance(tokens, str) else ids

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = True,
        padding: bool | str = False,
    ) -> Any:
        """Converts a conversation, or a list of conversations, to prompts. Uses the checkpoint's
        template, or Gemma's official chat format if the checkpoint has no template.

        Returns the same as `tokenizer(text)`, or only its input_ids if return_dict=False. Control
        tokens come only from the template; names of control tokens in a message are encoded as
        plain text. tokenize=False returns the rendered str, which does not show this difference.

        Raises ValueError if a message is malformed or out of order, or if the template fails.
        """
        if self.chat is None:
            raise ValueError(
                f"{self.source} has no chat template, and no {' and '.join(TURNS)}: use an"
                " instruction-tuned (-it) model"
            )
        several = isinstance(messages, list | tuple) and isinstance([*messages, 0][0], list | tuple)
        chats = [check_messages(chat) for chat in (messages if several else [messages])]
        if not tokenize:
            texts = [self.chat.render(chat, add_generation_prompt) for chat in chats]
            return texts if several else texts[0]
        rows = [self._chat_ids(chat, add_generation_prompt) for chat in chats]
        encoding = pack(rows, self.pad_token_id, return_tensors, padding, flat=not several)
        return encoding if return_dict else encoding.input_ids

    def _chat_ids(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool
    ) -> list[int]:
        assert self.chat is not None
        pieces = render_pieces(
            self.chat, messages, add_generation_prompt, self._find_control_tokens
        )
        ids = self._ids(pieces[0])
        for token, text in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += self._encode_plain(token) + self._ids(text, add_special_tokens=False)
        return ids

    def _ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = self._encode(text).ids
        if add_special_tokens and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except TypeError:
            raise ValueError(f"text must be a str of valid Unicode, not {text!r:.60}") from None

    def _find_control_tokens(self, text: str) -> list[tuple[int, int]]:
        """Encodes `text`. Returns start and stop, in characters, of each control token in it."""
        found = self._encode(text)
        spans = zip(found.ids, found.offsets, strict=True)
        return [span for token_id, span in spans if token_id in self._control_ids]

    def _encode_plain(self, text: str) -> list[int]:
        """Returns the ids of `text` from the BPE alone, which does not look for control tokens."""
        text = self.backend.normalizer.normalize_str(text)
        ids = [token.id for token in self.backend.model.tokenize(text)]
        if (self._control_ids - {self.unk_token_id}) & set(ids):
            raise ValueError(
                f"{self.source}: the BPE merges turn the plain text {text!r} into a control token:"
                " remove it from the messages"
            )
        return ids


def _load(file: Path) -> Backend:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: pass the directory of a model")
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception, not a subclass
        raise ValueError(f"{file} is not a readable tokenizer: {error}") from error


AutoTokenizer = GemmaTokenizer = Tokenizer
