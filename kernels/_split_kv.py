"""What decode_attention.py's programs, which share out a kv head's keys, do about it: how many they
are, their tile, and the join of their partial results."""

import math

from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.launch import Gpu


def count_splits(pairs: int, join: int, visible: int, gpu: Gpu) -> int:
    """Of each of `pairs` kv heads with `visible` keys. A split is joined in the time of `join`
    keys, so the sum of both is least with sqrt(join * visible) keys in each."""
    most = min(2 * gpu.multiprocessors // pairs, triton.cdiv(visible, 64))  # two a multiprocessor
    return max(1, min(most, round(math.sqrt(visible / join))))


def tile(
    pairs: int, group: int, visible: int, d: int, itemsize: int, gpu: Gpu
) -> dict[str, int]:  # fmt: skip
    """Of a program: rows, keys, warps, stages; rows of a split that it joins; count_splits' join.
    Where there are more programs than multiprocessors, two are to fit in shared memory."""
    crowded = pairs * count_splits(pairs, group, visible, gpu) > gpu.multiprocessors
    rows, num_warps = triton.next_power_of_2(group), 8 if d * itemsize >= 512 else 4
    narrow = d == 256 and (crowded or gpu.shared_memory < 160_000)
    block_n = 16 if itemsize == 4 else 32 if narrow else 64
    return {
        "BLOCK_M": max(16, triton.next_power_of_2(group + 1)), "BLOCK_N": block_n, "ROWS": rows,
        "JOIN": group, "num_warps": num_warps, "num_stages": 3,
    }  # fmt: skip


def chunk(rows: int, d: int, num_warps: int) -> int:
    """Splits that a program joins at a time: 32 registers a thread."""
    return min(max(num_warps * 1024 // (rows * d), 1), 16)


@triton.jit
def join_splits(
    partial_ptr,  # [splits, GROUP, D]
    stats_ptr,  # [splits, 2, GROUP]: maxima and sums
    out_ptr,  # [GROUP, D]
    active,  # of the splits
    GROUP: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP rounded up to a power of two
    CHUNK: tl.constexpr,  # splits at a time: what registers can hold
):  # fmt: skip
    row, channel = tl.arange(0, ROWS), tl.arange(0, D)
    out = tl.zeros([ROWS, D], tl.float32)
    row_max = tl.full([ROWS], -1e30, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, active, CHUNK):
        split = first + tl.arange(0, CHUNK)[:, None]
        mask = (split < active) & (row < GROUP)[None, :]  # [CHUNK, ROWS]
        stats = stats_ptr + split * (2 * GROUP) + row[None, :]
        part_row = ((split * GROUP + row[None, :]) * D)[:, :, None]
        part = tl.load(partial_ptr + part_row + channel[None, None, :], mask[:, :, None], other=0.0)
        part_max = tl.load(stats, mask, other=-1e30)
        part_sum = tl.load(stats + GROUP, mask, other=0.0)

        new_max = tl.maximum(row_max, tl.max(part_max, axis=0))
        weights = tl.exp2(part_max - new_max[None, :])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights * part_sum, axis=0)
        out = out * rescale[:, None] + tl.sum(weights[:, :, None] * part, axis=0)
        row_max = new_max
    out = out / tl.where(row_sum == 0, 1.0, row_sum)[:, None]  # 0: rows beyond GROUP
    tl.store(out_ptr + row[:, None] * D + channel[None, :], out, mask=(row < GROUP)[:, None])
