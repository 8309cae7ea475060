"""The choice of a token: the likeliest, or one drawn, by noise that needs no generator's state.

    token = argmax_v(logits_v / temperature + gumbel(seed, position, row, v))
    gumbel = -log(-log(1 - u)),  0 < u < 1

logits           :: [b, vocab], bf16 | fp16 | fp32; -inf: a token that cannot be chosen
position         :: [b], int32: where the chosen token will stand
token            :: [b], int64, written in place; -1: a logit is NaN or inf, or all are -inf
counter          :: [≥ b], int32, zeros, and left so: counts programs
temperature      :: [b], fp32, or None; 0 or None: the likeliest token, of equal ones the lowest
seed             :: [b], int64, with a temperature

The largest sum of logit and Gumbel noise is a draw from softmax(logits / temperature) (Maddison et
al. 2014, A* Sampling). u is number v % 4 of Philox-4x32-10 (Salmon et al. 2011, Random123) with the
key seed and the counter (v // 4, position, row, 0). So a token depends on its seed and its place,
and not on what was drawn before. Sums in fp32; programs compare their bests in a fixed order.
Bound by memory: bytes = logits.numel() * itemsize. Walk-through step: choose.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.launch import launch_config, runs_triton

PARTIALS = 512  # bests of programs that a warp compares at a time: 16 a thread


def philox_reference(counter: tuple[Tensor, ...], key: Tensor) -> tuple[Tensor, ...]:
    """Four counters of 32 bits and a key of 64 → four numbers of 32 bits, all of them in int64."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key & low, key >> 32 & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # unsigned: bits above 63 are lost, the rest right
        c0, c1, c2, c3 = (b >> 32 ^ c1 ^ k0) & low, b, (a >> 32 ^ c3 ^ k1) & low, a
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1 & low, c2, c3 & low


def gumbel_reference(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """seed, position :: [b] → [b, vocab], fp32"""
    place = torch.arange(max(-(-vocab // 4), len(position)), device=position.device)
    c0, row = place[: -(-vocab // 4)], place[: len(position), None]
    c1 = position.long()[:, None] & 0xFFFFFFFF
    counter, key = (c0, c1, row, torch.zeros_like(row)), seed[:, None]
    drawn = torch.stack(philox_reference(counter, key), dim=-1)
    u = (drawn.flatten(1)[:, :vocab].float() + 0.5) * 2**-32
    return -torch.log(-torch.log1p(-u.clamp_(max=1 - 2**-24)))


def sample_token_reference(
    logits: Tensor, position: Tensor, temperature: Tensor | None = None, seed: Tensor | None = None
) -> Tensor:
    scores = logits.float()
    if temperature is not None and seed is not None:
        samples = temperature[:, None] > 0
        divisor = torch.where(samples, temperature[:, None], 1.0)
        drawn = scores / divisor + gumbel_reference(seed, position, logits.shape[1])
        scores = torch.where(samples, drawn, scores)
    token = scores.argmax(-1, keepdim=True)
    best = scores.gather(1, token)  # NaN is above inf
    return token.masked_fill(~best.isfinite(), -1).squeeze(1)


@triton.jit
def gumbel(seed, position, row, token):
    """[tokens, rows] of tokens :: [tokens, 1] and seed, position, row :: [1, rows]"""
    r0, r1, r2, r3 = tl.philox(seed, token // 4, position, row, 0)
    number = token % 4
    r = tl.where(number == 0, r0, tl.where(number == 1, r1, tl.where(number == 2, r2, r3)))
    u = r.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    u = tl.minimum(u, 0.99999994)
    # Small u are the large noises: -log(1 - u) by its series, which keeps all their digits.
    exponential = tl.where(u < 0.01, u * (1 + u * (0.5 + u * 0.33333334)), -tl.log(1 - u))
    return -tl.log(exponential)


@triton.jit
def scores_of(
    logits, token, row, rows, position_ptr, temperature_ptr, seed_ptr,
    VOCAB: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """Of logits :: [tokens, rows]. The largest is chosen; inf: the row is refused."""
    inf: tl.constexpr = float("inf")
    scores = logits
    if SAMPLE:
        position = tl.load(position_ptr + row, mask=row < rows, other=0)
        setting = tl.minimum(row, rows - 1)  # a mask would cost more registers
        temperature, seed = tl.load(temperature_ptr + setting), tl.load(seed_ptr + setting)
        noise = gumbel(seed, position, row, token)
        drawn = logits / tl.where(temperature > 0, temperature, 1.0) + noise
        scores = tl.where(temperature > 0, drawn, logits)
    mask = (token < VOCAB) & (row < rows)
    return tl.where(mask, tl.where(logits < inf, scores, inf), -inf)


@triton.jit
def best_of(scores, token):
    """[tokens, rows] → [1, rows], the best and its token; of equal ones the lowest, or -1."""
    best = tl.max(scores, axis=0, keep_dims=True)
    first = tl.min(tl.where(scores == best, token, 0x7FFFFFFF), axis=0, keep_dims=True)
    return best, tl.where(tl.abs(best) < float("inf"), first, -1)


@triton.jit
def _best_program(best_ptr, row, rows, programs, BLOCK_B: tl.constexpr, CHUNK: tl.constexpr):
    """[1, rows], that of the lowest tokens first; -1: the row is refused."""
    best = tl.full([CHUNK, BLOCK_B], float("-inf"), tl.float32)
    program = tl.full([CHUNK, BLOCK_B], 0, tl.int32)
    for first in range(0, programs, CHUNK):
        part = first + tl.arange(0, CHUNK)[:, None]
        mask = (part < programs) & (row < rows)
        scores = tl.load(best_ptr + row * programs + part, mask=mask, other=float("-inf"))
        program = tl.where(scores > best, part, program)
        best = tl.maximum(best, scores)
    return best_of(best, program)[1]


@triton.jit
def compare(
    best, best_token, row, rows, best_ptr, best_token_ptr, counter_ptr, token_ptr,
    BLOCK_B: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Stores this program's best; the last one to be done stores the token."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(best_ptr + row * programs + program, best, mask=row < rows)
    tl.store(best_token_ptr + row * programs + program, best_token, mask=row < rows)
    tl.debug_barrier()  # all threads have stored: one of them announces it
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        winner = _best_program(best_ptr, row, rows, programs, BLOCK_B, CHUNK)
        mask = (winner >= 0) & (row < rows)
        token = tl.load(best_token_ptr + row * programs + winner, mask=mask, other=-1)
        tl.store(token_ptr + row, token.to(tl.int64), mask=row < rows)
        tl.store(counter_ptr, 0)


@triton.jit
def _sample_token_kernel(
    logits_ptr,  # [rows, VOCAB]
    position_ptr,  # [rows]
    token_ptr,  # [rows]
    counter_ptr,  # [rows]
    temperature_ptr,  # [rows] | None
    seed_ptr,  # [rows] | None
    best_ptr,  # [rows, programs]
    best_token_ptr,  # [rows, programs]
    VOCAB: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    rows, row = tl.num_programs(1), tl.program_id(1) + tl.zeros([1, 1], tl.int32)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    logits = tl.load(logits_ptr + row.to(tl.int64) * VOCAB + token, mask=token < VOCAB, other=0.0)
    scores = scores_of(
        logits.to(tl.float32), token, row, rows, position_ptr, temperature_ptr, seed_ptr,
        VOCAB, SAMPLE,
    )  # fmt: skip
    best, best_token = best_of(scores, token)
    compare(
        best, best_token, row, rows, best_ptr, best_token_ptr,
        counter_ptr + tl.program_id(1), token_ptr, 1, CHUNK,
    )  # fmt: skip


@op(fake=lambda *_, **__: None, mutates_args=("token", "counter"))
def sample_token(
    logits: Tensor, position: Tensor, token: Tensor, counter: Tensor,
    temperature: Tensor | None = None, seed: Tensor | None = None,
) -> None:  # fmt: skip
    """The next token of each row, into `token`. Off the GPU, the reference."""
    rows, vocab = logits.shape
    check_sampling(rows, position, token, counter, temperature, seed)
    if not runs_triton(logits):
        token.copy_(sample_token_reference(logits, position, temperature, seed))
        return
    blocks = launch_config("sample_token", {"BLOCK_N": 1024, "num_warps": 4})
    logits, programs = logits.contiguous(), triton.cdiv(vocab, blocks["BLOCK_N"])
    best, best_token = partials(rows, programs, logits.device)
    if rows:
        _sample_token_kernel[(programs, rows)](
            logits, position, token, counter, temperature, seed, best, best_token,
            VOCAB=vocab, CHUNK=min(4 * PARTIALS, triton.next_power_of_2(programs)),
            SAMPLE=temperature is not None, **blocks,
        )  # fmt: skip


def partials(rows: int, programs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where programs store their bests."""
    best = torch.empty(rows, programs, dtype=torch.float32, device=device)
    return best, torch.empty(rows, programs, dtype=torch.int32, device=device)


def check_sampling(
    rows: int, position: Tensor, token: Tensor, counter: Tensor, temperature: Tensor | None,
    seed: Tensor | None,
) -> None:  # fmt: skip
    assert position.shape == token.shape == (rows,), f"{rows=}, {position.shape=}, {token.shape=}"
    assert position.dtype == counter.dtype == torch.int32 and token.dtype == torch.int64
    assert counter.numel() >= rows, f"{counter.numel()=} is less than {rows=}"
    assert position.is_contiguous() and token.is_contiguous() and counter.is_contiguous()
    assert (temperature is None) == (seed is None), "a temperature and a seed, or neither"
    if temperature is not None and seed is not None:
        assert temperature.shape == seed.shape == (rows,)
        assert temperature.is_contiguous() and seed.is_contiguous()
        assert temperature.dtype == torch.float32 and seed.dtype == torch.int64
