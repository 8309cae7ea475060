"""LM head: final norm, projection to the vocabulary, soft cap and the next token, in one launch.

    logits = cap(norm_linear(x, residual, norm_weight, post_norm_weight, weight, …)), see matvec.py
    cap(l) = softcap * tanh(l / softcap);   token = sample_token(logits, …), see sample.py

x, residual      :: [b, dim], bf16 | fp16 | fp32; residual, norm weights, layer_scalar and offset
                    as in norm_linear
weight           :: [vocab, dim], x.dtype, or packed (packed.py): often the embedding
position, token, counter, temperature, seed: as in sample_token

Up to MAX_ROWS rows, logits are in fp32 and never written: each program keeps its best token of
each row, and the last program to finish compares them. More rows write logits in x.dtype. The
elements of a packed weight are exact for one row, and are rounded once to x.dtype for more rows.
Bound by memory: bytes = weight.nbytes. Walk-through steps: final norm, lm_head, sample.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.kernels._gemv import gemv
from gemma_fast.kernels._matmul_input import MatmulInput, load_input, norm_scales
from gemma_fast.kernels._op import op, wait_for_previous_kernel
from gemma_fast.kernels._skinny import prefetch_weight, skinny_matmul
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels._weight import load_weight
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.launch import gpu, launch_config
from gemma_fast.kernels.matvec import check_matmul, is_matvec, norm_linear
from gemma_fast.kernels.matvec import default_config as matvec_config
from gemma_fast.kernels.packed import Weight
from gemma_fast.kernels.sample import (
    PARTIALS,
    SamplingInputs,
    best_token_of,
    check_sampling,
    new_partials,
    reduce_programs,
    sample_token,
    sampling_scores,
)

BYTES = 131_072  # bytes of the weight that each program reads (about), if x has one row


class LMHeadSpec(NamedTuple):
    """Compile-time constants of the LM head: one `tl.constexpr`."""

    dim: int
    vocab: int
    softcap: float  # 0: no soft cap
    eps: float  # epsilon of the norms
    offset: float  # the norms multiply by offset + weight
    group: int  # columns of the weight that share a scale; 0: not packed


def soft_cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Soft cap in the dtype of logits; NaN and inf stay as they are, so that sampling sees them."""
    if softcap is None:
        return logits
    return torch.where(logits.isfinite(), softcap * torch.tanh(logits / softcap), logits)


@triton.jit(do_not_specialize=["rows"])
def _next_token_kernel(
    inputs,  # MatmulInput
    weight,  # Weight [vocab, dim]
    sampling,  # SamplingInputs
    partials,  # Partials, with one counter
    rows,
    SPEC: tl.constexpr,  # LMHeadSpec
    BLOCKS: tl.constexpr,  # blocks of BLOCK_N tokens per program
    BLOCK_B: tl.constexpr,  # rows, rounded up to 1 or MAX_ROWS
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,  # programs whose best scores are compared at a time
    PDL: tl.constexpr,
):
    DIM: tl.constexpr = SPEC.dim
    VOCAB: tl.constexpr = SPEC.vocab
    GROUP: tl.constexpr = SPEC.group
    row = tl.arange(0, BLOCK_B)[None, :]  # [1, BLOCK_B]
    token = tl.program_id(0) * (BLOCKS * BLOCK_N) + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    weight_row = tl.minimum(token, VOCAB - 1)
    if BLOCK_B == 1:
        first_block = load_weight(weight, weight_row, 0, DIM, GROUP, BLOCK_K)
    elif PDL:
        prefetch_weight(weight, weight_row, DIM, GROUP, BLOCK_K)
    wait_for_previous_kernel(PDL)
    scales = norm_scales(inputs, None, rows, False, SPEC.eps, SPEC.offset, DIM, BLOCK_B, BLOCK_K)
    first_x = None
    # Normalizing x again for each block would take longer than reading packed rows.
    if BLOCK_B == 1 and weight.scale is not None:
        # [1, BLOCK_K]
        first_x = load_input(inputs, scales, None, rows, 0, SPEC.offset, DIM, 1, BLOCK_K)
    best = tl.full([BLOCK_N, BLOCK_B], float("-inf"), tl.float32)
    best_token = tl.full([BLOCK_N, BLOCK_B], -1, tl.int32)
    for block in range(BLOCKS):
        next_row = tl.minimum(token + BLOCK_N, VOCAB - 1)
        if BLOCK_B == 1:
            next_block = first_block
            if block + 1 < BLOCKS:  # the next block is loaded while this one is multiplied
                next_block = load_weight(weight, next_row, 0, DIM, GROUP, BLOCK_K)
            # [BLOCK_N, 1]
            logits = gemv(
                first_block, first_x, weight, weight_row, inputs, scales, None, rows,
                SPEC.offset, DIM, GROUP, BLOCK_K, STAGES,
            )  # fmt: skip
            first_block = next_block
        else:
            # [BLOCK_N, BLOCK_B]
            logits = skinny_matmul(
                weight, weight_row, inputs, scales, None, rows,
                SPEC.offset, DIM, GROUP, BLOCK_B, BLOCK_K, STAGES,
            )  # fmt: skip
        if SPEC.softcap > 0:
            capped = SPEC.softcap * (2 * tl.sigmoid(2 / SPEC.softcap * logits) - 1)
            logits = tl.where(tl.abs(logits) < float("inf"), capped, logits)
        # [BLOCK_N, BLOCK_B]
        scores = sampling_scores(logits, token[:, None], row, rows, sampling, VOCAB)
        best_token = tl.where(scores > best, token[:, None], best_token)  # [BLOCK_N, BLOCK_B]
        best = tl.maximum(best, scores)
        token += BLOCK_N
        weight_row = next_row
    best, best_token = best_token_of(best, best_token)  # [1, BLOCK_B]
    reduce_programs(best, best_token, row, rows, partials, BLOCK_B, CHUNK)


def default_config(rows: int, weight: Weight, itemsize: int) -> dict[str, int]:
    """Returns the launch config: that of other matmuls, but with one row a program computes several
    blocks of tokens, so that it computes the norm once for all of them."""
    config = matvec_config(rows, weight, itemsize) | {"BLOCKS": 1}
    if rows == 1:  # two blocks are in registers: this one and the next
        int8, line = weight.data.dtype == torch.int8, weight.data[:1].nbytes  # bytes of a row
        block = 8 if int8 else 4
        config |= {"BLOCK_N": block, "BLOCKS": triton.cdiv(BYTES, block * line)}
    return config


@op(fake=lambda *_, **__: None, mutates_args=("token", "counter"))
def next_token(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, post_norm_weight: Tensor | None,
    weight: Tensor, position: Tensor, token: Tensor, counter: Tensor,
    temperature: Tensor | None = None, seed: Tensor | None = None, *,
    layer_scalar: Tensor | None = None, softcap: float | None = None, eps: float = 1e-6,
    offset: float = 1.0, weight_scale: Tensor | None = None,
    weight_minimum: Tensor | None = None, pdl: bool = False,
) -> None:  # fmt: skip
    """Writes the next token of each row to `token`. Where Triton does not run, and for more than
    MAX_ROWS rows, it computes the logits and then samples.

    weight, pdl: as in `linear`, see matvec.py.
    """
    (rows, dim), vocab = x.shape, weight.shape[0]
    packed = Weight(weight, weight_scale, weight_minimum)
    check_sampling(rows, position, token, counter, temperature, seed)
    assert softcap is None or softcap > 0
    inputs = MatmulInput(x, residual, norm_weight, post_norm_weight, layer_scalar)
    check_matmul(inputs, packed)
    if not is_matvec(x, packed):
        norms: dict[str, Any] = {"layer_scalar": layer_scalar, "eps": eps, "offset": offset}
        if calls.is_matvec(x, packed):
            y, _ = calls.matvec(
                x, packed, residual=residual, norm_weight=norm_weight,
                post_norm_weight=post_norm_weight, out_dtype=torch.float32, **norms,
            )  # fmt: skip
        else:
            y, _ = norm_linear(
                x, residual, norm_weight, post_norm_weight, weight,
                weight_scale=weight_scale, weight_minimum=weight_minimum, **norms,
            )  # fmt: skip
        logits = soft_cap_logits(y.float(), softcap)
        sample_token(logits, position, token, counter, temperature, seed)
        return

    config = launch_config("next_token", default_config(rows, packed, x.element_size()))
    programs = triton.cdiv(vocab, config["BLOCKS"] * config["BLOCK_N"])
    residual = None if residual is None else residual.contiguous()
    _next_token_kernel[(programs,)](
        inputs._replace(x=x.contiguous(), residual=residual), packed,
        SamplingInputs(position, temperature, seed), new_partials(token, counter, programs), rows,
        SPEC=LMHeadSpec(dim, vocab, softcap or 0.0, eps, offset, packed.group),
        CHUNK=PARTIALS * config["num_warps"] // config["BLOCK_B"],
        **config, **gpu(x.device).pdl_options(pdl),
    )  # fmt: skip
