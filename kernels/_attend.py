"""What attention.py and decode_attention.py share: a block of the ring's keys or values, its
scores, and how it joins the softmax of the blocks before.

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
    MASKED: tl.constexpr,  # whether some positions are not before the end
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
        if MASKED:
            return tl.load(pointer, mask=(position < end)[:, None], other=0.0)
        else:
            return tl.load(pointer)


@triton.jit
def scores_of_block(
    q, query,
    keys, slot_stride, slots, batch, kv_head,
    block, begin, end,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_N] of positions block, block + 1, …, for softmax_step to scale; -inf: unseen"""
    k = load_block(
        keys, slot_stride, slots, batch, kv_head, block, end, MASKED, BLOCK_N, D, DESCRIPTORS
    )  # fmt: skip
    scores = tl.dot(q, k.T, input_precision="ieee")
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        scores = 1 - 2 / (tl.exp2(scores * (2 * SCALE * LOG2_E / SOFTCAP)) + 1)
    if MASKED:
        key = block + tl.arange(0, BLOCK_N)[None, :]
        visible = (key <= query) & (key >= begin)
        if WINDOW > 0:  # one comparison for both: a negative distance is a large one
            visible = ((query - key).to(tl.uint32) < WINDOW) & (key >= begin)
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def softmax_step(scores, row_max, row_sum, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Weights of a block that joins the running softmax (row_max, finite; row_sum), and what the
    sums so far are to be multiplied by."""
    FACTOR: tl.constexpr = (SOFTCAP if SOFTCAP > 0 else SCALE) * LOG2_E  # for exp2
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * FACTOR)
    weights = tl.exp2(tl.fma(scores, FACTOR, -new_max[:, None]))
    rescale = tl.exp2(row_max - new_max)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, axis=1)
