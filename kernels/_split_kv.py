"""Split-KV decode attention (Flash-Decoding): the keys of one kv head are split over several
programs. This file has the number of splits, the launch config, and the merge of partial results.
"""

import math
from typing import Any, NamedTuple

from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.launch import Gpu


class Splits(NamedTuple):
    """Pointers to partial results; contiguous."""

    partial: Any  # [b, n, splits, group, d]
    stats: Any  # [b, n, splits, 2, group]: row max and row sum
    counter: Any  # [b * n]: number of programs that have stored their partial result


def count_splits(pairs: int, merge_cost: int, visible: int, gpu: Gpu) -> int:
    """Returns the number of splits for each of `pairs` (sequence, kv head) with `visible` keys.
    Merging one split costs as much as reading `merge_cost` keys; total time is lowest at
    sqrt(merge_cost * visible) keys per split."""
    # At most two programs per multiprocessor, and one split per 64 keys (rounded up).
    most = min(2 * gpu.multiprocessors // pairs, triton.cdiv(visible, 64))
    return max(1, min(most, round(math.sqrt(visible / merge_cost))))


def default_config(
    pairs: int, group: int, visible: int, d: int, itemsize: int, gpu: Gpu
) -> dict[str, int]:  # fmt: skip
    """Returns the launch config. In 16-bit dtypes at head_dim 256 and 512, blocks are narrower if
    shared memory is small, or if there are more programs than multiprocessors, so that two programs
    fit in the shared memory of a multiprocessor (227 KB on Hopper); with more than 16 rows, their
    registers would not fit. In fp32 at head_dim 512, fewer blocks are prefetched if shared memory
    is small, and if there are more than 16 rows."""
    block_m = max(16, triton.next_power_of_2(group + 1))
    small = gpu.shared_memory < 160_000
    programs = pairs * count_splits(pairs, group, visible, gpu)
    narrow = d >= 256 and (small or (block_m == 16 and programs > gpu.multiprocessors))
    block_n, num_stages = (32 if narrow else 64) // (2 if d == 512 else 1), 3
    if itemsize == 4:
        block_n, num_stages = 16, 3 - (small + (block_m > 16) if d == 512 else 0)
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "MERGE_COST": group,
        "num_warps": 8 if d * itemsize >= 512 else 4, "num_stages": num_stages,
    }  # fmt: skip


def merge_chunk(group: int, d: int, num_warps: int) -> int:
    """Returns how many splits merge_splits loads at a time. They take 32 registers per thread."""
    return min(max(num_warps * 1024 // (triton.next_power_of_2(group) * d), 1), 16)


@triton.jit
def merge_splits(
    partial_ptr,  # [splits, GROUP, D]
    stats_ptr,  # [splits, 2, GROUP]: row max and row sum
    out_ptr,  # [GROUP, D]
    splits,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,  # splits at a time, see merge_chunk
):
    """Merges the partial results of a kv head in the order of the splits and stores the output."""
    ROWS: tl.constexpr = triton.next_power_of_2(GROUP)
    row, channel = tl.arange(0, ROWS), tl.arange(0, D)  # [ROWS], [D]
    out = tl.zeros([ROWS, D], tl.float32)
    row_max = tl.full([ROWS], -1e30, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)[:, None]  # [CHUNK, 1]
        mask = (split < splits) & (row < GROUP)[None, :]  # [CHUNK, ROWS]
        stats = stats_ptr + split * (2 * GROUP) + row[None, :]  # [CHUNK, ROWS]
        part_row = ((split * GROUP + row[None, :]) * D)[:, :, None]  # [CHUNK, ROWS, 1]
        # [CHUNK, ROWS, D]
        part = tl.load(partial_ptr + part_row + channel[None, None, :], mask[:, :, None], other=0.0)
        part_max = tl.load(stats, mask, other=-1e30)  # [CHUNK, ROWS]
        part_sum = tl.load(stats + GROUP, mask, other=0.0)  # [CHUNK, ROWS]

        new_max = tl.maximum(row_max, tl.max(part_max, axis=0))  # [ROWS]
        weights = tl.exp2(part_max - new_max[None, :])  # [CHUNK, ROWS]
        rescale = tl.exp2(row_max - new_max)  # [ROWS]
        row_sum = row_sum * rescale + tl.sum(weights * part_sum, axis=0)  # [ROWS]
        out = out * rescale[:, None] + tl.sum(weights[:, :, None] * part, axis=0)  # [ROWS, D]
        row_max = new_max
    out = out / tl.where(row_sum == 0, 1.0, row_sum)[:, None]  # the sum is 0 in rows ≥ GROUP
    tl.store(out_ptr + row[:, None] * D + channel[None, :], out, mask=(row < GROUP)[:, None])
