"""Makes random packed weights, and unpacks them independently of kernels.packed."""

import torch
from torch import Tensor

from gemma_fast.kernels.packed import PackedRows, PackedWeight, Packing

PACKINGS = {
    "int8, group 32": Packing(8, 32, False, torch.float16),
    "int8, group 16, minimum": Packing(8, 16, True, torch.float32),
    "int8, group 96": Packing(8, 96, False, torch.bfloat16),
    "int4, group 32": Packing(4, 32, False, torch.float16),
    "int4, group 32, minimum": Packing(4, 32, True, torch.float16),
    "int4, group 96, minimum": Packing(4, 96, True, torch.bfloat16),
    "int4, group 64": Packing(4, 64, False, torch.float32),
}


def random_rows(out: int, dim: int, packing: Packing, device: str = "cpu") -> PackedRows:
    """Returns rows whose values are about normal(0, 1 / dim), with every integer of the packing.
    Scales differ from group to group, and minimums are as large as the values."""
    low, high = value_range(packing)
    values = torch.randint(low, high + 1, (out, dim), device=device, dtype=torch.int8)
    values[0, :2] = torch.tensor([low, high])
    groups, size = (out, dim // packing.group), 3.5 / (high - low) * dim**-0.5
    scale = ((0.5 + torch.rand(groups, device=device)) * size).to(packing.scale)
    minimum = None
    if packing.minimum:
        minimum = (torch.randn(groups, device=device) * dim**-0.5).to(packing.scale)
    return PackedRows(values, scale, minimum)


def value_range(packing: Packing) -> tuple[int, int]:
    """Returns the least and the largest integer."""
    if packing.bits == 8:
        return -128, 127
    return (0, 15) if packing.minimum else (-8, 7)


def exact(rows: PackedRows) -> Tensor:
    """Returns the rows in fp64: scale * value + minimum."""
    values, scale, minimum = rows
    out, groups = scale.shape
    weight = values.double().view(out, groups, -1) * scale.double().unsqueeze(-1)
    if minimum is not None:
        weight += minimum.double().unsqueeze(-1)
    return weight.view(values.shape)


def packed_weight(
    out: int, dim: int, packing: Packing, device: str = "cpu"
) -> tuple[PackedWeight, Tensor]:
    """Returns a random packed weight, and its elements in fp64."""
    rows = random_rows(out, dim, packing, device)
    weight = PackedWeight((out, dim), packing).to(device)
    weight.write(0, rows)
    return weight, exact(rows)
