"""Shared by attention.py and decode_attention.py: bundles of arguments, loading a block of keys or
values from a ring buffer, the soft cap, one online-softmax step.

Slot `p % slots` of a ring holds position p. Kernels count positions from the start of a ring
revolution: the one that holds the oldest position still in the ring. Positions are then below
2 * slots, and one subtraction finds the slot. attention.py has a picture.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.kernels._triton import tl, triton

HEAD_DIMS = (32, 64, 128, 256, 512)  # for these, tiles fit in registers and shared memory
LOG2_E = tl.constexpr(1.4426950408889634)


class AttentionSpec(NamedTuple):
    """Compile-time constants of a layer's attention: one `tl.constexpr`."""

    group: int  # m: query heads per kv head
    dim: int  # d: head dim
    scale: float  # multiplies q · k
    softcap: float  # 0: no soft cap
    window: int  # 0: no window
    eps: float  # epsilon of the RMSNorm of q and k
    offset: float  # the norm multiplies by offset + weight


class Heads(NamedTuple):
    """Pointer and strides of a tensor [b, t, heads, d] whose last dimension is contiguous. For
    [b, heads, d], token_stride is None."""

    ptr: Any
    batch_stride: Any
    token_stride: Any
    head_stride: Any


class RingStrides(NamedTuple):
    """Strides of both keys and values, [b, n, slots, d], whose last dimension is contiguous."""

    batch: Any
    head: Any
    slot: Any


class Positions(NamedTuple):
    """Pointers to int32 positions, one per sequence."""

    query: Any  # [b]: position of each row's first query
    left_padding: Any  # [b] | None: positions below it are padding


def heads_of(x: Tensor) -> Heads:
    """Returns the pointer and strides of x :: [b, t, heads, d] as one kernel argument."""
    return Heads(x, *x.stride()[:3])


class HeadRing(NamedTuple):
    """Keys or values of one kv head of one sequence, in a kernel."""

    source: Any  # [b, n, slots, d]: a tensor descriptor if DESCRIPTORS; else a pointer to slot 0
    slot_stride: Any
    slots: Any
    batch: Any  # index of the sequence; only for a descriptor
    kv_head: Any  # index of the kv head; only for a descriptor


def visible_keys(
    query_offset: Tensor, left_padding: Tensor | None, t: int, slots: int, window: int | None
) -> Tensor:
    """Whether a query sees the position that a slot of the ring holds: [b, t, slots], bool."""
    device = query_offset.device
    query = query_offset.unsqueeze(1) + torch.arange(t, device=device)  # [b, t] positions
    last = query[:, -1:]  # [b, 1]
    key = last - (last - torch.arange(slots, device=device)) % slots  # [b, slots] positions
    query, key = query.unsqueeze(2), key.unsqueeze(1)  # [b, t, 1], [b, 1, slots]
    oldest = 0 if left_padding is None else left_padding.clamp(min=0).view(-1, 1, 1)  # [b, 1, 1]
    visible = (key >= oldest) & (key <= query)  # [b, t, slots]
    return visible if window is None else visible & (key > query - window)


@triton.jit
def load_block(
    ring,  # HeadRing
    block,  # position of the block's first key
    end,  # pointers do not load positions from here on; descriptors load the whole block
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Loads the keys or values of positions block … block + BLOCK_N - 1: [BLOCK_N, D]."""
    if DESCRIPTORS:
        slot = tl.where(block < ring.slots, block, block - ring.slots)
        tile = ring.source.load([ring.batch, ring.kv_head, slot, 0])  # [1, 1, BLOCK_N, D]
        return tile.reshape([BLOCK_N, D])  # [BLOCK_N, D]
    else:
        position = block + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        slot = tl.where(position < ring.slots, position, position - ring.slots).to(tl.int64)
        slot = slot[:, None]  # [BLOCK_N, 1]
        pointer = ring.source + slot * ring.slot_stride + tl.arange(0, D)[None, :]  # [BLOCK_N, D]
        return tl.load(pointer, mask=(position < end)[:, None], other=0.0)  # [BLOCK_N, D]


@triton.jit
def soft_cap(scores, SPEC: tl.constexpr):
    """Returns tanh(scale * scores / softcap), which softmax_step multiplies by softcap; or, without
    a soft cap, the scores."""
    if SPEC.softcap > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        scores = 1 - 2 / (tl.exp2(scores * (2 * SPEC.scale * LOG2_E / SPEC.softcap)) + 1)
    return scores


@triton.jit
def softmax_step(scores, row_max, row_sum, SPEC: tl.constexpr):
    """One online-softmax step over the scores of a block, [BLOCK_M, BLOCK_N]. Returns the block's
    weights, the rescale factor of the accumulator, the new row max (finite) and row sum."""
    # exp2 is one instruction and exp is two, so the scale includes log2(e).
    SCALE: tl.constexpr = (SPEC.softcap if SPEC.softcap > 0 else SPEC.scale) * LOG2_E
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * SCALE)  # [BLOCK_M]
    weights = tl.exp2(tl.fma(scores, SCALE, -new_max[:, None]))  # [BLOCK_M, BLOCK_N]
    rescale = tl.exp2(row_max - new_max)  # [BLOCK_M]
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, axis=1)  # [BLOCK_M]
