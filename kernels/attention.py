"""Causal attention of rotary-embedded queries over a cache: multi-query, grouped or multi-head.

    out = softmax(mask(cap(scale * rotate(rms_norm(q)) @ keysᵀ))) @ values
    cap(s) = softcap * tanh(s / softcap)

q            :: [b, t, heads, d], bf16 | fp16 | fp32, not rotated; a view of the qkv product is fine
keys, values :: [b, n, slots, d], q.dtype, K rotated: a ring, slot `p % slots` holds position p, and
                the newest position is that of the last query
cos, sin     :: [b, t, d / 2], fp32, of the queries' positions
start        :: [b], int32: query i of a row stands at position start + i. Positions below zero are
                left padding; their rows are 0.
norm_weight  :: [d] or None: no norm (Gemma 3 normalises queries before it rotates them)
window       :: a query at p sees the keys p - window + 1 … p; None: 0 … p
returns      :: [b, t, heads, d], q.dtype

Scores, cap, mask and softmax are in fp32; rotated queries and weights are rounded to q.dtype before
the products. The m = heads / n query heads of a kv head share its keys: a tile of the kernel is
tokens x m rows. The loop runs over the positions that its rows can see, and nothing else.
Bound by compute for prompts: FLOPs = 4 * b * heads * d * (visible pairs); by memory for one token:
bytes = 2 * b * n * positions * d * itemsize. Walk-through step: attention.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels._triton import knobs, tl, triton
from gemma_fast.kernels.rmsnorm import rms_norm_reference
from gemma_fast.kernels.rotary import norm_rotate, rotate


def attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, start: Tensor,
    norm_weight: Tensor | None = None, *, scale: float, window: int | None = None,
    softcap: float | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    b, t, heads, d = q.shape
    n, slots = keys.shape[1:3]
    query = start.unsqueeze(1) + torch.arange(t, device=q.device)  # [b, t] positions
    last = query[:, -1:]
    key = last - (last - torch.arange(slots, device=q.device)) % slots  # [b, slots] positions
    query, key = query.unsqueeze(2), key.unsqueeze(1)
    visible = (key >= 0) & (key <= query)  # [b, t, slots]
    if window is not None:
        visible &= key > query - window

    q = q.float() if norm_weight is None else rms_norm_reference(q.float(), norm_weight, eps)
    q = rotate(q, cos, sin).view(b, t, n, heads // n, d).permute(0, 2, 3, 1, 4)  # [b, n, m, t, d]
    scores = q.reshape(b, n, -1, d) @ keys.float().transpose(2, 3) * scale  # [b, n, m * t, slots]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(b, n, heads // n, t, slots)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    weights = scores.softmax(-1).masked_fill(~visible.any(-1)[:, None, None, :, None], 0)
    out = weights.view(b, n, -1, slots) @ values.float()  # [b, n, m * t, d]
    return out.view(b, heads, t, d).transpose(1, 2).to(values.dtype).contiguous()


@triton.jit
def _attention_kernel(
    q_ptr,  # [b, t, n * GROUP, d]
    keys_ptr,  # [b, n, slots, d]
    values_ptr,  # [b, n, slots, d]
    cos_ptr,  # [b, t, HALF], contiguous
    sin_ptr,  # [b, t, HALF], contiguous
    start_ptr,  # [b]
    norm_weight_ptr,  # [d] | None
    out_ptr,  # [b, t, n * GROUP, d]
    q_batch_stride, q_token_stride, q_head_stride,
    keys_batch_stride, keys_head_stride, keys_slot_stride,
    values_batch_stride, values_head_stride, values_slot_stride,
    out_batch_stride, out_token_stride, out_head_stride,
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
):  # fmt: skip
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    mask = (token < t)[:, None]
    half = tl.arange(0, HALF)[None, :]
    start = tl.load(start_ptr + batch)
    query = (start + token)[:, None]

    q_ptr += batch * q_batch_stride
    q_ptr += (token.to(tl.int64) * q_token_stride + head * q_head_stride)[:, None]
    q1 = tl.load(q_ptr + half, mask=mask, other=0.0).to(tl.float32)
    q2 = tl.load(q_ptr + HALF + half, mask=mask, other=0.0).to(tl.float32)
    angle = (batch * t + token)[:, None] * HALF + half
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    dtype = keys_ptr.dtype.element_ty
    q1, q2 = norm_rotate(q1, q2, norm_weight_ptr, cos, sin, EPS, HALF, HAS_NORM)
    q1, q2 = q1.to(dtype), q2.to(dtype)

    last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, t - 1)
    end = start + last_token + 1
    begin = tl.maximum(start + t - slots, 0)  # the oldest position that the ring still holds
    if WINDOW > 0:
        begin = tl.maximum(begin, start + first_row // GROUP - WINDOW + 1)

    keys_ptr += batch * keys_batch_stride + kv_head * keys_head_stride
    values_ptr += batch * values_batch_stride + kv_head * values_head_stride
    channel = tl.arange(0, 2 * HALF)[None, :]
    out = tl.zeros([BLOCK_M, 2 * HALF], tl.float32)
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a row may see nothing at all
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for block in range(begin, end, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        held = (key < end)[:, None]
        slot = (key % slots).to(tl.int64)[:, None]
        k1 = tl.load(keys_ptr + slot * keys_slot_stride + half, mask=held, other=0.0)
        k2 = tl.load(keys_ptr + slot * keys_slot_stride + HALF + half, mask=held, other=0.0)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee") * SCALE
        if SOFTCAP > 0:
            scores = SOFTCAP * (2 * tl.sigmoid(scores * (2 / SOFTCAP)) - 1)  # SOFTCAP * tanh
        visible = key[None, :] <= query
        if WINDOW > 0:
            visible &= key[None, :] > query - WINDOW
        scores = tl.where(visible, scores * 1.4426950408889634, -1e30)  # log2(e), for exp2

        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.where(visible, tl.exp2(scores - new_max[:, None]), 0.0)
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        row_max = new_max
        v = tl.load(values_ptr + slot * values_slot_stride + channel, mask=held, other=0.0)
        out = tl.dot(weights.to(dtype), v, out * rescale[:, None], input_precision="ieee")

    out = out / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    out_ptr += batch * out_batch_stride
    out_ptr += (token.to(tl.int64) * out_token_stride + head * out_head_stride)[:, None]
    tl.store(out_ptr + channel, out, mask=mask)


def _tile(rows: int, d: int, itemsize: int) -> dict[str, int]:
    """Rows, keys, warps: q and two stages of k and v fit in 99 KB (8.6 and 8.9), nothing spills."""
    wide = d * itemsize >= 1024  # 256 channels in fp32
    block_m = 16 if rows <= 16 else 32 if wide else 64
    num_warps = 4 if block_m == 16 and not wide else 8
    return {"BLOCK_M": block_m, "BLOCK_N": 16 if wide else 32, "num_warps": num_warps}


@op(fake=lambda q, *_, **__: torch.empty_like(q, memory_format=torch.contiguous_format))
def attention(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, start: Tensor,
    norm_weight: Tensor | None = None, *, scale: float, window: int | None = None,
    softcap: float | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Causal attention of t queries over a cache. Falls back to the reference off the GPU."""
    b, t, heads, d = q.shape
    _, n, slots, _ = keys.shape
    assert keys.shape == values.shape == (b, n, slots, d), (
        f"{tuple(keys.shape)=}, {tuple(q.shape)=}"
    )
    assert heads % n == 0, f"{heads} query heads are not a multiple of {n} kv heads"
    assert cos.shape == sin.shape == (b, t, d // 2) and start.shape == (b,)
    if not (q.is_cuda or knobs.runtime.interpret):
        return attention_reference(
            q, keys, values, cos, sin, start, norm_weight,
            scale=scale, window=window, softcap=softcap, eps=eps,
        )  # fmt: skip

    assert d >= 32 and d & (d - 1) == 0, f"head_dim must be a power of two from 32: {d=}"
    assert q.stride(3) == keys.stride(3) == values.stride(3) == 1
    assert cos.is_contiguous() and sin.is_contiguous()
    assert q.is_cuda or q.dtype != torch.bfloat16, "the interpreter multiplies bf16 as integers"
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows = t * (heads // n)
    tile = _tile(rows, d, q.element_size())
    _attention_kernel[(triton.cdiv(rows, tile["BLOCK_M"]), n, b)](
        q, keys, values, cos, sin, start, norm_weight, out,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *out.stride()[:3], t, slots,
        SCALE=scale, SOFTCAP=softcap or 0.0, WINDOW=window or 0, EPS=eps,
        HAS_NORM=norm_weight is not None, GROUP=heads // n, HALF=d // 2,
        **tile, num_stages=2,
    )  # fmt: skip
    return out
