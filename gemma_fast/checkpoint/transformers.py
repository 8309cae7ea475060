"""A Gemma of transformers' → GemmaForCausalLM, on the weights that are there.

    model = GemmaForCausalLM.from_transformers(transformers_model)

Shared, not copied: the embedding, which is the head too, every norm, o_proj and down_proj. The
products that this project fuses are copied, q, k and v to qkv_proj, gate and up to gate_up_proj:
2 * (heads + 2 * kv heads) * head_dim * hidden + 4 * ffn * hidden bytes a layer in 16 bits, which of
Gemma 2B is 2.60 GB of 5.01. Where such tensors lie one behind the other already, they are shared.

transformers is not imported: the instance has all that is asked of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from gemma_fast.checkpoint.base import MULTIMODAL_PREFIX, NOT_TEXT, TIED_HEAD
from gemma_fast.checkpoint.config_files import config_from_json
from gemma_fast.config import GemmaConfig
from gemma_fast.engine.request import GenerationConfig
from gemma_fast.load import pick_device, refuse_head_dim, refuse_overflow
from gemma_fast.memory import out_of_memory

if TYPE_CHECKING:
    from gemma_fast.causal_lm import GemmaForCausalLM

    Model = TypeVar("Model", bound=GemmaForCausalLM)

CLASSES = (
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build_from_transformers(cls: type[Model], source: nn.Module) -> Model:
    """The same text model on the same device, in the same dtype, with its generation_config.

    A change of shared weights in place is seen by both models, one of q, k, v, gate or up is not:
    build anew after training. Moving or converting either model ends the sharing.

    ValueError: another class than CLASSES, a variant that this model does not compute, weights that
    are quantized, wrapped by an adapter, not all there, on several devices or in several dtypes, or
    an lm_head of its own.
    """
    config = _read_config(source)
    weights = _read_weights(source, config)
    first = weights["model.embed_tokens.weight"]
    device = pick_device(first.device, None)
    refuse_overflow(config, first.dtype)
    refuse_head_dim(config, device)
    with torch.device("meta"):
        model = cls(config)
    model.embed_tokens, model.norm = _fused([first]), _fused([weights["model.norm.weight"]])
    with out_of_memory("the copies of fused weights", 0, device, "from_pretrained"):
        for layer in model.layers:
            for name, parts in layer.parts.items():
                if parts:
                    setattr(layer, name, _fused([weights[part] for part in parts]))
    generation = getattr(source, "generation_config", None)
    given = generation.to_dict() if generation is not None else {}
    model.generation_config = GenerationConfig({k: v for k, v in given.items() if v is not None})
    return model


def _read_config(source: nn.Module) -> GemmaConfig:
    kind = type(source).__name__
    if kind.startswith("Peft"):
        raise ValueError(
            f"{kind}: an adapter is not read; pass what model.merge_and_unload() gives"
        )
    if kind not in CLASSES or not hasattr(source.config, "to_dict"):
        raise ValueError(f"{kind} is none of transformers' {', '.join(CLASSES)}")
    try:
        return config_from_json(source.config.to_dict())  # type: ignore[union-attr, operator]
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from error


def _read_weights(source: nn.Module, config: GemmaConfig) -> dict[str, Tensor]:
    """The text model's tensors under the checkpoint's names, all as the config asks for."""
    found, head = {}, None
    for stored_name, weight in source.named_parameters(remove_duplicate=False):
        if TIED_HEAD.match(stored_name):
            head = weight
        elif not NOT_TEXT.match(stored_name):
            found[MULTIMODAL_PREFIX.sub("model.", stored_name)] = weight
    expected = config.tensor_shapes()
    for name in found:
        if name not in expected:
            way_out = "an adapter must be merged first (merge_and_unload)" if "lora" in name else ""
            raise ValueError(f"parameter {name} is unknown to the config; {way_out}".rstrip("; "))
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"parameter {name} is missing: only plain, unfused weights are read")
        _check_weight(name, found[name], shape)
    embedding = found["model.embed_tokens.weight"]
    if head is not None and head.data_ptr() != embedding.data_ptr():
        raise ValueError("lm_head has weights of its own: only one tied to embed_tokens is read")
    for what in ("device", "dtype"):
        kinds = {getattr(weight, what): name for name, weight in found.items()}
        if len(kinds) > 1:
            places = ", ".join(f"{name} {kind}" for kind, name in kinds.items())
            raise ValueError(f"weights are of several {what}s, only one is supported: {places}")
    return {name: weight.detach() for name, weight in found.items()}


def _check_weight(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        raise ValueError(
            f"parameter {name} is a {type(weight).__name__} of {weight.dtype}: quantized and"
            " distributed weights are not read, only float32, bfloat16 and float16"
        )
    if weight.is_meta:
        raise ValueError(f"parameter {name} is on the meta device or offloaded: it has no data")
    if weight.shape != shape:
        raise ValueError(
            f"parameter {name} has shape {tuple(weight.shape)}, but the config asks for {shape}"
        )


def _fused(parts: Sequence[Tensor]) -> nn.Parameter:
    """The parts stacked along their first dimension: in place where they lie so, else a copy."""
    first, end = parts[0], parts[0].data_ptr()
    in_place = True
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        in_place &= same and part.is_contiguous() and part.data_ptr() == end
        end += part.nbytes
    if not in_place:
        return nn.Parameter(torch.cat(list(parts)), requires_grad=False)
    rows, rest = sum(len(part) for part in parts), first.shape[1:]
    strides = (math.prod(rest), *first.stride()[1:])
    whole = first.as_strided((rows, *rest), strides, first.storage_offset())
    return nn.Parameter(whole, requires_grad=False)
