"""Decode attention: one new token per sequence attends to the cache.

    decode_attention  normalizes and rotates the token's q and k, and writes its k and v:
    q, k = rotate(rms_norm(q)), rotate(rms_norm(k));  slot = position % slots
    keys[:, :, slot] = k;  values[:, :, slot] = v, or with v_norm v / rms(v)
    split_attention   takes a q that is rotated and a cache that holds the token's k and v already
    both: out = softmax(cap(scale * q @ keysᵀ)) @ values, over the visible keys

qkv          :: [b, n * m + 2 * n, d], bf16 | fp16 | fp32: query heads, then keys, then values
heads        :: "qkv"; "qk": qkv has no values: v is k before its norm and rotation (Gemma 4);
                "q": qkv has only queries: another layer has written the token's k and v to the
                cache, and nothing is written (Gemma 4's shared layers)
q            :: [b, n * m, d], like qkv
keys, values :: [b, n, slots, d], qkv.dtype, K rotated: a ring buffer, slot `p % slots` holds
                position p; written in place. Unused slots hold finite numbers.
cos, sin     :: [positions, d / 2], fp32: row p belongs to position p
position     :: [b], int32, of the new token. Below zero: padding; its output is 0, nothing is
                written
left_padding :: [b], int32: positions below it are padding, which no token sees; None: below zero
counter      :: [at least b * n], int32, zeros, and zeros again afterwards: counts programs
q_norm, k_norm :: [d] or None: no norm (Gemma 3 and 4 normalize q and k before they rotate them).
                heads = "q": k_norm is None
v_norm       :: normalize v over d, without weights, in fp32; rounded once, at the store (Gemma 4)
offset       :: the norms of q and k multiply by offset + weight
window       :: the token sees the keys position - window + 1 … position; None: all in the ring
pdl          :: start while the previous kernel still runs, if the GPU can (programmatic dependent
                launch, PDL). position, cos, sin and norms must be older than the previous kernel,
                which itself must wait for the one before it before it lets this one start
returns      :: [b, n * m, d], qkv.dtype

Numerics as in attention.py; partial results are in fp32 and merged in a fixed order.
Bound by memory: bytes = 2 * b * n * visible keys * d * itemsize. Walk-through step: attention.

The keys of one kv head are divided among programs ("splits"), each with the m query heads as rows.
Here: slots = 16, position = 37, no window, BLOCK_N = 4, and, to show it, two splits; █: visible.

    position     16     22   26   30   34   38
    block               ████ ████ ████ ████
                 │      └─ split 0┴─ split 1
                 │      oldest = 22           newest = 37, end = 38
             revolution = 16; the ring wraps at 32

`oldest` is position - window + 1, or the oldest position in the ring, or the end of left padding,
whichever comes last. Blocks are counted from it, so only the last block may be partly masked.
Positions are counted from the start of a ring revolution, as in attention.py.

The software pipeline:

1. position, cos, sin and norm weights are loaded before the wait for the previous kernel, so these
   loads overlap its tail. qkv, which that kernel writes, is loaded after the wait.
2. num_stages = 3: keys and values of the next two blocks are copied to shared memory while a block
   is computed; otherwise each block would wait for memory.
3. Each program stores its partial result and increments the kv head's counter. The last program to
   do so merges all splits, in the same launch: no second kernel waits for the slowest program.

The last split also writes the new token's K and V. The number of splits that have work is computed
on the GPU, from position, so one CUDA graph serves every length.
"""

from typing import Any

import torch
from torch import Tensor

from gemma_fast.kernels._new_token import (
    NewToken,
    QKRotary,
    load_new_token,
    load_new_token_rotary,
)
from gemma_fast.kernels._op import op, wait_for_previous_kernel
from gemma_fast.kernels._ring import (
    HEAD_DIMS,
    AttentionSpec,
    HeadRing,
    Heads,
    Positions,
    RingStrides,
    load_block,
    soft_cap,
    softmax_step,
)
from gemma_fast.kernels._split_kv import (
    Splits,
    count_splits,
    default_config,
    merge_chunk,
    merge_splits,
)
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.attention import attention_reference
from gemma_fast.kernels.cpu import attention as cpu_attention
from gemma_fast.kernels.cpu.calls import runs_c
from gemma_fast.kernels.launch import gpu, launch_config, runs_triton
from gemma_fast.kernels.rotary import rotary_write_reference


def head_counts(qkv: Tensor, keys: Tensor, heads: str) -> list[int]:
    """Returns how many query heads qkv :: [b, heads, d] has, and, unless heads = "q", how many key
    heads and value heads."""
    n = keys.shape[1]
    return [qkv.shape[1] - (len(heads) - 1) * n, *(n for _ in heads[1:])]


def decode_attention_reference(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, *, scale: float,
    heads: str = "qkv", v_norm: bool = False, offset: float = 1.0,
    window: int | None = None, softcap: float | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    q, *kv = qkv.unsqueeze(1).split(head_counts(qkv, keys, heads), dim=2)  # [b, 1, heads, d]
    cos, sin = (x[position.clamp(min=0).long()].unsqueeze(1) for x in (cos, sin))  # [b, 1, d / 2]
    if kv:
        padding = position < 0
        before = (keys[padding], values[padding]) if padding.any() else None  # copies
        k, v = kv[0], kv[-1]  # [b, 1, n, d]
        rotary_write_reference(k, v, keys, values, cos, sin, position, k_norm, eps, offset, v_norm)
        if before:
            keys[padding], values[padding] = before
    return attention_reference(
        q, keys, values, cos, sin, position, q_norm,
        scale=scale, window=window, softcap=softcap, eps=eps, offset=offset,
    ).squeeze(1)  # fmt: skip


@triton.jit(do_not_specialize=["slots"])
def _decode_attention_kernel(
    qkv,  # Heads [b, n * group + 2 * n, d], or only queries if rotary.cos is None
    keys_ptr,  # [b, n, slots, d]
    values_ptr,  # [b, n, slots, d]
    strides,  # RingStrides
    rotary,  # QKRotary
    positions,  # Positions
    splits,  # Splits
    out_ptr,  # [b, n * group, d], contiguous
    slots,
    SPEC: tl.constexpr,  # AttentionSpec
    TOKEN: tl.constexpr,  # NewToken | None: the input has only queries, rotated already
    BLOCK_M: tl.constexpr,  # rows: group query heads and the new key
    BLOCK_N: tl.constexpr,  # keys
    CHUNK: tl.constexpr,  # splits merged at a time
    MERGE_COST: tl.constexpr,  # keys: see count_splits
    PDL: tl.constexpr,
):
    GROUP: tl.constexpr = SPEC.group
    D: tl.constexpr = SPEC.dim
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    split, max_splits, n = tl.program_id(0), tl.num_programs(0), tl.num_programs(1)
    position = tl.load(positions.query + batch)
    # Visible keys are oldest … end - 1, counted from the start of the ring revolution.
    revolution = tl.maximum(position + 1 - slots, 0) // slots * slots
    end = position + 1 - revolution
    oldest = tl.maximum(end - (tl.minimum(slots, SPEC.window) if SPEC.window > 0 else slots), 0)
    if positions.left_padding is not None:
        oldest = tl.maximum(oldest, tl.load(positions.left_padding + batch) - revolution)
    blocks = tl.maximum(tl.cdiv(end - oldest, BLOCK_N), 1)  # a padding row has one, to store zeros
    # count_splits assumes that the ring is full. This uses the number of keys visible now.
    balanced = tl.sqrt((MERGE_COST * tl.maximum(end - oldest, 0)).to(tl.float32)) / BLOCK_N
    blocks_per_split = tl.maximum(tl.cdiv(blocks, max_splits), (balanced + 0.5).to(tl.int32))
    active = tl.cdiv(blocks, blocks_per_split)
    if split >= active:
        return

    row, channel = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, D)[None, :]  # [BLOCK_M, 1], [1, d]
    is_query = row < GROUP
    qkv_ptr = qkv.ptr + batch * qkv.batch_stride
    keys_ptr += batch * strides.batch + kv_head * strides.head
    values_ptr += batch * strides.batch + kv_head * strides.head
    if TOKEN is None:
        wait_for_previous_kernel(PDL)
        q_ptr = qkv_ptr + (kv_head * GROUP + row) * qkv.head_stride + channel
        q = tl.load(q_ptr, mask=is_query, other=0.0)  # [BLOCK_M, d]
    else:
        # The new key is a row of the queries' tile, and rotated with them. Its scores are not used.
        loaded = load_new_token_rotary(rotary, position, row, SPEC)
        wait_for_previous_kernel(PDL)
        HAS_NORM: tl.constexpr = rotary.q_norm is not None
        q, new_v = load_new_token(
            qkv_ptr, qkv.head_stride, loaded, row, kv_head, n, SPEC, TOKEN, HAS_NORM
        )
        if TOKEN.heads != "q":
            slot = (position % slots).to(tl.int64) * strides.slot
            newest = (split == active - 1) & (position >= 0)
            tl.store(keys_ptr + slot + 0 * row + channel, q, mask=(row == GROUP) & newest)
            tl.store(values_ptr + slot + channel, new_v, mask=newest)
            tl.debug_barrier()  # only this program reads the new K and V in this launch

    out = tl.zeros([BLOCK_M, D], tl.float32)
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    keys = HeadRing(keys_ptr, strides.slot, slots, 0, 0)
    values = HeadRing(values_ptr, strides.slot, slots, 0, 0)
    begin = oldest + split * blocks_per_split * BLOCK_N
    for block in range(begin, tl.minimum(begin + blocks_per_split * BLOCK_N, end), BLOCK_N):
        k = load_block(keys, block, end, BLOCK_N, D, False)  # [BLOCK_N, d]
        scores = soft_cap(tl.dot(q, k.T, input_precision="ieee"), SPEC)  # [BLOCK_M, BLOCK_N]
        key = block + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
        scores = tl.where(key < end, scores, float("-inf"))
        weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, SPEC)
        v = load_block(values, block, end, BLOCK_N, D, False)  # [BLOCK_N, d]
        # [BLOCK_M, d]
        out = tl.dot(weights.to(q.dtype), v, out * rescale[:, None], input_precision="ieee")

    pair = batch * n + kv_head
    out_ptr += pair * (GROUP * D)
    cell = row * D + channel  # [BLOCK_M, d]
    if active == 1:
        out = out / tl.where(row_sum == 0, 1.0, row_sum)[:, None]  # [BLOCK_M, d]
        tl.store(out_ptr + cell, out, mask=is_query)
    else:
        partial_ptr = splits.partial + pair * max_splits * (GROUP * D)
        stats_ptr = splits.stats + pair * max_splits * (2 * GROUP)
        tl.store(partial_ptr + split * (GROUP * D) + cell, out, mask=is_query)
        stats = stats_ptr + split * (2 * GROUP) + row  # [BLOCK_M, 1]
        tl.store(stats, row_max[:, None], mask=is_query)
        tl.store(stats + GROUP, row_sum[:, None], mask=is_query)
        tl.debug_barrier()  # all threads have stored before one of them increments the counter
        before = tl.atomic_add(splits.counter + pair, 1, sem="acq_rel", scope="gpu")
        if before == active - 1:
            merge_splits(partial_ptr, stats_ptr, out_ptr, active, GROUP, D, CHUNK)
            tl.store(splits.counter + pair, 0)


def _launch(
    qkv: Tensor, keys: Tensor, values: Tensor, rotary: QKRotary, positions: Positions,
    counter: Tensor, spec: AttentionSpec, token: NewToken | None, pdl: bool,
) -> Tensor:  # fmt: skip
    b, n, slots, d = keys.shape
    out = torch.empty(b, n * spec.group, d, dtype=qkv.dtype, device=qkv.device)
    assert d in HEAD_DIMS, f"head_dim must be one of {HEAD_DIMS}: {d=}"
    assert qkv.stride(2) == keys.stride(3) == 1 and keys.stride() == values.stride()
    contiguous = (rotary.cos, rotary.sin, *positions, counter)
    assert all(x is None or x.is_contiguous() for x in contiguous)
    assert spec.scale > 0
    assert qkv.is_cuda or qkv.dtype != torch.bfloat16, "the interpreter multiplies bf16 as integers"
    limits, visible = gpu(qkv.device), min(slots, spec.window or slots)
    config = default_config(b * n, spec.group, visible, d, qkv.element_size(), limits)
    config = launch_config("decode_attention", config)
    count = count_splits(b * n, config["MERGE_COST"], visible, limits)
    partial = torch.empty(b, n, count, spec.group, d, dtype=torch.float32, device=qkv.device)
    stats = torch.empty(b, n, count, 2, spec.group, dtype=torch.float32, device=qkv.device)
    batch_stride, head_stride, _ = qkv.stride()
    _decode_attention_kernel[(count, n, b)](
        Heads(qkv, batch_stride, None, head_stride), keys, values, RingStrides(*keys.stride()[:3]),
        rotary, positions, Splits(partial, stats, counter), out, slots,
        SPEC=spec, TOKEN=token, CHUNK=merge_chunk(spec.group, d, config["num_warps"]),
        **config, **limits.pdl_options(pdl),
    )  # fmt: skip
    return out


@op(
    fake=lambda qkv, keys, *_, heads="qkv", **__: qkv.new_empty(
        qkv.shape[0], head_counts(qkv, keys, heads)[0], qkv.shape[2]
    ),
    mutates_args=("keys", "values", "counter"),
)
def decode_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    counter: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None, *, scale: float,
    heads: str = "qkv", v_norm: bool = False, offset: float = 1.0,
    window: int | None = None, softcap: float | None = None, eps: float = 1e-6,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of one new token per sequence, whose K and V are written to the cache. Runs the
    reference where Triton does not run."""
    assert heads in ("qkv", "qk", "q"), f"{heads=}"
    n, slots = keys.shape[1:3]
    b, queries, d = qkv.shape[0], head_counts(qkv, keys, heads)[0], qkv.shape[2]
    assert keys.shape == values.shape == (b, n, slots, d), f"{tuple(keys.shape)=}, {qkv.shape=}"
    assert queries > 0 and queries % n == 0, (
        f"{queries} query heads are not a multiple of {n} kv heads"
    )
    assert cos.shape == sin.shape == (cos.shape[0], d // 2) and position.shape == (b,)
    assert qkv.dtype == keys.dtype == values.dtype, f"{qkv.dtype=}, {keys.dtype=}, {values.dtype=}"
    assert cos.dtype == sin.dtype == torch.float32
    assert position.dtype == counter.dtype == torch.int32 and counter.numel() >= b * n
    if heads == "q":
        assert k_norm is None, "k_norm needs a key"
    else:
        assert (q_norm is None) == (k_norm is None), "norm q and k, or neither"
    assert all(x is None or (x.shape == (d,) and x.stride(0) == 1) for x in (q_norm, k_norm))
    if not qkv.numel():
        return qkv.new_empty(b, queries, d)
    options: dict[str, Any] = {
        "scale": scale, "heads": heads, "v_norm": v_norm, "offset": offset, "window": window,
        "softcap": softcap, "eps": eps,
    }  # fmt: skip
    if not runs_triton(qkv):
        if runs_c(qkv) and keys.stride() == values.stride() and keys.stride(3) == 1:
            return cpu_attention.decode_attention(
                qkv, keys, values, cos, sin, position, q_norm, k_norm, queries=queries, **options
            )
        used = min(max(int(position.max()) + 1, 1), slots)  # slots from here on are unused
        return decode_attention_reference(
            qkv, keys[:, :, :used], values[:, :, :used], cos, sin, position, q_norm, k_norm,
            **options,
        )  # fmt: skip

    assert window != 0 and softcap != 0
    spec = AttentionSpec(queries // n, d, scale, softcap or 0.0, window or 0, eps, offset)
    rotary, token = QKRotary(cos, sin, q_norm, k_norm), NewToken(heads, v_norm and heads != "q")
    positions = Positions(position, None)
    return _launch(qkv, keys, values, rotary, positions, counter, spec, token, pdl)


@op(fake=lambda q, *_, **__: q.new_empty(q.shape), mutates_args=("counter",))
def split_attention(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, left_padding: Tensor | None,
    counter: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one query per sequence over a cache that already holds its key. Runs the
    reference of attention.py where Triton does not run."""
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
    assert window != 0 and softcap != 0
    spec = AttentionSpec(heads // n, d, scale, softcap or 0.0, window or 0, 0.0, 0.0)
    rotary, positions = QKRotary(None, None, None, None), Positions(position, left_padding)
    return _launch(q, keys, values, rotary, positions, counter, spec, None, pdl=False)
