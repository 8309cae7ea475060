"""Tests packed weights in the layout of PyTorch's CPU kernel. The oracle is the packed rows in
float64. With scales and minimums that bf16 represents, a result must be exact."""

from types import SimpleNamespace

import pytest
import torch
from triton_interpreter import interpreter

from gemma_fast.kernels import _int4pack, packed_cpu
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.packed import PackedRows, PackedWeight, Packing, take_rows
from gemma_fast.kernels.packed_cpu import LARGEST, MAX_ROWS, CPUPackedWeight
from gemma_fast.kernels.rmsnorm import rms_norm

BLOCK = _int4pack.block_rows()
needs_kernel = pytest.mark.skipif(BLOCK is None, reason="needs PyTorch's kernel: AVX2 or AVX512")
OUT = 192
# (bits, group, dim): groups of each size, larger ones than the kernel has, and odd multiples
SHAPES = [
    (4, 32, 96), (4, 64, 192), (4, 128, 256), (4, 256, 512), (4, 1024, 1024), (4, 96, 192),
    (8, 16, 80), (8, 32, 96), (8, 64, 192), (8, 128, 256), (8, 256, 512), (8, 640, 640),
    (8, 48, 96),
]  # fmt: skip


RANGES = {(4, False): (-8, 7), (4, True): (0, 15), (8, False): (-128, LARGEST), (8, True): (0, 31)}


def rows_of(bits: int, group: int, dim: int, minimum: bool, exact: bool, out: int = OUT):
    """Returns packed rows of random values. exact: bf16 has their scales and zeros."""
    low, high = RANGES[bits, minimum]
    values = torch.randint(low, high + 1, (out, dim), dtype=torch.int8)
    shape = out, dim // group
    if exact:
        scale = 2.0 ** torch.randint(-6, -3, shape)
        middle = torch.randint(-3, 4, shape) * (17 if bits == 8 else 1) / 64
        return PackedRows(values, scale, middle - 8 * scale if minimum else None)
    scale = (torch.rand(shape) + 0.5) / 64
    return PackedRows(values, scale, -torch.rand(shape) * high / 64 if minimum else None)


def packed(bits: int, group: int, rows: PackedRows) -> CPUPackedWeight:
    packing = Packing(bits, group, rows.minimum is not None, torch.float16)
    weight = CPUPackedWeight(rows.values.shape, packing)
    for start in range(0, len(rows.values), 64):  # in blocks, as load.py does
        part = (None if x is None else x[start : start + 64] for x in rows)
        weight.write(start, PackedRows(*part))
    return weight


def float64(rows: PackedRows) -> torch.Tensor:
    """Returns scale * value + minimum :: [out, dim]."""
    repeats = rows.values.shape[1] // rows.scale.shape[1]
    scale = rows.scale.double().repeat_interleave(repeats, 1)
    weight = rows.values.double() * scale
    return weight if rows.minimum is None else weight + rows.minimum.repeat_interleave(repeats, 1)


def check_exact(bits, group, dim, minimum, x_rows):
    """Integers in x and powers of two in the weight have exact sums: y is rounded once."""
    rows = rows_of(bits, group, dim, minimum, exact=True)
    weight, oracle = packed(bits, group, rows), float64(rows)
    assert torch.equal(weight.weight.unpack(torch.float32).double(), oracle)
    x = torch.randint(-4, 5, (x_rows, dim)).bfloat16()
    y = linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (x.double() @ oracle.T).bfloat16())


@needs_kernel
@pytest.mark.parametrize("x_rows", [1, 3, MAX_ROWS, MAX_ROWS + 1], ids=str)
@pytest.mark.parametrize("minimum", [False, True], ids=["symmetric", "minimum"])
@pytest.mark.parametrize(("bits", "group", "dim"), SHAPES, ids=str)
def test_matmul_is_exact_where_bf16_has_the_scales(bits, group, dim, minimum, x_rows):
    check_exact(bits, group, dim, minimum, x_rows)


MISTAKES = {
    "the nibbles of x are exchanged": (
        packed_cpu, "_digit_values", lambda: torch.tensor([[1.0], [16.0]], dtype=torch.bfloat16)
    ),
    "rows are neighbors in a byte": (
        packed_cpu, "interleave",
        lambda values, *args: _int4pack.interleave(
            values.view(-1, BLOCK // 2, 2, values.shape[1]).transpose(1, 2).reshape(values.shape),
            *args,
        ),
    ),
    "low nibbles are before high ones": (
        packed_cpu, "interleave",
        lambda values, *args: _int4pack.interleave(values >> 4 | values << 4, *args),
    ),
}  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("mistake", MISTAKES)
def test_known_mistakes_are_noticed(mistake, monkeypatch):
    check_exact(8, 32, 96, False, 3)
    monkeypatch.setattr(*MISTAKES[mistake])
    with pytest.raises((AssertionError, RuntimeError)):
        check_exact(8, 32, 96, False, 3)


@needs_kernel
@pytest.mark.parametrize("largest", [LARGEST, 127])
def test_values_above_119_are_not_shifted(largest, monkeypatch):
    """Their zero, 8 / 17 of the scale, is rounded. With a shift, 127 would become -129."""
    rows = rows_of(8, 32, 96, False, exact=True)
    rows.values[::2] = torch.randint(-128, 128, rows.values[::2].shape)
    monkeypatch.setattr(packed_cpu, "LARGEST", largest)
    found = packed(8, 32, rows).weight.unpack(torch.float32)
    limit = 8 * 2**-9 * rows.scale.max()
    assert ((found - float64(rows)).abs().max() <= limit) == (largest == LARGEST)


@needs_kernel
@pytest.mark.parametrize("minimum", [False, True], ids=["symmetric", "minimum"])
@pytest.mark.parametrize(("bits", "group", "dim"), SHAPES, ids=str)
def test_rounded_scales_change_a_weight_about_as_bf16_does(bits, group, dim, minimum):
    rows = rows_of(bits, group, dim, minimum, exact=False)
    found, oracle = packed(bits, group, rows).weight.unpack(torch.float32), float64(rows)
    groups = oracle.unflatten(1, (-1, group))
    largest = groups.abs().amax(2) + (8 * rows.scale if bits == 8 else 0)
    error = (found - oracle).unflatten(1, (-1, group)).abs().amax(2)
    assert (error <= 2**-7 * largest).all()
    assert (found - oracle).norm() < 1.4 * (oracle.bfloat16() - oracle).norm()


@needs_kernel
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_gathered(bits):
    rows = rows_of(bits, 32, 96, True, exact=True)
    weight, oracle = packed(bits, 32, rows).weight, float64(rows)
    index = torch.tensor([[0, 191, 31, 32], [63, 64, 33, 0]])
    assert torch.equal(take_rows(weight, index, torch.float32).double(), oracle[index])
    for start, stop in ((0, 192), (0, 1), (63, 65), (70, 191), (191, 192), (5, 5)):
        found = weight.rows(start, stop).unpack(torch.float32)
        assert torch.equal(found.double(), oracle[start:stop])


@needs_kernel
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_has_the_properties_of_the_plain_layout(bits):
    rows = rows_of(bits, 32, 96, False, exact=True)
    weight = packed(bits, 32, rows)
    plain = PackedWeight(rows.values.shape, Packing(bits, 32, False, torch.float16))
    assert weight.shape == plain.shape == (OUT, 96)
    assert (weight.weight.bits, weight.weight.group) == (bits, 32)
    assert weight.data.shape == plain.data.shape
    assert weight.nbytes == plain.nbytes + plain.scale.nbytes  # zeros, beside scales


@needs_kernel
def test_rows_of_several_kinds_are_parts_of_one_weight():
    """As q, k and v of a GGUF file in Q4_K_M: Q4_K, Q4_K and Q6_K."""
    parts = [
        rows_of(4, 32, 96, True, exact=True, out=64), rows_of(4, 32, 96, False, True, out=64),
        rows_of(8, 16, 96, False, exact=True, out=64),
    ]  # fmt: skip
    parts[0] = parts[0]._replace(minimum=parts[0].scale * -8)  # zero / 17 is exact, too
    weight = CPUPackedWeight((192, 96), Packing(8, 16, True, torch.float16))
    for i, part in enumerate(parts):
        weight.write(64 * i, part)
    oracle = torch.cat([float64(part) for part in parts])
    assert torch.equal(weight.weight.unpack(torch.float32).double(), oracle)


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (2, 1, 96), (96,)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_x_of_any_shape(bits, shape):
    rows = rows_of(bits, 32, 96, False, exact=True)
    x = torch.randint(-4, 5, (*shape[:-1], 192)).bfloat16()[..., ::2]  # strided
    x = x if len(shape) > 1 else x.contiguous()
    y = linear(x, packed(bits, 32, rows))
    assert torch.equal(y, (x.double() @ float64(rows).T).bfloat16())


@needs_kernel
def test_float32_activations_use_the_unpacked_weight():
    rows = rows_of(8, 32, 96, True, exact=False)
    weight, x = packed(8, 32, rows), torch.randn(3, 96)
    torch.testing.assert_close(linear(x, weight), x @ weight.weight.unpack(torch.float32).T)


@needs_kernel
def test_norm_and_geglu_are_separate_ops():
    rows = rows_of(8, 32, 96, False, exact=False)
    weight, x, norm = packed(8, 32, rows), torch.randn(2, 96).bfloat16(), torch.randn(96)
    y, h = norm_linear(x, None, norm, None, weight, geglu=True)
    gate, up = linear(rms_norm(x, norm, 1e-6, 1.0), weight).float().chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=1e-6)
    assert torch.equal(h, x)


@needs_kernel
def test_a_move_to_a_gpu_says_what_to_do_and_changes_nothing():
    weight = packed(8, 32, rows_of(8, 32, 96, False, exact=True))
    before = weight.weight.unpack(torch.float32)
    with pytest.raises(ValueError, match="load the model again with device='cuda'"):
        weight._apply(lambda x: SimpleNamespace(is_cuda=True))
    assert torch.equal(weight.weight.unpack(torch.float32), before)
    assert torch.equal(weight.float().weight.unpack(torch.float32), before)


@needs_kernel
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_another_processor_packed_are_unpacked(bits, monkeypatch):
    """A model that was pickled on a processor with AVX2 and is used on one with AVX512."""
    rows = rows_of(bits, 32, 96, True, exact=True)
    own = packed(bits, 32, rows)
    monkeypatch.setattr(packed_cpu, "block_rows", lambda: 96 - BLOCK)
    weight, x, oracle = packed(bits, 32, rows), torch.randint(-4, 5, (3, 96)), float64(rows)
    monkeypatch.undo()
    assert not torch.equal(weight.data, own.data)
    assert torch.equal(weight.weight.unpack(torch.float32).double(), oracle)
    assert torch.equal(linear(x.bfloat16(), weight), (x.double() @ oracle.T).bfloat16())
    index = torch.tensor([5, 190, 37])
    assert torch.equal(take_rows(weight.weight, index, torch.float32).double(), oracle[index])
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        own.load_state_dict(weight.state_dict())


@needs_kernel
def test_scales_that_are_not_finite_are_refused():
    rows = rows_of(8, 32, 96, False, exact=True)
    rows.scale[3, 1] = float("nan")
    with pytest.raises(ValueError, match="does not fit bfloat16"):
        packed(8, 32, rows)


@needs_kernel
def test_only_whole_blocks_are_supported():
    assert CPUPackedWeight.supports([64, 256])
    assert not CPUPackedWeight.supports([64, 200])
    with interpreter():
        assert not CPUPackedWeight.supports([64])


@pytest.mark.parametrize("found", ["another processor", "another layout", "no kernel"])
def test_without_the_known_layout_there_are_no_kernels(found, monkeypatch):
    capability = "DEFAULT" if found == "another processor" else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if found == "another layout":
        other = lambda values, _: values[:, ::2].to(torch.uint8) | values[:, 1::2] << 4  # noqa: E731
        fake = SimpleNamespace(_convert_weight_to_int4pack_for_cpu=other)
        monkeypatch.setattr(torch.ops, "aten", fake)
    if found == "no kernel":
        monkeypatch.setattr(torch.ops, "aten", SimpleNamespace())
    _int4pack.block_rows.cache_clear()
    try:
        assert _int4pack.block_rows() is None
    finally:
        _int4pack.block_rows.cache_clear()
