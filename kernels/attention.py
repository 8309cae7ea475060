"""Causal attention of rotary-embedded queries over a cache: multi-query, grouped or multi-head.

    out = softmax(mask(cap(scale * rotate(rms_norm(q)) @ keysᵀ))) @ values
    cap(s) = softcap * tanh(s / softcap)

q            :: [b, t, heads, d], bf16 | fp16 | fp32, not rotated; a view of the qkv product is fine
keys, values :: [b, n, slots, d], q.dtype, K rotated: a ring, slot `p % slots` holds position p, and
                the newest position is that of the last query. An unused slot holds finite numbers.
cos, sin     :: [b, t, d / 2], fp32, of the queries' positions; None: q is rotated already
query_offset :: [b], int32: query i of a row stands at position query_offset + i
left_padding :: [b], int32: positions below it are left padding, whose rows are 0; None: below zero
norm_weight  :: [d] or None: no norm (Gemma 3 normalises queries before it rotates them)
window       :: a query at p sees the keys p - window + 1 … p; None: 0 … p
returns      :: [b, t, heads, d], q.dtype

Scores, cap, mask and softmax are in fp32; rotated queries and weights are rounded to q.dtype before
the matmuls. The m = heads / n query heads of a kv head share its keys: a program has a tile of
tokens x m rows. It visits the blocks of keys that at least one of its rows sees, oldest first, and
masks those that not all rows see whole (the diagonal, the window's far edge). The tiles with the
most blocks, the last tokens', start first.
Bound by compute for prompts: FLOPs = 4 * b * heads * d * (visible pairs); by memory for one token:
bytes = 2 * b * n * positions * d * itemsize. Walk-through step: attention.
"""

from typing import Any

import torch
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels._ring import HEAD_DIMS, load_block, soft_cap, softmax_step
from gemma_fast.kernels._triton import TensorDescriptor, tl, triton
from gemma_fast.kernels.launch import Gpu, gpu, launch_config, runs_triton
from gemma_fast.kernels.rmsnorm import rms_norm_reference
from gemma_fast.kernels.rotary import rotate, rotate_rows


def visible_keys(
    query_offset: Tensor, left_padding: Tensor | None, t: int, slots: int, window: int | None
) -> Tensor:
    """[b, t, slots], whether a query sees what a slot of the ring holds."""
    device = query_offset.device
    query = query_offset.unsqueeze(1) + torch.arange(t, device=device)  # [b, t] positions
    last = query[:, -1:]
    key = last - (last - torch.arange(slots, device=device)) % slots  # [b, slots] positions
    query, key = query.unsqueeze(2), key.unsqueeze(1)
    oldest = 0 if left_padding is None else left_padding.clamp(min=0).view(-1, 1, 1)
    visible = (key >= oldest) & (key <= query)
    return visible if window is None else visible & (key > query - window)


def attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor | None, sin: Tensor | None,
    query_offset: Tensor, norm_weight: Tensor | None = None, *, scale: float,
    left_padding: Tensor | None = None, window: int | None = None, softcap: float | None = None,
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    b, t, heads, d = q.shape
    n, slots = keys.shape[1:3]
    visible = visible_keys(query_offset, left_padding, t, slots, window)
    q = q.float() if norm_weight is None else rms_norm_reference(q.float(), norm_weight, eps)
    q = q if cos is None or sin is None else rotate(q, cos, sin)
    q = q.view(b, t, n, heads // n, d).permute(0, 2, 3, 1, 4)  # [b, n, m, t, d]
    scores = q.reshape(b, n, -1, d) @ keys.float().transpose(2, 3) * scale  # [b, n, m * t, slots]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(b, n, heads // n, t, slots)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    weights = scores.softmax(-1).masked_fill(~visible.any(-1)[:, None, None, :, None], 0)
    out = weights.view(b, n, -1, slots) @ values.float()  # [b, n, m * t, d]
    return out.view(b, heads, t, d).transpose(1, 2).to(values.dtype).contiguous()


@triton.jit
def _softmax_of_block(
    scores,  # [BLOCK_M, BLOCK_N]: q @ kᵀ of the keys block, block + 1, …
    row_max, row_sum,  # [BLOCK_M]
    block, begin, whole_begin, whole_end, first_row, offset,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Soft cap, mask and softmax step of a block's scores. Every row sees all keys of a block that
    begins at whole_begin … whole_end - 1; such a block is not masked."""
    scores = soft_cap(scores, SCALE, SOFTCAP)
    if (block < whole_begin) | (block >= whole_end):
        key = block + tl.arange(0, BLOCK_N)[None, :]
        query = offset + (first_row + tl.arange(0, BLOCK_M)[:, None]) // GROUP
        visible = (key <= query) & (key >= begin)
        if WINDOW > 0:
            visible &= key > query - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    return softmax_step(scores, row_max, row_sum, SCALE, SOFTCAP)


@triton.jit(do_not_specialize=["t", "slots"])
def _attention_kernel(
    q_ptr,  # [b, t, n * GROUP, d]
    keys,  # [b, n, slots, d]: a tensor descriptor if DESCRIPTORS, else a pointer
    values,  # like keys
    cos_ptr,  # [b, t, HALF], contiguous | None: q is rotated
    sin_ptr,  # [b, t, HALF], contiguous | None
    query_offset_ptr,  # [b]
    left_padding_ptr,  # [b] | None
    norm_weight_ptr,  # [d] | None
    out_ptr,  # [b, t, n * GROUP, d], contiguous
    q_batch_stride, q_token_stride, q_head_stride,
    batch_stride, kv_head_stride, slot_stride,  # of keys and of values
    t,
    slots,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0: none
    WINDOW: tl.constexpr,  # 0: none
    EPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per kv head
    HALF: tl.constexpr,  # d / 2
    BLOCK_M: tl.constexpr,  # rows: GROUP query heads of BLOCK_M / GROUP tokens
    BLOCK_N: tl.constexpr,  # keys
    DESCRIPTORS: tl.constexpr,
    WGMMA: tl.constexpr,  # Hopper's asynchronous matmuls
):  # fmt: skip
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    mask = (token < t)[:, None]
    query_offset = tl.load(query_offset_ptr + batch)

    # Triton keeps a loaded operand in shared memory, but a computed one in 64 registers a thread.
    # ptxas then has too few, and serializes Hopper's matmuls. So queries are stored and loaded.
    batch_token = batch.to(tl.int64) * t + token  # int64: times heads * d passes 2**31
    q_ptr += batch.to(tl.int64) * q_batch_stride
    q_row = (token.to(tl.int64) * q_token_stride + head.to(tl.int64) * q_head_stride)[:, None]
    out_row = ((batch_token * heads + head) * (2 * HALF))[:, None]
    channel = tl.arange(0, 2 * HALF)[None, :]
    if cos_ptr is None:
        q = tl.load(q_ptr + q_row + channel, mask=mask, other=0.0)
        tl.store(out_ptr + out_row + channel, q, mask=mask)
    else:
        angle = (batch_token * HALF)[:, None]
        rotate_rows(
            q_ptr + q_row, out_ptr + out_row, cos_ptr + angle, sin_ptr + angle,
            norm_weight_ptr, mask, mask, EPS, HALF, 16, HAS_NORM,
        )  # fmt: skip
    tl.debug_barrier()
    q = tl.load(out_ptr + out_row + channel, mask=mask, other=0.0)

    # Positions are counted as _ring.py says. Rows see no key before `begin`, and the tile sees
    # those from `first` to `end`.
    begin = tl.maximum(query_offset + t - slots, 0)  # the oldest that the ring holds
    turn = begin // slots * slots
    if left_padding_ptr is not None:
        begin = tl.maximum(begin, tl.load(left_padding_ptr + batch))
    begin -= turn
    offset = query_offset - turn  # the position of token 0
    first_query = offset + first_row // GROUP
    end = offset + tl.minimum((first_row + BLOCK_M - 1) // GROUP, t - 1) + 1
    first, whole_begin, whole_end = begin, begin, first_query + 2 - BLOCK_N
    if WINDOW > 0:
        first = tl.maximum(first_query - WINDOW + 1, begin)
        whole_begin = tl.maximum(end - WINDOW, begin)
    first = first // BLOCK_N * BLOCK_N  # blocks begin at multiples of BLOCK_N
    last = tl.maximum(end - 1, first) // BLOCK_N * BLOCK_N  # at least one block

    if not DESCRIPTORS:
        first_slot = batch.to(tl.int64) * batch_stride + kv_head.to(tl.int64) * kv_head_stride
        keys += first_slot
        values += first_slot
    out = tl.zeros([BLOCK_M, 2 * HALF], tl.float32)
    if WGMMA:
        # Zeros by a matmul: if no matmul has written the accumulator before the loop, ptxas waits
        # for matmuls at the loop's top, and softmax does not overlap them.
        zeros = tl.zeros([16, 2 * HALF], q.dtype)
        out = tl.dot(tl.zeros([BLOCK_M, 16], q.dtype), zeros)
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a row may see nothing at all
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # A round: softmax of the previous block, scores of this block, values of the previous one. In
    # this order Hopper's tensor cores multiply the values while the next round computes softmax.
    # The first round has no previous block: all its weights are masked.
    # disable_licm: hoisted out of the loop, the addresses of q take 32 registers a thread.
    for block in tl.range(first, last + 1, BLOCK_N, disable_licm=WGMMA):
        weights, rescale, row_max, row_sum = _softmax_of_block(
            scores, row_max, row_sum,
            block - BLOCK_N, begin, whole_begin, whole_end, first_row, offset,
            SCALE, SOFTCAP, WINDOW, GROUP, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        weights = weights.to(q.dtype)  # before the matmuls: across them, half as many registers
        k = load_block(
            keys, slot_stride, slots, batch, kv_head, block, end, BLOCK_N, 2 * HALF, DESCRIPTORS
        )
        scores = tl.dot(q, k.T, input_precision="ieee")
        previous = tl.maximum(block - BLOCK_N, first)
        v = load_block(
            values, slot_stride, slots, batch, kv_head, previous, end, BLOCK_N, 2 * HALF,
            DESCRIPTORS,
        )  # fmt: skip
        out = tl.dot(weights, v, out * rescale[:, None], input_precision="ieee")
    weights, rescale, row_max, row_sum = _softmax_of_block(
        scores, row_max, row_sum, last, begin, whole_begin, whole_end, first_row, offset,
        SCALE, SOFTCAP, WINDOW, GROUP, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    v = load_block(
        values, slot_stride, slots, batch, kv_head, last, end, BLOCK_N, 2 * HALF, DESCRIPTORS
    )
    out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")

    out = out / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    # cumsum, not arange: the rows of arange, above, would stay in 16 registers through the loop.
    row = first_row - 1 + tl.cumsum(tl.full([BLOCK_M], 1, tl.int32), 0)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    out_row = (((batch.to(tl.int64) * t + token) * heads + head) * (2 * HALF))[:, None]
    tl.store(out_ptr + out_row + channel, out, mask=(token < t)[:, None])


def tile(rows: int, heads: int, d: int, itemsize: int, gpu: Gpu) -> dict[str, int]:
    """Rows, keys, warps and stages, for `rows` in each of `heads`: what fits in shared memory (q,
    and two stages of k and v), does not spill registers in the loop, and gives every multiprocessor
    work."""
    if itemsize == 4:  # no tensor cores
        block_m, block_n, num_warps = 16 if rows <= 16 else 32, 16, 8
    elif rows <= 16:
        block_m, block_n, num_warps = 16, 32, 8
    elif gpu.shared_memory < 200_000:
        block_m, block_n, num_warps = 64, 32 if d == 256 else 64, 8
    elif triton.cdiv(rows, 128) * heads < 2 * gpu.multiprocessors:
        block_m, block_n, num_warps = 64, 32 if d == 256 else 64, 4  # two tiles a multiprocessor
    else:
        block_m, block_n, num_warps = 128, 64, 8
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": 2}


@op(fake=lambda q, *_, **__: torch.empty_like(q, memory_format=torch.contiguous_format))
def attention(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor | None, sin: Tensor | None,
    query_offset: Tensor, norm_weight: Tensor | None = None, *, scale: float,
    left_padding: Tensor | None = None, window: int | None = None, softcap: float | None = None,
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Causal attention of t queries over a cache. Falls back to the reference off the GPU."""
    b, t, heads, d = q.shape
    _, n, slots, _ = keys.shape
    assert keys.shape == values.shape == (b, n, slots, d), (
        f"{tuple(keys.shape)=}, {tuple(q.shape)=}"
    )
    assert heads % n == 0, f"{heads} query heads are not a multiple of {n} kv heads"
    for angles in (cos, sin):
        assert angles is None or (angles.shape == (b, t, d // 2) and angles.dtype == torch.float32)
        assert angles is None or angles.is_contiguous()
    assert (cos is None) == (sin is None) and (norm_weight is None or cos is not None)
    for bound in (query_offset, query_offset if left_padding is None else left_padding):
        assert bound.shape == (b,) and bound.dtype == torch.int32 and bound.is_contiguous()
    assert q.dtype == keys.dtype == values.dtype, f"{q.dtype=}, {keys.dtype=}, {values.dtype=}"
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    if not runs_triton(q):
        return attention_reference(
            q, keys, values, cos, sin, query_offset, norm_weight,
            scale=scale, left_padding=left_padding, window=window, softcap=softcap, eps=eps,
        )  # fmt: skip

    assert d in HEAD_DIMS, f"head_dim must be one of {HEAD_DIMS}: {d=}"
    assert q.stride(3) == keys.stride(3) == 1 and keys.stride() == values.stride()
    assert scale > 0 and window != 0 and softcap != 0
    assert q.is_cuda or q.dtype != torch.bfloat16, "the interpreter multiplies bf16 as integers"
    rows = t * (heads // n)
    limits = gpu(q.device)
    blocks = tile(rows, n * b, d, q.element_size(), limits)
    blocks["DESCRIPTORS"] = rows > 16 and limits.can_describe(keys, values)
    blocks = launch_config("attention", blocks)
    blocks["DESCRIPTORS"] &= slots % blocks["BLOCK_N"] == 0  # else one straddles the ring's ends
    blocks["WGMMA"] = limits.capability == 90 and blocks["BLOCK_M"] >= 64  # wgmma takes 64 rows
    rings: list[Any] = [keys, values]
    if blocks["DESCRIPTORS"]:
        rings = [TensorDescriptor.from_tensor(x, [1, 1, blocks["BLOCK_N"], d]) for x in rings]
    _attention_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]), n, b)](
        q, *rings, cos, sin, query_offset, left_padding, norm_weight, out,
        *q.stride()[:3], *keys.stride()[:3], t, slots,
        SCALE=scale, SOFTCAP=softcap or 0.0, WINDOW=window or 0, EPS=eps,
        HAS_NORM=norm_weight is not None, GROUP=heads // n, HALF=d // 2, **blocks,
    )  # fmt: skip
    return out
