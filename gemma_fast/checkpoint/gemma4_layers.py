"""Converts the fields of a Gemma 4 config.json that say what differs between its layers, and those
of its mixture of experts.

The files on the hub have `global_head_dim` and `num_global_key_value_heads`. transformers 5.24
saves `per_layer_config` instead: an object for each layer whose shape is not that of the config,
under the layer's index ("05" or "5"). Where it is present, transformers ignores the other two.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_fast.config import FULL, SLIDING
from gemma_fast.ranges import INT_RANGES, check_number

SHAPE = ("head_dim", "num_key_value_heads")  # what an object of per_layer_config can change
FULL_SHAPE = ("global_head_dim", "num_global_key_value_heads")  # the same, of full layers
EXPERTS = "num_experts", "top_k_experts", "moe_intermediate_size"
INDEX = re.compile(r"\d{1,3}", re.ASCII)


def layer_fields(read: Mapping[str, Any], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the layer types and the shapes of both types, as fields of GemmaConfig.

    read    the applied fields of config.json
    values  the fields of GemmaConfig, with defaults
    Raises ValueError if layers of one type have different shapes. Warnings name `source`.
    """
    layers = values["num_hidden_layers"]
    check_number("num_hidden_layers", layers, *INT_RANGES["num_hidden_layers"], whole=True)
    kinds = _layer_types(values, source)
    found: dict[str, Any] = {"layer_types": kinds}
    shape, full = [values[name] for name in SHAPE], [values.get(name) for name in FULL_SHAPE]
    if "per_layer_config" in read:
        shapes = _shapes(read["per_layer_config"], kinds, values)
        full = shapes.get(FULL, shape)
        shape = shapes.get(SLIDING, shape)
        found |= zip(SHAPE, shape, strict=True)
    elif values.get("attention_k_eq_v") is not True:
        full[1] = None  # transformers reads the field only for layers whose values are the keys
    for name, general, special in zip(FULL_SHAPE, shape, full, strict=True):
        found[name] = None if special == general else special
    if values.get("vocab_size_per_layer_input") == values["vocab_size"] or not values.get(
        "hidden_size_per_layer_input"
    ):
        found["vocab_size_per_layer_input"] = None
    return found


def expert_fields(read: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of GemmaConfig for a mixture of experts; {} if the model has none.

    read: the applied fields of config.json. Without enable_moe_block, transformers ignores the
    other fields. Raises ValueError if a field is missing or out of range.
    """
    enabled = read.get("enable_moe_block")
    if not isinstance(enabled, bool | None):
        raise ValueError(f"enable_moe_block={enabled!r:.60} must be true or false")
    if not enabled:
        return {}
    for name in EXPERTS:
        if read.get(name) is None:
            raise ValueError(f"{name} is missing, but enable_moe_block is true")
        check_number(name, read[name], 1, INT_RANGES[name][1], whole=True)
    return {name: read[name] for name in EXPERTS}


def _layer_types(values: Mapping[str, Any], source: str) -> tuple[Any, ...]:
    """Returns the type of each layer. The last layer is always full, as in transformers."""
    layers, pattern = values["num_hidden_layers"], values["sliding_window_pattern"]
    kinds = values.get("layer_types") or tuple(
        SLIDING if i % pattern else FULL for i in range(1, layers + 1)
    )
    if not isinstance(kinds, tuple) or len(kinds) != layers:
        raise ValueError(f"layer_types={kinds!r:.80} must be a list of {layers} layer types")
    if kinds[-1] != FULL:
        warnings.warn(
            f"{source}: the last layer has type {kinds[-1]!r:.40}; it is used as {FULL}, as in"
            " transformers",
            stacklevel=2,
        )
    return (*kinds[:-1], FULL)


def _shapes(given: Any, kinds: Sequence[Any], values: Mapping[str, Any]) -> dict[Any, list[Any]]:
    """Returns layer type → [head_dim, num_key_value_heads]."""
    objects = _objects(given, len(kinds))
    found: dict[Any, list[Any]] = {}
    for i, kind in enumerate(kinds):
        changed = objects.get(i, {})
        for name, value in changed.items():
            if name not in SHAPE and value != values.get(name) and (name, value) != ("skip", []):
                raise ValueError(
                    f"per_layer_config: {name:.40}={value!r:.60} of layer {i} is not supported,"
                    f" only {' and '.join(SHAPE)}: use transformers"
                )
        shape = [changed.get(name, values[name]) for name in SHAPE]
        if found.setdefault(str(kind), shape) != shape:
            raise ValueError(
                f"per_layer_config: layer {i} has {' and '.join(SHAPE)} {shape!r:.80}, but another"
                f" layer of type {kind} has {found[str(kind)]!r:.80}: layers of one type must have"
                " one shape here; use transformers"
            )
    return found


def _objects(given: Any, layers: int) -> dict[int, Mapping[str, Any]]:
    """Returns layer index → its object in per_layer_config."""
    if not isinstance(given, Mapping | None):
        raise ValueError(f"per_layer_config={given!r:.80} must be a JSON object")
    found: dict[int, Mapping[str, Any]] = {}
    for key, value in (given or {}).items():
        if not INDEX.fullmatch(str(key)) or int(key) >= layers or not isinstance(value, Mapping):
            raise ValueError(
                f"per_layer_config has {key!r:.40}: {value!r:.40}; it must have an object for the"
                f" index of a layer, from 0 to {layers - 1}"
            )
        found[int(key)] = value
    return found
