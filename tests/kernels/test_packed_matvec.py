"""Compares linear, norm_linear and next_token with packed weights to fp64."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import DTYPES, chosen, sampled
from marks import slow
from matvec_checks import (
    EPS,
    GEMMA_4,
    check_linear,
    check_norm_linear,
    gemma_4_inputs,
    packed_weight_of,
)
from triton_interpreter import interpreter

from gemma_fast.checkpoint.base import PER_LAYER_EMBEDDING
from gemma_fast.config import GemmaConfig
from gemma_fast.kernels.launch import runs_triton
from gemma_fast.kernels.lm_head import next_token
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.packed import PackedWeight, Packing
from gemma_fast.presets import PRESETS

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
# Packing, dims. Blocks hold the whole row, part of it, or more than it; the last dim of a line has
# several blocks of which the last is not full. A group may be the row, part of a block, or (96)
# neither a part nor a multiple of a block.
KINDS = {
    "int4, group 32": (Packing(4, 32, False, HALF), (32, 640, 4640)),
    "int4, group 32, minimum": (Packing(4, 32, True, HALF), (96, 640, 4640)),
    "int4, group 96, minimum": (Packing(4, 96, True, FP32), (1152, 4704)),
    "int4, group 128": (Packing(4, 128, False, BF16), (640, 4736)),
    "int4, group 128, minimum": (Packing(4, 128, True, BF16), (1152,)),
    "int4, row": (Packing(4, 0, False, FP32), (32, 640, 4640)),
    "int4, row, minimum": (Packing(4, 0, True, HALF), (96, 4640)),
    "int8, group 16, minimum": (Packing(8, 16, True, HALF), (96, 640, 4624)),
    "int8, group 32": (Packing(8, 32, False, HALF), (32, 1152, 4640)),
    "int8, group 96": (Packing(8, 96, False, HALF), (1152, 4704)),
    "int8, group 128": (Packing(8, 128, False, BF16), (640, 4736)),
    "int8, row": (Packing(8, 0, False, FP32), (16, 640, 4640)),
    "int8, row, minimum": (Packing(8, 0, True, HALF), (96, 4640)),
}
CASES = [(kind, dim) for kind, (_, dims) in KINDS.items() for dim in dims]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weight_of(kind, out, dim, device):
    """Returns a PackedWeight, its values in fp64, and the size of their terms."""
    packing = KINDS[kind][0]
    return packed_weight_of(out, dim, packing._replace(group=packing.group or dim), device)


def weight_steps(x):
    """Returns how often a weight is rounded to x's dtype: once, except for one row on the kernel,
    which multiplies in fp32."""
    return int(len(x) > 1 or not runs_triton(x))


@DTYPE
@pytest.mark.parametrize("rows", [1, 2, *slow(8)], ids="rows {}".format)
@pytest.mark.parametrize(("kind", "dim"), CASES, ids=str)
def test_linear_equals_fp64(kind, dim, rows, dtype, device, poison_outputs):
    weight, exact, size = weight_of(kind, 37, dim, device)
    x = torch.randn(rows, dim, device=device).to(dtype)
    check_linear(linear(x, weight), x, exact, size, weight_steps(x))


@DTYPE
@pytest.mark.parametrize("case", ["geglu", *GEMMA_4])
@pytest.mark.parametrize("rows", [1, 8], ids="rows {}".format)
@pytest.mark.parametrize(
    ("kind", "dim"), [("int4, group 32, minimum", 640), ("int8, group 128", 1152)], ids=str
)
def test_norm_linear_equals_fp64(kind, dim, rows, case, dtype, device, poison_outputs):
    weight, exact, size = weight_of(kind, 38, dim, device)
    name = "layer_scalar, geglu" if case == "geglu" else case
    (*given, _), options = gemma_4_inputs(rows, dim, 38, name, dtype, device)
    if case == "geglu":  # as in Gemma 1: no post-norm
        given[3], options = None, {"geglu": True}
    found = norm_linear(*given, weight, **options, eps=EPS)
    steps = weight_steps(given[0])
    check_norm_linear(found, *given, exact, **options, size=size, weight_steps=steps)


@pytest.mark.parametrize("rows", [1, 3], ids="rows {}".format)
@pytest.mark.parametrize(("kind", "dim"), [x for x in CASES if x[1] > 1000], ids=str)
def test_a_row_reads_no_scale_of_the_next_row(kind, dim, rows, device):
    """The last block is not full. If the part of it beyond the row were not masked, infinite scales
    of the next row would be multiplied by 0, which gives NaN."""
    weight, exact, size = weight_of(kind, 6, dim, device)
    weight.scale[1::2], x = float("inf"), torch.randn(rows, dim, device=device)
    y = linear(x, weight)
    assert not y[:, 1::2].isfinite().any()
    check_linear(y[:, ::2], x, exact[::2], size[::2])


def changed(weight, mistake):
    """Returns the weight as a kernel with this mistake would read it."""
    data, scale, minimum = (None if x is None else x.clone() for x in weight.weight)
    if mistake == "scale of the next group":
        scale = scale.roll(1, 1)
    elif mistake == "minimum left out":
        minimum.zero_()
    elif mistake == "zero point left out":  # with a minimum there is none
        minimum = torch.zeros_like(scale)
    elif mistake == "halves of bytes swapped":
        data = data << 4 | data >> 4
    elif mistake == "units swapped":
        data = data.view(len(data), -1, 16).flip(1).flatten(1)
    elif mistake == "sign left out":
        data = data & 0x7F
    return {"weight": data, "weight_scale": scale, "weight_minimum": minimum}


@pytest.mark.parametrize("rows", [1, 8], ids="rows {}".format)
@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("int4, group 32", "scale of the next group"),
        ("int4, group 32, minimum", "minimum left out"),
        ("int4, group 32", "zero point left out"),
        ("int4, group 128", "halves of bytes swapped"),
        ("int4, row", "units swapped"),
        ("int8, group 128", "scale of the next group"),
        ("int8, group 16, minimum", "minimum left out"),
        ("int8, group 32", "units swapped"),
        ("int8, row", "sign left out"),
    ],
    ids=str,
)
def test_check_of_linear_detects_a_mistake(kind, mistake, rows, device):
    weight, exact, size = weight_of(kind, 24, 640, device)
    for dtype in DTYPES:
        x = torch.randn(rows, 640, device=device).to(dtype)
        check_linear(linear(x, weight), x, exact, size, weight_steps(x))
        found = linear(x, **changed(weight, mistake))
        with pytest.raises(AssertionError, match="times its bound"):
            check_linear(found, x, exact, size, weight_steps(x))


@pytest.mark.parametrize("b", [1, 3], ids="b {}".format)
@pytest.mark.parametrize(
    ("kind", "dim"),
    [("int4, group 32, minimum", 640), ("int8, group 128", 4736), ("int4, group 32", 96)],
    ids=str,
)
def test_next_token_equals_reference(kind, dim, b, poison_outputs):
    """One row: a program computes 4 or 8 tokens at a time, and 499 is a multiple of neither."""
    weight, exact, _ = weight_of(kind, 499, dim, "cpu")
    x, residual = torch.randn(2, b, dim)
    norm_weight, post_weight = torch.randn(2, dim) / 4
    given = x, residual, norm_weight, post_weight, weight
    found = []
    for options in ({}, dict(zip(("temperature", "seed"), sampled(3.0), strict=True))):
        expected = chosen(next_token, *given, b=b, device="cpu", **options)
        found.append(on_kernels(given, b, options))
        assert torch.equal(found[-1], expected)
    assert not torch.equal(*found)
    _, h = norm_linear(x, residual, norm_weight, post_weight, exact[:1].float())
    normed = h.double() * (h.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(found[0], (normed * (1 + norm_weight.double()) @ exact.T).argmax(-1))


def on_kernels(given, b, options):
    with interpreter():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        given = [x.to(device) for x in given]
        options = {name: x.to(device) for name, x in options.items()}
        return chosen(next_token, *given, b=b, device=device, **options).cpu()


@pytest.mark.parametrize("model", ["gemma-2b", "gemma-4-e4b", "gemma-4-26b-a4b"])
def test_a_decode_step_reads_few_bytes_of_packed_weights(model):
    script = Path(__file__).parents[1] / "support/packed_bytes.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, script, model]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    read = 2 * matrices_of_a_token(PRESETS[model])
    assert read <= found["16 bits"] <= 1.001 * read
    assert 0.5 < found["int8"] / found["16 bits"] <= 0.54
    assert 0.25 < found["int4"] / found["16 bits"] <= 0.32


def matrices_of_a_token(config: GemmaConfig) -> int:
    """Returns how many elements of its matrices a model reads for a token: of experts, those that
    the token uses."""
    total = 0
    for name, shape in config.tensor_shapes().items():
        expert = re.search(r"\.experts\.(\d+)\.", name)
        used = expert is None or int(expert[1]) < config.top_k_experts
        if len(shape) == 2 and name != PER_LAYER_EMBEDDING and used:
            total += math.prod(shape)
    return total


def test_a_packed_weight_of_wrong_shape_raises(device):
    weight = PackedWeight((6, 64), Packing(4, 32, False, HALF)).to(device)
    for op in (lambda x: linear(x, weight), lambda x: norm_linear(x, None, x[0], None, weight)):
        with pytest.raises(AssertionError, match=r"\(6, 64\).*\(2, 32\)"):
            op(torch.randn(2, 32, device=device))
