"""Creates transformers' model of a GGUF file by llama.cpp's rules, to judge gemma_fast's reader.

This file shares no code with gemma_fast.checkpoint: it uses the package gguf directly.
transformers has a reader of its own (`gguf_file=`), which is not used: it does not know Gemma 1 and
does not read the rope scaling, the soft caps, the layer pattern and the 27B models' query scale.

The rules are those of llama.cpp: src/llama-model.cpp (load_hparams) and src/models/gemma.cpp,
gemma2.cpp and gemma3.cpp (load_arch_hparams, load_arch_tensors, graph). gguf_gemma4.py has those of
gemma4.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor

from gemma_fast.benchmarks.verify import gguf_gemma4

ARCHITECTURES = {
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "gemma4": gguf.MODEL_ARCH.GEMMA4,
}
FULL, SLIDING = gguf_gemma4.FULL, gguf_gemma4.SLIDING
BLOCK = 1 << 22  # elements that are dequantized at once
# Keys that llama.cpp reads and that transformers' Gemma cannot represent → the value without effect
REFUSED: dict[str, Any] = {
    "attention.causal": True, "expert_count": 0, "rope.scaling.attn_factor": 1.0,
}  # fmt: skip


class GGUFTruth:
    """Reads a GGUF file, or all parts of a split one, once. `model` creates a model in any dtype.

    An output.weight is the output head, in all families (llama.cpp expects it in Gemma 3 only).
    Raises ValueError for other tensors that llama.cpp does not know, for missing tensors, and for
    metadata that transformers' Gemma cannot represent.
    """

    def __init__(self, path: Path) -> None:
        readers = [gguf.GGUFReader(part) for part in parts(path)]
        self.metadata = {name: field.contents() for name, field in readers[0].fields.items()}
        self.tensors = {t.name: t for reader in readers for t in reader.tensors}

    def model(self, dtype: torch.dtype, device: torch.device | str) -> transformers.PreTrainedModel:
        tied, family = "output.weight" not in self.tensors, self.metadata["general.architecture"]
        vocab_size = self.tensors["token_embd.weight"].data.shape[0]
        config = config_of(self.metadata, vocab_size=vocab_size, tie_word_embeddings=tied)
        unused, optional = set(self.tensors), set[str]()
        if family == "gemma4":
            unused -= gguf_gemma4.read_tensors(config, self.tensors)
            optional = gguf_gemma4.OPTIONAL
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", experts_implementation="eager", dtype=dtype
            )
        names = gguf.get_tensor_name_map(ARCHITECTURES[family], config.num_hidden_layers)
        scalars = [x for x in model.named_buffers() if x[0].endswith(".layer_scalar")]
        for name, weight in (*model.named_parameters(), *scalars):
            known = f"{names.get_name(name.removesuffix('.weight'))}.weight"
            less = name.endswith("norm.weight") and family != "gemma4"
            for stored_name, part in gguf_gemma4.stored_parts(
                name, weight.data, known, self.tensors
            ).items():
                if stored_name in self.tensors:
                    copy(self.tensors[stored_name], part, less)
                elif name.split(".")[-1] in optional:
                    part.fill_(1)
                else:
                    raise ValueError(f"the file has no tensor {stored_name} for {name}")
                unused.discard(stored_name)
        if unused:
            raise ValueError(f"llama.cpp knows no tensor {min(unused)} in a Gemma model")
        return model.eval().requires_grad_(False)


def parts(path: Path) -> list[Path]:
    """Returns the files of a split model (NAME-00001-of-00003.gguf, …), or else the path."""
    whole, _, count = path.stem.rpartition("-of-")
    if not (whole.endswith("-00001") and count.isdecimal()):
        return [path]
    stem = whole.removesuffix("00001")
    return [path.with_name(f"{stem}{i + 1:05}-of-{count}.gguf") for i in range(int(count))]


def copy(tensor: gguf.ReaderTensor, out: Tensor, less: bool) -> None:
    """Dequantizes a tensor into `out`, which may be the matrices of all experts. less: subtract 1,
    because transformers' norms (except Gemma 4's) multiply by 1 + weight, and llama.cpp's by the
    stored weight."""
    matrices = out if out.ndim == 3 else [torch.atleast_2d(out)]
    rows, count = tensor.data.reshape(-1, tensor.data.shape[-1]), sum(map(len, matrices))
    if count != rows.shape[0]:
        raise ValueError(f"tensor {tensor.name} has {rows.shape[0]} rows, not {count}")
    start = 0
    for matrix in matrices:
        step = max(BLOCK // matrix.shape[1], 1)
        for i in range(0, len(matrix), step):
            block = rows[start + i : start + min(i + step, len(matrix))]
            values = torch.tensor(gguf.dequantize(block, tensor.tensor_type))
            matrix[i : i + step] = values.float() - 1 if less else values
        start += len(matrix)


def config_of(
    metadata: Mapping[str, Any], *, vocab_size: int, tie_word_embeddings: bool
) -> transformers.PreTrainedConfig:
    """Returns transformers' config of the model that llama.cpp builds from the metadata."""
    family = metadata["general.architecture"]
    if family not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture {family!r} is not one of {', '.join(ARCHITECTURES)}"
        )
    keys = {name.removeprefix(f"{family}."): value for name, value in metadata.items()}
    refuse(keys, {"expert_count"} if family == "gemma4" else set())
    sizes = {"vocab_size": vocab_size, "tie_word_embeddings": tie_word_embeddings}
    if family == "gemma4":
        heads = per_layer(keys, "attention.head_count")
        return gguf_gemma4.config_of(keys, heads, rope_of(keys), **sizes)
    common = common_of(keys) | sizes
    rope, layers, hidden = rope_of(keys), common["num_hidden_layers"], common["hidden_size"]
    if family == "gemma":
        return transformers.GemmaConfig(
            hidden_act="gelu_pytorch_tanh", rope_parameters=rope, **common
        )
    common["hidden_activation"] = "gelu_pytorch_tanh"  # ggml_gelu
    largest = layers == {"gemma2": 46, "gemma3": 62}[family]  # 27B
    heads, head_dim = common["num_attention_heads"], common["head_dim"]
    common["query_pre_attn_scalar"] = hidden // heads if largest else head_dim
    if family == "gemma2":
        if keys.get("rope.freq_base_swa", rope["rope_theta"]) != rope["rope_theta"]:
            raise ValueError("transformers' Gemma 2 has no rope.freq_base_swa")
        if keys.get("rope.scaling.type") == "none" and keys.get("rope.scaling.factor", 1) != 1:
            raise ValueError("llama.cpp scales only the layers with a window")
        return transformers.Gemma2Config(
            rope_parameters=rope, sliding_window=keys.get("attention.sliding_window", 4096),
            layer_types=kinds(keys, layers, 2),
            attn_logit_softcapping=keys.get("attn_logit_softcapping", 50.0),
            final_logit_softcapping=keys.get("final_logit_softcapping", 30.0), **common,
        )  # fmt: skip
    window = keys.get("attention.sliding_window", 0)
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10_000.0)}
    return transformers.Gemma3TextConfig(
        rope_parameters={FULL: rope, SLIDING: local}, sliding_window=window or 4096,
        layer_types=kinds(keys, layers, 6) if window else [FULL] * layers,
        final_logit_softcapping=keys.get("final_logit_softcapping") or None, **common,
    )  # fmt: skip


def common_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of transformers' config that all families have."""
    hidden, heads = keys["embedding_length"], per_layer(keys, "attention.head_count")
    head_dim = keys.get("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.get(name, head_dim) != head_dim:
            raise ValueError(f"{name} {keys[name]} is not attention.key_length {head_dim}")
    return {
        "hidden_size": hidden, "num_hidden_layers": keys["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": per_layer(keys, "attention.head_count_kv", heads),
        "head_dim": head_dim, "intermediate_size": per_layer(keys, "feed_forward_length"),
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
    }  # fmt: skip


def refuse(keys: Mapping[str, Any], known: set[str]) -> None:
    """Raises ValueError for a key that has an effect, unless it is in `known`."""
    for name, neutral in REFUSED.items():
        if name not in known and keys.get(name, neutral) != neutral:
            raise ValueError(f"transformers' Gemma has no {name} {keys[name]}")


def per_layer(keys: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Returns the value of a key that may be one number or one number per layer. Raises ValueError
    if the layers differ, KeyError if the key is missing and there is no default."""
    value = keys.get(name, default) if default is not None else keys[name]
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ValueError(f"transformers' Gemma needs the same {name} on all layers: {value}")
        value = value[0]
    return int(value)


def kinds(keys: Mapping[str, Any], layers: int, period: int) -> list[str]:
    """Returns each layer's kind of attention. The pattern is a list (true: window) or a period: the
    last layer of each period is full; with period 0, no layer is full."""
    pattern = keys.get("attention.sliding_window_pattern", period)
    if not isinstance(pattern, list):
        pattern = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)]
    return [SLIDING if window else FULL for window in pattern]


def rope_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rope parameters of full layers."""
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0)) or 1.0
    rope = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10_000.0)}
    if kind == "none" or (kind == "linear" and factor == 1):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    raise ValueError(f"rope.scaling.type {kind!r} is not one of none, linear")
