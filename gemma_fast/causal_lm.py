"""`GemmaForCausalLM` has the methods and arguments of transformers' class of the same name.

This file defines `from_pretrained`, `forward` and `generate`, and checks their arguments. load.py
loads the weights, model/ implements the forward pass, and engine/ implements decoding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from gemma_fast.arguments import as_row, checked_cache, ids_of
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.rounded import check_quantize
from gemma_fast.checkpoint.transformers import TransformersCheckpoint
from gemma_fast.compat import (
    ATTRIBUTES,
    FORWARD,
    FROM_PRETRAINED,
    GENERATE,
    check_keywords,
    download_options,
)
from gemma_fast.config import GemmaConfig
from gemma_fast.engine.generate import generate_tokens
from gemma_fast.engine.many import Generated, generate_many, one_request
from gemma_fast.engine.options import UNSET, GenerationConfig, as_mapping, merge_options
from gemma_fast.engine.outputs import CausalLMOutput, Outputs
from gemma_fast.engine.pool import DecoderPool
from gemma_fast.engine.processors import functions_of, processors_of
from gemma_fast.engine.request import Request, end_token_ids, requests_of
from gemma_fast.engine.scheduler import CHUNK, Scheduler
from gemma_fast.load import PER_LAYER, load_model, pick_device
from gemma_fast.model.cache import KVCache
from gemma_fast.model.gemma import Gemma

DEFAULT_LENGTH = 8192  # tokens of a text in generate_many(), if the requests are not a list


class GemmaForCausalLM(Gemma):
    """Gemma 1 to 4 (text). Its call and `generate` work like those of transformers' class.

    `from_pretrained` and `from_checkpoint` load weights. The constructor does not initialize them.
    """

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config)
        self.generation_config = GenerationConfig.of_model(config)
        self.decoders = DecoderPool()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        quantize: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **others: Any,
    ) -> GemmaForCausalLM:
        """Loads a model from a directory of safetensors, a .gguf file or a hub id.

        dtype        type of norms and activations, and of weights that are not packed. None or
                     "auto": the checkpoint's; for GGUF bf16 on a GPU, float32 on a CPU, but bf16
                     for packed weights on a CPU with instructions for bf16, see load.py
        device       None: the GPU if there is one, else the CPU
        device_map   transformers' way to pass the device: "auto", a device, or {"": device}; with
                     "model.embed_tokens_per_layer": "cpu" in the dict, the table of Gemma 4's
                     per-layer embeddings stays in host memory, see load.py
        quantize     None: weights that the checkpoint has in 8 or 4 bits stay packed; "none": they
                     are unpacked to dtype; "int8" or "int4": weights with more bits are rounded
                     while they are read, see checkpoint/rounded.py
        torch_dtype  older name of dtype in transformers
        others       revision, token, cache_dir, force_download, local_files_only: as in
                     huggingface_hub, without effect on a path; and transformers' keywords that
                     have no effect here, see `compat.FROM_PRETRAINED`

        Checks config, tensor names, shapes and dtypes before it allocates the weights; then reads
        one tensor at a time. Raises ValueError or FileNotFoundError, which name the file and the
        tensor.
        """
        check_keywords("from_pretrained()", others, FROM_PRETRAINED)
        if dtype is not None and torch_dtype is not None:
            raise TypeError("from_pretrained() got both dtype and torch_dtype: pass only dtype")
        dtype = dtype or torch_dtype or "auto"
        check_quantize(quantize)  # before a download
        checkpoint = open_checkpoint(name_or_path, download_options(others))
        return cls.from_checkpoint(
            checkpoint, dtype=dtype, device=pick_device(device, device_map),
            on_host=isinstance(device_map, Mapping) and f"model.{PER_LAYER}" in device_map,
            quantize=quantize,
        )  # fmt: skip

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        on_host: bool = False,
        quantize: str | None = None,
    ) -> GemmaForCausalLM:
        """Builds the model from an open checkpoint, for example a `RandomCheckpoint`. The arguments
        are those of `load.load_model`."""
        model = load_model(cls, checkpoint, dtype, device, on_host, quantize)
        if checkpoint.generation_config:
            options, source = checkpoint.generation_config, str(checkpoint.path)
            model.generation_config = GenerationConfig.of(options, source)
        return model

    @classmethod
    def from_transformers(cls, model: nn.Module) -> GemmaForCausalLM:
        """Builds the model from a Gemma model of transformers that is already in memory.

        The new model gets the dtype and device of that model's text weights, and its
        generation_config.

        Both models share the memory of all other weights than those of q, k, v, gate and up, so an
        in-place change affects both, until one is moved or converted. The weights of q, k and v are
        stacked in one tensor here, and so are those of gate and up. They are copied unless they are
        already adjacent in memory. For Gemma 2B in 16 bits, they take 2.60 of 5.01 GB. If
        transformers' model is trained, the copies do not change: build this model again after that.

        Raises ValueError if `checkpoint.transformers` does not support the model.
        """
        return cls.from_checkpoint(TransformersCheckpoint(model))

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        *,
        cache: KVCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutput:
        """Computes, for each token of input_ids, the logits of the token after it.

        input_ids        [b, t], integers; the tokens that follow the tokens in past_key_values
        attention_mask   [b, past + t], 0 for padding on the left; None: no padding. Padding may be
                         on the right, but then the cache cannot be continued
        position_ids     [b, t], as in transformers; must agree with attention_mask
        past_key_values  the KVCache that an earlier call returned; it is extended in place
        cache            name of past_key_values in transformers 5.24
        use_cache        False: return no cache; default: return the cache
        logits_to_keep   number of last tokens whose logits are returned; 0: all tokens
        others           transformers' keywords that have no effect here, see `compat.FORWARD`
        """
        check_keywords("forward()", others, FORWARD)
        if cache is not None and past_key_values is not None:
            raise TypeError("forward() got both cache and past_key_values: pass only one")
        input_ids = ids_of(input_ids, self)
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"{logits_to_keep=} must be an integer of at least 0 (0: all)")
        b, t = input_ids.shape
        cache = past_key_values if cache is None else cache
        cache = self.new_cache(b, t, grows=True) if cache is None else checked_cache(cache, b, self)
        cache.reserve(t)  # may raise, so it must come before `align` changes the cache's positions
        cache.align(t, attention_mask, position_ids)
        hiddens = self.hidden_states(input_ids, cache, keep=logits_to_keep or None)
        logits = self.logits(hiddens.last(logits_to_keep))
        return CausalLMOutput(logits, None if use_cache is False else cache)

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = UNSET,
        max_length: int | None = UNSET,
        do_sample: bool | None = UNSET,
        temperature: float | None = UNSET,
        top_k: int | None = UNSET,
        top_p: float | None = UNSET,
        min_p: float | None = UNSET,
        repetition_penalty: float | None = UNSET,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = UNSET,
        pad_token_id: int | None = UNSET,
        stop_strings: str | Sequence[str] | None = UNSET,
        tokenizer: Any = None,
        streamer: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        generation_config: Any = None,
        inputs: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Continues prompts. Returns ids :: [b, t + new] of the prompts and the new tokens, as in
        transformers; with return_dict_in_generate=True, an `engine.outputs.GenerateOutput`. A row
        is one sequence of the batch.

        input_ids       [b, t]; prompts of different lengths are padded on the left
        attention_mask  [b, t], 0 for padding; None: pad_token_id is padding, if it ends no text
        max_new_tokens  maximum number of new tokens; default: 20
        max_length      maximum number of tokens, prompt included, if max_new_tokens is not set
        do_sample       False (default): take the most likely token, and ignore temperature, top_k,
                        top_p and min_p
        temperature     divides the logits; 0: the most likely token, even with do_sample=True
        top_k, top_p, min_p, repetition_penalty  see `engine.sampling.Sampling`; the default of
                        top_k is 50, as in transformers
        seed            the same seed samples the same text; None: torch's global generator sets it
        eos_token_id    one or more ids that end a row; pad_token_id fills the rest of the row;
                        None: no id ends a row, and no row is filled
        pad_token_id    None: the first id of eos_token_id
        stop_strings    strings that end a row when they appear in its generated text; they need
                        `tokenizer`, any object with `decode(ids) -> str`
        streamer        an object: put(ids) is called with the prompt, then with each new token;
                        end() is called last
        logits_processor  function, or list of functions, (ids, logits) → logits of all rows, as
                        transformers' LogitsProcessor; they prevent a CUDA graph
        stopping_criteria  the same for (ids, None) → True where a row ends
        prefix_allowed_tokens_fn  function (row, ids) → the only tokens that may follow
        generation_config  these options as a mapping, or as transformers' object; as in
                        transformers, it may be the second positional argument
        inputs          another name of input_ids
        others          the other options of `compat.APPLIED`, as in transformers' GenerationConfig,
                        and its keywords that have no effect here. A keyword or value that is not
                        supported raises TypeError, which names an alternative

        An option that is not passed is taken from generation_config, or else from the model's
        generation_config; in both, None means that it is not set. As in transformers, a keyword
        that is None switches the option off, and max_new_tokens=None gives the default. Ctrl-C ends
        generation and returns the tokens generated until then.

        Raises ValueError for an empty prompt, an id outside the vocabulary, more tokens than the
        model's context, a sampling value out of range, or logits that are not finite; raises
        torch.OutOfMemoryError if the cache does not fit. After an error, the model is still usable.
        """
        check_keywords("generate()", others, GENERATE)
        if inputs is not None and input_ids is not None:
            raise TypeError("generate() got both input_ids and inputs: pass only input_ids")
        ids = ids_of(inputs if input_ids is None else input_ids, self)
        if isinstance(attention_mask, Mapping) or hasattr(attention_mask, "to_dict"):
            if generation_config is not None:
                raise TypeError("generate() got generation_config twice: pass it by name only")
            generation_config, attention_mask = attention_mask, None
        keywords = others | {
            "max_new_tokens": max_new_tokens, "max_length": max_length, "do_sample": do_sample,
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id, "stop_strings": stop_strings,
        }  # fmt: skip
        options = merge_options(keywords, generation_config, self._defaults())
        requests = requests_of(ids, attention_mask, options, seed, self.config)
        processors = processors_of(
            logits_processor, prefix_allowed_tokens_fn, copies=len(requests) // len(ids)
        )
        criteria = functions_of("stopping_criteria", stopping_criteria)
        outputs = Outputs(options)
        ids = generate_tokens(
            self, self.decoders, requests, tokenizer, streamer, processors, criteria, outputs.record
        )
        return outputs.of(ids)

    def generate_many(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        tokenizer: Any = None,
        batch_size: int = 32,
        max_length: int | None = None,
        chunk: int = CHUNK,
        batch_invariant: bool = False,
        prefix_ids: Sequence[int] = (),
        **options: Any,
    ) -> Generator[Generated, None, None]:
        """Continues many prompts of any lengths, `batch_size` at the same time. Yields an
        `engine.many.Generated` for each request as soon as its text ends. A request that is refused
        or fails has `error`, and the others go on.

        requests         mappings of `request`'s arguments: {"input_ids": …, "max_new_tokens": 30}.
                         A generator is read only as fast as texts end
        tokenizer        finds stop strings, which must begin in the new text
        batch_size       texts that are decoded at the same time, rounded up to 1, 2, 4, 8 or a
                         multiple of 8; a prompt that waits takes the place of a text that has ended
        max_length       maximum number of tokens of a text, prompt included; it sets the size of
                         the cache. None: the longest of `requests` if it is a list, else the
                         context, up to DEFAULT_LENGTH
        chunk            tokens of prompts that are read between two decode steps, at most
        batch_invariant  True: a text has the same bits whatever runs beside it, see
                         engine/scheduler.py; slower while few texts run
        prefix_ids       ids with which prompts may begin, for example those of a system prompt.
                         They are computed once
        options          for requests that do not set them

        The tokens of a text do not depend on the order of the requests. With a seed, sampled tokens
        are those of `generate` for one prompt.
        """
        if batch_size < 1:
            raise ValueError(f"{batch_size=} must be at least 1")
        read: Iterable[Request | Exception] = (
            self._request_or_error(given, options) for given in requests
        )
        if max_length is None and isinstance(requests, list | tuple):
            read = [*read]
            sizes = [len(x.ids) + x.max_new_tokens for x in read if isinstance(x, Request)]
            max_length = max(sizes, default=1)
        context = self.config.max_position_embeddings
        prefix = self._ids_on_host(prefix_ids)[0].tolist() if len(prefix_ids) else []
        max_length = min(DEFAULT_LENGTH if max_length is None else max_length, context)
        decoder = self.decoders.take(self, batch_size, max_length)
        try:
            scheduler = Scheduler(
                decoder,
                tokenizer,
                max_length=max_length,
                chunk=chunk,
                invariant=batch_invariant,
                prefix=prefix,
            )
            with closing(scheduler):
                yield from generate_many(scheduler, read)
        finally:
            self.decoders.give_back(decoder)

    def request(
        self, input_ids: Any, *, seed: int | None = None, logprobs: int | None = None,
        **options: Any,
    ) -> Request:  # fmt: skip
        """Returns a request for `generate_many`'s scheduler: one prompt to continue.

        input_ids  list of token ids, or a tensor [t] or [1, t]; no padding
        seed       as in `generate`
        logprobs   number of likeliest tokens whose log-probabilities are returned with that of each
                   new token, up to MAX_LOGPROBS
        options    the options of `generate` that are keywords of transformers' GenerationConfig

        Raises ValueError or TypeError as `generate` does.
        """
        check_keywords("a request", options, GENERATE)
        ids = self._ids_on_host(input_ids)
        return one_request(ids, options, self._defaults(), seed, logprobs, self.config)

    def _ids_on_host(self, input_ids: Any) -> Tensor:
        """Returns the ids of one prompt :: [1, t], checked. A check on a GPU would wait for it."""
        return ids_of(as_row(input_ids), self, torch.device("cpu"))

    def _request_or_error(
        self, given: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Request | Exception:
        try:
            return self.request(**{**options, **given})
        except (ValueError, TypeError) as error:
            return error

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens at which `generate` ends a text, unless eos_token_id is passed."""
        return end_token_ids(as_mapping(self._defaults()), self.config.vocab_size)

    def _defaults(self) -> Any:
        """Returns generation_config, or the ids of the config if it is empty."""
        return self.generation_config or GenerationConfig.of_model(self.config)

    def can_generate(self) -> bool:
        return True

    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.config.tensor_shapes().values())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in ATTRIBUTES:
                raise
        raise AttributeError(f"GemmaForCausalLM has no {name}: {ATTRIBUTES[name]}")

    def memory(self) -> dict[str, int]:
        """Returns the bytes of each item on the device. `free_memory` frees "cache" and "graph".

        weights  all parameters, packed or not, except an output head of its own
        lm_head  the output head, if it has a weight of its own
        host     the table of per-layer embeddings, if it is in host memory and the model on a GPU
        cache    the rotary tables, and the KV caches that `generate` keeps for its next call
        graph    the CUDA graphs that `generate` keeps for its next call
        """
        kept = self.decoders.memory()
        kept["cache"] += self.rope.nbytes
        items = {} if self.lm_head is None else {"lm_head": self.lm_head.nbytes}
        table = self.embed_tokens_per_layer
        if table is not None and table.device != self.device:
            items["host"] = table.nbytes
        weights = sum(weight.nbytes for weight in self.parameters()) - sum(items.values())
        return {"weights": weights, **items, **kept}

    def free_memory(self) -> None:
        """Frees the KV caches and CUDA graphs that `generate` keeps, and the rotary tables."""
        self.decoders.clear()
        self.rope.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> GemmaForCausalLM:
        self.decoders.clear()  # CUDA graphs read the weights at fixed addresses
        super()._apply(fn, recurse)
        return self


AutoModelForCausalLM = GemmaForCausalLM
Gemma2ForCausalLM = Gemma3ForCausalLM = GemmaForCausalLM
Gemma4ForCausalLM = Gemma4UnifiedForCausalLM = GemmaForCausalLM
