"""Attention of one new token a sequence over the cache.

    decode_attention  its K and V are written into the cache:
    q, k = rotate(rms_norm(q)), rotate(rms_norm(k));  slot = position % slots
    keys[:, :, slot] = k;  values[:, :, slot] = v
    split_attention   q is rotated, and the cache holds its K and V, already
    both: out = softmax(cap(scale * q @ keysᵀ)) @ values, over the visible keys

qkv          :: [b, n * m + 2 * n, d], bf16 | fp16 | fp32: query heads, then keys, then values
q            :: [b, n * m, d], likewise
keys, values :: [b, n, slots, d], qkv.dtype, K rotated: the whole ring, written in place; slot
                `p % slots` holds position p. An unused slot holds finite numbers.
cos, sin     :: [positions, d / 2], fp32: row p is of position p
position     :: [b], int32, of the new token. Below zero: padding, its output 0, nothing written
left_padding :: [b], int32: positions below it are left padding, which none sees; None: below zero
counter      :: [at least b * n], int32, zeros, and left so: counts programs
q_norm, k_norm :: [d] or None: no norm (Gemma 3 normalises q and k before it rotates them)
window       :: the token sees the keys position - window + 1 … position; None: all in the ring
prefetch     :: start while the kernel ahead still runs, where the GPU can (programmatic dependent
                launch). position, cos, sin and norms are older than that kernel, and it starts
                others only when it has itself waited for the one ahead of it
returns      :: [b, n * m, d], qkv.dtype

Numerics as in attention.py; partial results are in fp32, joined in a fixed order. A kv head's keys
are dealt out to programs, whose tile has its m query heads as rows; the last to be done joins all.
Their shares are computed on the GPU, from position, so that a CUDA graph holds for every position.
Bound by memory: bytes = 2 * b * n * visible keys * d * itemsize. Walk-through step: attention.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._op import op, wait_for_previous_kernel
from gemma_fast.kernels._ring import HEAD_DIMS, load_block, soft_cap, softmax_step
from gemma_fast.kernels._split_kv import chunk, count_splits, join_splits, tile
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.attention import attention_reference
from gemma_fast.kernels.launch import gpu, launch_config, runs_triton
from gemma_fast.kernels.rotary import rotary_write_reference


def decode_attention_reference(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, *, scale: float,
    window: int | None = None, softcap: float | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    heads, n = qkv.shape[1], keys.shape[1]
    q, k, v = qkv.unsqueeze(1).split((heads - 2 * n, n, n), dim=2)  # [b, 1, heads, d]
    cos, sin = (x[position.clamp(min=0).long()].unsqueeze(1) for x in (cos, sin))  # [b, 1, d / 2]
    padding = position < 0
    before = (keys[padding], values[padding]) if padding.any() else None  # copies
    rotary_write_reference(k, v, keys, values, cos, sin, position, k_norm, eps)
    if before:
        keys[padding], values[padding] = before
    return attention_reference(
        q, keys, values, cos, sin, position, q_norm,
        scale=scale, window=window, softcap=softcap, eps=eps,
    ).squeeze(1)  # fmt: skip


@triton.jit
def _turn(
    qkv_ptr, head_stride, cos_ptr, sin_ptr, position, q_norm_ptr, k_norm_ptr,
    row, kv_head, n,
    EPS: tl.constexpr, HAS_NORM: tl.constexpr, PREFETCH: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A kv head's queries and, as row GROUP, its key, normalised and rotated; and its value."""
    D: tl.constexpr = 2 * HALF
    channel, half = tl.arange(0, D)[None, :], tl.arange(0, HALF)[None, :]
    mask, is_query = row <= GROUP, row < GROUP
    angle = tl.maximum(position, 0).to(tl.int64) * HALF + half
    cos, sin = tl.load(cos_ptr + angle), tl.load(sin_ptr + angle)
    if HAS_NORM:
        q_norm_ptr, k_norm_ptr = q_norm_ptr + half, k_norm_ptr + half
        weight1 = tl.where(is_query, tl.load(q_norm_ptr), tl.load(k_norm_ptr))
        weight2 = tl.where(is_query, tl.load(q_norm_ptr + HALF), tl.load(k_norm_ptr + HALF))
    wait_for_previous_kernel(PREFETCH)

    head = tl.where(is_query, kv_head * GROUP + row, n * GROUP + kv_head)
    x_ptr = qkv_ptr + head * head_stride + half
    x1 = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(qkv_ptr + (n * GROUP + n + kv_head) * head_stride + channel)
    if HAS_NORM:
        inv_rms = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / D + EPS)
        x1 *= inv_rms * (1 + weight1.to(tl.float32))
        x2 *= inv_rms * (1 + weight2.to(tl.float32))
    turned = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin).permute(0, 2, 1)
    return turned.reshape(mask.shape[0], D).to(qkv_ptr.dtype.element_ty), v


@triton.jit(do_not_specialize=["slots"])
def _decode_attention_kernel(
    qkv_ptr,  # [b, n * GROUP + 2 * n, d]
    keys_ptr, values_ptr,  # [b, n, slots, d]
    cos_ptr, sin_ptr,  # [positions, HALF], contiguous | None: only queries, that are rotated
    position_ptr,  # [b]
    left_padding_ptr,  # [b] | None
    counter_ptr,  # [b * n]
    q_norm_ptr, k_norm_ptr,  # [d] | None
    partial_ptr,  # [b, n, splits, GROUP, d], contiguous
    stats_ptr,  # [b, n, splits, 2, GROUP], contiguous
    out_ptr,  # [b, n * GROUP, d], contiguous
    qkv_batch_stride, qkv_head_stride,
    batch_stride, kv_head_stride, slot_stride,  # of keys and of values
    slots,
    SCALE: tl.constexpr, EPS: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,  # 0: none
    HAS_NORM: tl.constexpr, PREFETCH: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr,  # query heads per kv head; d / 2
    BLOCK_M: tl.constexpr,  # rows: GROUP query heads and the new key
    BLOCK_N: tl.constexpr,  # keys
    ROWS: tl.constexpr, CHUNK: tl.constexpr, JOIN: tl.constexpr,  # see _split_kv.py
):  # fmt: skip
    D: tl.constexpr = 2 * HALF
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    split, splits, n = tl.program_id(0), tl.num_programs(0), tl.num_programs(1)
    position = tl.load(position_ptr + batch)
    # The visible ones from begin to end are counted as _ring.py says.
    turn = tl.maximum(position + 1 - slots, 0) // slots * slots
    end = position + 1 - turn
    begin = tl.maximum(end - (tl.minimum(slots, WINDOW) if WINDOW > 0 else slots), 0)
    if left_padding_ptr is not None:
        begin = tl.maximum(begin, tl.load(left_padding_ptr + batch) - turn)
    blocks = tl.maximum(tl.cdiv(end - begin, BLOCK_N), 1)  # one for padding, too: it stores zeros
    # As count_splits has it, but of the keys that are there by now.
    balanced = tl.sqrt((JOIN * tl.maximum(end - begin, 0)).to(tl.float32)) / BLOCK_N
    blocks_per_split = tl.maximum(tl.cdiv(blocks, splits), (balanced + 0.5).to(tl.int32))
    active = tl.cdiv(blocks, blocks_per_split)
    if split >= active:
        return

    row, channel = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, D)[None, :]
    is_query = row < GROUP
    qkv_ptr += batch * qkv_batch_stride
    keys_ptr += batch * batch_stride + kv_head * kv_head_stride
    values_ptr += batch * batch_stride + kv_head * kv_head_stride
    if cos_ptr is None:
        wait_for_previous_kernel(PREFETCH)
        q_ptr = qkv_ptr + (kv_head * GROUP + row) * qkv_head_stride + channel
        q = tl.load(q_ptr, mask=is_query, other=0.0)
    else:
        # The new key is a row of the queries' tile: it is turned as they are, its scores are lost.
        q, v = _turn(
            qkv_ptr, qkv_head_stride, cos_ptr, sin_ptr, position, q_norm_ptr, k_norm_ptr,
            row, kv_head, n, EPS, HAS_NORM, PREFETCH, GROUP, HALF,
        )  # fmt: skip
        slot = (position % slots).to(tl.int64) * slot_stride
        newest = (split == active - 1) & (position >= 0)
        tl.store(keys_ptr + slot + 0 * row + channel, q, mask=(row == GROUP) & newest)
        tl.store(values_ptr + slot + channel, v, mask=newest)
        tl.debug_barrier()  # this program, and no other, reads them now

    out = tl.zeros([BLOCK_M, D], tl.float32)
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    share = begin + split * blocks_per_split * BLOCK_N
    for block in range(share, tl.minimum(share + blocks_per_split * BLOCK_N, end), BLOCK_N):
        k = load_block(keys_ptr, slot_stride, slots, 0, 0, block, end, BLOCK_N, D, False)
        scores = soft_cap(tl.dot(q, k.T, input_precision="ieee"), SCALE, SOFTCAP)
        key = block + tl.arange(0, BLOCK_N)[None, :]
        scores = tl.where((key >= begin) & (key < end), scores, float("-inf"))
        weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, SCALE, SOFTCAP)
        block_v = load_block(values_ptr, slot_stride, slots, 0, 0, block, end, BLOCK_N, D, False)
        out = tl.dot(weights.to(q.dtype), block_v, out * rescale[:, None], input_precision="ieee")

    pair = batch * n + kv_head
    out_ptr += pair * (GROUP * D)
    cell = row * D + channel
    if active == 1:
        out = out / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
        tl.store(out_ptr + cell, out, mask=is_query)
    else:
        partial_ptr += pair * splits * (GROUP * D)
        stats_ptr += pair * splits * (2 * GROUP)
        tl.store(partial_ptr + split * (GROUP * D) + cell, out, mask=is_query)
        stats = stats_ptr + split * (2 * GROUP) + row
        tl.store(stats, row_max[:, None], mask=is_query)
        tl.store(stats + GROUP, row_sum[:, None], mask=is_query)
        tl.debug_barrier()  # all threads have stored: one of them announces it
        before = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if before == active - 1:
            join_splits(partial_ptr, stats_ptr, out_ptr, active, GROUP, D, ROWS, CHUNK)
            tl.store(counter_ptr + pair, 0)


def _launch(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor | None, sin: Tensor | None,
    position: Tensor, left_padding: Tensor | None, counter: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, *, scale: float, window: int | None, softcap: float | None,
    eps: float, prefetch: bool,
) -> Tensor:  # fmt: skip
    (b, n, slots, d), heads = keys.shape, qkv.shape[1]
    if cos is not None:
        heads -= 2 * n
    out = torch.empty(b, heads, d, dtype=qkv.dtype, device=qkv.device)
    assert d in HEAD_DIMS, f"head_dim must be one of {HEAD_DIMS}: {d=}"
    assert qkv.stride(2) == keys.stride(3) == 1 and keys.stride() == values.stride()
    assert all(x is None or x.is_contiguous() for x in (cos, sin, position, left_padding, counter))
    assert scale > 0 and window != 0 and softcap != 0
    assert qkv.is_cuda or qkv.dtype != torch.bfloat16, "the interpreter multiplies bf16 as integers"
    limits, visible = gpu(qkv.device), min(slots, window or slots)
    blocks = tile(b * n, heads // n, visible, d, qkv.element_size(), limits)
    blocks = launch_config("decode_attention", blocks)
    splits = count_splits(b * n, blocks["JOIN"], visible, limits)
    partial = torch.empty(b, n, splits, heads // n, d, dtype=torch.float32, device=qkv.device)
    stats = torch.empty(b, n, splits, 2, heads // n, dtype=torch.float32, device=qkv.device)
    _decode_attention_kernel[(splits, n, b)](
        qkv, keys, values, cos, sin, position, left_padding, counter, q_norm, k_norm,
        partial, stats, out,
        *qkv.stride()[:2], *keys.stride()[:3], slots,
        SCALE=scale, SOFTCAP=softcap or 0.0, WINDOW=window or 0, EPS=eps,
        HAS_NORM=q_norm is not None, GROUP=heads // n, HALF=d // 2,
        CHUNK=chunk(blocks["ROWS"], d, blocks["num_warps"]),
        **blocks, **limits.overlap(prefetch),
    )  # fmt: skip
    return out


@op(
    fake=lambda qkv, keys, *_, **__: qkv.new_empty(
        qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1], qkv.shape[2]
    ),
    mutates_args=("keys", "values", "counter"),
)
def decode_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    counter: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None, *, scale: float,
    window: int | None = None, softcap: float | None = None, eps: float = 1e-6,
    prefetch: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of one new token a sequence, which joins the cache. Off the GPU, the reference."""
    n, slots = keys.shape[1:3]
    b, heads, d = qkv.shape[0], qkv.shape[1] - 2 * n, qkv.shape[2]
    assert keys.shape == values.shape == (b, n, slots, d), f"{tuple(keys.shape)=}, {qkv.shape=}"
    assert heads > 0 and heads % n == 0, f"{heads} query heads are not a multiple of {n} kv heads"
    assert cos.shape == sin.shape == (cos.shape[0], d // 2) and position.shape == (b,)
    assert qkv.dtype == keys.dtype == values.dtype, f"{qkv.dtype=}, {keys.dtype=}, {values.dtype=}"
    assert cos.dtype == sin.dtype == torch.float32
    assert position.dtype == counter.dtype == torch.int32 and counter.numel() >= b * n
    assert (q_norm is None) == (k_norm is None), "norm q and k, or neither"
    assert all(x is None or (x.shape == (d,) and x.stride(0) == 1) for x in (q_norm, k_norm))
    if not qkv.numel():
        return qkv.new_empty(b, heads, d)
    if not runs_triton(qkv):
        used = min(max(int(position.max()) + 1, 1), slots)  # until it wraps, a ring is its begin
        return decode_attention_reference(
            qkv, keys[:, :, :used], values[:, :, :used], cos, sin, position, q_norm, k_norm,
            scale=scale, window=window, softcap=softcap, eps=eps,
        )  # fmt: skip

    return _launch(
        qkv, keys, values, cos, sin, position, None, counter, q_norm, k_norm,
        scale=scale, window=window, softcap=softcap, eps=eps, prefetch=prefetch,
    )  # fmt: skip


@op(fake=lambda q, *_, **__: q.new_empty(q.shape), mutates_args=("counter",))
def split_attention(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, left_padding: Tensor | None,
    counter: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one query a sequence over a cache that holds its key. Off the GPU, the
    reference of attention.py."""
    (b, heads, d), (n, slots) = q.shape, keys.shape[1:3]
    assert keys.shape == values.shape == (b, n, slots, d), f"{tuple(keys.shape)=}, {q.shape=}"
    assert heads % n == 0, f"{heads} query heads are not a multiple of {n} kv heads"
    for bound in (position, position if left_padding is None else left_padding):
        assert bound.shape == (b,) and bound.dtype == torch.int32
    assert counter.dtype == torch.int32 and counter.numel() >= b * n
    assert q.dtype == keys.dtype == values.dtype, f"{q.dtype=}, {keys.dtype=}, {values.dtype=}"
    if not q.numel():
        return q.new_empty(q.shape)
    if not runs_triton(q):
        return attention_reference(
            q.unsqueeze(1), keys, values, None, None, position,
            scale=scale, left_padding=left_padding, window=window, softcap=softcap,
        ).squeeze(1)  # fmt: skip
    return _launch(
        q, keys, values, None, None, position, left_padding, counter, None, None,
        scale=scale, window=window, softcap=softcap, eps=0.0, prefetch=False,
    )  # fmt: skip
