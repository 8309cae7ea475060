"""Causal attention of rotary-embedded queries over a cache: multi-query, grouped or multi-head.

    out = softmax(mask(cap(scale * rotate(rms_norm(q)) @ keysᵀ))) @ values
    cap(s) = softcap * tanh(s / softcap)

q            :: [b, t, heads, d], bf16 | fp16 | fp32, not rotated; a view of the qkv projection is
                fine
keys, values :: [b, n, slots, d], q.dtype, K rotated: a ring buffer, slot `p % slots` holds position
                p. The newest position is that of the last query. Unused slots hold finite numbers.
cos, sin     :: [b, t, d / 2], fp32, of the queries' positions; None: q is rotated already
query_offset :: [b], int32: position of each row's query 0; query i has position query_offset + i
left_padding :: [b], int32: positions below it are padding, and their output is 0; None: below zero
norm_weight  :: [d] or None: no norm (Gemma 3 and 4 normalize queries before they rotate them); the
                norm multiplies by offset + norm_weight
window       :: a query at p sees the keys p - window + 1 … p; None: 0 … p
returns      :: [b, t, heads, d], q.dtype

Scores, soft cap, mask and softmax are in fp32; rotated queries and weights are rounded to q.dtype
before the matmuls. Bound by compute for prompts: FLOPs = 4 * b * heads * d * (visible pairs); by
memory for one token: bytes = 2 * b * n * positions * d * itemsize. Walk-through step: attention.

The m = heads / n query heads of a kv head share its keys, so a program computes a tile of
tokens x m rows. Here: queries 21 … 26, window 18, BLOCK_N = 4; █: the query sees the key.

    position     4    8    12   16   20   24
    query 21     ████ ████ ████ ████ ██·· ····      first_block    =  4
    query 22     ·███ ████ ████ ████ ███· ····      unmasked_begin =  9
    query 23     ··██ ████ ████ ████ ████ ····      unmasked_end   = 19
    query 24     ···█ ████ ████ ████ ████ █···      last_block     = 24
    query 25     ···· ████ ████ ████ ████ ██··      newest         = 26, end = 27
    query 26     ···· ·███ ████ ████ ████ ███·
                 └─────────┴─────────┴────────
                   masked:  unmasked   masked:
                  window's             diagonal
                  far edge

A block is unmasked if it starts at unmasked_begin … unmasked_end - 1: every row sees all its keys,
and no mask is computed. Blocks before first_block and after last_block are not visited.

`oldest` is the oldest position in the ring that is not left padding. Here: slots = 16, newest = 37.

    slot         0       6             15 0          5
    position     16      22            31 32         37
                 ├╌╌╌╌╌╌╌┼──────────────┼─────────────┤
            revolution  oldest         wraps        newest

Slots 0 … 5 hold positions 32 … 37, no longer 16 … 21. Positions are counted from the start of the
ring revolution that holds the oldest position still in the ring, here 16. They are below 2 * slots.

The software pipeline of the loop over blocks:

1. An iteration computes softmax of the previous block, scores of this block, values of the previous
   block. Hopper's tensor cores then multiply values while the next iteration computes softmax.
2. The first iteration has no previous block: all its weights are masked to 0. One matmul of values
   per program is wasted, but a prologue in its place would keep more values in registers through
   the loop, which ptxas then spills.
3. num_stages = 2: the keys and values that the next iteration multiplies are copied to shared
   memory during this one.

Programs with the most blocks, those of the last tokens, start first.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels._ring import (
    HEAD_DIMS,
    AttentionSpec,
    HeadRing,
    Positions,
    RingStrides,
    heads_of,
    load_block,
    soft_cap,
    softmax_step,
    visible_keys,
)
from gemma_fast.kernels._triton import TensorDescriptor, tl, triton
from gemma_fast.kernels.cpu import attention as cpu_attention
from gemma_fast.kernels.cpu.calls import runs_c
from gemma_fast.kernels.launch import Gpu, gpu, launch_config, runs_triton
from gemma_fast.kernels.rmsnorm import rms_norm_reference
from gemma_fast.kernels.rotary import Rotary, rotate, rotate_rows


def attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor | None, sin: Tensor | None,
    query_offset: Tensor, norm_weight: Tensor | None = None, *, scale: float,
    left_padding: Tensor | None = None, window: int | None = None, softcap: float | None = None,
    eps: float = 1e-6, offset: float = 1.0,
) -> Tensor:  # fmt: skip
    b, t, heads, d = q.shape
    n, slots = keys.shape[1:3]
    visible = visible_keys(query_offset, left_padding, t, slots, window)
    q = q.float()
    q = q if norm_weight is None else rms_norm_reference(q, norm_weight, eps, offset)
    q = q if cos is None or sin is None else rotate(q, cos, sin)
    q = q.view(b, t, n, heads // n, d).permute(0, 2, 3, 1, 4)  # [b, n, m, t, d]
    scores = q.reshape(b, n, -1, d) @ keys.float().transpose(2, 3) * scale  # [b, n, m * t, slots]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(b, n, heads // n, t, slots)  # [b, n, m, t, slots]
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    sees_nothing = ~visible.any(-1)[:, None, None, :, None]  # [b, 1, 1, t, 1]
    weights = scores.softmax(-1).masked_fill(sees_nothing, 0)
    out = weights.view(b, n, -1, slots) @ values.float()  # [b, n, m * t, d]
    return out.view(b, heads, t, d).transpose(1, 2).to(values.dtype).contiguous()


class Span(NamedTuple):
    """Positions on the key axis of a tile, and the tile's first row; see the picture. Positions are
    counted from the start of the ring revolution."""

    oldest: Any
    first_block: Any
    unmasked_begin: Any
    unmasked_end: Any
    last_block: Any
    end: Any
    query: Any  # position of query 0 of the sequence
    first_row: Any  # first row of the tile


@triton.jit
def _span_of_tile(
    positions, batch, first_row, t, slots,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns the Span of the tile with rows first_row … first_row + BLOCK_M - 1."""
    query_offset = tl.load(positions.query + batch)
    oldest = tl.maximum(query_offset + t - slots, 0)  # the oldest position in the ring
    revolution = oldest // slots * slots
    if positions.left_padding is not None:
        oldest = tl.maximum(oldest, tl.load(positions.left_padding + batch))
    oldest -= revolution  # from here on positions are counted from the revolution's start
    query = query_offset - revolution
    first_query = query + first_row // SPEC.group
    end = query + tl.minimum((first_row + BLOCK_M - 1) // SPEC.group, t - 1) + 1
    first_block, unmasked_begin, unmasked_end = oldest, oldest, first_query + 2 - BLOCK_N
    if SPEC.window > 0:
        first_block = tl.maximum(first_query - SPEC.window + 1, oldest)
        unmasked_begin = tl.maximum(end - SPEC.window, oldest)
    first_block = first_block // BLOCK_N * BLOCK_N  # blocks start at multiples of BLOCK_N
    last_block = tl.maximum(end - 1, first_block) // BLOCK_N * BLOCK_N  # at least one block
    return Span(
        oldest, first_block, unmasked_begin, unmasked_end, last_block, end, query, first_row
    )


@triton.jit
def _softmax_of_block(
    scores,  # [BLOCK_M, BLOCK_N]: q @ kᵀ
    row_max,  # [BLOCK_M]
    row_sum,  # [BLOCK_M]
    block,  # position of the block's first key
    span,  # Span
    SPEC: tl.constexpr,
):
    """Soft cap, mask and online-softmax step of one block. Returns what softmax_step returns."""
    BLOCK_M: tl.constexpr = scores.shape[0]
    BLOCK_N: tl.constexpr = scores.shape[1]
    scores = soft_cap(scores, SPEC)
    if (block < span.unmasked_begin) | (block >= span.unmasked_end):
        key = block + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
        row = span.first_row + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
        query = span.query + row // SPEC.group
        visible = (key <= query) & (key >= span.oldest)  # [BLOCK_M, BLOCK_N]
        if SPEC.window > 0:
            visible &= key > query - SPEC.window
        scores = tl.where(visible, scores, float("-inf"))
    return softmax_step(scores, row_max, row_sum, SPEC)


@triton.jit(do_not_specialize=["t", "slots"])
def _attention_kernel(
    q,  # Heads [b, t, n * group, d]
    keys,  # [b, n, slots, d]: a tensor descriptor if DESCRIPTORS, else a pointer
    values,  # like keys
    strides,  # RingStrides
    rotary,  # Rotary, with cos and sin [b, t, d / 2] | None: q is rotated
    positions,  # Positions
    out_ptr,  # [b, t, n * group, d], contiguous
    t,
    slots,
    SPEC: tl.constexpr,  # AttentionSpec
    BLOCK_M: tl.constexpr,  # rows: group query heads of BLOCK_M / group tokens
    BLOCK_N: tl.constexpr,  # keys
    DESCRIPTORS: tl.constexpr,
    WGMMA: tl.constexpr,  # Hopper's asynchronous matmuls
):
    GROUP: tl.constexpr = SPEC.group
    D: tl.constexpr = SPEC.dim
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    mask = (token < t)[:, None]  # [BLOCK_M, 1]

    # Rotated queries are stored to the output and loaded again. Triton keeps a loaded operand in
    # shared memory, but a computed operand in 64 registers per thread; ptxas then has too few
    # registers and serializes Hopper's matmuls.
    batch_token = batch.to(tl.int64) * t + token  # int64: times heads * d passes 2**31
    q_ptr = q.ptr + batch.to(tl.int64) * q.batch_stride
    # [BLOCK_M, 1]
    q_row = (token.to(tl.int64) * q.token_stride + head.to(tl.int64) * q.head_stride)[:, None]
    out_row = ((batch_token * heads + head) * D)[:, None]  # [BLOCK_M, 1]
    channel = tl.arange(0, D)[None, :]  # [1, d]
    if rotary.cos is None:
        rotated = tl.load(q_ptr + q_row + channel, mask=mask, other=0.0)  # [BLOCK_M, d]
        tl.store(out_ptr + out_row + channel, rotated, mask=mask)
    else:
        angle = (batch_token * (D // 2))[:, None]  # [BLOCK_M, 1]
        rotate_rows(
            q_ptr + q_row, out_ptr + out_row, rotary.cos + angle, rotary.sin + angle,
            rotary.norm_weight, mask, mask, SPEC.eps, SPEC.offset, D // 2, 16,
        )  # fmt: skip
    tl.debug_barrier()
    q_tile = tl.load(out_ptr + out_row + channel, mask=mask, other=0.0)  # [BLOCK_M, d]

    span = _span_of_tile(positions, batch, first_row, t, slots, SPEC, BLOCK_M, BLOCK_N)
    if not DESCRIPTORS:
        first_slot = batch.to(tl.int64) * strides.batch + kv_head.to(tl.int64) * strides.head
        keys += first_slot
        values += first_slot
    k_ring = HeadRing(keys, strides.slot, slots, batch, kv_head)
    v_ring = HeadRing(values, strides.slot, slots, batch, kv_head)
    out = tl.zeros([BLOCK_M, D], tl.float32)
    if WGMMA:
        # A matmul initializes the accumulator to zeros. Otherwise ptxas places waits for matmuls at
        # the top of the loop, and softmax does not overlap them.
        no_rows, zeros = tl.zeros([BLOCK_M, 16], q_tile.dtype), tl.zeros([16, D], q_tile.dtype)
        if D < 512:
            out = tl.dot(no_rows, zeros)  # [BLOCK_M, d]
        else:
            # Triton divides the rows among all warps if it sees that a later matmul uses the
            # result. At d = 512, the warps divide columns, too, or the accumulator would not fit
            # in registers. A loop hides the later matmul. LLVM knows that it runs once.
            for _ in range(tl.minimum(tl.num_programs(0), 1)):
                out = tl.dot(no_rows, zeros)  # [BLOCK_M, d]
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a row may see no key
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # disable_licm: otherwise LLVM hoists the addresses of q_tile, which take 32 registers.
    for block in tl.range(span.first_block, span.last_block + 1, BLOCK_N, disable_licm=WGMMA):
        weights, rescale, row_max, row_sum = _softmax_of_block(
            scores, row_max, row_sum, block - BLOCK_N, span, SPEC
        )
        # Cast before the next matmul: 16-bit weights take half the registers across it.
        weights = weights.to(q_tile.dtype)  # [BLOCK_M, BLOCK_N]
        k = load_block(k_ring, block, span.end, BLOCK_N, D, DESCRIPTORS)  # [BLOCK_N, d]
        scores = tl.dot(q_tile, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        previous = tl.maximum(block - BLOCK_N, span.first_block)
        v = load_block(v_ring, previous, span.end, BLOCK_N, D, DESCRIPTORS)  # [BLOCK_N, d]
        out = tl.dot(weights, v, out * rescale[:, None], input_precision="ieee")  # [BLOCK_M, d]
    weights, rescale, row_max, row_sum = _softmax_of_block(
        scores, row_max, row_sum, span.last_block, span, SPEC
    )
    v = load_block(v_ring, span.last_block, span.end, BLOCK_N, D, DESCRIPTORS)  # [BLOCK_N, d]
    # [BLOCK_M, d]
    out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")
    out = out / tl.where(row_sum == 0, 1.0, row_sum)[:, None]  # [BLOCK_M, d]
    # cumsum, not arange: the compiler would keep the row numbers of the first arange, above, in 14
    # registers through the loop.
    row = first_row - 1 + tl.cumsum(tl.full([BLOCK_M], 1, tl.int32), 0)  # [BLOCK_M]
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    out_row = (((batch.to(tl.int64) * t + token) * heads + head) * D)[:, None]  # [BLOCK_M, 1]
    tl.store(out_ptr + out_row + channel, out, mask=(token < t)[:, None])


def default_config(rows: int, heads: int, d: int, itemsize: int, gpu: Gpu) -> dict[str, int]:
    """Returns the launch config for `rows` rows in each of `heads` kv heads. Operands must fit in
    shared memory, and no register may be spilled in the loop. Short prompts get small tiles, so
    that more multiprocessors have work."""
    if itemsize == 4:  # no tensor cores
        narrow = rows <= 16 or (d == 512 and gpu.shared_memory < 160_000)
        block_m, block_n, num_warps = 16 if narrow else 32, 16, 8
    elif rows <= 16:
        block_m, block_n, num_warps = 16, 32, 8
    elif d == 512:
        block_m, block_n, num_warps = 64, 32 if gpu.shared_memory > 160_000 else 16, 8
    elif gpu.shared_memory < 200_000:
        block_m, block_n, num_warps = 64, 32 if d == 256 else 64, 8
    elif triton.cdiv(rows, 128) * heads < 2 * gpu.multiprocessors:
        block_m, block_n, num_warps = 64, 32 if d == 256 else 64, 4  # two programs fit
    else:
        block_m, block_n, num_warps = 128, 64, 8
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": 2}


@op(fake=lambda q, *_, **__: torch.empty_like(q, memory_format=torch.contiguous_format))
def attention(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor | None, sin: Tensor | None,
    query_offset: Tensor, norm_weight: Tensor | None = None, *, scale: float,
    left_padding: Tensor | None = None, window: int | None = None, softcap: float | None = None,
    eps: float = 1e-6, offset: float = 1.0,
) -> Tensor:  # fmt: skip
    """Causal attention of t queries over a cache. Runs the reference where Triton does not run."""
    b, t, heads, d = q.shape
    _, n, slots, _ = keys.shape
    assert keys.shape == values.shape == (b, n, slots, d), (
        f"{tuple(keys.shape)=}, {tuple(q.shape)=}"
    )
    assert heads % n == 0, f"{heads} query heads are not a multiple of {n} kv heads"
    assert (cos is None) == (sin is None), "give cos and sin, or neither"
    assert norm_weight is None or cos is not None, "norm_weight needs cos and sin"
    for name, x, shape, dtype in (
        ("cos", cos, (b, t, d // 2), torch.float32), ("sin", sin, (b, t, d // 2), torch.float32),
        ("query_offset", query_offset, (b,), torch.int32),
        ("left_padding", left_padding, (b,), torch.int32),
    ):  # fmt: skip
        assert x is None or (x.shape == shape and x.dtype == dtype and x.is_contiguous()), (
            f"{name} must be contiguous, {shape}, {dtype}: {tuple(x.shape)=}, {x.dtype=}"
        )
    assert q.dtype == keys.dtype == values.dtype, f"{q.dtype=}, {keys.dtype=}, {values.dtype=}"
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    if not runs_triton(q):
        options: dict[str, Any] = {
            "scale": scale, "left_padding": left_padding, "window": window, "softcap": softcap,
            "eps": eps, "offset": offset,
        }  # fmt: skip
        inputs = q, keys, values, cos, sin, query_offset, norm_weight
        contiguous = q.stride(3) == keys.stride(3) == 1 and keys.stride() == values.stride()
        if runs_c(q) and contiguous:
            return cpu_attention.attention(*inputs, **options)
        return attention_reference(*inputs, **options)

    assert d in HEAD_DIMS, f"head_dim must be one of {HEAD_DIMS}: {d=}"
    assert q.stride(3) == keys.stride(3) == 1 and keys.stride() == values.stride()
    assert scale > 0 and window != 0 and softcap != 0
    assert q.is_cuda or q.dtype != torch.bfloat16, "the interpreter multiplies bf16 as integers"
    rows, limits = t * (heads // n), gpu(q.device)
    config = default_config(rows, n * b, d, q.element_size(), limits)
    config["DESCRIPTORS"] = rows > 16 and limits.can_describe(keys, values)
    config = launch_config("attention", config)
    config["DESCRIPTORS"] &= slots % config["BLOCK_N"] == 0  # else a block straddles the ring's end
    config["WGMMA"] = limits.capability == 90 and config["BLOCK_M"] >= 64  # wgmma has 64 rows
    rings: list[Any] = [keys, values]
    if config["DESCRIPTORS"]:
        rings = [TensorDescriptor.from_tensor(x, [1, 1, config["BLOCK_N"], d]) for x in rings]
    spec = AttentionSpec(heads // n, d, scale, softcap or 0.0, window or 0, eps, offset)
    _attention_kernel[(triton.cdiv(rows, config["BLOCK_M"]), n, b)](
        heads_of(q), *rings, RingStrides(*keys.stride()[:3]), Rotary(cos, sin, norm_weight),
        Positions(query_offset, left_padding), out, t, slots, SPEC=spec, **config,
    )  # fmt: skip
    return out
