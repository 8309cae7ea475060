"""Keys and values into the cache: K normalised (Gemma 3) and rotated by its position; V as it is.

    keys[:, :, slot] = rotate(rms_norm(k));  values[:, :, slot] = v;  slot = position % slots

k, v         :: [b, t, n, d], bf16 | fp16 | fp32; views of the qkv product are fine
keys, values :: [b, n, slots, d], a ring; written in place
cos, sin     :: [b, t, d / 2], fp32, of the angles position * theta^(-2i / d)
query_offset :: [b], int32: position of each row's token 0; token i has position query_offset + i.
                Positions below zero are left padding.
norm_weight  :: [d] or None: no norm

Rotary embedding turns channel i against i + d / 2, in fp32; K is rounded once, at the store.
Of more tokens than slots, the last ones stay.
Bound by memory: bytes = 4 * k.numel() * itemsize + 4 * b * t * d. Walk-through step: rotary
embedding, KV cache.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.launch import launch_config, runs_triton
from gemma_fast.kernels.rmsnorm import rms_norm_reference


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x :: [b, t, heads, d], turned by the angles of cos and sin :: [b, t, d / 2], in fp32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [b, t, 1, d / 2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def rotary_write_reference(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor,
    query_offset: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    b, t, _, _ = k.shape
    slots = keys.shape[2]
    if norm_weight is not None:
        k = rms_norm_reference(k.float(), norm_weight, eps)
    k = rotate(k, cos, sin).to(keys.dtype)
    kept = torch.arange(max(t - slots, 0), t, device=k.device)
    # Positions below zero land in slots that hold nothing yet: a row that has them has no past.
    slot = (query_offset.unsqueeze(1) + kept) % slots  # [b, kept]
    row = torch.arange(b, device=k.device).unsqueeze(1)
    keys[row, :, slot] = k[:, -slots:]
    values[row, :, slot] = v[:, -slots:]


@triton.jit
def rotate_rows(
    x_ptr,  # [rows, 1]: where each row of x begins
    out_ptr,  # [rows, 1]
    cos_ptr,  # [rows, 1]
    sin_ptr,  # [rows, 1]
    norm_weight_ptr,  # [d] | None
    mask,  # [rows, 1]: which rows there are
    kept,  # [rows, 1]: of those, which are written
    EPS: tl.constexpr,
    HALF: tl.constexpr,  # d / 2
    CHUNK: tl.constexpr,  # channels of each half at a time: what registers can hold
    HAS_NORM: tl.constexpr,
):
    """Rows from memory to memory: normalised if HAS_NORM, then rotated."""
    chunk = tl.arange(0, CHUNK)[None, :]
    if HAS_NORM:
        square_sum = tl.zeros([mask.shape[0], 1], tl.float32)
        for i in tl.static_range(0, 2 * HALF, CHUNK):
            x = tl.load(x_ptr + i + chunk, mask=mask, other=0.0).to(tl.float32)
            square_sum += tl.sum(x * x, axis=1, keep_dims=True)
        inv_rms = tl.rsqrt(square_sum / (2 * HALF) + EPS)
    for i in tl.static_range(0, HALF, CHUNK):
        x1 = tl.load(x_ptr + i + chunk, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + HALF + i + chunk, mask=mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            x1 *= inv_rms * (1 + tl.load(norm_weight_ptr + i + chunk).to(tl.float32))
            x2 *= inv_rms * (1 + tl.load(norm_weight_ptr + HALF + i + chunk).to(tl.float32))
        cos = tl.load(cos_ptr + i + chunk, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + i + chunk, mask=mask, other=0.0)
        tl.store(out_ptr + i + chunk, x1 * cos - x2 * sin, mask=kept)
        tl.store(out_ptr + HALF + i + chunk, x2 * cos + x1 * sin, mask=kept)


@triton.jit(do_not_specialize=["t", "slots"])
def _rotary_write_kernel(
    k_ptr,  # [b, t, n, d]
    v_ptr,  # [b, t, n, d]
    keys_ptr,  # [b, n, slots, d]
    values_ptr,  # [b, n, slots, d]
    cos_ptr,  # [b, t, HALF], contiguous
    sin_ptr,  # [b, t, HALF], contiguous
    query_offset_ptr,  # [b]
    norm_weight_ptr,  # [d] | None
    k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    batch_stride, head_stride, slot_stride,  # of keys and of values
    t,
    slots,
    EPS: tl.constexpr,
    HALF: tl.constexpr,  # d / 2
    BLOCK: tl.constexpr,  # tokens
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, 2 * HALF)[None, :]
    mask = token < t
    position = tl.load(query_offset_ptr + batch) + token
    kept = mask & (position >= 0) & (token >= t - slots)
    slot = (position % slots).to(tl.int64)
    token = token.to(tl.int64)

    v_ptr += batch * v_batch_stride + head * v_head_stride + token * v_token_stride
    v = tl.load(v_ptr + channel, mask=mask)  # now, and kept or not, so that all loads wait at once
    k_ptr += batch * k_batch_stride + head * k_head_stride + token * k_token_stride
    ring = batch * batch_stride + head * head_stride + slot * slot_stride
    angle = (batch * t + token) * HALF
    rotate_rows(
        k_ptr, keys_ptr + ring, cos_ptr + angle, sin_ptr + angle, norm_weight_ptr, mask, kept,
        EPS, HALF, HALF, HAS_NORM,
    )  # fmt: skip
    tl.store(values_ptr + ring + channel, v, mask=kept)


def tile(d: int) -> dict[str, int]:
    """Tokens, so that a thread loads 16 bytes of each half, and warps; the same for any t: one
    kernel."""
    return {"BLOCK": max(2048 // d, 1), "num_warps": 4}


@op(fake=lambda *_: None, mutates_args=("keys", "values"))
def rotary_write(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor,
    query_offset: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    """Writes t tokens' K, rotated, and V to their slots. Off the GPU, the reference."""
    b, t, n, d = k.shape
    slots = keys.shape[2]
    assert v.shape == k.shape and keys.shape == values.shape == (b, n, slots, d)
    assert cos.shape == sin.shape == (b, t, d // 2) and query_offset.shape == (b,)
    assert k.dtype == v.dtype == keys.dtype == values.dtype, f"{k.dtype=}, {keys.dtype=}"
    assert cos.dtype == sin.dtype == torch.float32 and query_offset.dtype == torch.int32
    if not k.numel():
        return None
    if not runs_triton(k):
        return rotary_write_reference(k, v, keys, values, cos, sin, query_offset, norm_weight, eps)

    assert d & (d - 1) == 0, f"head_dim must be a power of two: {d=}"
    assert k.stride(3) == v.stride(3) == keys.stride(3) == 1 and keys.stride() == values.stride()
    assert cos.is_contiguous() and sin.is_contiguous() and query_offset.is_contiguous()
    blocks = launch_config("rotary_write", tile(d))
    _rotary_write_kernel[(triton.cdiv(t, blocks["BLOCK"]), n, b)](
        k, v, keys, values, cos, sin, query_offset, norm_weight,
        *k.stride()[:3], *v.stride()[:3], *keys.stride()[:3], t, slots,
        EPS=eps, HALF=d // 2, HAS_NORM=norm_weight is not None, **blocks,
    )  # fmt: skip
    return None
