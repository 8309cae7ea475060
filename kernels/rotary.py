"""Rotary embedding and KV cache write: K is normalized (Gemma 3 and 4) and rotated; V is copied, or
normalized (Gemma 4).

    keys[:, :, slot] = rotate(rms_norm(k));  slot = position % slots
    values[:, :, slot] = v, or with v_norm v / rms(v)

k, v         :: [b, t, n, d], bf16 | fp16 | fp32; views of the qkv projection are fine
keys, values :: [b, n, slots, d], a ring buffer, written in place
cos, sin     :: [b, t, d / 2], fp32, of the angles position * theta^(-2i / d)
query_offset :: [b], int32: position of each row's token 0; token i has position query_offset + i.
                Positions below zero are left padding.
norm_weight  :: [d] or None: no norm; the norm multiplies by offset + norm_weight
v_norm       :: normalize V over d, without weights

Channel i is rotated with channel i + d / 2, in fp32; K and V are rounded once, at the store. If
there are more tokens than slots, the ring holds the last ones. k and v may be the same heads, as in
Gemma 4's layers whose values are their keys.
Bound by memory: bytes = 4 * k.numel() * itemsize + 4 * b * t * d. Walk-through step: rotary
embedding, KV cache.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels._ring import RingStrides, heads_of
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.launch import launch_config, runs_triton
from gemma_fast.kernels.rmsnorm import add_offset, rms_norm_reference


class Rotary(NamedTuple):
    """Pointers to rotary angles and norm weights."""

    cos: Any  # fp32, rows of d / 2, contiguous | None: heads are rotated already
    sin: Any  # like cos
    norm_weight: Any  # [d] | None: no norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x :: [b, t, heads, d] by the angles of cos and sin :: [b, t, d / 2], in fp32."""
    x1, x2 = x.float().chunk(2, dim=-1)  # [b, t, heads, d / 2]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [b, t, 1, d / 2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)  # [b, t, heads, d]


def rotary_write_reference(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor,
    query_offset: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6,
    offset: float = 1.0, v_norm: bool = False,
) -> None:  # fmt: skip
    b, t, _, _ = k.shape
    slots = keys.shape[2]
    if norm_weight is not None:
        k = rms_norm_reference(k.float(), norm_weight, eps, offset)
    if v_norm:
        v = rms_norm_reference(v, None, eps)
    k = rotate(k, cos, sin).to(keys.dtype)
    kept = torch.arange(max(t - slots, 0), t, device=k.device)
    # A row with positions below zero has no earlier tokens, so these slots are still unused.
    slot = (query_offset.unsqueeze(1) + kept) % slots  # [b, kept]
    row = torch.arange(b, device=k.device).unsqueeze(1)  # [b, 1]
    keys[row, :, slot] = k[:, -slots:]
    values[row, :, slot] = v[:, -slots:]


@triton.jit
def normalize_rows(x, EPS: tl.constexpr):
    """Returns the RMSNorm, without weights, of rows x :: [rows, dim], in fp32."""
    x = x.to(tl.float32)
    square_sum = tl.sum(x * x, axis=1, keep_dims=True)  # [rows, 1]
    return x * tl.rsqrt(square_sum / x.shape[1] + EPS)


@triton.jit
def rotate_rows(
    x_ptr,  # [rows, 1]: start of each row of x
    out_ptr,  # [rows, 1]: start of each row of the output
    cos_ptr,  # [rows, 1]: start of each row of cos
    sin_ptr,  # [rows, 1]: start of each row of sin
    norm_weight_ptr,  # [d] | None: no norm
    mask,  # [rows, 1]: rows that exist
    kept,  # [rows, 1]: rows that are stored
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,  # the norm multiplies by OFFSET + norm weight
    HALF: tl.constexpr,  # d / 2
    CHUNK: tl.constexpr,  # channels of each half per iteration; bounds the registers
):
    """Normalizes (if there is a norm weight) and rotates rows of heads, from x_ptr to out_ptr."""
    chunk = tl.arange(0, CHUNK)[None, :]  # [1, CHUNK]
    if norm_weight_ptr is not None:
        square_sum = tl.zeros([mask.shape[0], 1], tl.float32)  # [rows, 1]
        for i in tl.static_range(0, 2 * HALF, CHUNK):
            x = tl.load(x_ptr + i + chunk, mask=mask, other=0.0).to(tl.float32)  # [rows, CHUNK]
            square_sum += tl.sum(x * x, axis=1, keep_dims=True)  # [rows, 1]
        inv_rms = tl.rsqrt(square_sum / (2 * HALF) + EPS)
    for i in tl.static_range(0, HALF, CHUNK):
        x1 = tl.load(x_ptr + i + chunk, mask=mask, other=0.0).to(tl.float32)  # [rows, CHUNK]
        x2 = tl.load(x_ptr + HALF + i + chunk, mask=mask, other=0.0).to(tl.float32)
        if norm_weight_ptr is not None:
            x1 *= inv_rms * add_offset(tl.load(norm_weight_ptr + i + chunk), OFFSET)
            x2 *= inv_rms * add_offset(tl.load(norm_weight_ptr + HALF + i + chunk), OFFSET)
        cos = tl.load(cos_ptr + i + chunk, mask=mask, other=0.0)  # [rows, CHUNK]
        sin = tl.load(sin_ptr + i + chunk, mask=mask, other=0.0)
        tl.store(out_ptr + i + chunk, x1 * cos - x2 * sin, mask=kept)
        tl.store(out_ptr + HALF + i + chunk, x2 * cos + x1 * sin, mask=kept)


@triton.jit(do_not_specialize=["t", "slots"])
def _rotary_write_kernel(
    k,  # Heads [b, t, n, d]
    v,  # Heads [b, t, n, d]
    keys_ptr,  # [b, n, slots, d]
    values_ptr,  # [b, n, slots, d]
    strides,  # RingStrides
    rotary,  # Rotary, with cos and sin [b, t, HALF]
    query_offset_ptr,  # [b]
    t,
    slots,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    V_NORM: tl.constexpr,
    HALF: tl.constexpr,  # d / 2
    BLOCK: tl.constexpr,  # tokens
):
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]  # [BLOCK, 1]
    channel = tl.arange(0, 2 * HALF)[None, :]  # [1, d]
    mask = token < t
    position = tl.load(query_offset_ptr + batch) + token  # [BLOCK, 1]
    kept = mask & (position >= 0) & (token >= t - slots)
    slot = (position % slots).to(tl.int64)
    token = token.to(tl.int64)

    v_ptr = v.ptr + (batch * v.batch_stride + head * v.head_stride + token * v.token_stride)
    # V is loaded before K, and without the mask `kept`, so that one wait covers all loads.
    v_rows = tl.load(v_ptr + channel, mask=mask)  # [BLOCK, d]
    k_ptr = k.ptr + (batch * k.batch_stride + head * k.head_stride + token * k.token_stride)
    ring = batch * strides.batch + head * strides.head + slot * strides.slot  # [BLOCK, 1]
    angle = (batch * t + token) * HALF  # [BLOCK, 1]
    rotate_rows(
        k_ptr, keys_ptr + ring, rotary.cos + angle, rotary.sin + angle, rotary.norm_weight, mask,
        kept, EPS, OFFSET, HALF, HALF,
    )  # fmt: skip
    if V_NORM:
        v_rows = normalize_rows(v_rows, EPS)
    tl.store(values_ptr + ring + channel, v_rows, mask=kept)


def default_config(d: int) -> dict[str, int]:
    """Returns the launch config: so many tokens that a thread loads 16 bytes of each half. It does
    not depend on t, so one compiled kernel serves all prompts."""
    return {"BLOCK": max(2048 // d, 1), "num_warps": 4}


@op(fake=lambda *_: None, mutates_args=("keys", "values"))
def rotary_write(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor,
    query_offset: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6,
    offset: float = 1.0, v_norm: bool = False,
) -> None:  # fmt: skip
    """Writes rotated K, and V, of t tokens to the ring. Runs the reference where Triton does not
    run."""
    b, t, n, d = k.shape
    slots = keys.shape[2]
    assert v.shape == k.shape and keys.shape == values.shape == (b, n, slots, d)
    assert cos.shape == sin.shape == (b, t, d // 2) and query_offset.shape == (b,)
    assert k.dtype == v.dtype == keys.dtype == values.dtype, f"{k.dtype=}, {keys.dtype=}"
    assert cos.dtype == sin.dtype == torch.float32, f"{cos.dtype=}, {sin.dtype=}"
    assert query_offset.dtype == torch.int32, f"{query_offset.dtype=}"
    assert norm_weight is None or norm_weight.shape == (d,), f"{tuple(norm_weight.shape)=}, {d=}"
    if not k.numel():
        return None
    if not runs_triton(k):
        if calls.runs_c(k) and all(x.stride(3) == 1 for x in (k, v, keys, values)):
            norms: dict[str, Any] = {"eps": eps, "offset": offset, "query_offset": query_offset}
            calls.rotary(k, keys, cos, sin, norm_weight, **norms)
            calls.rotary(v, values, None, None, None, normed=v_norm, **norms)
            return None
        return rotary_write_reference(
            k, v, keys, values, cos, sin, query_offset, norm_weight, eps, offset, v_norm
        )

    assert d & (d - 1) == 0, f"head_dim must be a power of two: {d=}"
    assert k.stride(3) == v.stride(3) == keys.stride(3) == 1 and keys.stride() == values.stride()
    assert cos.is_contiguous() and sin.is_contiguous() and query_offset.is_contiguous()
    config = launch_config("rotary_write", default_config(d))
    _rotary_write_kernel[(triton.cdiv(t, config["BLOCK"]), n, b)](
        heads_of(k), heads_of(v), keys, values, RingStrides(*keys.stride()[:3]),
        Rotary(cos, sin, norm_weight), query_offset, t, slots,
        EPS=eps, OFFSET=offset, V_NORM=v_norm, HALF=d // 2, **config,
    )  # fmt: skip
    return None
