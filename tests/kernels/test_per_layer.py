"""Compares per_layer_inputs with fp64."""

import pytest
import torch
from kernel_checks import DTYPES
from packed_weights import PACKINGS, packed_weight
from tolerances import assert_rounded, norm_roundings

from gemma_fast.kernels import per_layer
from gemma_fast.kernels.launch import Gpu, as_on
from gemma_fast.kernels.packed import Packing
from gemma_fast.kernels.per_layer import per_layer_inputs

# (batch, tokens, layers, p); p is a power of two or not, and rows do not fill the last program.
SHAPES = [(1, 1, 35, 256), (2, 3, 5, 48), (1, 7, 1, 8), (3, 1, 2, 640)]
H100 = Gpu(capability=90, shared_memory=232_448, multiprocessors=132)
SCALE, EPS, VOCAB = 0.03, 1e-3, 11  # EPS is large enough to change results


def inputs(shape, dtype=torch.float32, device="cpu"):
    b, t, layers, p = shape
    projected = (2 * torch.randn(b, t, layers * p, device=device)).to(dtype)
    table = (torch.randn(VOCAB, layers * p, device=device) / p**0.5).to(dtype)
    norm_weight = torch.randn(p, device=device).to(dtype)
    return projected, torch.randint(VOCAB, (b, t), device=device), table, norm_weight


def parts(projected, ids, table, norm_weight, offset, scale=SCALE, eps=EPS):
    """Returns the normalized projection and the embedding, [b, t, layers, p], before their sum."""
    p = norm_weight.shape[0]
    x = scale * projected.double().unflatten(-1, (-1, p))
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + norm_weight.double())
    return x, table[ids].double().unflatten(-1, (-1, p)) * p**0.5


def check(y, given, offset):
    normed, embedding = parts(*given, offset)
    assert y.dtype == given[0].dtype and y.is_contiguous()
    size = normed.abs() + embedding.abs()
    assert_rounded(y, (normed + embedding) / 2**0.5, norm_roundings(normed.shape[-1]) + 4, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0], ids="offset {}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_per_layer_inputs_equal_fp64(shape, offset, dtype, device, poison_outputs):
    given = inputs(shape, dtype, device)
    check(per_layer_inputs(*given, scale=SCALE, eps=EPS, offset=offset), given, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_rows_of_a_packed_table_equal_fp64(packing, dtype, device, poison_outputs):
    projected, ids, _, norm_weight = inputs((2, 3, 4, 48), dtype, device)
    table, elements = packed_weight(VOCAB, 4 * 48, packing, device)
    y = per_layer_inputs(projected, ids, table, norm_weight, scale=SCALE, eps=EPS, offset=0.0)
    check(y, (projected, ids, elements, norm_weight), 0.0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 3, 35, 256), (1, 2, 12, 8), (1, 2, 8, 20)], ids=str)
def test_layers_of_a_packed_table_may_be_smaller_than_a_group(shape, bits, device):
    projected, ids, _, norm_weight = inputs(shape, device=device)
    packing = Packing(bits, 32, True, torch.float16)
    table, elements = packed_weight(VOCAB, shape[2] * shape[3], packing, device)
    y = per_layer_inputs(projected, ids, table, norm_weight, scale=SCALE, eps=EPS, offset=0.0)
    check(y, (projected, ids, elements, norm_weight), 0.0)


# Each function returns parts of the sum with one mistake.
MISTAKES = {
    "1 + weight": lambda given: parts(*given, 1.0),
    "unscaled": lambda given: parts(*given, 0.0, scale=1.0),
    "epsilon": lambda given: parts(*given, 0.0, eps=1.01 * EPS),
    "another token": lambda given: parts(given[0], given[1] - 1, *given[2:], 0.0),
    "embedding not rescaled": lambda given: parts(*given[:2], given[2] / 16, given[3], 0.0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_detects_a_mistake(mistake):
    given = inputs(SHAPES[1])
    check(sum(parts(*given, 0.0)).float() / 2**0.5, given, 0.0)
    with pytest.raises(AssertionError, match="times its bound"):
        check(sum(MISTAKES[mistake](given)).float() / 2**0.5, given, 0.0)


def test_the_sum_is_divided_by_the_root_of_2_and_rounded_once(device):
    """The model's logits do not depend on the factor, because a norm follows."""
    projected, ids, table, norm_weight = inputs(SHAPES[0], torch.float16, device)
    y = per_layer_inputs(projected, ids, table, norm_weight, scale=SCALE, eps=EPS, offset=0.0)
    normed, embedding = parts(projected, ids, table, norm_weight, 0.0)
    once = ((normed + embedding) / 2**0.5).half()
    steps = (normed.half() + embedding.half()) * 0.5**0.5
    assert (y != once).float().mean() < 1e-2 < (y != steps).float().mean()


def test_strided_inputs_equal_fp64(device, poison_outputs):
    projected, _, table, norm_weight = inputs((4, 6, 3, 40), device=device)
    ids = torch.randint(VOCAB, (6, 8), device=device).T[::2]
    given = projected.transpose(0, 1).contiguous().transpose(0, 1), ids, table, norm_weight
    check(per_layer_inputs(*given, scale=SCALE, eps=EPS, offset=0.0), given, 0.0)


def test_token_minus_one_reads_row_0(device):
    projected, _, table, norm_weight = inputs((1, 2, 2, 32), device=device)
    found, expected = (
        per_layer_inputs(projected, torch.tensor([ids], device=device), table, norm_weight, scale=1)
        for ids in ((-1, 2), (0, 2))
    )
    assert torch.equal(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_table_may_be_in_pinned_host_memory():
    projected, ids, table, norm_weight = inputs(SHAPES[0], device="cuda")
    given = projected, ids, table.cpu().pin_memory(), norm_weight
    found = per_layer_inputs(*given, scale=SCALE)
    assert torch.equal(found, per_layer_inputs(projected, ids, table, norm_weight, scale=SCALE))
    packed, _ = packed_weight(VOCAB, table.shape[1], PACKINGS["int4, group 32, minimum"], "cuda")
    expected = per_layer_inputs(projected, ids, packed, norm_weight, scale=SCALE)
    for part in packed.parameters():
        part.data = part.data.cpu().pin_memory()
    assert torch.equal(per_layer_inputs(projected, ids, packed, norm_weight, scale=SCALE), expected)


class Recorder(list):
    """Takes the place of a kernel, and collects the PDL option of its launches."""

    def __getitem__(self, grid):
        return lambda *args, PDL, **options: self.append(PDL)


def test_ids_that_are_copied_are_not_read_before_the_wait(monkeypatch):
    """The previous kernel in the stream may be the one that copies them."""
    launched = Recorder()
    monkeypatch.setattr(per_layer, "_per_layer_inputs_kernel", launched)
    monkeypatch.setattr(per_layer, "runs_triton", lambda x: True)
    projected, ids, *weights = inputs((2, 6, 3, 32), device="cpu")
    with as_on(H100):
        for given in (ids, ids.T.contiguous().T):
            per_layer_inputs(projected, given, *weights, scale=SCALE, pdl=True)
    assert [*launched] == [True, False]


def test_no_tokens_give_an_empty_result(device):
    given = inputs((2, 0, 3, 32), device=device)
    assert per_layer_inputs(*given, scale=SCALE).shape == (2, 0, 3, 32)


def test_tables_of_other_shapes_raise(device):
    projected, ids, table, norm_weight = inputs((1, 2, 3, 32), device=device)
    with pytest.raises(AssertionError, match="64"):
        per_layer_inputs(projected, ids, table[:, :64], norm_weight, scale=SCALE)
    with pytest.raises(AssertionError, match="float16"):
        per_layer_inputs(projected, ids, table.half(), norm_weight, scale=SCALE)
