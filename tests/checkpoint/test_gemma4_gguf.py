"""Checks that GGUF files of Gemma 4 are read as llama.cpp reads them: shapes by layer, values that
are keys, rotary factors, and what is refused."""

import warnings
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from checkpoints import (
    GEMMA_4,
    assert_holds,
    random_tensors,
    rope_factors,
    write_gguf,
    write_safetensors,
)

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.config_gguf import IGNORED, config_from_gguf
from gemma_fast.checkpoint.gemma4_gguf import with_tensors
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.config import FULL, SLIDING, RopeParameters
from gemma_fast.presets import PRESETS

# As llama.cpp converts gemma-4-E2B.
E2B = {
    "general.architecture": "gemma4",
    "gemma4.context_length": 131_072,
    "gemma4.embedding_length": 1536,
    "gemma4.block_count": 35,
    "gemma4.feed_forward_length": [6144] * 15 + [12288] * 20,
    "gemma4.attention.head_count": 8,
    "gemma4.attention.head_count_kv": 1,
    "gemma4.attention.key_length": 512,
    "gemma4.attention.value_length": 512,
    "gemma4.attention.key_length_swa": 256,
    "gemma4.attention.value_length_swa": 256,
    "gemma4.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "gemma4.attention.sliding_window": 512,
    "gemma4.attention.sliding_window_pattern": ([True] * 4 + [False]) * 7,
    "gemma4.attention.shared_kv_layers": 20,
    "gemma4.embedding_length_per_layer_input": 256,
    "gemma4.final_logit_softcapping": 30.0,
    "gemma4.rope.freq_base": 1e6,
    "gemma4.rope.freq_base_swa": 1e4,
    "gemma4.rope.dimension_count": 512,
    "gemma4.rope.dimension_count_swa": 256,
    "tokenizer.ggml.tokens": ["x"] * 262_144,
}
EXPERTS = {"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 704}
QUARTER = np.array([1] * 64 + [1e30] * 192, np.float32)


def changed(change: dict) -> dict:
    return E2B | {f"gemma4.{key}": value for key, value in change.items()}


def metadata_of(name: str) -> dict:
    """Returns the metadata of the file that llama.cpp makes of a preset."""
    config = PRESETS[name]
    kv_heads = [layer.num_key_value_heads for layer in config.layers]
    return changed(
        {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": kv_heads if len(set(kv_heads)) > 1 else kv_heads[0],
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": [x == SLIDING for x in config.layer_types],
            "attention.shared_kv_layers": config.num_kv_shared_layers,
            "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
            **(EXPERTS if config.num_experts else {}),
        }
    )


def test_metadata_and_tensors_of_published_files_equal_the_presets():
    names = ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")
    for name, metadata in zip(names, [E2B, *map(metadata_of, names[1:])], strict=True):
        config = config_from_gguf(metadata)
        assert with_tensors(config, PRESETS[name].tensor_shapes(), QUARTER) == PRESETS[name]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"final_logit_softcapping": None}, {"final_logit_softcapping": 30.0}),  # the default
        ({"final_logit_softcapping": 0.0}, {"final_logit_softcapping": None}),
        ({"rope.freq_base_swa": None}, {"sliding_rope": RopeParameters(1e4)}),
        ({"rope.freq_base": 5e5}, {"full_rope": RopeParameters(5e5)}),
        ({"rope.scaling.factor": 8.0}, {"full_rope": RopeParameters(1e6, "linear", 8.0)}),
        ({"attention.value_length": None}, {"global_head_dim": 512, "head_dim": 256}),
        ({"attention.head_count_kv": None}, {"num_key_value_heads": 8}),
        ({"embedding_length_per_layer_input": None}, {"hidden_size_per_layer_input": 0}),
        ({"feed_forward_length": [6144] * 35}, {"use_double_wide_mlp": False}),
        ({"expert_count": 0, "expert_feed_forward_length": 704}, {"moe_intermediate_size": 0}),
        ({"expert_used_count": 8, "expert_feed_forward_length": 704}, {"num_experts": 0}),
        (EXPERTS, {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}),
        (
            {"attention.head_count_kv": ([4] * 4 + [2]) * 7},
            {"num_key_value_heads": 4, "num_global_key_value_heads": 2},
        ),
        (
            {"attention.sliding_window_pattern": [False] * 35, "attention.sliding_window": None},
            {"layer_types": (FULL,) * 35, "sliding_window": None},
        ),
        (
            {"attention.key_length_swa": 512, "attention.value_length_swa": 512,
             "rope.dimension_count_swa": 512},
            {"head_dim": 512, "global_head_dim": None},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_fields_are_read_from_gguf(change, expected):
    config = config_from_gguf(changed(change))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_count": 128}, "no gemma4.expert_used_count: convert"),
        (EXPERTS | {"expert_used_count": None}, "no gemma4.expert_used_count"),
        (EXPERTS | {"expert_feed_forward_length": None}, "no gemma4.expert_feed_forward_length"),
        (EXPERTS | {"expert_count": 1025}, "gemma4.expert_count=1025 must be an integer from 1"),
        (EXPERTS | {"expert_count": 1 << 40}, "gemma4.expert_count=1099511627776 must be"),
        (EXPERTS | {"expert_count": "128"}, "gemma4.expert_count='128' must be"),
        (EXPERTS | {"expert_count": [128] * 35}, r"gemma4.expert_count=\[128"),
        (EXPERTS | {"expert_used_count": 0}, "gemma4.expert_used_count=0 must be"),
        (EXPERTS | {"expert_used_count": 9, "expert_count": 8}, "experts=8 with top_k_experts=9"),
        (EXPERTS | {"expert_feed_forward_length": 1 << 40}, "feed_forward_length=10995116277"),
        ({"block_count": None}, "gemma4.block_count=None"),
        ({"block_count": 10**12}, "gemma4.block_count=1000000000000"),
        ({"attention.shared_kv_layers": 35}, "shared_kv_layers=35 must be an integer from 0 to 34"),
        ({"attention.shared_kv_layers": "20"}, "shared_kv_layers='20'"),
        ({"attention.sliding_window_pattern": None}, "pattern=None must be an array of 35 values"),
        ({"attention.sliding_window_pattern": 5}, "pattern=5 must be an array"),
        ({"attention.sliding_window_pattern": [True] * 34}, "must be an array of 35 values"),
        ({"attention.sliding_window": None}, "sliding_window is not set"),
        ({"attention.key_length": None}, "no gemma4.attention.key_length: convert"),
        ({"attention.key_length_swa": None}, "no gemma4.attention.key_length_swa"),
        ({"attention.value_length": 256}, "value_length=256 must equal gemma4.attention.key_leng"),
        ({"rope.dimension_count_swa": 64}, "rope.dimension_count_swa=64 must equal"),
        ({"attention.key_length": 1 << 40, "attention.value_length": None,
          "rope.dimension_count": None}, "global_head_dim=1099511627776"),
        ({"attention.head_count_kv": [1] * 34 + [2]}, "head_count_kv=2 of layer 34 is 1 in other"),
        ({"attention.head_count_kv": [1] * 34}, "must have a value for each layer"),
        ({"attention.head_count_kv": []}, "must have a value for each layer"),
        ({"attention.head_count_kv": 0}, "num_key_value_heads=0"),
        ({"attention.head_count_kv": ["1"] * 35}, "num_key_value_heads='1'"),
        ({"feed_forward_length": None}, "no gemma4.feed_forward_length"),
        ({"feed_forward_length": [6144] * 34 + [1]}, "feed_forward_length=1 of layer 34"),
        ({"feed_forward_length": [6144] * 15 + [9216] * 20}, "must be 6144, or twice as much"),
        ({"feed_forward_length": [1 << 40] * 35}, "intermediate_size=1099511627776"),
        ({"embedding_length_per_layer_input": -1}, "hidden_size_per_layer_input=-1"),
    ],
    ids=str,
)  # fmt: skip
def test_unsupported_metadata_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_gguf(changed(change))


KEYS = [
    key.removeprefix("{arch}.")
    for part in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
    for key in vars(part).values()
    if isinstance(key, str) and key.startswith("{arch}.")
]
NO_EFFECT = (*IGNORED, "attn_logit_softcapping", "expert_used_count", "expert_feed_forward_length")


@pytest.mark.parametrize("key", [key for key in KEYS if key not in NO_EFFECT])
def test_every_key_has_an_effect_or_is_refused_or_gives_a_warning(key):
    """Adds each key that the package gguf knows, with an odd value."""
    before = config_from_gguf(E2B)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if config_from_gguf(changed({key: 3})) != before:
                return
        except ValueError:
            return
    assert key in str(caught[-1].message)


def test_config_and_logits_equal_those_of_a_directory(tmp_path):
    full = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    rope = {FULL: full, SLIDING: {"rope_theta": 1e4}}
    tensors = write_gguf(tmp_path / "model.gguf", "gemma4")
    options = {"final_logit_softcapping": 30.0, "rope_parameters": rope}  # the file's metadata
    write_safetensors(tmp_path, "gemma4", tensors, **options)
    models = [
        GemmaForCausalLM.from_pretrained(path, device="cpu", dtype="float32")
        for path in (tmp_path / "model.gguf", tmp_path)
    ]
    assert models[0].config == models[1].config
    first, second = (model(torch.arange(12)[None]).logits for model in models)
    assert first.isfinite().all() and torch.equal(first, second)


def test_norms_are_read_as_they_are_stored(tmp_path):
    name = "model.layers.0.self_attn.q_norm.weight"
    tensors = random_tensors("gemma4")
    tensors[name] = torch.linspace(-1, 1, 32) * 1e-2  # subtracting and adding 1 would lose digits
    write_gguf(tmp_path / "model.gguf", "gemma4", tensors)
    assert_holds(open_checkpoint(tmp_path / "model.gguf"), tensors)


def test_values_of_their_own_are_read(tmp_path):
    options = {"attention_k_eq_v": False, "num_global_key_value_heads": None}
    tensors = write_gguf(tmp_path / "model.gguf", "gemma4", **options)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert not checkpoint.config.attention_k_eq_v
    assert_holds(checkpoint, tensors)


def test_full_layers_must_agree_on_their_values(tmp_path):
    sizes = GEMMA_4 | {"num_kv_shared_layers": 0, "use_double_wide_mlp": False}
    write_gguf(
        tmp_path / "model.gguf",
        "gemma4",
        extra={"blk.3.attn_v.weight": np.ones((64, 64), np.float32)},
        **sizes,
    )
    with pytest.raises(ValueError, match=r"model\.gguf: blk\.1 has no attn_v\.weight, but other"):
        open_checkpoint(tmp_path / "model.gguf")


def test_keys_and_values_that_no_layer_uses_are_ignored(tmp_path):
    extra = {f"blk.2.attn_{x}.weight": np.ones((64, 64), np.float32) for x in "kv"}
    extra |= {"blk.3.attn_k.weight": np.ones((64, 64), np.float32)}
    extra |= {f"blk.{i}.attn_k_norm.weight": np.ones(32, np.float32) for i in (2, 3)}
    tensors = write_gguf(tmp_path / "model.gguf", "gemma4", extra=extra)
    assert_holds(open_checkpoint(tmp_path / "model.gguf"), tensors)


@pytest.mark.parametrize("turning", [0, 1, 8, 31, 32])
def test_rope_factors_say_how_many_pairs_rotate(tmp_path, turning):
    factors = np.array([1] * turning + [1e30] * (32 - turning), np.float32)
    write_gguf(tmp_path / "model.gguf", "gemma4", extra={"rope_freqs.weight": factors})
    rope = open_checkpoint(tmp_path / "model.gguf").config.full_rope
    assert rope == RopeParameters(1e4, "proportional", partial_rotary_factor=turning / 32)


def test_the_share_stands_for_the_same_number_of_pairs_in_every_head_dim():
    base = config_from_gguf(E2B)
    for d in range(2, 1025, 14):
        config = replace(base, global_head_dim=d)
        for turning in range(d // 2 + 1):
            factors = np.array([1] * turning + [1e30] * (d // 2 - turning), np.float32)
            rope = with_tensors(config, [], factors).full_rope
            assert int(rope.partial_rotary_factor * d // 2) == turning


@pytest.mark.parametrize(
    "factors",
    [
        None,
        np.array([1] * 8 + [1e30] * 23, np.float32),
        np.array([1] * 8 + [1e30] * 25, np.float32),
        np.array([1e30] * 24 + [1] * 8, np.float32),
        np.array([1] * 8 + [2] * 24, np.float32),
        np.array([1] * 8 + [np.inf] * 24, np.float32),
        np.full(32, np.nan, np.float32),
        np.ones(32, np.int8),
        np.ones((1, 32), np.float32),
    ],
    ids=["none", "short", "long", "last", "others", "infinite", "nan", "int8", "matrix"],
)
def test_other_rope_factors_are_refused(tmp_path, factors):
    write_gguf(tmp_path / "model.gguf", "gemma4", extra={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"model\.gguf: .*rope_freqs\.weight"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.ffn_gate_shexp.weight", "blk.0.attn_q.scale", "blk.0.ffn_gate_up_exps.scale",
        "blk.0.layer_output_scale.bias", "blk.0.layer_output_scale.scale", "per_layer_token_embd",
    ],
)  # fmt: skip
def test_unknown_tensors_are_refused(tmp_path, name):
    extra = {name: np.ones(8, np.float32)}
    write_gguf(tmp_path / "model.gguf", "gemma4", extra=extra)
    with pytest.raises(ValueError, match=rf"{name} is unknown: gemma4 has no such tensor"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_missing_layer_scale_is_refused(tmp_path):
    tensors = random_tensors("gemma4")
    del tensors["model.layers.2.layer_scalar"]
    write_gguf(tmp_path / "model.gguf", "gemma4", tensors)
    with pytest.raises(ValueError, match=r"layers\.2\.layer_scalar is missing"):
        open_checkpoint(tmp_path / "model.gguf")


def test_rope_factors_are_those_of_the_published_models():
    assert np.array_equal(rope_factors(PRESETS["gemma-4-e2b"]), QUARTER)
