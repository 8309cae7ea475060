"""Compares attention and rotary_write with a plain fp64 softmax over keys sorted by position."""

import torch
from oracles import angles, normed, normed_and_rotated, softmax_attention
from tolerances import assert_rounded, attention_roundings

from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.rotary import rotary_write

D = 32


def check(
    device,
    dtype,
    *,
    t,
    past=(0,),
    n=1,
    m=1,
    window=None,
    softcap=None,
    norm=False,
    offset=1.0,
    v_norm=False,
    k_eq_v=False,
    last=None,
    spare=0,
    multiple=1,
    d=D,
    seed=0,
):
    """Compares both ops with fp64, for t new tokens after past[row] tokens.

    If past[row] is negative, the row's new tokens begin with -past[row] tokens of left padding.
    With `last`, only the last new tokens are queries, as in Gemma 4's layers that share K and V.
    """
    torch.manual_seed(seed)
    b, start = len(past), torch.tensor(past, dtype=torch.int32, device=device)
    length = max(past) + t
    slots = max(length, 1) + spare
    last = last or t
    if window:  # the shortest ring that holds all visible keys, so that it wraps
        slots = min(slots, window + last - 1)
    slots = -(-slots // multiple) * multiple
    q_weight, k_weight = (torch.randn(d, device=device) / 2 if norm else None for _ in "qk")
    # k, v :: [b, length, n, d]: past and new tokens, indexed by position. v has strided heads.
    k, v = (torch.randn(b, length, n, x * d, device=device).to(dtype)[..., :d] for x in (1, 2))
    v = k if k_eq_v else v
    heads, of_norm = n * m, (1e-6, offset, v_norm)
    q = torch.randn(b, t, 3 * heads, d, device=device).to(dtype)[:, :, heads : 2 * heads]

    # Attention multiplies unwritten slots by 0, so they may hold any finite number.
    shape, unwritten = (2, b, slots, n, d), torch.finfo(dtype).max
    keys, values = torch.full(shape, unwritten, dtype=dtype, device=device).transpose(2, 3)
    for row, before in enumerate(past):
        for begin in range(0, max(before, 0), max(slots, 1)):
            part = slice(begin, min(begin + slots, before))
            at = torch.tensor([begin], dtype=torch.int32, device=device)
            rows = slice(row, row + 1)
            rotary_write(
                k[rows, part], v[rows, part], keys[rows], values[rows],
                *angles(at, part.stop - begin, d), at, k_weight, *of_norm,
            )  # fmt: skip
    cos, sin = angles(start, t, d)
    # Padding tokens repeat the row's first token.
    columns = start.long().unsqueeze(1) + torch.arange(t, device=device)
    index = columns.clamp(min=0)[..., None, None].expand(b, t, n, d)
    new_k, new_v = k.gather(1, index), v.gather(1, index)
    rotary_write(new_k, new_v, keys, values, cos, sin, start, k_weight, *of_norm)
    scale = 0.3 * (32 / d) ** 0.5  # so scores and errors do not depend on d
    q, cos, sin = q[:, t - last :], *(x[:, t - last :].contiguous() for x in (cos, sin))
    out = attention(
        q, keys, values, cos, sin, start + (t - last), q_weight,
        scale=scale, window=window, softcap=softcap, offset=offset,
    )  # fmt: skip
    assert out.dtype == dtype
    assert not out.isnan().any()
    t, past = last, [before + t - last for before in past]
    for row, before in enumerate(past):
        real = slice(max(-before, 0), t)
        assert (out[row, : real.start] == 0).all(), "outputs of padding must be zero"
        if real.start >= t:
            continue
        total = before + t
        q_positions = torch.arange(before + real.start, total, device=device)
        k_positions = torch.arange(total, device=device)
        exact, size = softmax_attention(
            normed_and_rotated(q[row, real], q_positions, q_weight, offset),
            normed_and_rotated(k[row, :total], k_positions, k_weight, offset).to(dtype),
            normed(v[row, :total]).to(dtype) if v_norm else v[row, :total],
            q_positions, k_positions, window, softcap, scale,
        )  # fmt: skip
        assert_rounded(out[row, real], exact, size=size, **attention_roundings(d, total, scale))


GEMMA_4 = {"window": 6, "norm": True, "offset": 0.0, "v_norm": True}
WIDE = {"d": 512, "norm": True, "offset": 0.0, "v_norm": True}
CASES = {
    "one token": {"t": 1},
    "prompt": {"t": 37},
    "whole blocks": {"t": 32, "m": 2},
    "one token past whole blocks": {"t": 33, "m": 2},
    "multi-query": {"t": 9, "m": 4},
    "grouped": {"t": 9, "n": 2, "m": 2},
    "odd group": {"t": 11, "n": 2, "m": 3},
    "multi-head": {"t": 9, "n": 4},
    "soft cap": {"t": 20, "softcap": 1.5},
    "q and k norm": {"t": 20, "norm": True},
    "wide heads": {"t": 20, "norm": True, "d": 128},
    "window smaller than a block": {"t": 50, "window": 5},
    "window of one": {"t": 6, "window": 1},
    "window larger than a block": {"t": 80, "window": 40},
    "window larger than the text": {"t": 10, "window": 64},
    "after a prefix": {"t": 7, "past": (30,)},
    "windowed chunk after a prefix": {"t": 20, "past": (30,), "window": 16},
    "decode in a full ring": {"t": 1, "past": (45,), "window": 16, "m": 4},
    "decode in a ring, ragged rows": {"t": 1, "past": (45, 3, 16, 15), "window": 16},
    "left padding": {"t": 12, "past": (0, -5, -11), "m": 2},
    "rows of padding only": {"t": 4, "past": (0, -4, -9)},
    "ragged decode, unused slots": {"t": 1, "past": (3, 40, 0), "spare": 9},
    "all options together": {
        "t": 21, "past": (0, -3), "n": 2, "m": 3, "window": 6, "softcap": 2.0, "norm": True,
    },
    "d 512": {"t": 20, "d": 512, "m": 2},
    "all options of Gemma 4 together": {"t": 21, "past": (0, -3), "n": 2, "m": 3, **GEMMA_4},
    "values are keys, d 512": {"t": 9, "past": (30, -2), "m": 16, "k_eq_v": True, **WIDE},
    "last query": {"t": 40, "last": 1, "m": 4},
    "last queries": {"t": 50, "past": (0, -3, 9), "last": 7, "n": 2, "m": 2},
    "last queries, windowed": {"t": 60, "past": (0, -11, 20), "last": 6, "window": 16, "m": 4},
    "last queries, one in the padding": {"t": 12, "past": (0, -9, -12), "last": 4, "window": 5},
    "last queries, d 512": {"t": 40, "past": (0, -3), "last": 18, "m": 2, **WIDE},
    # The texts below are longer than several blocks of every launch config.
    "long": {"t": 300, "past": (90, 0), "m": 2},
    "long, windowed": {"t": 300, "past": (0, 200), "m": 3, "window": 130},
    "long, padded": {"t": 290, "past": (0, -140), "m": 4, "window": 256, "softcap": 2.0},
    "chunk in a ring that wraps": {"t": 20, "past": (300, 7), "window": 40, "m": 2},
    "long chunk in a ring that wraps": {"t": 90, "past": (700, 655), "window": 150, "m": 2},
    "past and prompt at block edges": {"t": 129, "past": (127, 128), "m": 1},
    "long, last queries": {"t": 300, "past": (0, -40, 200), "last": 90, "m": 2},
    "long, last queries in a ring that wraps": {
        "t": 400, "past": (0, -40), "last": 33, "window": 130, "m": 3,
    },
}  # fmt: skip
