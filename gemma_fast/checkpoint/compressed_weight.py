"""Reads a weight that the library compressed-tensors has quantized from the tensors that store it.

    weight[o, i] = scale[o / rows, i / columns] * (value[o, i] - zero_point[o / rows, i / columns])

    format                values of X.weight                 scale
    pack-quantized        X.weight_packed, int32: 4 or 8     X.weight_scale
    int-quantized         X.weight, int8                     X.weight_scale
    float-quantized       X.weight, float8_e4m3              X.weight_scale
    mxfp8-quantized       X.weight, float8_e4m3              X.weight_scale, uint8: power of 2
    mxfp4-pack-quantized  X.weight_packed, uint8: two e2m1   X.weight_scale, uint8: power of 2
    nvfp4-pack-quantized  X.weight_packed, uint8: two e2m1   X.weight_scale / X.weight_global_scale

Packed values are in the order of the row, lowest bits first. pack-quantized stores
value + 2^(bits - 1), and also packs X.weight_zero_point in this way, along the column.

Integers can stay packed, see kernels/packed.py. Values in e2m1 are multiples of 1/2: twice as large
they are integers. Values in float8 must be unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_fast.checkpoint.quantization_config import Scheme
from gemma_fast.kernels.packed import COLUMNS, PackedRows, Packing

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Suffix and dtype of the tensor with the values; dtypes of the scale.
LAYOUTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "pack-quantized": ("weight_packed", "I32", tuple(FLOATS)),
    "int-quantized": ("weight", "I8", tuple(FLOATS)),
    "float-quantized": ("weight", "F8_E4M3", tuple(FLOATS)),
    "mxfp8-quantized": ("weight", "F8_E4M3", ("U8",)),
    "mxfp4-pack-quantized": ("weight_packed", "U8", ("U8",)),
    "nvfp4-pack-quantized": ("weight_packed", "U8", ("F8_E4M3",)),
}
EXTRA = {"pack-quantized": {"weight_shape"}, "nvfp4-pack-quantized": {"weight_global_scale"}}
TWICE_E2M1 = torch.tensor((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)).to(torch.int8)
DOWNLOAD = "download or convert the model again"


class Part(NamedTuple):
    """A tensor of a safetensors file, or one expert's rows in a tensor [experts, rows, dim]."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    offset: int  # of its first byte in the file

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.file}: tensor {self.name} {problem}")


Read = Callable[[Part, int, int], Tensor]  # returns rows start … stop - 1 of a part


class CompressedWeight:
    """A quantized weight.

    shape    (out, dim)
    dtype    name of the dtype in which the library unpacks the weight
    block    rows and columns that share a scale
    packing  how the weight can stay packed; None: it must be unpacked
    """

    def __init__(self, parts: Mapping[str, Part], scheme: Scheme, read: Read) -> None:
        """parts: by the end of their names. Raises ValueError if they do not fit the scheme."""
        self.parts, self.scheme, self._read = parts, scheme, read
        suffix, dtype, scale_dtypes = LAYOUTS[scheme.format]
        self._check_names(suffix)
        self.values, scale = parts[suffix], parts["weight_scale"]
        self.dtype = scale.dtype if scale.dtype in FLOATS else "BF16"
        per_word = {"I32": 32 // scheme.bits, "U8": 2}.get(dtype, 1)  # values in one element
        self.shape = self._shape(per_word)
        out, dim = self.shape
        rows, columns = (
            min(size or whole, whole) for size, whole in zip(scheme.block, self.shape, strict=True)
        )
        self.block = rows, columns
        if scheme.block[0] == 1 and dim % columns:
            raise self.values.error(f"has {dim} columns, which groups of {columns} do not divide")
        grid = _blocks(out, rows), _blocks(dim, columns)
        one = [(1,), ()] if scheme.block == (0, 0) else []
        self._expect(suffix, (dtype,), (out, _blocks(dim, per_word)))
        self._expect("weight_scale", scale_dtypes, *one, grid)
        if dtype == "I32" and not scheme.symmetric:
            self._expect("weight_zero_point", ("I32",), (_blocks(out, per_word), grid[1]))
        elif not scheme.symmetric:
            self._expect("weight_zero_point", ("I8",), scale.shape)
        if "weight_global_scale" in parts:
            self._expect("weight_global_scale", ("F32",), (1,))
        self.packing = self._packing()

    def packed_rows(self, start: int, stop: int) -> PackedRows:
        """Returns rows `start` to `stop` - 1, if the weight has a packing."""
        values, scale, zero = self._rows(start, stop)
        if zero is None:
            return PackedRows(values, scale, None)
        shift = 8 if self.scheme.bits == 4 else 0  # with a minimum, 4 bits have 0 … 15
        scale = scale.float()
        return PackedRows(values + shift, scale, (zero.float() + shift) * -scale)

    def unpacked_rows(self, start: int, stop: int) -> Tensor:
        """Returns rows `start` to `stop` - 1 in fp32."""
        values, scale, zero = self._rows(start, stop)
        weight = values.float()  # [rows, dim]
        if zero is not None:
            weight -= self._along_row(zero.float())
        return weight * self._along_row(scale.float())

    def _check_names(self, suffix: str) -> None:
        """Raises ValueError if a part is missing, or is not one of the scheme's."""
        form = self.scheme.format
        needed = {suffix, "weight_scale"} | EXTRA.get(form, set())
        needed |= set() if self.scheme.symmetric else {"weight_zero_point"}
        other = next(iter(self.parts.values()))
        if missing := sorted(needed - self.parts.keys()):
            name = f"{other.name.rpartition('.')[0]}.{missing[0]}"
            raise other._replace(name=name).error(f"is missing, but {form} needs it: {DOWNLOAD}")
        if "weight_g_idx" in self.parts:
            raise self.parts["weight_g_idx"].error(
                "gives the order of columns (actorder), which is not supported: use vLLM, or an"
                " unquantized or .gguf file"
            )
        for name in sorted(self.parts.keys() - needed):
            kind = "symmetric " if name == "weight_zero_point" else ""
            raise self.parts[name].error(f"is not part of {kind}{form} weights: {DOWNLOAD}")

    def _expect(self, suffix: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> None:
        part, scheme = self.parts[suffix], self.scheme
        if part.dtype not in dtypes or part.shape not in shapes:
            raise part.error(
                f"has dtype {part.dtype} and shape {part.shape}, but {scheme.format} with"
                f" {scheme.bits} bits and a scale for {_size(scheme.block)} requires"
                f" {' or '.join(dtypes)} and {shapes[0]}: {DOWNLOAD}"
            )

    def _shape(self, per_word: int) -> tuple[int, int]:
        shape = list(self.values.shape)
        if "weight_shape" in self.parts:
            self._expect("weight_shape", ("I64", "I32"), (2,))
            shape = self._read(self.parts["weight_shape"], 0, 2).tolist()
        elif len(shape) == 2:
            shape[1] *= per_word
        if len(shape) != 2 or min(shape) < 1:
            raise self.values.error(f"stores a matrix of shape {tuple(shape)}: {DOWNLOAD}")
        return shape[0], shape[1]

    def _packing(self) -> Packing | None:
        form, group = self.scheme.format, self.block[1]
        integers = self.scheme.bits if form in ("pack-quantized", "int-quantized") else 8
        bits = 4 if integers == 4 and group % COLUMNS[4] == 0 else 8
        if self.values.dtype == "F8_E4M3" or group % COLUMNS[bits] or self.shape[1] % group:
            return None
        exact = self.scheme.symmetric and not form.startswith("nvfp4")
        dtype = FLOATS[self.dtype] if exact else torch.float32
        return Packing(bits, group, not self.scheme.symmetric, dtype)

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns values :: [rows, dim], int8 or float8; scale :: [rows, groups]; and zero point ::
        [rows, groups], int8, or None."""
        stop = min(stop, self.shape[0])
        values = self._read(self.values, start, stop)
        scale = self._per_row("weight_scale", start, stop)
        zero = None if self.scheme.symmetric else self._zero_point(start, stop)
        if values.dtype == torch.int32:
            values = _unpack(values, self.scheme.bits, self.shape[1])
        elif values.dtype == torch.uint8:
            nibbles = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)  # [rows, dim]
            values = TWICE_E2M1[nibbles.int()]
        elif self.scheme.bits == 4:
            for name, x in ((self.values, values), (self.parts.get("weight_zero_point"), zero)):
                if name is not None and x is not None and ((x < -8) | (x > 7)).any():
                    raise name.error(f"has values outside -8 … 7, the range of 4 bits: {DOWNLOAD}")
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu).float().to(torch.bfloat16)
        if "weight_global_scale" in self.parts:
            scale = scale.float() / self._read(self.parts["weight_global_scale"], 0, 1)
        if not scale.isfinite().all():
            raise self.parts["weight_scale"].error(f"is not finite: {DOWNLOAD}")
        return values, scale / 2 if self.values.dtype == "U8" else scale, zero

    def _zero_point(self, start: int, stop: int) -> Tensor:
        part = self.parts["weight_zero_point"]
        if part.dtype == "I8":
            return self._per_row("weight_zero_point", start, stop)
        bits = self.scheme.bits
        per_word = 32 // bits
        first = start // per_word
        words = self._read(part, first, _blocks(stop, per_word)).unsqueeze(1)  # [words, 1, groups]
        shifts = torch.arange(0, 32, bits, dtype=torch.int32).view(-1, 1)
        zeros = (words >> shifts & (1 << bits) - 1) - (1 << bits - 1)  # [words, per_word, groups]
        return zeros.flatten(0, 1)[start - first * per_word :][: stop - start].to(torch.int8)

    def _per_row(self, suffix: str, start: int, stop: int) -> Tensor:
        """Returns the factors of each row :: [rows, groups]."""
        part, rows = self.parts[suffix], self.block[0]
        if len(part.shape) < 2:
            return self._read(part, 0, 1).view(1, 1).expand(stop - start, 1)
        first = start // rows
        factors = self._read(part, first, _blocks(stop, rows))  # [rows / block, groups]
        return factors if rows == 1 else factors[torch.arange(start, stop) // rows - first]

    def _along_row(self, factors: Tensor) -> Tensor:
        """Returns [rows, groups] as [rows, dim], or as [rows, 1] if there is one group."""
        if factors.shape[1] == 1:
            return factors
        return factors.repeat_interleave(self.block[1], dim=1)[:, : self.shape[1]]


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Returns the values in int32 words :: [rows, n] as [rows, columns], int8."""
    data = words.view(torch.uint8)  # [rows, 4 n]; on a little-endian processor
    if bits == 4:
        data = torch.stack((data & 15, data >> 4), dim=-1).flatten(1)  # [rows, 8 n]
    return (data[:, :columns] - (1 << bits - 1)).view(torch.int8)  # wraps around


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def _size(block: tuple[int, int]) -> str:
    rows, columns = (str(size or "all") for size in block)
    return f"{rows} rows, {columns} columns"
