"""Sampling: the most likely token, or one drawn by noise that needs no generator state.

    token = argmax_v(logits_v / temperature + gumbel(seed, position, v))
    gumbel = -log(-log(1 - u)),  0 < u < 1

logits           :: [b, vocab], bf16 | fp16 | fp32; -inf: a token that cannot be sampled
position         :: [b], int32: position of the sampled token
token            :: [b], int64, written in place; -1 if a logit is NaN or inf, or all are -inf
counter          :: [≥ b], int32, zeros, and zeros again afterwards: counts programs
temperature      :: [b], fp32, or None; 0 or None: the most likely token, the lowest if several are
seed             :: [b], int64, given together with temperature

The argmax of logits plus Gumbel noise is a sample of softmax(logits / temperature) (Maddison et
al. 2014, A* Sampling). u is number v % 4 of Philox-4x32-10 (Salmon et al. 2011, Random123) with the
key seed and the counter (v // 4, position, 0, 0). So a token depends on its seed and position, not
on its row and on earlier samples. Sums are in fp32; programs are compared in a fixed order.
Bound by memory: bytes = logits.numel() * itemsize. Walk-through step: next token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.launch import launch_config, runs_triton

PARTIALS = 512  # partial results that a warp compares at a time: 16 per thread


class SamplingInputs(NamedTuple):
    """Pointers to the inputs of sampling besides the logits."""

    position: Any  # [rows]
    temperature: Any  # [rows] | None: greedy
    seed: Any  # [rows] | None


class Partials(NamedTuple):
    """Pointers to the partial result of each program, and to the final result."""

    token: Any  # [rows]: the final result
    counter: Any  # [rows], or [1] for all rows: programs that have stored their partial result
    best: Any  # [rows, programs]
    best_token: Any  # [rows, programs]


def philox_reference(counter: tuple[Tensor, ...], key: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit counters and a 64-bit key → four 32-bit random numbers; all stored in int64."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key & low, key >> 32 & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # overflow drops bits above 63 only
        c0, c1, c2, c3 = (b >> 32 ^ c1 ^ k0) & low, b, (a >> 32 ^ c3 ^ k1) & low, a
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1 & low, c2, c3 & low


def gumbel_reference(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Returns the Gumbel noise of seed, position :: [b]: [b, vocab], fp32."""
    c0 = torch.arange(-(-vocab // 4), device=position.device)
    c1 = position.long()[:, None] & 0xFFFFFFFF  # [b, 1]
    zero = torch.zeros_like(c1)
    counter, key = (c0, c1, zero, zero), seed[:, None]
    drawn = torch.stack(philox_reference(counter, key), dim=-1)  # [b, vocab / 4, 4]
    u = (drawn.flatten(1)[:, :vocab].float() + 0.5) * 2**-32  # [b, vocab]
    return -torch.log(-torch.log1p(-u.clamp_(max=1 - 2**-24)))


def sample_token_reference(
    logits: Tensor, position: Tensor, temperature: Tensor | None = None, seed: Tensor | None = None
) -> Tensor:
    scores = logits.float()
    if temperature is not None and seed is not None:
        samples = temperature[:, None] > 0  # [b, 1]
        divisor = torch.where(samples, temperature[:, None], 1.0)
        drawn = scores / divisor + gumbel_reference(seed, position, logits.shape[1])
        scores = torch.where(samples, drawn, scores)
    token = scores.argmax(-1, keepdim=True)  # [b, 1]
    best = scores.gather(1, token)  # NaN is above inf
    return token.masked_fill(~best.isfinite(), -1).squeeze(1)  # [b]


@triton.jit
def gumbel(seed, position, token):
    """Returns the Gumbel noise of token :: [BLOCK_N, 1] and seed, position :: [1, BLOCK_B]:
    [BLOCK_N, BLOCK_B], fp32."""
    r0, r1, r2, r3 = tl.philox(seed, token // 4, position, 0, 0)  # [BLOCK_N, BLOCK_B]
    number = token % 4
    r = tl.where(number == 0, r0, tl.where(number == 1, r1, tl.where(number == 2, r2, r3)))
    u = r.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    u = tl.minimum(u, 0.99999994)
    # Small u give the largest noise. 1 - u would lose their digits, so -log(1 - u) is computed by
    # its series.
    exponential = tl.where(u < 0.01, u * (1 + u * (0.5 + u * 0.33333334)), -tl.log(1 - u))
    return -tl.log(exponential)


@triton.jit
def sampling_scores(logits, token, row, rows, sampling, VOCAB: tl.constexpr):
    """Returns scores, [BLOCK_N, BLOCK_B], whose argmax over tokens is the next token: logits, or
    with a temperature logits / temperature + noise. A logit that is NaN or inf gets the score
    inf."""
    inf: tl.constexpr = float("inf")
    scores = logits
    if sampling.temperature is not None:
        position = tl.load(sampling.position + row, mask=row < rows, other=0)  # [1, BLOCK_B]
        setting = tl.minimum(row, rows - 1)  # a mask would cost more registers
        temperature = tl.load(sampling.temperature + setting)  # [1, BLOCK_B]
        seed = tl.load(sampling.seed + setting)
        noise = gumbel(seed, position, token)  # [BLOCK_N, BLOCK_B]
        noisy = logits / tl.where(temperature > 0, temperature, 1.0) + noise
        scores = tl.where(temperature > 0, noisy, logits)
    mask = (token < VOCAB) & (row < rows)
    return tl.where(mask, tl.where(logits < inf, scores, inf), -inf)


@triton.jit
def best_token_of(scores, token):
    """Returns the best score of each row and its token, [1, BLOCK_B], for scores and token ::
    [BLOCK_N, BLOCK_B]. The lowest token wins a tie; -1 if the best score is not finite."""
    best = tl.max(scores, axis=0, keep_dims=True)  # [1, BLOCK_B]
    lowest = tl.min(tl.where(scores == best, token, 0x7FFFFFFF), axis=0, keep_dims=True)
    return best, tl.where(tl.abs(best) < float("inf"), lowest, -1)


@triton.jit
def _best_program(best_ptr, row, rows, programs, BLOCK_B: tl.constexpr, CHUNK: tl.constexpr):
    """Returns the program with the best score of each row, [1, BLOCK_B], or -1 if that score is not
    finite. The lowest program wins a tie; it has the lowest tokens."""
    best = tl.full([CHUNK, BLOCK_B], float("-inf"), tl.float32)
    program = tl.full([CHUNK, BLOCK_B], 0, tl.int32)
    for first in range(0, programs, CHUNK):
        part = first + tl.arange(0, CHUNK)[:, None]  # [CHUNK, 1]
        mask = (part < programs) & (row < rows)  # [CHUNK, BLOCK_B]
        # [CHUNK, BLOCK_B]
        scores = tl.load(best_ptr + row * programs + part, mask=mask, other=float("-inf"))
        program = tl.where(scores > best, part, program)
        best = tl.maximum(best, scores)
    return best_token_of(best, program)[1]  # [1, BLOCK_B]


@triton.jit
def reduce_programs(
    best, best_token, row,  # [1, BLOCK_B]
    rows,
    partials,  # Partials
    BLOCK_B: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Stores this program's best. The last program to do so compares all and stores the token."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(partials.best + row * programs + program, best, mask=row < rows)
    tl.store(partials.best_token + row * programs + program, best_token, mask=row < rows)
    tl.debug_barrier()  # all threads have stored before one of them increments the counter
    if tl.atomic_add(partials.counter, 1, sem="acq_rel", scope="gpu") == programs - 1:
        winner = _best_program(partials.best, row, rows, programs, BLOCK_B, CHUNK)  # [1, BLOCK_B]
        mask = (winner >= 0) & (row < rows)
        token = tl.load(partials.best_token + row * programs + winner, mask=mask, other=-1)
        tl.store(partials.token + row, token.to(tl.int64), mask=row < rows)
        tl.store(partials.counter, 0)


@triton.jit
def _sample_token_kernel(
    logits_ptr,  # [rows, VOCAB]
    sampling,  # SamplingInputs
    partials,  # Partials, with a counter per row
    VOCAB: tl.constexpr,
    BLOCK_N: tl.constexpr,  # tokens
    CHUNK: tl.constexpr,  # programs whose best scores are compared at a time
):
    rows, row = tl.num_programs(1), tl.program_id(1) + tl.zeros([1, 1], tl.int32)  # row :: [1, 1]
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N, 1]
    # [BLOCK_N, 1]
    logits = tl.load(logits_ptr + row.to(tl.int64) * VOCAB + token, mask=token < VOCAB, other=0.0)
    scores = sampling_scores(logits.to(tl.float32), token, row, rows, sampling, VOCAB)
    best, best_token = best_token_of(scores, token)  # [1, 1]
    counter = partials.counter + tl.program_id(1)
    partials = Partials(partials.token, counter, partials.best, partials.best_token)
    reduce_programs(best, best_token, row, rows, partials, 1, CHUNK)


@op(fake=lambda *_, **__: None, mutates_args=("token", "counter"))
def sample_token(
    logits: Tensor, position: Tensor, token: Tensor, counter: Tensor,
    temperature: Tensor | None = None, seed: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the next token of each row to `token`. Runs the reference where Triton does not
    run."""
    rows, vocab = logits.shape
    check_sampling(rows, position, token, counter, temperature, seed)
    if not runs_triton(logits):
        greedy = temperature is None and logits.dtype == torch.float32 and logits.is_contiguous()
        if greedy and calls.runs_c(logits):
            calls.best_token(logits, token)
        else:
            token.copy_(sample_token_reference(logits, position, temperature, seed))
        return
    config = launch_config("sample_token", {"BLOCK_N": 1024, "num_warps": 4})
    logits, programs = logits.contiguous(), triton.cdiv(vocab, config["BLOCK_N"])
    if rows:
        _sample_token_kernel[(programs, rows)](
            logits, SamplingInputs(position, temperature, seed),
            new_partials(token, counter, programs),
            VOCAB=vocab, **config,
            CHUNK=min(config["num_warps"] * PARTIALS, triton.next_power_of_2(programs)),
        )  # fmt: skip


def new_partials(token: Tensor, counter: Tensor, programs: int) -> Partials:
    """Allocates the partial results of `programs` programs for each row of `token`."""
    best = torch.empty(len(token), programs, dtype=torch.float32, device=token.device)
    best_token = torch.empty(len(token), programs, dtype=torch.int32, device=token.device)
    return Partials(token, counter, best, best_token)


def check_sampling(
    rows: int, position: Tensor, token: Tensor, counter: Tensor, temperature: Tensor | None,
    seed: Tensor | None,
) -> None:  # fmt: skip
    """Asserts that shapes, dtypes and strides are right for `rows` rows of logits."""
    assert position.shape == token.shape == (rows,), f"{rows=}, {position.shape=}, {token.shape=}"
    assert position.dtype == counter.dtype == torch.int32 and token.dtype == torch.int64
    assert counter.numel() >= rows, f"{counter.numel()=} is less than {rows=}"
    assert position.is_contiguous() and token.is_contiguous() and counter.is_contiguous()
    assert (temperature is None) == (seed is None), "give temperature and seed, or neither"
    if temperature is not None and seed is not None:
        assert temperature.shape == seed.shape == (rows,)
        assert temperature.is_contiguous() and seed.is_contiguous()
        assert temperature.dtype == torch.float32 and seed.dtype == torch.int64
