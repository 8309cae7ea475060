"""Converts the rotary fields of a config.json to RopeParameters, as transformers reads them.

transformers 5 writes `rope_parameters`, for Gemma 3 and 4 with one object per layer type.
transformers 4 wrote `rope_theta`, `rope_local_base_freq` and `rope_scaling`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_fast.config import FULL, SLIDING, RopeParameters
from gemma_fast.ranges import ROPE_RANGES, check_number

USE_HF = "load the model with transformers and call gemma_fast.hf.accelerate(model)"
THETAS = {"gemma": 1e4, "gemma2": 1e4, "gemma3": 1e6}  # default theta of full layers
LOCAL_THETA = 1e4  # default theta of Gemma 3's windowed layers
# rope_type → the keys of its object that are applied. transformers warns of other keys and ignores
# them. "dynamic" changes the angles of contexts above max_position_embeddings only.
KEYS = {
    "default": {"rope_theta"},
    "dynamic": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "yarn": {
        "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
        "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    },
}  # fmt: skip
KEYS_OF_GEMMA_4 = KEYS | {"proportional": {"rope_theta", "factor", "partial_rotary_factor"}}
ROUNDED = {"truncate": True}  # transformers ignores `truncate` in the object of a layer type
OTHER_KEYS = {"rope_type", "type", "partial_rotary_factor"}


def rope_of(
    read: Mapping[str, Any], family: str, context: int, kinds: Sequence[str] = (FULL, SLIDING)
) -> dict[str, RopeParameters]:
    """Returns the fields `full_rope` and `sliding_rope` of GemmaConfig; {}: the family's defaults.

    read     the applied fields of config.json
    context  max_position_embeddings, the default of YaRN's original context
    kinds    the types of the model's layers
    """
    if family == "gemma4":
        return _rope_of_gemma4(read, context, kinds)
    new, scaling = (_mapping(name, read.get(name)) for name in ("rope_parameters", "rope_scaling"))
    theta, per_type = read.get("rope_theta"), FULL in new or SLIDING in new
    theta = {"rope_theta": THETAS[family] if theta is None else theta}
    if family != "gemma3":
        if per_type:
            raise ValueError(f"rope_parameters={new!r:.80}: {family} has one object for all layers")
        context = read.get("original_max_position_embeddings") or context
        both = _parameters(theta | dict(scaling or new), context)
        return {"full_rope": both, "sliding_rope": both}
    if new and not per_type:
        raise ValueError(f"rope_parameters={new!r:.80} needs an object for {FULL} and {SLIDING}")
    full, local = (_mapping(f"rope_parameters.{k}", new.get(k)) for k in (FULL, SLIDING))
    if scaling.get("type") not in (None, (dict(full) | dict(scaling)).get("rope_type")):
        raise ValueError("rope_scaling has `type`, which transformers 5 ignores: write `rope_type`")
    local_theta = read.get("rope_local_base_freq")
    local_theta = {"rope_theta": LOCAL_THETA if local_theta is None else local_theta}
    return {
        "full_rope": _parameters(theta | dict(full) | dict(scaling) | ROUNDED, context),
        "sliding_rope": _parameters(local_theta | dict(local) | ROUNDED, context),
    }


def _rope_of_gemma4(
    read: Mapping[str, Any], context: int, kinds: Sequence[str]
) -> dict[str, RopeParameters]:
    """transformers requires an object for each layer type of the model, and `rope_theta` in it."""
    new = _mapping("rope_parameters", read.get("rope_parameters"))
    if read.get("rope_scaling") is not None:
        raise ValueError("rope_scaling is not supported for Gemma 4: write rope_parameters")
    if read.get("rope_parameters") is None:
        return {}
    found: dict[str, RopeParameters] = {}
    for kind, field in ((FULL, "full_rope"), (SLIDING, "sliding_rope")):
        given = dict(_mapping(f"rope_parameters.{kind}", new.get(kind)))
        if new.get(kind) is None and kind in kinds:
            raise ValueError(f"rope_parameters={new!r:.80} needs an object for {kind}")
        theta = read.get("rope_theta") if given.get("rope_theta") is None else given["rope_theta"]
        if theta is None and given:
            raise ValueError(f"rope_parameters.{kind}={given!r:.80} needs a rope_theta")
        given |= ({} if theta is None else {"rope_theta": theta}) | ROUNDED
        found[field] = _parameters(given, context, KEYS_OF_GEMMA_4)
    return found


def _parameters(
    given: Mapping[str, Any], context: int, keys: Mapping[str, set[str]] = KEYS
) -> RopeParameters:
    kind = given.get("rope_type", given.get("type")) or "default"
    if not isinstance(kind, str) or kind not in keys:
        raise ValueError(
            f"rope_type {kind!r:.60} is not supported, only {', '.join(keys)}: {USE_HF}"
        )
    if unknown := sorted(given.keys() - set().union(*keys.values()) - OTHER_KEYS):
        warnings.warn(f"config.json: rope parameter {unknown[0]!r:.60} has no effect", stacklevel=2)
    if given.get("partial_rotary_factor") not in (None, 1) and kind in ("linear", "yarn"):
        partial = given["partial_rotary_factor"]
        raise ValueError(f"partial_rotary_factor={partial!r} is not supported, only 1: {USE_HF}")
    values = {name: given[name] for name in keys[kind] if given.get(name) is not None}
    if kind in ("default", "dynamic"):
        return RopeParameters(**values)
    if kind == "linear" and "factor" not in values:
        raise ValueError("rope_type 'linear' needs a factor")
    if kind == "yarn":
        values = _complete_yarn(values, context)
    return RopeParameters(rope_type=kind, **values)


def _complete_yarn(values: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Fills in YaRN's original context, factor and attention factor, as transformers does."""
    values = {"original_max_position_embeddings": context} | dict(values)
    mscale, mscale_all_dim = (values.pop(name, 0) for name in ("mscale", "mscale_all_dim"))
    original = values["original_max_position_embeddings"]
    tokens = ROPE_RANGES["original_max_position_embeddings"]
    check_number("max_position_embeddings", context, *tokens, whole=True)
    check_number("original_max_position_embeddings", original, *tokens, whole=True)
    values.setdefault("factor", context / original)
    check_number("mscale", mscale, 0, 100)
    check_number("mscale_all_dim", mscale_all_dim, 0, 100)
    check_number("factor", values["factor"], *ROPE_RANGES["factor"])
    log = math.log(max(values["factor"], 1)) / 10
    if mscale and mscale_all_dim:
        attention_factor = (mscale * log + 1) / (mscale_all_dim * log + 1)
    else:
        attention_factor = log + 1
    return {"attention_factor": attention_factor} | values


def _mapping(name: str, given: Any) -> Mapping[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"{name}={given!r:.60} must be a JSON object")
    return given or {}
