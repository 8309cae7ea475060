"""Reads quantization_config in config.json, which says how compressed-tensors stored the weights.
Refuses the methods of other libraries, and says what to use for them.

The input is untrusted. `targets` and `ignore` are not read: they may contain regular expressions,
which can take forever. A weight's own tensors say whether it is quantized, and their names, shapes
and dtypes say which of the config's groups it belongs to, see compressed.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from gemma_fast.checkpoint.rope_fields import USE_HF

METHOD = "compressed-tensors"
NO_HF = "use an unquantized or .gguf file of the model, or vLLM"
WAYS_OUT = {
    **dict.fromkeys(("bitsandbytes", "torchao", "gptq", "awq", "fp8"), USE_HF),
    "modelopt": NO_HF,
    "gemma": "use the model's -qat-q4_0-gguf or -qat-w4a16-ct files, or transformers",
}
OTHER_WAY_OUT = f"{USE_HF}, or use an unquantized or .gguf file"
# Tensors that only other methods write, for files whose config.json does not name the method.
MARKERS = {
    "bitsandbytes": r"(?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__\w+|SCB",
    "torchao": r"_weight_(?:qdata|scale|zero_point)",
    "gptq or awq": r"qweight|qzeros",
    "modelopt": r"weight_scale_2",
    "fp8": r"weight_scale_inv",
    "gemma": r"embedding_(?:quantized|scale)|(?:in|out)put_activation_scale",
}
_MARKERS = {method: re.compile(rf"(?:.+\.)?(?:{suffixes})") for method, suffixes in MARKERS.items()}
# Format and type of the weights → numbers of bits.
FORMATS = {
    ("pack-quantized", "int"): (4, 8),
    ("int-quantized", "int"): (4, 8),
    ("float-quantized", "float"): (8,),
    ("nvfp4-pack-quantized", "float"): (4,),
    ("mxfp4-pack-quantized", "float"): (4,),
    ("mxfp8-quantized", "float"): (8,),
}
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block", None)
MAX_GROUPS = 64  # each weight is compared with each group
IGNORED = {
    "quant_method", "ignore", "quantization_status", "global_compression_ratio", "version",
    "run_compressed", "dequantize", "use_optimized_inference", "moe_sparsity_config",
}  # fmt: skip
APPLIED = {"config_groups", "format", "kv_cache_scheme", "sparsity_config", "transform_config"}
GROUP_FIELDS = {"targets", "weights", "input_activations", "output_activations", "format"}
WEIGHT_FIELDS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic",
    "actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip


class Scheme(NamedTuple):
    """How the weights of a config group are stored."""

    format: str  # a name of compressed-tensors
    bits: int
    symmetric: bool  # whether there are no zero points
    block: tuple[int, int]  # rows and columns that share a scale; 0: all


class Quantization(NamedTuple):
    """Content of quantization_config in config.json."""

    schemes: tuple[Scheme, ...] = ()
    computed: tuple[str, ...] = ()  # what the file's scheme quantizes while the model runs


def quantization_of(config: Mapping[str, Any], source: str) -> Quantization | None:
    """Returns the quantization of a config.json's content, or None if it has none.

    Raises ValueError for methods, formats and options that are not supported. The message does not
    name `source`; warnings do.
    """
    given, text = config.get("quantization_config"), config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    if None not in (given, inner) and given != inner:
        raise ValueError("quantization_config differs from that in text_config: remove one of them")
    given = inner if given is None else given
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"quantization_config={given!r:.60} must be a JSON object")
    if (method := given.get("quant_method")) != METHOD:
        raise refusal(f"quantization_config: quant_method {method!r:.60}", str(method))
    for name in ("sparsity_config", "transform_config"):
        value = given.get(name)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise ValueError(
                f"quantization_config.{name}={value!r:.60} is not supported: {OTHER_WAY_OUT}"
            )
    for name in given.keys() - IGNORED - APPLIED:
        warnings.warn(
            f"{source}: quantization_config.{name:.60} is unknown and has no effect", stacklevel=2
        )
    groups = given.get("config_groups") or {}
    if not isinstance(groups, Mapping) or len(groups) > MAX_GROUPS:
        raise ValueError(
            f"quantization_config.config_groups={groups!r:.60} must be a JSON object with at most"
            f" {MAX_GROUPS} groups"
        )
    schemes = [_scheme(str(name), group, given.get("format")) for name, group in groups.items()]
    computed = _activations(groups.values())
    if given.get("kv_cache_scheme") is not None:
        computed.append("the KV cache")
    known = dict.fromkeys(scheme for scheme in schemes if scheme is not None)
    return Quantization(tuple(known), tuple(computed))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json without quantization_config."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    return plain


def refusal(what: str, method: str) -> ValueError:
    """Returns the error for a file that another method has quantized."""
    return ValueError(f"{what} is not supported, only {METHOD}: {_way_out(method)}")


def other_method(tensor: str) -> str | None:
    """Returns the name of the method that writes tensors of this name, or None."""
    return next((name for name, marker in _MARKERS.items() if marker.fullmatch(tensor)), None)


def _way_out(method: str) -> str:
    return WAYS_OUT.get(method.partition(" ")[0], OTHER_WAY_OUT)


def _activations(groups: Any) -> list[str]:
    """Returns what the groups quantize besides weights, for a warning."""
    for group in groups:
        for kind in ("input_activations", "output_activations"):
            if (given := group.get(kind)) is not None:
                bits = given.get("num_bits", 8) if isinstance(given, Mapping) else given
                return [f"activations (to {bits!r:.20} bits)"]
    return []


def _scheme(name: str, group: Any, default_format: Any) -> Scheme | None:
    """Returns the scheme of a group, or None if the group does not quantize weights."""
    where = f"quantization_config.config_groups.{name:.60}"
    if not isinstance(group, Mapping):
        raise ValueError(f"{where}={group!r:.60} must be a JSON object: write the scheme out")
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise ValueError(f"{where}.weights={weights!r:.60} must be a JSON object")
    for fields, known in ((group, GROUP_FIELDS), (weights, WEIGHT_FIELDS)):
        if unknown := sorted(fields.keys() - known):
            raise ValueError(f"{where}: the field {unknown[0]!r:.60} is unknown: {OTHER_WAY_OUT}")
    bits, kind = weights.get("num_bits", 8), str(weights.get("type", "int")).lower()
    stored = str(group.get("format") or default_format)
    if stored == "naive-quantized":
        stored = f"{kind}-quantized"
    block = _block(weights)
    symmetric = weights.get("symmetric", True)
    packs_zeros = stored == "pack-quantized" and not symmetric
    supported = {
        "dynamic": (False, None),
        "actorder": (False, None, "weight", "static"),
        "symmetric": (True, False) if kind == "int" else (True,),
        "strategy": ("channel", "group", None) if packs_zeros else STRATEGIES,
    }
    wrong = [f for f, values in supported.items() if weights.get(f, values[0]) not in values]
    if type(bits) is not int or bits not in FORMATS.get((stored, kind), ()):
        wrong.append("format")
    if block is None or wrong:
        field, given = (*wrong, "strategy")[0], {"format": stored, **weights}
        raise ValueError(
            f"{where}: {field}={given.get(field)!r:.60} is not supported in {given!r:.400}:"
            f" {OTHER_WAY_OUT}"
        )
    return Scheme(stored, bits, bool(symmetric), block)


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the numbers of rows and columns that share a scale; 0: all. None: invalid."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy in ("tensor", "channel"):
        return (0, 0) if strategy == "tensor" else (1, 0)
    block = weights.get("block_structure") if strategy == "block" else [1, size]
    if isinstance(block, str) and (match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", block)):
        block = [int(match[1]), int(match[2])]  # written by old releases
    if not isinstance(block, list) or len(block) != 2:
        return None
    rows, columns = block
    return (rows, columns) if all(type(x) is int and x > 0 for x in block) else None
