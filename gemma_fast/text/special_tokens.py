"""The vocabulary of a tokenizer and its special tokens, under the names that transformers uses.

`eos_token` is a token, `eos_token_id` its id. Both can be set. So can those of the other names in
NAMED, and those of tokens that a file adds, for example `image_token`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gemma_fast.text.keywords import ATTRIBUTES
from gemma_fast.text.scored_merges import ScoredMerges

NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
DEFAULTS = {
    "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
    "mask_token": "<mask>",
}  # fmt: skip
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # the new and the old name


class Vocabulary:
    """Maps tokens to ids and back.

    <name>_token, <name>_token_id        token and id of each name in `special_tokens_map`; None for
                                         a name in NAMED that is not set
    special_tokens_map                   name → token
    all_special_tokens, all_special_ids  those tokens, then `extra_special_tokens`
    """

    _backend: Backend  # its model has no merges as long as there are `_merges`
    _merges: ScoredMerges | None
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    bos_token_id: int
    eos_token_id: int
    unk_token_id: int
    pad_token_id: int
    _named: dict[str, str]
    _extra: list[str]

    @property
    def backend(self) -> Backend:
        """The tokenizer of the package `tokenizers`, without a post-processor."""
        if self._merges is not None:
            self._backend.model = self._merges.model()
            self._merges = None
        return self._backend

    def __getattr__(self, name: str) -> Any:
        """Returns a named token or its id. Raises AttributeError for another attribute, with what
        to use instead if it is one of transformers'."""
        if not name.startswith("_"):
            key = name.removesuffix("_id")
            if key in self._named or key in NAMED:
                token = self._named.get(key)
                return token if name == key or token is None else self.token_to_id(token)
            if name.removesuffix("_ids") in EXTRA:
                return self.convert_tokens_to_ids(self._extra) if "_ids" in name else [*self._extra]
            if name in ATTRIBUTES:
                raise AttributeError(f"gemma_fast's tokenizer has no {name}: {ATTRIBUTES[name]}")
        raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        key = name.removesuffix("_id")
        if key in NAMED or key in self.__dict__.get("_named", ()):
            self._set_named(key, value if name == key else self._token_of(name, value))
        elif name in EXTRA:
            self._extra = [self._known(name, token) for token in value or ()]
        else:
            super().__setattr__(name, value)

    def _set_named(self, name: str, token: str | AddedToken | None) -> None:
        if token is None:
            self._named.pop(name, None)
        else:
            self._named[name] = self._known(name, token)

    def _token_of(self, name: str, token_id: Any) -> str | None:
        if token_id is None:
            return None
        try:
            token = self._backend.id_to_token(token_id)
        except (TypeError, OverflowError):
            token = None
        if token is None:
            raise ValueError(f"{name}={token_id!r:.60} is not an id of the vocabulary")
        return token

    def _known(self, name: str, token: Any) -> str:
        _check_token(name, token)
        if self.token_to_id(str(token)) is None:
            raise ValueError(
                f"{name}={token!r:.60} is not in the vocabulary: use one of its tokens, or add it"
                " with add_special_tokens"
            )
        return str(token)

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.__dict__.get('source')!r}, vocab_size={self.vocab_size},"
            f" special_tokens_map={self.special_tokens_map})"
        )

    def __bool__(self) -> bool:
        return True

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the BPE. `len(tokenizer)` includes those that were added later."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    @property
    def vocab(self) -> dict[str, int]:
        return self._backend.get_vocab()

    def get_vocab(self) -> dict[str, int]:
        return self.vocab

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Tokens that are split off before the BPE merges: id → token, by id."""
        return dict(sorted(self._backend.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    @property
    def special_tokens_map(self) -> dict[str, str]:
        names = [*NAMED, *(name for name in self._named if name not in NAMED)]
        return {name: self._named[name] for name in names if name in self._named}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token such as "<end_of_turn>"; None for an unknown token."""
        return self._backend.token_to_id(token)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Returns the id of a token, or a list of ids. An unknown token has the id of <unk>."""
        names = [tokens] if isinstance(tokens, str) else tokens
        found = [self.token_to_id(name) for name in names]
        ids = [self.unk_token_id if token_id is None else token_id for token_id in found]
        return ids[0] if isinstance(tokens, str) else ids

    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> Any:
        """Returns the token of an id, or a list of tokens; None for an id outside the vocabulary.
        `skip_special_tokens` leaves out `all_special_ids` from a list."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        skip = set(self.all_special_ids if skip_special_tokens else ())
        return [self._backend.id_to_token(i) for i in map(int, ids) if i not in skip]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._backend.decoder.decode(tokens)

    def get_special_tokens_mask(
        self,
        token_ids_0: Iterable[int],
        token_ids_1: Iterable[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Returns 1 for each special token among the ids, 0 for each other token."""
        if token_ids_1 is not None or not already_has_special_tokens:
            raise ValueError(
                "get_special_tokens_mask takes complete ids: pass already_has_special_tokens=True,"
                " or call the tokenizer with return_special_tokens_mask=True"
            )
        special = set(self.all_special_ids)
        return [int(token_id in special) for token_id in map(int, token_ids_0)]

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens to the end of the vocabulary, and returns the number of new ones. The model's
        embedding does not grow: an id beyond it is refused by the model."""
        tokens = new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]
        for token in tokens:
            _check_token("a token", token)
        add = self._backend.add_special_tokens if special_tokens else self._backend.add_tokens
        return add([token for token in tokens if token])

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Adds tokens, such as {"pad_token": "<pad>"}, and sets the attributes of these names.
        Returns the number of tokens that were not in the vocabulary."""
        count = 0
        for name, value in special_tokens_dict.items():
            if name in EXTRA:
                count += self.add_tokens(list(value), special_tokens=True)
                kept = [] if replace_extra_special_tokens and value else self._extra
                self._extra = list(dict.fromkeys([*kept, *map(str, value)]))
            elif name in NAMED:
                count += self.add_tokens(value, special_tokens=True)
                setattr(self, name, value)
            else:
                raise ValueError(f"{name!r} is not the name of a special token: use one of {NAMED}")
        return count


def _check_token(name: str, token: Any) -> None:
    if not isinstance(token, str | AddedToken):
        raise ValueError(f"{name} must be a str or an AddedToken, not {token!r:.60}")
