"""Converts text and chats to token ids and back, with Gemma's BPE on the package `tokenizers`.

    tokenizer = Tokenizer.from_pretrained("path/or/hub-id/or/file.gguf")
    tokenizer("I want to move", return_tensors="pt").input_ids  # [b, t]
    tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt")

Tokenizer has the interface of transformers' tokenizers, with two differences: a text that starts
with <bos> does not get a second one, and names of control tokens in a chat message are encoded as
plain text, unless sanitize_control_tokens=False is passed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from gemma_fast.checkpoint.hub import read_json, resolve
from gemma_fast.compat import download_options
from gemma_fast.text.chat import GemmaTurns
from gemma_fast.text.chat_encoder import ChatEncoder
from gemma_fast.text.gguf_settings import gguf_settings
from gemma_fast.text.gguf_vocab import MAX_ADDED, gguf_vocabulary
from gemma_fast.text.scored_merges import ScoredMerges
from gemma_fast.text.settings import (
    GENERIC,
    NO_MAX_LENGTH,
    add_settings_of,
    check_settings,
    read_settings,
)
from gemma_fast.text.special_tokens import DEFAULTS, EXTRA
from gemma_fast.text.templates import check_templates, read_templates
from gemma_fast.text.vocab_files import (
    DECODER,
    NORMALIZER,
    check_pipeline,
    load_vocabulary,
    newline_split,
    warn_of_missing_bos,
)

CORE = ("<pad>", "<eos>", "<bos>", "<unk>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
ENDS = ("<eos>", "<end_of_turn>", "<turn|>", "<|tool_response>")  # the last two in Gemma 4
GEMMA_3_END_OF_TURN = 106  # 107 in Gemma 1 and 2
CALL_TEMPLATE = "from_pretrained(chat_template=…)"  # source of a template in error messages
FILES = ["*.json", "*.jinja", "tokenizer.model"]


class Tokenizer(ChatEncoder):
    """Gemma's tokenizer. Its base classes have the calls and attributes.

    stop_token_ids :: list[int], the ids of <eos>, of the vocabulary's other tokens in ENDS, and of
                      the checkpoint's other tokens that end a text
    vocab_size     :: int, without tokens that were added later
    """

    is_fast = True
    clean_up_tokenization_spaces = False
    clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = False
    split_special_tokens = False
    verbose = False
    pad_token_type_id = 0
    init_inputs = ()

    def __init__(
        self,
        backend: Backend,
        source: str,
        *,
        merges: ScoredMerges | None = None,
        model_type: str = "",
        settings: Mapping[str, Any] | None = None,
        template_source: str | None = None,
    ):
        """Changes `backend` in place. Error messages contain `source`. `merges` are those that the
        model of `backend` still lacks, `model_type` is the field of config.json, `settings` are
        those of settings.py or gguf_settings.py.

        Raises ValueError if `backend` is not a BPE with Gemma's core tokens.
        """
        names = {name: backend.token_to_id(name) for name in CORE + TURNS}
        ids = {name: token_id for name, token_id in names.items() if token_id is not None}
        missing = [name for name in CORE if name not in ids]
        if not isinstance(backend.model, models.BPE) or missing:
            raise ValueError(f"{source} is not a Gemma tokenizer: it lacks {missing or 'BPE'}")
        self._named, self._extra = {}, []
        self._backend, self._merges = backend, merges
        self.source, self.name_or_path = source, source
        self.init_kwargs = dict(settings or {})
        settings = dict(settings or {})
        add_settings_of(backend, settings)
        backend.normalizer, backend.decoder = NORMALIZER, DECODER
        backend.pre_tokenizer = newline_split(backend)
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens([AddedToken(name, normalized=False) for name in ids])
        self._set_tokens(settings)

        self.padding_side = settings.get("padding_side", "left")
        self.truncation_side = settings.get("truncation_side", "right")
        max_len = settings.get("max_len", NO_MAX_LENGTH)
        self.model_max_length = settings.get("model_max_length", max_len)
        self.model_input_names = settings.get("model_input_names", ["input_ids", "attention_mask"])
        if backend.post_processor is not None:
            self._use(backend.post_processor)
        else:
            self._set_post_processor(bos=True, eos=False)
        for name in ("add_bos_token", "add_eos_token"):
            if settings.get(name) is not None:
                setattr(self, name, settings[name])

        self.chat_control_tokens = settings.get("chat_control_tokens")
        self._template_source = template_source or source
        self._templates = check_templates(settings.get("chat_template"), self._template_source)
        gemma_3 = ids.get("<end_of_turn>") == GEMMA_3_END_OF_TURN
        family = model_type.startswith("gemma3") if model_type else gemma_3
        self.turns = GemmaTurns(family) if ids.keys() >= set(TURNS) else None

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **others: Any) -> Tokenizer:
        """Loads tokenizer.json, or tokenizer.model, and the files beside it from a directory or the
        hub, or rebuilds the tokenizer of a .gguf.

        `others` are keys of tokenizer_config.json, keywords of a download (`compat.DOWNLOAD`), or
        transformers' keywords that have no effect here, see `keywords.SETTINGS`. Raises ValueError,
        with the path, for a malformed file, and the errors of `hub.resolve`.
        """
        given = check_settings(others, "from_pretrained()", call=True)
        path = resolve(name_or_path, FILES, download_options(others))
        if path.is_file():
            from gemma_fast.checkpoint.gguf_reader import open_gguf  # needs the extra `gguf`

            gguf = open_gguf(path)
            metadata = gguf.metadata
            backend, merges = gguf_vocabulary(metadata, str(path))
            if merges is not None:
                merges.file = gguf
            return cls(
                backend,
                str(path),
                merges=merges,
                model_type=str(metadata.get("general.architecture") or ""),
                settings=gguf_settings(metadata, backend, str(path)) | given,
                template_source=CALL_TEMPLATE if "chat_template" in given else None,
            )
        config = read_json(path / "config.json") if (path / "config.json").exists() else {}
        file, backend, merges = load_vocabulary(path)
        settings = read_settings(path, others)
        if settings.get("tokenizer_class") in GENERIC:
            check_pipeline(backend, file)
        else:  # transformers' GemmaTokenizer does not read it from the file
            backend.pre_tokenizer = None
        if file.suffix == ".json" and backend.post_processor is None:
            warn_of_missing_bos(settings, file)
        templates, template_source = read_templates(path)
        if "chat_template" in given:
            template_source = CALL_TEMPLATE
        elif templates is not None:
            settings["chat_template"] = templates
        tokenizer = cls(
            backend,
            str(file),
            merges=merges,
            model_type=str(config.get("model_type") or ""),
            settings=settings,
            template_source=template_source,
        )
        tokenizer.name_or_path = os.fspath(name_or_path)
        return tokenizer

    def _set_tokens(self, settings: Mapping[str, Any]) -> None:
        """Adds the tokens of `settings` that the vocabulary lacks, and names them."""
        known = {repr(token) for token in self._backend.get_added_tokens_decoder().values()}
        decoder = settings.get("added_tokens_decoder", {})
        self._backend.add_tokens([token for token in decoder.values() if repr(token) not in known])
        for i, token in decoder.items():
            if self.token_to_id(token.content) != i:
                warnings.warn(
                    f"{self.source}: the id of {token.content!r} is"
                    f" {self.token_to_id(token.content)}, not {i} as in added_tokens_decoder",
                    stacklevel=4,
                )
        extra: Any = next((settings[name] for name in EXTRA if settings.get(name)), [])
        specific = dict(settings.get("model_specific_special_tokens", {}))
        if isinstance(extra, Mapping):
            specific, extra = {**specific, **extra}, []
        own = {
            k: v for k, v in settings.items() if k.endswith("_token") and not isinstance(v, bool)
        }
        defaults = {k: v for k, v in DEFAULTS.items() if self.token_to_id(v) is not None}
        named = {**defaults, **own, **specific}
        added = {t.content: t for t in self._backend.get_added_tokens_decoder().values()}
        missing = [
            token for token in (*named.values(), *extra) if token and str(token) not in added
        ]
        for token in {
            added[str(token)] for token in named.values() if token and str(token) in added
        }:
            if not token.special:
                token.special = True
                missing.append(token)
        if len(added) + len(missing) > MAX_ADDED:
            raise ValueError(
                f"{self.source}: the file and its settings add {len(added) + len(missing)} tokens;"
                f" the limit is {MAX_ADDED}"
            )
        self._backend.add_special_tokens(missing)
        for name, token in named.items():
            self._set_named(name, token)
        self._extra = [str(token) for token in extra]
        self._ends = [str(token) for token in settings.get("end_tokens", ())]

    @property
    def stop_token_ids(self) -> list[int]:
        names = [*ENDS, self.eos_token, *self._ends]
        found = [self.token_to_id(name) for name in names if name]
        return sorted({token_id for token_id in found if token_id is not None})

    @property
    def backend_tokenizer(self) -> Backend:
        return self.backend

    @property
    def decoder(self) -> Any:
        return self._backend.decoder


AutoTokenizer = GemmaTokenizer = Tokenizer
