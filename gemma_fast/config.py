"""`GemmaConfig` is one frozen dataclass for Gemma 1 to 4 (the text model).

The field names are those of transformers. Creating a config checks the range of every field, so
that a damaged config cannot cause a huge allocation. A value out of range raises ValueError, which
names the field, the value and the allowed range (ranges.py). presets.py has the published sizes;
checkpoint/config_json.py and config_gguf.py read config files.
"""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

from gemma_fast.ranges import ROPE_RANGES, ROPE_TYPES, check_number, check_ranges

SLIDING, FULL = "sliding_attention", "full_attention"


class RopeParameters(NamedTuple):
    """Rotary parameters of the layers of one type. The names are those of transformers.

    default  position p rotates channel pair i by the angle p * rope_theta^(-2i / head_dim)
    linear   divides every angle by `factor`
    proportional  rotates the first `partial_rotary_factor` of the pairs, by the angles of linear
    yarn     divides the angles of slow pairs by `factor`, keeps those of fast pairs, and
             interpolates between them (Peng et al. 2023). The bounds are the pairs that rotate
             `beta_slow` and `beta_fast` times within `original_max_position_embeddings` positions;
             with `truncate` they are rounded outwards to whole pairs. cos and sin are multiplied by
             `attention_factor`.
    """

    rope_theta: float = 1e4
    rope_type: str = "default"  # "default" | "linear" | "proportional" | "yarn"
    factor: float = 1.0
    original_max_position_embeddings: int = 1
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    partial_rotary_factor: float = 1.0


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
    "gemma4": {
        "max_position_embeddings": 131_072, "sliding_window": 512, "sliding_window_pattern": 6,
        "full_rope": RopeParameters(1e6, "proportional", partial_rotary_factor=0.25),
        "query_pre_attn_scalar": 1, "global_head_dim": 512,
    },
}  # fmt: skip
SHAPES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size",
)  # fmt: skip


# Tensors of a layer whose names do not end in ".weight".
NO_SUFFIX = ("layer_scalar", "router.scale", "router.per_expert_scale")


class LayerShape(NamedTuple):
    """Shape of one layer: window, heads, MLP, and the layer whose keys and values it reads."""

    kind: str  # SLIDING | FULL
    window: int | None  # keys that a token sees, its own included; None: all earlier ones
    head_dim: int
    num_key_value_heads: int
    intermediate_size: int  # width of the MLP
    kv_layer: int  # the layer whose keys and values this layer reads: itself, or an earlier one
    k_eq_v: bool  # there is no v_proj: values are the output of k_proj


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Config of one Gemma model; `model_type` is its family: Gemma 1, 2, 3 or 4.

    The families differ in structure as follows. Gemma 2 has soft caps (`…_softcapping`). Gemma 2
    and 3 have layers with a sliding window and layers with full attention (`layer_types`), and
    normalize the outputs of attention and MLP (`post_norms`). Gemma 3 also normalizes queries and
    keys (`qk_norm`). Its layers with a window have rotary parameters of their own (`sliding_rope`).
    In Gemma 4 the layers have different shapes (`layers`), norms multiply by their weight instead
    of 1 + weight (`norm_offset`), values are normalized (`v_norm`), and each layer multiplies the
    residual stream by a number. Its small models have layers that read an earlier layer's keys and
    values (`num_kv_shared_layers`), and embeddings for each layer (`hidden_size_per_layer_input`).
    The 26B-A4B has a mixture of experts beside the MLP of each layer (`num_experts`).
    """

    model_type: str  # "gemma" | "gemma2" | "gemma3" | "gemma4"
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
    global_head_dim: int | None = None  # head dim of full layers; None: head_dim
    num_global_key_value_heads: int | None = None  # of full layers; None: num_key_value_heads
    attention_k_eq_v: bool = False  # full layers have no v_proj: values are the output of k_proj
    num_kv_shared_layers: int = 0  # the last layers, which read an earlier layer's K and V
    use_double_wide_mlp: bool = False  # the MLP of these layers has twice intermediate_size
    hidden_size_per_layer_input: int = 0  # width of the per-layer embeddings; 0: none
    vocab_size_per_layer_input: int | None = None  # their number; None: vocab_size
    num_experts: int = 0  # experts of each layer; 0: no mixture of experts
    top_k_experts: int = 0  # experts that a token uses on each layer
    moe_intermediate_size: int = 0  # width of an expert
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
        check_ranges(values | {"sliding_window_pattern": sliding_window_pattern})
        for name in ("full_rope", "sliding_rope"):
            _check_rope(name, values[name])
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
        own = self.num_hidden_layers - self.num_kv_shared_layers
        if missing := set(self.layer_types) - set(self.layer_types[: max(own, 0)]):
            raise ValueError(
                f"num_kv_shared_layers={self.num_kv_shared_layers!r} leaves no layer of type "
                f"{missing.pop()} whose keys and values are shared"
            )

    @property
    def post_norms(self) -> bool:
        """Whether the outputs of attention and MLP are normalized before the residual addition."""
        return self.model_type != "gemma"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized over head_dim before the rotary embedding."""
        return self.model_type in ("gemma3", "gemma4")

    @property
    def v_norm(self) -> bool:
        """Whether values are normalized over head_dim, without weights."""
        return self.model_type == "gemma4"

    @property
    def norm_offset(self) -> float:
        """The number that a norm adds to its weight: x / rms(x) * (norm_offset + weight)."""
        return 0.0 if self.model_type == "gemma4" else 1.0

    def rope(self, kind: str) -> RopeParameters:
        """Returns the rotary parameters of layers of this type."""
        return self.full_rope if kind == FULL else self.sliding_rope

    def head_dim_of(self, kind: str) -> int:
        """Returns the head dim of layers of this type."""
        return (self.global_head_dim if kind == FULL else None) or self.head_dim

    def window(self, layer: int) -> int | None:
        """Returns how many keys a token sees on this layer, its own included; None on a full layer,
        where it sees its own key and all earlier ones."""
        return self.layers[layer].window

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """The shape of each layer."""
        return _layers(self)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns name → shape of the checkpoint's tensors, in the order in which they are used.

        Each expert's matrices are tensors of their own, as in quantized files.
        """
        hidden, width = self.hidden_size, self.hidden_size_per_layer_input
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        if width:
            rows, columns = self.vocab_size_per_layer_input, self.num_hidden_layers * width
            shapes |= {
                "model.embed_tokens_per_layer.weight": (rows or self.vocab_size, columns),
                "model.per_layer_model_projection.weight": (columns, hidden),
                "model.per_layer_projection_norm.weight": (width,),
            }
        for i in range(self.num_hidden_layers):
            layer = self.layer_tensor_shapes(i)
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def layer_tensor_shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """Returns name → shape of the tensors of layer i, without the prefix "model.layers.i."."""
        layer, hidden, width = self.layers[i], self.hidden_size, self.hidden_size_per_layer_input
        ffn, d = layer.intermediate_size, layer.head_dim
        q, kv = self.num_attention_heads * d, layer.num_key_value_heads * d
        shapes: dict[str, tuple[int, ...]] = {
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
            shapes |= {f"{side}_feedforward_layernorm": (hidden,) for side in ("pre", "post")}
        if self.qk_norm:
            shapes |= {f"self_attn.{x}_norm": (d,) for x in "qk"}
        if width:
            shapes |= {
                "per_layer_input_gate": (width, hidden),
                "per_layer_projection": (hidden, width),
                "post_per_layer_input_norm": (hidden,),
            }
        if layer.k_eq_v:
            del shapes["self_attn.v_proj"]
        if layer.kv_layer != i:
            for name in ("k_proj", "v_proj", "k_norm"):
                shapes.pop(f"self_attn.{name}", None)
        if self.num_experts:
            shapes |= self._expert_tensor_shapes()
        if self.model_type == "gemma4":
            shapes["layer_scalar"] = (1,)
        return {
            name if name in NO_SUFFIX else f"{name}.weight": shape for name, shape in shapes.items()
        }

    def _expert_tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, ffn, experts = self.hidden_size, self.moe_intermediate_size, self.num_experts
        shapes: dict[str, tuple[int, ...]] = {
            "pre_feedforward_layernorm_2": (hidden,),
            "post_feedforward_layernorm_1": (hidden,),
            "post_feedforward_layernorm_2": (hidden,),
            "router.proj": (experts, hidden),
            "router.scale": (hidden,),
            "router.per_expert_scale": (experts,),
        }
        for i in range(experts):
            shapes |= {f"experts.{i}.{name}_proj": (ffn, hidden) for name in ("gate", "up")}
            shapes[f"experts.{i}.down_proj"] = hidden, ffn
        return shapes

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    @property
    def num_active_parameters(self) -> int:
        """Returns num_parameters without the experts that a token does not choose."""
        expert = 3 * self.moe_intermediate_size * self.hidden_size
        idle = (self.num_experts - self.top_k_experts) * self.num_hidden_layers
        return self.num_parameters - idle * expert


def _check_rope(name: str, rope: RopeParameters) -> None:
    if not isinstance(rope, RopeParameters) or not isinstance(rope.truncate, bool):
        raise ValueError(f"{name}={rope!r} must be RopeParameters, with a bool for truncate")
    if rope.rope_type not in ROPE_TYPES:
        raise ValueError(
            f"{name}: rope_type={rope.rope_type!r:.80} is not one of {', '.join(ROPE_TYPES)}"
        )
    for field, (low, high) in ROPE_RANGES.items():
        whole = field == "original_max_position_embeddings"
        check_number(f"{name}: {field}", getattr(rope, field), low, high, whole)


@lru_cache(maxsize=64)
def _layers(config: GemmaConfig) -> tuple[LayerShape, ...]:
    own = config.num_hidden_layers - config.num_kv_shared_layers
    newest = {kind: i for i, kind in enumerate(config.layer_types[:own])}
    layers = []
    for i, kind in enumerate(config.layer_types):
        full, shared = kind == FULL, i >= own
        kv_heads = config.num_global_key_value_heads if full else None
        double = config.use_double_wide_mlp and shared
        layers.append(
            LayerShape(
                kind=kind,
                window=None if full else config.sliding_window,
                head_dim=config.head_dim_of(kind),
                num_key_value_heads=kv_heads or config.num_key_value_heads,
                intermediate_size=config.intermediate_size * (2 if double else 1),
                kv_layer=newest[kind] if shared else i,
                k_eq_v=config.attention_k_eq_v and full,
            )
        )
    return tuple(layers)
