"""Opens a .gguf file, which has llama.cpp's tensor names, reversed dimensions and quantized blocks.
The other parts of a split file (`-00001-of-00003.gguf`) are opened with the first part.

This module is imported only when a GGUF file is opened, so that the package `gguf` stays optional.
"""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemma_fast.checkpoint.base import FileCheckpoint, parse_content
from gemma_fast.checkpoint.config_gguf import config_from_gguf, generation_from_gguf
from gemma_fast.checkpoint.experts import ExpertRows
from gemma_fast.checkpoint.gemma4_gguf import ROPE_FACTORS, with_tensors
from gemma_fast.checkpoint.gguf_blocks import FORMATS, read_blocks
from gemma_fast.checkpoint.gguf_reader import GGMLQuantizationType as Type
from gemma_fast.checkpoint.gguf_reader import (
    GGUFFile,
    ReaderTensor,
    open_gguf,
    read_rows,
    stored_rows,
)
from gemma_fast.checkpoint.hub import GGUF_PART
from gemma_fast.kernels.packed import PackedRows, Packing

BLOCK = 1 << 20  # elements that are dequantized at once, few enough for the CPU's cache

MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GEMMA_4_MODEL_NAMES = {
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
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
GEMMA_4_NAMES = GEMMA_3_NAMES | {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
# Gemma 4's tensors whose names in transformers do not end in ".weight".
GEMMA_4_PARAMETERS = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_gate_exps.weight": "experts.gate_proj",
    "ffn_up_exps.weight": "experts.up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
}
LAYER_NAMES = {
    "gemma": GEMMA_1_NAMES, "gemma2": GEMMA_2_NAMES, "gemma3": GEMMA_3_NAMES,
    "gemma4": GEMMA_4_NAMES,
}  # fmt: skip
NOT_QUANTIZED = (Type.F32, Type.F16, Type.BF16)
LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d{0,3})\.((\w+)\.(?:weight|scale))", re.ASCII)


class GGUFCheckpoint(FileCheckpoint):
    """A Gemma checkpoint in a GGUF file. GGUF stores the weight of a norm of Gemma 1 to 3 as
    1 + weight."""

    def __init__(self, path: Path):
        super().__init__(path)
        first = open_gguf(path)
        self.config = parse_content(path, config_from_gguf, first.metadata)
        self.generation_config = parse_content(path, generation_from_gguf, first.metadata)
        if self.generation_config:  # `generate` takes no option of the config if this has one
            for name in ("eos_token_id", "pad_token_id"):
                self.generation_config.setdefault(name, getattr(self.config, name))
        factors = None  # divisors of the rotary frequencies, 1 in Gemma 1 to 3
        for file in _parts(first):
            for tensor in file.tensors:
                if tensor.name == ROPE_FACTORS:
                    factors = self._rope_factors(file.path, tensor)
                    continue
                shape = tuple(tensor.shape[::-1].tolist())
                self.add(self._name(tensor.name), shape, file.path, tensor)
        if self.config.model_type == "gemma4":
            try:
                self.config = with_tensors(self.config, self.shapes, factors)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error

    def _name(self, stored_name: str) -> str:
        """Returns transformers' name for a tensor of the file."""
        family = self.config.model_type
        names = MODEL_NAMES | (GEMMA_4_MODEL_NAMES if family == "gemma4" else {})
        if stored_name in names:
            return names[stored_name]
        if match := LAYER_TENSOR.fullmatch(stored_name):
            layer, tensor, module = match.groups()
            if family == "gemma4" and tensor in GEMMA_4_PARAMETERS:
                return f"model.layers.{layer}.{GEMMA_4_PARAMETERS[tensor]}"
            if tensor.endswith(".weight") and module in LAYER_NAMES[family]:
                return f"model.layers.{layer}.{LAYER_NAMES[family][module]}.weight"
        raise ValueError(
            f"{self.path}: tensor {stored_name} is unknown: {family} has no such tensor; use"
            " llama.cpp"
        )

    def check(self) -> None:
        super().check()
        first_of_type: dict[Type, str] = {}
        for name, tensor in self.stored.items():
            first_of_type.setdefault(tensor.tensor_type, name)
        for name in first_of_type.values():
            tensor = self.stored[name]
            try:
                read_rows(self.files[name], tensor, 0, 1)
            except NotImplementedError:
                raise ValueError(
                    f"{self.files[name]}: tensor {name} has type {tensor.tensor_type.name}, which"
                    " the package gguf cannot dequantize: convert the model to BF16 or Q8_0"
                ) from None

    def packing(self, name: str) -> Packing | None:
        tensor = self.stored[name]
        found = FORMATS.get(tensor.tensor_type) if tensor.shape.size == 2 else None
        return found and found.packing

    def warn_of_unpacked(self) -> None:
        kept = *FORMATS, *NOT_QUANTIZED
        matrices = [tensor for tensor in self.stored.values() if tensor.shape.size == 2]
        others = [tensor for tensor in matrices if tensor.tensor_type not in kept]
        if not others:
            return
        types = ", ".join(sorted({tensor.tensor_type.name for tensor in others}))
        stored = sum(int(tensor.n_bytes) for tensor in others) / 1e9
        unpacked = sum(2 * int(tensor.n_elements) for tensor in others) / 1e9
        warnings.warn(
            f"{self.path}: the types of {len(others)} tensors ({types}) do not stay packed."
            f" Unpacked to 16 bits, these tensors take {unpacked:.3g} GB instead of"
            f" {stored:.3g} GB, and twice that in float32, and decoding is as much slower. Use a"
            f" file with the types {', '.join(kind.name for kind in FORMATS)}, or pass"
            " quantize='int8' or 'int4'",
            stacklevel=3,
        )

    def packed_rows(self, name: str, start: int, stop: int) -> PackedRows:
        path, tensor = self.files[name], self.stored[name]
        rows = torch.from_numpy(stored_rows(path, tensor, start, stop))
        try:
            return read_blocks(tensor.tensor_type, rows)
        except ValueError as error:
            raise ValueError(
                f"{path}: tensor {name}: {error}: download or convert the model again"
            ) from error

    def _split(self, stored: ReaderTensor, rows: ExpertRows) -> ReaderTensor:
        count, columns = rows.shape
        data = stored.data[rows.expert, rows.start : rows.start + count]
        skipped = rows.expert * stored.data.shape[1] + rows.start  # rows before
        return stored._replace(
            shape=np.array([columns, count], np.uint64),
            n_elements=count * columns,
            n_bytes=data.nbytes,
            data_offset=stored.data_offset + skipped * data.strides[0],
            data=data,
        )

    def _read(self, name: str, out: Tensor) -> None:
        rows = torch.atleast_2d(out)
        step = max(BLOCK // rows.shape[1], 1)
        for i in range(0, len(rows), step):
            values = self._rows(name, i, i + step)
            if name.endswith("norm.weight"):
                values -= self.config.norm_offset  # GGUF stores the factor
            rows[i : i + step] = values

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy(read_rows(self.files[name], self.stored[name], start, stop))

    def _rope_factors(self, path: Path, tensor: ReaderTensor) -> np.ndarray:
        try:
            factors = read_rows(path, tensor, 0, 1)[0]
        except NotImplementedError:
            factors = np.zeros(1, np.float32)  # refused below, or by with_tensors
        others = self.config.model_type != "gemma4" and (factors != 1).any()
        if tensor.shape.size != 1 or others:
            raise ValueError(
                f"{path}: tensor {ROPE_FACTORS} scales rotary frequencies, which is not supported:"
                " use llama.cpp"
            )
        return factors


def _parts(first: GGUFFile) -> Iterator[GGUFFile]:
    """Yields a file and, if it is split, the other parts beside it. Raises ValueError if a part is
    missing or belongs to another model."""
    path = first.path
    count = first.metadata.get("split.count") or 1  # merged files have 0
    tensors = len(first.tensors)
    yield first
    match = GGUF_PART.fullmatch(path.name)
    named = int(match[3]) if match else 1
    if count != max(named, 1) or first.metadata.get("split.no", 0) != 0:
        raise ValueError(
            f"{path}: split.count={count!r} and split.no={first.metadata.get('split.no', 0)!r}, but"
            f" the name says the first of {named}: parts must be named NAME-00001-of-0000N.gguf"
        )
    for number in range(2, named + 1):
        assert match is not None
        beside = path.with_name(f"{match[1]}-{number:05}-of-{named:05}.gguf")
        if not beside.is_file():
            raise FileNotFoundError(
                f"{beside} does not exist, but {path.name} needs it: download it"
            )
        part = GGUFFile(beside)
        for key, expected in (("split.count", count), ("split.no", number - 1)):
            if (found := part.metadata.get(key)) != expected:
                raise ValueError(f"{part.path}: {key}={found!r} must be {expected}")
        tensors += len(part.tensors)
        yield part
    if (total := first.metadata.get("split.tensors.count", tensors)) != tensors:
        raise ValueError(f"{path}: split.tensors.count={total!r}, but the parts have {tensors}")
