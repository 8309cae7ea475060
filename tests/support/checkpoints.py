"""Writes tiny random checkpoints of each family, as safetensors or GGUF files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.config_json import config_from_json
from gemma_fast.config import FULL, SLIDING, GemmaConfig

FAMILIES = ("gemma", "gemma2", "gemma3")
ALL_FAMILIES = (*FAMILIES, "gemma4")
SIZES = {
    "vocab_size": 12,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
}
# Layers of both types with keys and values of their own, and two that read those of the first two.
GEMMA_4 = {
    "num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True, "num_key_value_heads": 2, "num_global_key_value_heads": 1,
    "attention_k_eq_v": True, "global_head_dim": 64, "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 12,
}  # fmt: skip


# With a mixture of experts in each layer.
EXPERTS = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
}  # fmt: skip
EXPERT = re.compile(r"(.+\.experts)\.\d+\.(\w+_proj)\.weight")


def config_json(family: str, **sizes: Any) -> dict:
    kind = family + ("_text" if family in ("gemma3", "gemma4") else "")
    shapes = SIZES | (GEMMA_4 if family == "gemma4" else {})
    return {"model_type": kind, "sliding_window": 8} | shapes | sizes


def random_tensors(family: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in config_from_json(config_json(family, **sizes)).tensor_shapes().items()
    }


def stacked(tensors: dict[str, Tensor], separate: bool = False) -> dict[str, Tensor]:
    """Returns the tensors as transformers saves them: the matrices of all experts of a layer are
    one tensor for gate and up, and one for down. separate: gate and up in two, as GGUF allows"""
    found: dict[str, Tensor] = {}
    matrices: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if match := EXPERT.fullmatch(name):
            matrices.setdefault(f"{match[1]}.{match[2]}", []).append(tensor)
        else:
            found[name] = tensor
    found |= {name: torch.stack(experts) for name, experts in matrices.items()}
    for gate in [name for name in matrices if name.endswith("gate_proj") and not separate]:
        both = found.pop(gate), found.pop(gate.replace("gate_proj", "up_proj"))
        found[gate.replace("gate_proj", "gate_up_proj")] = torch.cat(both, dim=1)
    return found


def unstacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with one for each matrix of an expert: the inverse of `stacked`."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, part = name.rpartition(".")
        if not prefix.endswith(".experts"):
            found[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        for i, expert in enumerate(tensor):
            matrices = zip(parts, expert.chunk(len(parts)), strict=True)
            found |= {f"{prefix}.{i}.{part}.weight": matrix for part, matrix in matrices}
    return found


def write_safetensors(
    path: Path, family: str = "gemma3", tensors: dict[str, Tensor] | None = None, **sizes: Any
) -> dict[str, Tensor]:
    """Writes config.json and model.safetensors into the directory `path`. Returns the tensors."""
    tensors = tensors or random_tensors(family, **sizes)
    (path / "config.json").write_text(json.dumps(config_json(family, **sizes)))
    save_file(tensors, path / "model.safetensors")
    return tensors


def split(path: Path, tensors: dict[str, Tensor], shards: int = 2) -> dict[str, str]:
    """Replaces model.safetensors by shards and an index. Returns the weight map of the index."""
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_index(path, weight_map)
    return weight_map


def write_index(path: Path, weight_map: object) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_gguf(
    path: Path,
    family: str = "gemma3",
    tensors: dict[str, Tensor] | None = None,
    *,
    quantize: Callable[[Tensor], tuple[np.ndarray, Type]] = lambda t: (t.numpy(), Type.F32),
    stored: dict[str, tuple[np.ndarray, Type]] | None = None,
    extra: dict[str, np.ndarray | None] | None = None,
    keys: dict[str, int] | None = None,
    separate: bool = False,
    **sizes: Any,
) -> dict[str, Tensor]:
    """Writes a GGUF file as llama.cpp does: the names come from the gguf package, and norm weights
    are in F32, with 1 added (except Gemma 4's). Tensors in `extra` are written under their own
    names; None: the tensor is left out. `keys` are further metadata. `stored` replaces what is
    written for tensors, by their names in transformers, those of `stacked` for experts; there,
    separate is explained. Returns the unquantized tensors, one for each matrix of an expert."""
    config = config_from_json(config_json(family, **sizes))
    tensors = tensors or random_tensors(family, **sizes)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, family)
    write_metadata(writer, config)
    for key, value in (keys or {}).items():
        writer.add_uint16(key, value)
    written: dict[str, tuple[np.ndarray, Type | None] | None] = {}
    for name, tensor in stacked(tensors, separate).items():
        factor = (tensor.float() + config.norm_offset).numpy()
        default = (factor, Type.F32) if tensor.dim() == 1 else quantize(tensor)
        written[gguf_name(names, name)] = (stored or {}).get(name, default)
    factors = {"rope_freqs.weight": rope_factors(config)} if family == "gemma4" else {}
    for stored_name, data in (factors | (extra or {})).items():
        written[stored_name] = None if data is None else (data, None)
    for stored_name, content in written.items():
        if content is not None:
            writer.add_tensor(stored_name, content[0], raw_dtype=content[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def gguf_name(names: gguf.TensorNameMap, name: str) -> str:
    """Returns the name under which llama.cpp stores a tensor of transformers."""
    layer, _, part = name.partition(".router.")
    if part.endswith("scale"):  # not in the map of the gguf package
        tensor = {"scale": "ffn_gate_inp", "per_expert_scale": "ffn_down_exps"}[part]
        return f"blk.{layer.rpartition('.')[2]}.{tensor}.scale"
    stored = names.get_name(name.removesuffix(".weight") + ".weight", try_suffixes=(".weight",))
    if stored is None:  # all experts' gate_proj or up_proj
        layer, _, part = name.partition(".experts.")
        stored = f"blk.{layer.rpartition('.')[2]}.ffn_{part.removesuffix('_proj')}_exps.weight"
    return stored


def rope_factors(config: GemmaConfig) -> np.ndarray:
    """Returns the divisors of the rotary frequencies of Gemma 4's full layers."""
    pairs = config.head_dim_of(FULL) // 2
    turning = int(config.full_rope.partial_rotary_factor * pairs)
    return np.array([1] * turning + [1e30] * (pairs - turning), np.float32)


def write_metadata(writer: gguf.GGUFWriter, config: GemmaConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gemma4":
        write_metadata_of_layers(writer, config)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(8)
    writer.add_rope_freq_base(1e4)
    writer.add_token_list([f"▁tokén {i}" for i in range(config.vocab_size)])
    writer.add_token_scores([-float(i) for i in range(config.vocab_size)])
    writer.add_add_bos_token(True)


def write_metadata_of_layers(writer: gguf.GGUFWriter, config: GemmaConfig) -> None:
    layers, full = config.layers, config.head_dim_of(FULL)
    writer.add_feed_forward_length([layer.intermediate_size for layer in layers])
    writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
    writer.add_sliding_window_pattern([layer.kind == SLIDING for layer in layers])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(full)
    for add in (
        writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa
    ):  # fmt: skip
        add(config.head_dim)
    writer.add_rope_freq_base_swa(1e4)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def read(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(checkpoint.shapes[name], torch.nan, dtype=dtype)
    checkpoint.copy(name, out)
    return out


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, Tensor], atol: float = 0.0) -> None:
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        torch.testing.assert_close(read(checkpoint, name), tensor.float(), rtol=0, atol=atol)
