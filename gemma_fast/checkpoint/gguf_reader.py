"""GGUF files, read without trusting them: a bounds-checked reader, and Gemma's checkpoint on it.

Imported only when a GGUF file is opened, so that the package `gguf` stays optional.
"""

import math
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint, parse_config
from gemma_fast.checkpoint.config_files import config_from_gguf

try:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
    from gguf.gguf_reader import ReaderField
    from gguf.quants import dequantize
except ModuleNotFoundError as error:
    raise ImportError('GGUF files need: pip install "gemma_fast[gguf]"') from error

MAX_STRING = 1 << 20  # bytes; the longest in a Gemma file is its chat template
MAX_ARRAY = 1 << 20  # items; the longest in a Gemma file is its vocabulary or its merges
MAX_DIMS = 4
BLOCK = 1 << 20  # elements dequantized at a time: they stay in the cache

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
IGNORED = ("rope_freqs.weight", "output.weight")  # not weights; tied to the embedding


class GGUFFile(GGUFReader):
    """`gguf.GGUFReader`, safe on hostile files and quick on long arrays.

    The base class checks no bound, multiplies dimensions in wrapping uint64, and walks arrays item
    by item (9 s for a vocabulary of 262,144). What is overridden is private, so setup.py pins
    `gguf` to one version.

    `metadata` holds the file's key/values as Python scalars, strings and lists. Raises ValueError,
    naming the file, for anything malformed, and allocates nothing out of proportion to the file.
    """

    metadata: dict[str, Any]

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            super().__init__(self.path)
            self.metadata = {
                name: field.contents()
                for name, field in self.fields.items()
                if not name.startswith("GGUF.")  # the header's own counts
            }
        except (ValueError, KeyError, OverflowError) as error:
            reason = error.args[0] if isinstance(error, KeyError) else error
            raise ValueError(f"{self.path} is not a readable GGUF file: {reason}") from error

    def _get(self, offset, dtype, count=1, override_order=None):
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"truncated: needs {end} bytes, has {len(self.data)}")
        return super()._get(int(offset), dtype, int(count), override_order)

    def _get_str(self, offset):
        length = int(self._get(offset, np.uint64)[0])
        if length > MAX_STRING:
            raise ValueError(f"a string of {length} bytes at byte {offset}")
        return super()._get_str(offset)

    def _build_fields(self, offs, count):
        if self.byte_order == "S":
            raise ValueError("its byte order is not this machine's")
        return super()._build_fields(offs, count)

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        item_type, count = GGUFValueType(head[0][0]), int(head[1][0])
        if count > MAX_ARRAY:
            raise ValueError(f"an array of {count} items at byte {orig_offs}")

        start = orig_offs + 12
        if item_type == GGUFValueType.STRING:
            items, size = self._get_strings(start, count)
        elif item_type in self.gguf_scalar_to_np:
            items = [self._get(start, self.gguf_scalar_to_np[item_type], count)]
            size = items[0].nbytes
        else:
            raise ValueError(f"an array of {item_type.name} at byte {orig_offs}")
        indices = list(range(len(head), len(head) + len(items)))
        return 12 + size, head + items, indices, [GGUFValueType.ARRAY, item_type]

    def _get_strings(self, start: int, count: int) -> tuple[list[memoryview], int]:
        """`count` strings from byte `start`, as views of the file, and the bytes they take."""
        data, offset, items = self.data.data, start, []
        for _ in range(count):
            if offset + 8 > len(data):
                raise ValueError(f"truncated: an array of {count} strings runs past the end")
            (length,) = struct.unpack_from("<Q", data, offset)
            offset += 8 + length
            if offset > len(data):
                raise ValueError(f"a string of {length} bytes at byte {offset - 8 - length}")
            items.append(data[offset - length : offset])
        return items, offset - start

    def _get_tensor_info_field(self, orig_offs) -> ReaderField:
        field = super()._get_tensor_info_field(orig_offs)
        _, _, _, dims, raw_type, offset = field.parts
        if not 1 <= len(dims) <= MAX_DIMS:
            raise ValueError(f"tensor {field.name!r} has {len(dims)} dimensions")
        # Python's integers do not wrap: past here neither the product nor the sum can.
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(raw_type[0])]
        n_bytes = math.prod(dims.tolist()) // block * block_bytes
        if not 0 < n_bytes <= len(self.data) or offset[0] > len(self.data):
            raise ValueError(
                f"tensor {field.name!r} of {dims.tolist()} at {offset[0]} does not fit"
                f" in {len(self.data)} bytes"
            )
        return field


class GGUFCheckpoint(Checkpoint):
    """Gemma in a GGUF file: other names, reversed dimensions, quantized blocks, 1 in the norms."""

    def __init__(self, file: GGUFFile):
        self.path = file.path
        self.config = parse_config(file.path, config_from_gguf, file.metadata)
        self.generation_config = {}
        self._tensors = {
            self._name(tensor.name): tensor for tensor in file.tensors if tensor.name not in IGNORED
        }
        self.files = dict.fromkeys(self._tensors, file.path)
        self.shapes = {name: tuple(t.shape[::-1].tolist()) for name, t in self._tensors.items()}

    def _name(self, stored_name: str) -> str:
        """The name that transformers gives a tensor."""
        family = self.config.model_type
        if stored_name in MODEL_NAMES:
            return MODEL_NAMES[stored_name]
        if match := LAYER_TENSOR.fullmatch(stored_name):
            layer, part = match.groups()
            if part in LAYER_NAMES[family]:
                return f"model.layers.{layer}.{LAYER_NAMES[family][part]}.weight"
        raise ValueError(f"{self.path}: tensor {stored_name} is unknown to {family}")

    def check(self) -> None:
        super().check()
        for name, tensor in self._tensors.items():
            try:
                dequantize(np.atleast_2d(tensor.data)[:1], tensor.tensor_type)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: tensor {name} has type {tensor.tensor_type.name}, which the"
                    " package gguf cannot dequantize"
                ) from None

    def _read(self, name: str, out: Tensor) -> None:
        stored = self._tensors[name]
        # Mapped anew for each tensor: unmapping lets go of the pages that were read.
        data = np.atleast_2d(
            np.memmap(self.path, stored.data.dtype, "r", stored.data_offset, stored.data.shape)
        )
        rows = torch.atleast_2d(out)
        step = max(BLOCK // rows.shape[1], 1)
        for i in range(0, len(rows), step):
            values = dequantize(data[i : i + step], stored.tensor_type)
            if name.endswith("norm.weight"):
                values = values - 1  # GGUF stores what the model scales by: 1 + weight
            rows[i : i + step] = torch.from_numpy(np.require(values, requirements="W"))
