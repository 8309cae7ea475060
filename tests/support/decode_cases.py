"""Builds inputs of decode_attention, and compares its results with a plain fp64 softmax over keys
sorted by position."""

import torch
from oracles import angles, normed, normed_and_rotated, softmax_attention
from tolerances import assert_rounded, attention_roundings, norm_roundings, pair_size

from gemma_fast.kernels.decode_attention import decode_attention

D, SCALE = 32, 0.3


def table(positions, d, device):
    """Returns cos and sin :: [positions, d / 2] of positions 0, 1, …"""
    start = torch.zeros(1, dtype=torch.int32, device=device)
    return (x[0].contiguous() for x in angles(start, positions, d))


class Case:
    """Builds rings that contain each row's tokens before position past[row], or, if heads = "q", up
    to this position. Also builds q, k and v of the token at past[row]. If past[row] is negative,
    that token is left padding."""

    def __init__(
        self, device, dtype, past, *, n=1, m=1, d=D, slots=None, spare=0, window=None,
        softcap=None, norm=False, heads="qkv", v_norm=False, offset=1.0, stale=None, seed=0,
    ):  # fmt: skip
        torch.manual_seed(seed)
        self.b, self.n, self.m, self.past, self.heads = len(past), n, m, past, heads
        length = max(*past, 0) + 1
        self.slots = slots or length + spare
        make = {"device": device, "dtype": dtype}
        self.norms = [torch.randn(d, **make) / 2 if norm else None for _ in "qk"]
        # k, v :: [b, length, n, d]: past and new tokens, indexed by position.
        self.k, self.v = torch.randn(2, self.b, length, n, d, **make)
        self.v = self.k if heads == "qk" else self.v
        self.q = torch.randn(self.b, 1, n * m, d, **make)
        new = torch.tensor([max(p, 0) for p in past])
        rows = torch.arange(self.b)
        given = [self.q[:, 0], self.k[rows, new], self.v[rows, new]][: len(heads)]
        apart = torch.randn(self.b, n * m + (len(heads) - 1) * n + 3, d, **make)
        self.qkv = apart[:, 1:-2].copy_(torch.cat(given, dim=1))
        self.offset = offset
        self.exact_v = normed(self.v) if v_norm else self.v  # values in the ring
        # Attention multiplies unwritten slots by 0, so they may hold any finite number.
        stale = torch.finfo(dtype).max if stale is None else stale
        self.keys, self.values = torch.full((2, self.b, self.slots, n, d), stale, **make)
        for row, p in enumerate(past):
            end = p + (heads == "q")
            old = torch.arange(max(end - self.slots, 0), max(end, 0), device=device)
            k = normed_and_rotated(self.k[row, old], old, self.norms[1], offset).to(dtype)
            self.keys[row, old % self.slots] = k
            self.values[row, old % self.slots] = self.exact_v[row, old].to(dtype)
        self.keys, self.values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        self.position = torch.tensor(past, dtype=torch.int32, device=device)
        self.counter = torch.zeros(self.b * n + 1, dtype=torch.int32, device=device)
        self.cos, self.sin = table(length, d, device)
        self.options = {
            "scale": SCALE, "window": window, "softcap": softcap, "heads": heads, "v_norm": v_norm,
            "offset": offset,
        }  # fmt: skip

    def run(self, **options):
        out = decode_attention(
            self.qkv, self.keys, self.values, self.cos, self.sin, self.position, self.counter,
            *self.norms[: 1 if self.heads == "q" else 2], **self.options, **options,
        )  # fmt: skip
        assert not self.counter.any(), "the kernel did not reset its counters"
        return out

    def check(self):
        before = self.keys.clone(), self.values.clone()
        out = self.run()
        dtype, d = self.qkv.dtype, self.qkv.shape[2]
        assert out.dtype == dtype and out.is_contiguous() and not out.isnan().any()
        for row, p in enumerate(self.past):
            if p < 0:
                assert (out[row] == 0).all(), "outputs of padding must be zero"
                continue
            slot, new = p % self.slots, torch.tensor([p], device=out.device)
            if self.heads != "q":
                k = normed_and_rotated(self.k[row, new], new, self.norms[1], self.offset)[0]
                found, v = self.keys[row, :, slot], self.values[row, :, slot]
                assert_rounded(found, k, norm_roundings(d) + 8, pair_size(k))
                if self.options["v_norm"]:
                    assert_rounded(v, self.exact_v[row, p], norm_roundings(d))
                else:
                    assert torch.equal(v, self.v[row, p])
                before[0][row, :, slot], before[1][row, :, slot] = found, v

            seen = min(self.slots, self.options["window"] or self.slots)
            positions = torch.arange(p + 1, device=out.device)
            exact, size = softmax_attention(
                normed_and_rotated(self.q[row], new, self.norms[0], self.offset),
                normed_and_rotated(
                    self.k[row, positions], positions, self.norms[1], self.offset
                ).to(dtype),
                self.exact_v[row, positions].to(dtype),
                new, positions, seen, self.options["softcap"], SCALE,
            )  # fmt: skip
            roundings = attention_roundings(d, min(seen, p + 1), SCALE)
            assert_rounded(out[row], exact[0], size=size[0], **roundings)
        rings = self.keys, self.values
        assert all(map(torch.equal, rings, before)), "a slot other than the new token's was written"


GEMMA_4 = {"norm": True, "v_norm": True, "offset": 0.0}
CASES = {
    "first token": {"past": [0]},
    "second token": {"past": [1], "m": 8},
    "multi-query": {"past": [150], "m": 8},
    "grouped": {"past": [70], "n": 2, "m": 2},
    "odd group": {"past": [70], "n": 2, "m": 3},
    "multi-head": {"past": [70], "n": 4},
    "16 query heads per kv head": {"past": [40], "m": 16},
    "d 64": {"past": [70], "m": 2, "d": 64, "norm": True},
    "d 128": {"past": [70], "m": 2, "d": 128, "norm": True},
    "d 256": {"past": [70], "m": 8, "d": 256},
    "soft cap": {"past": [70], "softcap": 1.5},
    "q and k norm": {"past": [70], "m": 4, "norm": True},
    "last key of a block": {"past": [63], "m": 2},
    "first key of a block": {"past": [64], "m": 2},
    "window of one": {"past": [70], "window": 1},
    "window smaller than a block": {"past": [70], "window": 5, "slots": 13},
    "window larger than a block": {"past": [170], "window": 100},
    "window larger than the text": {"past": [30], "window": 64},
    "window as long as the ring": {"past": [299], "window": 128, "slots": 128, "m": 4},
    "ring that wraps": {"past": [200, 128, 127], "slots": 128},
    "ring of 13 slots that wraps": {"past": [200, 5, 12, 13, 14], "slots": 13, "m": 2},
    "ring of one slot": {"past": [7, 0], "slots": 1},
    "few slots used": {"past": [0, 3], "spare": 700, "m": 2},
    "ragged rows": {"past": [3, 90, 0, 41], "spare": 9, "m": 4},
    "left padding": {"past": [-1, 80, -7], "m": 2, "n": 2},
    "rows of padding only": {"past": [-3, -1]},
    "many splits": {"past": [999, 400], "m": 2, "spare": 25},
    "more splits than one iteration merges": {"past": [340], "m": 16, "d": 256},
    "values are keys": {"past": [70, -2, 3], "n": 2, "m": 2, "heads": "qk"},
    "values are keys, normalized": {"past": [70, 8], "m": 3, "heads": "qk", **GEMMA_4},
    "values normalized": {"past": [70, -1], "n": 2, "m": 2, "slots": 23, **GEMMA_4},
    "only queries": {"past": [70, -2, 0], "n": 2, "m": 2, "heads": "q"},
    "only queries, ring that wraps": {
        "past": [70, 5, -1], "m": 4, "slots": 13, "window": 9, "heads": "q", **GEMMA_4,
    },
    "only queries, many splits": {"past": [700, 64], "m": 2, "heads": "q", **GEMMA_4},
    "d 512": {"past": [70, -1], "m": 8, "d": 512, **GEMMA_4},
    "d 512, 16 query heads per kv head": {
        "past": [340], "m": 16, "d": 512, "heads": "qk", **GEMMA_4,
    },
    "d 512, only queries": {"past": [90], "m": 4, "n": 2, "d": 512, "heads": "q", **GEMMA_4},
    "all options together": {
        "past": [300, -2, 7, 129], "n": 2, "m": 3, "window": 90, "slots": 101, "softcap": 2.0,
        "norm": True,
    },
}  # fmt: skip
