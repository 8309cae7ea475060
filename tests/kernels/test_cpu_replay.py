"""Tests that Replay repeats C calls only where that gives what the function would give."""

import gc
import weakref

import pytest
import torch
from c_kernels import needs_c, without_c
from decode_cases import Case
from matvec_checks import packed_weight_of

from gemma_fast.kernels.cpu.replay import Replay, recorder
from gemma_fast.kernels.decode_attention import decode_attention
from gemma_fast.kernels.geglu import geglu
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.packed import Packing
from gemma_fast.kernels.rmsnorm import add_rms_norm, rms_norm

pytestmark = needs_c


class Steps:
    """A function of x whose calls are counted, and a Replay of it."""

    def __init__(self, function):
        self.function, self.count, self.replay = function, 0, Replay()

    def counted(self, *inputs):
        self.count += 1
        return self.function(*inputs)

    def check(self, *shapes, steps=3):
        """Compares each step with the function itself. Returns how often the function was called
        by the replay."""
        for _ in range(steps):
            inputs = [torch.randn(shape) for shape in shapes]
            found = self.replay(self.counted, *inputs)
            assert torch.equal(found, self.function(*inputs))
        return self.count


def layer():
    """Returns a function :: [rows, 64] → [rows, 64] of several ops."""
    norm, post_norm = torch.randn(2, 64)
    gate_up, down = (
        torch.randn(192, 64),
        packed_weight_of(64, 96, Packing(4, 32, True, torch.half), "cpu")[0],
    )

    def function(x, residual):
        y, h = norm_linear(x, residual, norm, post_norm, gate_up, geglu=True)
        return add_rms_norm(linear(y, down), h, norm)[0]

    return function


@pytest.mark.parametrize("rows", [1, 5], ids="rows {}".format)
def test_the_function_is_called_once(rows):
    assert Steps(layer()).check((rows, 64), (rows, 64)) == 1


def test_another_number_of_threads_records_again():
    steps, threads = Steps(layer()), torch.get_num_threads()
    try:
        assert steps.check((2, 64), (2, 64)) == 1
        torch.set_num_threads(threads + 1)
        assert steps.check((2, 64), (2, 64)) == 2
    finally:
        torch.set_num_threads(threads)


def test_a_repeated_call_that_fails_raises():
    replay, fails = Replay(), [0]

    def function(x):
        recorder.calls.append((lambda: fails[0], ()))
        return x

    replay(function, torch.randn(1))
    fails[0] = 1
    with pytest.raises(MemoryError, match="intermediate results"):
        replay(function, torch.randn(1))


def test_intermediate_results_are_kept():
    """Later allocations must not reuse their memory."""
    steps = Steps(layer())
    steps.check((2, 64), (2, 64), steps=1)
    gc.collect()
    others = [torch.full((2, n), float("nan")) for n in (64, 96, 192) for _ in range(50)]
    assert steps.check((2, 64), (2, 64)) == 1 and len(others) == 150


def test_a_deleted_replay_frees_its_tensors():
    tensors = [torch.randn(8, 64)]
    replay, freed = Replay(), weakref.ref(tensors[0])
    replay(lambda x: linear(x, tensors[0]), torch.randn(1, 64))
    tensors.clear()
    assert freed() is not None
    del replay
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("heads", ["qkv", "q"])
def test_tensors_that_are_changed_in_place_are_read_again(heads):
    """As in a decode step, the position and the ring change."""
    one, other = (
        Case("cpu", torch.float32, [3, 0], spare=9, m=2, heads=heads, stale=0.5) for _ in range(2)
    )
    tables = torch.randn(2, 20, 16)  # of cos and sin

    def attend(case):
        rest = *tables, case.position, case.counter
        return lambda qkv: decode_attention(qkv, case.keys, case.values, *rest, **case.options)

    replay = Replay()
    for _ in range(5):
        qkv = torch.randn(one.qkv.shape)
        assert torch.equal(replay(attend(one), qkv), attend(other)(qkv))
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        one.position += 1
        other.position += 1


BUFFER = torch.randn(3, 2, 64)
# Functions of which a part is not a C call: another library, or a copy of a strided tensor.
NOT_REPEATED = {
    "a matmul of many rows": ((65, 64), lambda x: linear(x, BUFFER[0, :1])),
    "a strided weight": ((2, 64), lambda x: linear(x, BUFFER[0].T.contiguous().T)),
    "a strided row": ((2, 64, 2), lambda x: rms_norm(x[..., 0], None)),
    "a strided residual": (
        (2, 64, 2), lambda x: add_rms_norm(x[..., 1].contiguous(), x[..., 0], BUFFER[0, 0])[0]
    ),
    "rows of gates that are copied": (
        (3, 2, 64), lambda x: geglu(x.transpose(0, 1), BUFFER.transpose(0, 1))
    ),
    "rows of `up` that are copied": (
        (2, 3, 2),
        lambda x: norm_linear(
            BUFFER, BUFFER, None, BUFFER[0, 0], BUFFER[0], up=x.transpose(0, 1)
        )[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_REPEATED)
def test_functions_that_need_more_than_c_calls_are_called_each_time(name):
    shape, function = NOT_REPEATED[name]
    assert Steps(function).check(shape) == 3


def test_without_c_the_function_is_called_each_time():
    with without_c():
        assert Steps(layer()).check((2, 64), (2, 64)) == 3


def test_a_replay_that_began_in_inference_mode_goes_on_outside_of_it():
    steps = Steps(layer())
    with torch.inference_mode():
        steps.check((2, 64), (2, 64))
    with torch.no_grad():
        assert steps.check((2, 64), (2, 64)) == 1


def test_an_error_ends_the_recording():
    def fail(x):
        rms_norm(x, None)
        raise KeyboardInterrupt

    replay = Replay()
    with pytest.raises(KeyboardInterrupt):
        replay(fail, torch.randn(1, 8))
    assert recorder.calls is None and recorder.tensors is None
    x = torch.randn(1, 8)
    assert torch.equal(replay(lambda x: rms_norm(x, None), x), rms_norm(x, None))
