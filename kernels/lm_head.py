"""The next token in one launch: last norm, product with the tied embedding, soft cap, choice.

    logits = cap(norm_linear(x, residual, norm_weight, post_norm_weight, weight)), see matvec.py
    cap(l) = softcap * tanh(l / softcap);   token = sample_token(logits, …), see sample.py

x, residual      :: [b, dim], bf16 | fp16 | fp32; residual and norm weights as in norm_linear
weight           :: [vocab, dim], x.dtype
position, token, counter, temperature, seed: as in sample_token

Up to MAX_ROWS rows, logits are in fp32 and never written: each program keeps its best token of
each row, and the last one to be done compares them. Above, logits are rounded to x.dtype.
Bound by memory: bytes = weight.numel() * itemsize. Walk-through steps: last norm, lm_head, choose.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._op import op, wait_for_previous_kernel
from gemma_fast.kernels._product import (
    check_product,
    first_weight,
    is_matvec,
    norm_scales,
    product,
)
from gemma_fast.kernels._product import tile as product_tile
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.launch import gpu, launch_config
from gemma_fast.kernels.matvec import norm_linear
from gemma_fast.kernels.sample import (
    PARTIALS,
    best_of,
    check_sampling,
    compare,
    partials,
    sample_token,
    scores_of,
)

BYTES = 131_072  # of the weight, for a program with one row


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    """In fp32; what is not finite stays as it is."""
    logits = logits.float()
    if softcap is None:
        return logits
    return torch.where(logits.isfinite(), softcap * torch.tanh(logits / softcap), logits)


@triton.jit(do_not_specialize=["rows"])
def _next_token_kernel(
    x_ptr,  # [rows, DIM]
    residual_ptr,  # [rows, DIM] | None
    norm_weight_ptr,  # [DIM]
    post_norm_weight_ptr,  # [DIM] | None
    weight_ptr,  # [VOCAB, DIM]
    position_ptr,  # [rows]
    token_ptr,  # [rows]
    counter_ptr,  # [1]
    temperature_ptr,  # [rows] | None
    seed_ptr,  # [rows] | None
    best_ptr,  # [rows, programs]
    best_token_ptr,  # [rows, programs]
    rows,
    SOFTCAP: tl.constexpr,  # 0: none
    EPS: tl.constexpr,
    DIM: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BLOCK_N tokens, a program
    BLOCK_B: tl.constexpr,  # rows, rounded up
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_POST_NORM: tl.constexpr,
    SAMPLE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    first, row = tl.program_id(0) * (BLOCKS * BLOCK_N), tl.arange(0, BLOCK_B)[None, :]
    token = first + tl.arange(0, BLOCK_N)
    weight_row = tl.minimum(token, VOCAB - 1)
    weight = first_weight(weight_ptr, weight_row, DIM, BLOCK_B, BLOCK_K, PREFETCH)
    wait_for_previous_kernel(PREFETCH)
    scale, post_scale = norm_scales(
        x_ptr, residual_ptr, post_norm_weight_ptr, None, rows, False,
        EPS, DIM, BLOCK_B, BLOCK_K, HAS_RESIDUAL, HAS_POST_NORM,
    )  # fmt: skip
    best = tl.full([BLOCK_N, BLOCK_B], float("-inf"), tl.float32)
    best_token = tl.full([BLOCK_N, BLOCK_B], -1, tl.int32)
    for block in range(BLOCKS):
        next_weight, next_row = weight, tl.minimum(token + BLOCK_N, VOCAB - 1)
        if block + 1 < BLOCKS:  # on its way while this block is multiplied
            next_weight = first_weight(weight_ptr, next_row, DIM, BLOCK_B, BLOCK_K, False)
        logits = product(
            weight, weight_ptr, weight_row,
            x_ptr, residual_ptr, norm_weight_ptr, post_norm_weight_ptr, scale, post_scale, rows,
            DIM, BLOCK_B, BLOCK_K, STAGES, True, HAS_RESIDUAL, HAS_POST_NORM,
        )  # fmt: skip
        if SOFTCAP > 0:
            capped = SOFTCAP * (2 * tl.sigmoid(2 / SOFTCAP * logits) - 1)
            logits = tl.where(tl.abs(logits) < float("inf"), capped, logits)
        scores = scores_of(
            logits, token[:, None], row, rows, position_ptr, temperature_ptr, seed_ptr,
            VOCAB, SAMPLE,
        )  # fmt: skip
        best_token = tl.where(scores > best, token[:, None], best_token)
        best = tl.maximum(best, scores)
        token += BLOCK_N
        weight, weight_row = next_weight, next_row
    best, best_token = best_of(best, best_token)
    compare(
        best, best_token, row, rows, best_ptr, best_token_ptr, counter_ptr, token_ptr,
        BLOCK_B, CHUNK,
    )  # fmt: skip


def tile(rows: int, vocab: int, dim: int, itemsize: int) -> dict[str, int]:
    """As for other products; and of one row several blocks, for which its norm is computed once."""
    blocks = product_tile(rows, vocab, dim, itemsize) | {"BLOCKS": 1}
    if rows == 1:  # by 8, and the next 8 on their way, a program takes the registers of two
        blocks |= {"BLOCK_N": 4, "BLOCKS": triton.cdiv(BYTES, 4 * dim * itemsize)}
    return blocks


@op(fake=lambda *_, **__: None, mutates_args=("token", "counter"))
def next_token(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, post_norm_weight: Tensor | None,
    weight: Tensor, position: Tensor, token: Tensor, counter: Tensor,
    temperature: Tensor | None = None, seed: Tensor | None = None, *,
    softcap: float | None = None, eps: float = 1e-6, prefetch: bool = False,
) -> None:  # fmt: skip
    """The next token of each row, into `token`. Off the GPU, and for more than MAX_ROWS rows, the
    logits and then the choice.

    prefetch: weights that no kernel is still writing may be read while the kernel ahead runs.
    """
    (rows, dim), vocab = x.shape, weight.shape[0]
    check_sampling(rows, position, token, counter, temperature, seed)
    assert softcap is None or softcap > 0
    check_product(x, residual, norm_weight, post_norm_weight, weight)
    if not is_matvec(x, weight):
        y, _ = norm_linear(x, residual, norm_weight, post_norm_weight, weight, eps=eps)
        sample_token(_cap(y, softcap), position, token, counter, temperature, seed)
        return

    blocks = launch_config("next_token", tile(rows, vocab, dim, x.element_size()))
    programs = triton.cdiv(vocab, blocks["BLOCKS"] * blocks["BLOCK_N"])
    best, best_token = partials(rows, programs, x.device)
    _next_token_kernel[(programs,)](
        x.contiguous(), None if residual is None else residual.contiguous(),
        norm_weight, post_norm_weight, weight, position, token, counter, temperature, seed,
        best, best_token, rows,
        SOFTCAP=softcap or 0.0, EPS=eps, DIM=dim, VOCAB=vocab,
        CHUNK=PARTIALS * blocks["num_warps"] // blocks["BLOCK_B"],
        HAS_RESIDUAL=residual is not None, HAS_POST_NORM=post_norm_weight is not None,
        SAMPLE=temperature is not None, **blocks, **gpu(x.device).overlap(prefetch),
    )  # fmt: skip
