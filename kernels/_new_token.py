"""The new token of a decode step: its queries, key and value, normalized and rotated while they are
loaded, as in rotary.py."""

from typing import Any, NamedTuple

from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.rmsnorm import add_offset
from gemma_fast.kernels.rotary import normalize_rows


class QKRotary(NamedTuple):
    """Pointers to rotary angles and to the norm weights of q and k."""

    cos: Any  # [positions, d / 2], contiguous | None: the input has only queries, rotated already
    sin: Any  # like cos
    q_norm: Any  # [d] | None: no norm
    k_norm: Any  # [d] | None


class NewToken(NamedTuple):
    """Compile-time constants of a decode step's input: one `tl.constexpr`."""

    heads: str  # "qkv": queries, keys, values; "qk": the keys are the values, too; "q": queries
    v_norm: bool  # whether values are normalized


class NewTokenRotary(NamedTuple):
    """Values loaded from QKRotary for one token: its angles, and norm weights for each row of the
    tile. A query row has the norm weights of q, and the row of the key has those of k."""

    cos: Any  # [1, d / 2]
    sin: Any  # [1, d / 2]
    # Norm weights of the first half of the channels: [BLOCK_M, d / 2], or [1, d / 2] if all rows
    # are queries; 0.0: no norm.
    weight1: Any
    weight2: Any  # norm weights of the second half


@triton.jit
def load_new_token_rotary(rotary, position, row, SPEC: tl.constexpr):
    """Loads the NewTokenRotary at `position`. row :: [BLOCK_M, 1]: rows below `group` are queries,
    row `group` is the key."""
    HALF: tl.constexpr = SPEC.dim // 2
    half = tl.arange(0, HALF)[None, :]  # [1, d / 2]
    angle = tl.maximum(position, 0).to(tl.int64) * HALF + half
    cos, sin = tl.load(rotary.cos + angle), tl.load(rotary.sin + angle)  # [1, d / 2]
    weight1, weight2 = 0.0, 0.0
    if rotary.k_norm is not None:
        is_query = row < SPEC.group
        q_norm, k_norm = rotary.q_norm + half, rotary.k_norm + half
        weight1 = tl.where(is_query, tl.load(q_norm), tl.load(k_norm))  # [BLOCK_M, d / 2]
        weight2 = tl.where(is_query, tl.load(q_norm + HALF), tl.load(k_norm + HALF))
    elif rotary.q_norm is not None:
        weight1 = tl.load(rotary.q_norm + half)  # [1, d / 2]
        weight2 = tl.load(rotary.q_norm + HALF + half)
    return NewTokenRotary(cos, sin, weight1, weight2)


@triton.jit
def load_new_token(
    qkv_ptr,  # [n * group + 2 * n, d]: heads of one sequence
    head_stride,
    rotary,  # NewTokenRotary: loaded values
    row,  # [BLOCK_M, 1]
    kv_head, n,
    SPEC: tl.constexpr, TOKEN: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Loads the new token of a decode step for one kv head. Returns its queries (rows 0 to
    group - 1) and its key (row `group`), normalized and rotated, [BLOCK_M, d]; and its value,
    [1, d]. If TOKEN.heads = "q", there is no key, and the value is 0.0."""
    GROUP: tl.constexpr = SPEC.group
    D: tl.constexpr = SPEC.dim
    HALF: tl.constexpr = SPEC.dim // 2
    head = tl.where(row < GROUP, kv_head * GROUP + row, n * GROUP + kv_head)  # [BLOCK_M, 1]
    x_ptr = qkv_ptr + head * head_stride + tl.arange(0, HALF)[None, :]  # [BLOCK_M, d / 2]
    mask = row < GROUP if TOKEN.heads == "q" else row <= GROUP
    x1 = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, d / 2]
    x2 = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    v = 0.0
    if TOKEN.heads != "q":
        first: tl.constexpr = 1 if TOKEN.heads == "qkv" else 0
        v_ptr = qkv_ptr + (n * GROUP + n * first + kv_head) * head_stride
        v = tl.load(v_ptr + tl.arange(0, D)[None, :])  # [1, d]
        if TOKEN.v_norm:
            v = normalize_rows(v, SPEC.eps)
    if HAS_NORM:
        square_sum = tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True)  # [BLOCK_M, 1]
        inv_rms = tl.rsqrt(square_sum / D + SPEC.eps)
        x1 *= inv_rms * add_offset(rotary.weight1, SPEC.offset)
        x2 *= inv_rms * add_offset(rotary.weight2, SPEC.offset)
    x1, x2 = x1 * rotary.cos - x2 * rotary.sin, x2 * rotary.cos + x1 * rotary.sin
    rotated = tl.join(x1, x2).permute(0, 2, 1)  # [BLOCK_M, 2, d / 2]
    rotated = rotated.reshape(row.shape[0], D)  # [BLOCK_M, d]
    return rotated.to(qkv_ptr.dtype.element_ty), v
