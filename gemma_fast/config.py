"""`GemmaConfig` is one frozen dataclass for Gemma 1, 2 and 3 (the text model).

    PRESETS["gemma-2b"]  # one of ten published sizes

The field names are those of transformers. Creating a config checks the range of every field, so
that a damaged config cannot cause a huge allocation. A value out of range raises ValueError, which
names the field, the value and the allowed range. checkpoint/config_json.py and config_gguf.py read
config files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from typing import Any, NamedTuple

SLIDING, FULL = "sliding_attention", "full_attention"

INT_RANGES = {
    "vocab_size": (1, 1 << 20),
    "hidden_size": (1, 1 << 16),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 512),
    "num_key_value_heads": (1, 512),
    "head_dim": (2, 1024),
    "intermediate_size": (1, 1 << 18),
    "max_position_embeddings": (1, 1 << 24),
    "sliding_window": (1, 1 << 24),
    "sliding_window_pattern": (1, 512),
    "bos_token_id": (0, 1 << 20),
    "pad_token_id": (0, 1 << 20),
    "eos_token_id": (0, 1 << 20),
}
FLOAT_RANGES = {
    "query_pre_attn_scalar": (1e-3, 1e6),
    "rms_norm_eps": (1e-12, 1e-1),
    "attn_logit_softcapping": (1e-3, 1e6),
    "final_logit_softcapping": (1e-3, 1e6),
}
ROPE_RANGES = {
    "rope_theta": (1.0, 1e12),
    "factor": (1e-3, 1e4),
    "original_max_position_embeddings": (1, 1 << 24),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
}


class RopeParameters(NamedTuple):
    """Rotary parameters of the layers of one type. The names are those of transformers.

    default  position p rotates channel pair i by the angle p * rope_theta^(-2i / head_dim)
    linear   divides every angle by `factor`
    yarn     divides the angles of slow pairs by `factor`, keeps those of fast pairs, and
             interpolates between them (Peng et al. 2023). The bounds are the pairs that rotate
             `beta_slow` and `beta_fast` times within `original_max_position_embeddings` positions;
             with `truncate` they are rounded outwards to whole pairs. cos and sin are multiplied by
             `attention_factor`.
    """

    rope_theta: float = 1e4
    rope_type: str = "default"  # "default" | "linear" | "yarn"
    factor: float = 1.0
    original_max_position_embeddings: int = 1
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


DEFAULT_ROPE = RopeParameters()
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"max_position_embeddings": 8192},
    "gemma2": {
        "max_position_embeddings": 8192, "sliding_window": 4096, "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "max_position_embeddings": 131_072, "sliding_window": 4096, "sliding_window_pattern": 6,
        "full_rope": RopeParameters(1e6),
    },
}  # fmt: skip
SHAPES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Config of one Gemma model; `model_type` is its family: Gemma 1, 2 or 3.

    The families differ in structure as follows. Gemma 2 has soft caps (`…_softcapping`). Gemma 2
    and 3 have layers with a sliding window and layers with full attention (`layer_types`), and
    normalize the outputs of attention and MLP (`post_norms`). Gemma 3 also normalizes queries and
    keys (`qk_norm`). Its layers with a window have rotary parameters of their own (`sliding_rope`).
    """

    model_type: str  # "gemma" | "gemma2" | "gemma3"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    query_pre_attn_scalar: float  # scores are multiplied by query_pre_attn_scalar ** -0.5
    rms_norm_eps: float = 1e-6
    full_rope: RopeParameters = DEFAULT_ROPE  # rotary parameters of full layers
    sliding_rope: RopeParameters = DEFAULT_ROPE  # rotary parameters of windowed layers
    sliding_window: int | None = None  # keys that a token sees on windowed layers, its own included
    layer_types: tuple[str, ...] = ()
    sliding_window_pattern: InitVar[int | None] = None  # n: every nth layer is full
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True  # False: the output projection has a weight of its own
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1  # (): no token ends a text
    pad_token_id: int = 0

    def __post_init__(self, sliding_window_pattern: int | None) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {self.model_type!r:.80} is not one of {', '.join(FAMILIES)}"
            )
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        _check_ranges(values | {"sliding_window_pattern": sliding_window_pattern})
        for name in ("full_rope", "sliding_rope"):
            _check_rope(name, values[name])
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings={self.tie_word_embeddings!r} must be a bool")
        if not isinstance(self.layer_types, tuple):
            raise ValueError(f"layer_types={self.layer_types!r:.80} must be a tuple (JSON: a list)")
        if not self.layer_types:
            pattern = sliding_window_pattern or 1
            kinds = [SLIDING if i % pattern else FULL for i in range(1, self.num_hidden_layers + 1)]
            object.__setattr__(self, "layer_types", tuple(kinds))
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, but "
                f"num_hidden_layers={self.num_hidden_layers!r}"
            )
        if unknown := {str(kind) for kind in self.layer_types} - {SLIDING, FULL}:
            raise ValueError(
                f"layer_types has {sorted(unknown)!s:.80}: use only {SLIDING} and {FULL}"
            )
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise ValueError(f"layer_types has {SLIDING}, but sliding_window is not set")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads!r} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads!r}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim!r} is odd: rotary embedding needs pairs")

    @property
    def post_norms(self) -> bool:
        """Whether the outputs of attention and MLP are normalized before the residual addition."""
        return self.model_type != "gemma"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized over head_dim before the rotary embedding."""
        return self.model_type == "gemma3"

    def rope(self, kind: str) -> RopeParameters:
        """Returns the rotary parameters of layers of this type."""
        return self.full_rope if kind == FULL else self.sliding_rope

    def window(self, layer: int) -> int | None:
        """Returns how many keys a token sees on this layer, its own included; None on a full layer,
        where it sees its own key and all earlier ones."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns name → shape of the checkpoint's tensors, in the order in which they are used."""
        hidden, ffn, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        if self.post_norms:
            layer |= {f"{side}_feedforward_layernorm": (hidden,) for side in ("pre", "post")}
        if self.qk_norm:
            layer |= {f"self_attn.{x}_norm": (d,) for x in "qk"}
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def _check_ranges(values: Mapping[str, Any]) -> None:
    for name, (low, high) in (INT_RANGES | FLOAT_RANGES).items():
        given = values[name]
        if given is None and name.endswith(("softcapping", "window", "pattern")):
            continue
        several = name == "eos_token_id" and isinstance(given, tuple)
        for value in given if several else [given]:
            check_number(name, value, low, high, whole=name in INT_RANGES)


def _check_rope(name: str, rope: RopeParameters) -> None:
    if not isinstance(rope, RopeParameters) or not isinstance(rope.truncate, bool):
        raise ValueError(f"{name}={rope!r} must be RopeParameters, with a bool for truncate")
    if rope.rope_type not in ("default", "linear", "yarn"):
        raise ValueError(f"{name}: rope_type={rope.rope_type!r} is not default, linear or yarn")
    for field, (low, high) in ROPE_RANGES.items():
        whole = field == "original_max_position_embeddings"
        check_number(f"{name}: {field}", getattr(rope, field), low, high, whole)


def check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    """Raises ValueError unless value is a number from low to high, and an integer if `whole`."""
    kinds, kind = ((int,), "an integer") if whole else ((int, float), "a number")
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not (number and low <= value <= high):
        raise ValueError(f"{name}={value!r:.80} must be {kind} from {low:g} to {high:g}")


def _preset(family: str, *shapes: int, **values: Any) -> GemmaConfig:
    values = FAMILIES[family] | {"query_pre_attn_scalar": 256} | values
    return GemmaConfig(model_type=family, **values | dict(zip(SHAPES, shapes, strict=True)))


_LONG = {"sliding_window": 1024, "full_rope": RopeParameters(1e6, "linear", 8.0)}
_SHORT = {"sliding_window": 512, "max_position_embeddings": 32768}
PRESETS = {
    "gemma-2b": _preset("gemma", 256_000, 2048, 18, 8, 1, 256, 16384),
    "gemma-7b": _preset("gemma", 256_000, 3072, 28, 16, 16, 256, 24576),
    "gemma-2-2b": _preset("gemma2", 256_000, 2304, 26, 8, 4, 256, 9216),
    "gemma-2-9b": _preset("gemma2", 256_000, 3584, 42, 16, 8, 256, 14336),
    "gemma-2-27b": _preset(
        "gemma2", 256_000, 4608, 46, 32, 16, 128, 36864, query_pre_attn_scalar=144
    ),
    "gemma-3-270m": _preset("gemma3", 262_144, 640, 18, 4, 1, 256, 2048, **_SHORT),
    "gemma-3-1b": _preset("gemma3", 262_144, 1152, 26, 4, 1, 256, 6912, **_SHORT),
    "gemma-3-4b": _preset("gemma3", 262_208, 2560, 34, 8, 4, 256, 10240, **_LONG),
    "gemma-3-12b": _preset("gemma3", 262_208, 3840, 48, 16, 8, 256, 15360, **_LONG),
    "gemma-3-27b": _preset(
        "gemma3", 262_208, 5376, 62, 32, 16, 128, 21504, query_pre_attn_scalar=168, **_LONG
    ),
}
