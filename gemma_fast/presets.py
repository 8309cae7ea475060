"""`PRESETS`: the configs of the published sizes of Gemma 1 to 4, by name.

PRESETS["gemma-2b"]
"""

from __future__ import annotations

from typing import Any

from gemma_fast.config import FAMILIES, SHAPES, GemmaConfig, RopeParameters


def _preset(family: str, *shapes: int, **values: Any) -> GemmaConfig:
    values = {"query_pre_attn_scalar": 256} | FAMILIES[family] | values
    return GemmaConfig(model_type=family, **values | dict(zip(SHAPES, shapes, strict=True)))


_LONG = {"sliding_window": 1024, "full_rope": RopeParameters(1e6, "linear", 8.0)}
_SHORT = {"sliding_window": 512, "max_position_embeddings": 32768}
_GEMMA4 = {"final_logit_softcapping": 30.0}
_SMALL = _GEMMA4 | {"hidden_size_per_layer_input": 256}
_LARGE = _GEMMA4 | {
    "sliding_window": 1024, "max_position_embeddings": 262_144, "attention_k_eq_v": True,
}  # fmt: skip
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
    "gemma-4-e2b": _preset(
        "gemma4", 262_144, 1536, 35, 8, 1, 256, 6144, num_kv_shared_layers=20,
        use_double_wide_mlp=True, sliding_window_pattern=5, **_SMALL,
    ),
    "gemma-4-e4b": _preset(
        "gemma4", 262_144, 2560, 42, 8, 2, 256, 10240, num_kv_shared_layers=18, **_SMALL
    ),
    "gemma-4-12b": _preset(
        "gemma4", 262_144, 3840, 48, 16, 8, 256, 15360, num_global_key_value_heads=1, **_LARGE
    ),
    "gemma-4-26b-a4b": _preset(
        "gemma4", 262_144, 2816, 30, 16, 8, 256, 2112, num_global_key_value_heads=2,
        num_experts=128, top_k_experts=8, moe_intermediate_size=704, **_LARGE,
    ),
    "gemma-4-31b": _preset(
        "gemma4", 262_144, 5376, 60, 32, 16, 256, 21504, num_global_key_value_heads=4, **_LARGE
    ),
}  # fmt: skip
