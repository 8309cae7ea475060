"""Opens a .gguf file, which has llama.cpp's tensor names, reversed dimensions and quantized blocks.

This module is imported only when a GGUF file is opened, so that the package `gguf` stays optional.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint, parse_config
from gemma_fast.checkpoint.config_files import config_from_gguf
from gemma_fast.checkpoint.gguf_reader import GGUFFile, read_rows

BLOCK = 1 << 20  # elements that are dequantized at once, few enough for the CPU's cache

MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
COMMON_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_1_NAMES = COMMON_NAMES | {"ffn_norm": "post_attention_layernorm"}
GEMMA_2_NAMES = COMMON_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA_3_NAMES = GEMMA_2_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
LAYER_NAMES = {"gemma": GEMMA_1_NAMES, "gemma2": GEMMA_2_NAMES, "gemma3": GEMMA_3_NAMES}
LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d{0,3})\.(\w+)\.weight")
IGNORED = ("rope_freqs.weight", "output.weight")  # RoPE factors; copy of the embedding


class GGUFCheckpoint(Checkpoint):
    """A Gemma checkpoint in a GGUF file. GGUF stores the weight of a norm as 1 + weight."""

    def __init__(self, path: Path):
        self.path = path
        file = GGUFFile(path)
        self.config = parse_config(path, config_from_gguf, file.metadata)
        self.generation_config = {}
        self._tensors = {
            self._name(tensor.name): tensor for tensor in file.tensors if tensor.name not in IGNORED
        }
        self.files = dict.fromkeys(self._tensors, path)
        self.shapes = {name: tuple(t.shape[::-1].tolist()) for name, t in self._tensors.items()}

    def _name(self, stored_name: str) -> str:
        """Returns transformers' name for a tensor of the file."""
        family = self.config.model_type
        if stored_name in MODEL_NAMES:
            return MODEL_NAMES[stored_name]
        if match := LAYER_TENSOR.fullmatch(stored_name):
            layer, part = match.groups()
            if part in LAYER_NAMES[family]:
                return f"model.layers.{layer}.{LAYER_NAMES[family][part]}.weight"
        raise ValueError(
            f"{self.path}: tensor {stored_name} is unknown: {family} has no such tensor"
        )

    def check(self) -> None:
        super().check()
        for name, tensor in self._tensors.items():
            try:
                read_rows(self.path, tensor, 0, 1)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: tensor {name} has type {tensor.tensor_type.name}, which the"
                    " package gguf cannot dequantize: convert the model to BF16 or Q8_0"
                ) from None

    def _read(self, name: str, out: Tensor) -> None:
        rows = torch.atleast_2d(out)
        step = max(BLOCK // rows.shape[1], 1)
        for i in range(0, len(rows), step):
            values = torch.from_numpy(read_rows(self.path, self._tensors[name], i, i + step))
            if name.endswith("norm.weight"):
                values -= 1  # GGUF stores 1 + weight
            rows[i : i + step] = values
