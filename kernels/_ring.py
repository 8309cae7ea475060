"""Attention over a ring buffer, shared by attention.py and decode_attention.py: arguments that
belong together, loading a block of keys or values, the soft cap, one online-softmax step.

Slot `p % slots` of a ring holds position p. Kernels subtract the start of the ring revolution that
holds the oldest visible key, so positions are below 2 * slots and one subtraction finds a slot.
attention.py has a picture.
"""

from typing import Any, NamedTuple

from torch import Tensor

from gemma_fast.kernels._triton import tl, triton

HEAD_DIMS = (32, 64, 128, 256)  # for these, tiles fit in registers and shared memory
LOG2_E = tl.constexpr(1.4426950408889634)


class AttentionSpec(NamedTuple):
    """Compile-time constants of a layer's attention: one `tl.constexpr`."""

    group: int  # m: query heads per kv head
    dim: int  # d: head dim
    scale: float  # multiplies q · k
    softcap: float  # 0: no soft cap
    window: int  # 0: no window
    eps: float  # epsilon of the RMSNorm of q and k


class Heads(NamedTuple):
    """A tensor [b, t, heads, d] whose channels are contiguous; without t, token_stride is None."""

    ptr: Any
    batch_stride: Any
    token_stride: Any
    head_stride: Any


class RingStrides(NamedTuple):
    """Strides of keys and of values [b, n, slots, d]; channels are contiguous."""

    batch: Any
    head: Any
    slot: Any


class Positions(NamedTuple):
    """int32 pointers."""

    query: Any  # [b]: position of each row's first query
    left_padding: Any  # [b] | None: positions below it are padding


def heads_of(x: Tensor) -> Heads:
    """x :: [b, t, heads, d] as an argument of a kernel."""
    return Heads(x, *x.stride()[:3])


@triton.jit
def load_block(
    ring,  # [b, n, slots, d]: a tensor descriptor if DESCRIPTORS, else a pointer to a head's slots
    slot_stride, slots, batch, kv_head,
    block,  # first position
    end,  # positions from here on are not loaded; at most 2 * slots
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Loads the keys or values of positions block … block + BLOCK_N - 1: [BLOCK_N, D]."""
    if DESCRIPTORS:
        slot = tl.where(block < slots, block, block - slots)
        return ring.load([batch, kv_head, slot, 0]).reshape([BLOCK_N, D])  # from [1, 1, BLOCK_N, D]
    else:
        position = block + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        slot = tl.where(position < slots, position, position - slots).to(tl.int64)[:, None]
        pointer = ring + slot * slot_stride + tl.arange(0, D)[None, :]  # [BLOCK_N, D]
        return tl.load(pointer, mask=(position < end)[:, None], other=0.0)


@triton.jit
def soft_cap(scores, SPEC: tl.constexpr):
    """Returns tanh(scale * scores / softcap), which softmax_step scales by softcap; without a soft
    cap, the scores unchanged."""
    if SPEC.softcap > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        scores = 1 - 2 / (tl.exp2(scores * (2 * SPEC.scale * LOG2_E / SPEC.softcap)) + 1)
    return scores


@triton.jit
def softmax_step(scores, row_max, row_sum, SPEC: tl.constexpr):
    """One online-softmax step over the scores of a block, [BLOCK_M, BLOCK_N]. Returns the block's
    weights, the rescale factor of the accumulator, the new row max (finite) and row sum."""
    # exp2 is one instruction, exp is two: log2(e) is part of the scale.
    SCALE: tl.constexpr = (SPEC.softcap if SPEC.softcap > 0 else SPEC.scale) * LOG2_E
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * SCALE)  # [BLOCK_M]
    weights = tl.exp2(tl.fma(scores, SCALE, -new_max[:, None]))  # [BLOCK_M, BLOCK_N]
    rescale = tl.exp2(row_max - new_max)  # [BLOCK_M]
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, axis=1)
