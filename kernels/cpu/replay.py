"""Repeats the C calls of a function of tensors, without the Python code between them.

A decode step of Gemma 3 270M makes 91 of these calls. The code that prepares them takes a quarter
of the step's time (benchmarks/LOG.md). As in a CUDA graph, all tensors keep the addresses of the
recorded call.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Call = tuple[Callable[..., Any], Sequence[Any]]


class Recorder(threading.local):
    """Records the C calls of this thread.

    calls    functions and their arguments; None: nothing is recorded
    tensors  the tensors to which the arguments point
    missed   an op computed something without a C call, so the calls cannot replace it
    """

    calls: list[Call] | None = None
    tensors: list[Tensor] | None = None
    missed = False

    def run(self, launcher: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Runs an op's launcher, and notes if it makes no C call."""
        calls = self.calls
        before = len(calls or ())
        result = launcher(*args, **kwargs)
        self.missed |= calls is not None and len(calls) == before
        return result


recorder = Recorder()


def run_calls(calls: Sequence[Call]) -> None:
    """Makes these calls. Raises MemoryError if one returns nonzero."""
    for function, args in calls:
        if function(*args):
            raise MemoryError("no memory for intermediate results of a CPU kernel")


class Replay:
    """Calls a function, and records its C calls the first time. Later calls repeat these, until the
    number of threads changes.

    The function must compute its result by the ops of kernels/ and views of tensors alone, without
    copies, and read no tensor that is replaced between calls. If one of its ops does not call C,
    the function itself is called each time.
    """

    def __init__(self) -> None:
        self._calls: list[Call] | None = None
        self._inputs: Sequence[Tensor | None] = ()
        self._result: Any = None
        self._tensors: list[Tensor] = []
        self._repeats, self._threads = True, 0

    def __call__(self, function: Callable[..., Result], *inputs: Tensor | None) -> Result:
        """Returns function(*inputs). All calls must have inputs of the same shapes. The next call
        overwrites the result."""
        if not self._repeats:
            return function(*inputs)
        if self._calls is None or self._threads != torch.get_num_threads():
            return self._record(function, inputs)
        for own, x in zip(self._inputs, inputs, strict=True):
            if own is not None and x is not None:
                own.copy_(x)
        run_calls(self._calls)
        return self._result

    def _record(self, function: Callable[..., Result], inputs: Sequence[Tensor | None]) -> Result:
        with torch.inference_mode(False):  # else the copies cannot be changed outside that mode
            copies = [None if x is None else torch.empty_like(x).copy_(x) for x in inputs]
        assert recorder.calls is None, "recordings cannot be nested"
        try:
            recorder.calls, recorder.tensors, recorder.missed = [], [], False
            self._calls, self._threads = None, torch.get_num_threads()
            result = function(*copies)
            self._repeats = not recorder.missed
            if self._repeats:
                self._inputs, self._result, self._tensors = copies, result, recorder.tensors
                self._calls = recorder.calls  # last, because an interrupt may come before it
        finally:
            recorder.calls = recorder.tensors = None
        return result
