"""What attention.py and decode_attention.py share: loading a block of the ring's keys or values,
the soft cap of scores, and one step of the online softmax.

Positions are counted from the beginning of that turn of the ring which the oldest of them is in, so
they are below twice its slots.
"""

from gemma_fast.kernels._triton import tl, triton

HEAD_DIMS = (32, 64, 128, 256)  # of those, a tile fits in registers and shared memory
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_block(
    ring,  # [b, n, slots, d]: a tensor descriptor if DESCRIPTORS, else a pointer to a head's slots
    slot_stride, slots, batch, kv_head,
    block,  # the first position
    end,  # at most 2 * slots
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, D]: the keys or values of positions block, block + 1, …"""
    if DESCRIPTORS:
        slot = tl.where(block < slots, block, block - slots)
        return ring.load([batch, kv_head, slot, 0]).reshape([BLOCK_N, D])
    else:
        position = block + tl.arange(0, BLOCK_N)
        slot = tl.where(position < slots, position, position - slots).to(tl.int64)[:, None]
        pointer = ring + slot * slot_stride + tl.arange(0, D)[None, :]
        return tl.load(pointer, mask=(position < end)[:, None], other=0.0)


@triton.jit
def soft_cap(scores, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """tanh(SCALE * scores / SOFTCAP), for softmax_step to scale; without a cap, the scores."""
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        scores = 1 - 2 / (tl.exp2(scores * (2 * SCALE * LOG2_E / SOFTCAP)) + 1)
    return scores


@triton.jit
def softmax_step(scores, row_max, row_sum, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """One step of the online softmax. Returns the block's weights, the factor that rescales the
    sums so far, the new row_max (finite) and the new row_sum."""
    FACTOR: tl.constexpr = (SOFTCAP if SOFTCAP > 0 else SCALE) * LOG2_E  # for exp2
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * FACTOR)
    weights = tl.exp2(tl.fma(scores, FACTOR, -new_max[:, None]))
    rescale = tl.exp2(row_max - new_max)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, axis=1)
