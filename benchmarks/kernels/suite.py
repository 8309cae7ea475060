"""A suite is an op with its input sizes and its providers. `run` checks and times each provider.

    SUITE = Suite("rms_norm", …, providers={"eager": …, "gemma_fast": …})
    for result in run(SUITE, "8192 x 2048", device, torch.bfloat16, roof): …

A provider is an implementation of the op: eager PyTorch, a rival library or ours (gemma_fast). It
is a function that gets one set of inputs, does imports and other untimed preparation, and returns a
"call": a function without arguments, which runs the op and returns its outputs. The oracle computes
the correct outputs in float32; a provider whose outputs differ from them is "wrong" and is not
timed. An exception of a provider becomes its status (see measure/outcome.py).

The work of a size is the minimum number of bytes and FLOPs (see measure/machine.py). A suite with a
yardstick also times a copy of the same number of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.benchmarks.measure.machine import Roof, Work
from gemma_fast.benchmarks.measure.outcome import COPY, NOT_MEASURED, OURS, Wrong, error, verdict
from gemma_fast.benchmarks.measure.timing import Call, Times, device_times

Size = dict[str, Any]
Config = dict[str, int]
Choices = Mapping[str, Sequence[int]]
Prepare = Callable[..., Call]  # the type of a provider: one set of inputs → the timed call
# Limits of outcome.error. One rounding to bf16 gives an error of 1.7e-3, to fp16 2.1e-4, and rivals
# may also round intermediate results. The bf16 limit is too wide to detect another order of
# roundings, gelu by erf or a wrong eps; the tests detect these mistakes.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-5}


@dataclass(frozen=True)
class Tuning:
    """Launch configs that benchmarks.tune tries. kernel: the kernel's name in kernels.launch;
    choices: a function from a size to {key of the config: values to try}"""

    kernel: str
    choices: Callable[[Size], Choices]

    def candidates(self, size: Size) -> dict[str, Config]:
        """Returns every combination of the choices: name → launch config."""
        choices = self.choices(size)
        configs = (dict(zip(choices, x, strict=True)) for x in product(*choices.values()))
        return {", ".join([OURS, *(f"{k} {v}" for k, v in x.items())]): x for x in configs}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """An op, its sizes and its providers.

    about      the op in one line, for titles
    sizes      the sizes used on a GPU: name → keywords of `inputs` and `work`
    tiny       the sizes used without a GPU
    inputs     inputs(**size, device=…, dtype=…) → tuple of random inputs, by torch's generators
    oracle     oracle(*inputs upcast to fp32) → the correct output or outputs, in fp32
    work       work(itemsize, **size) → the minimum number of bytes and FLOPs
    yardstick  whether a copy of the same number of bytes is also timed
    tuning     launch configs that benchmarks.tune tries
    tolerance  limit of outcome.error, by dtype
    float32    indices of the outputs that are in float32 for every dtype
    """

    name: str
    about: str
    sizes: Mapping[str, Size]
    tiny: Mapping[str, Size]
    inputs: Callable[..., tuple[Any, ...]]
    oracle: Callable[..., Tensor | tuple[Tensor, ...]]
    work: Callable[..., Work]
    providers: Mapping[str, Prepare]
    yardstick: bool = False
    tuning: Tuning | None = None
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)
    float32: Sequence[int] = ()

    @property
    def names(self) -> list[str]:
        return [*self.providers, *([COPY] if self.yardstick else [])]

    def sizes_on(self, device: torch.device) -> Mapping[str, Size]:
        return self.sizes if device.type == "cuda" else self.tiny


class Check(NamedTuple):
    """A kernel's check in `gemma-fast verify`: ours(*inputs)() is compared with formula(*inputs).

    inputs: as in Suite; sizes: the size used without a GPU, then the size used on a GPU
    """

    name: str
    inputs: Callable[..., tuple[Any, ...]]
    formula: Callable[..., Any]  # eager PyTorch; in float64 its result is taken as exact
    ours: Prepare
    sizes: Sequence[Size]
    chooses: bool = False  # whether `ours` returns tokens and `formula` returns logits

    def resized(self, name: str, **changes: Any) -> Check:
        """Returns the check under another name and with changed keywords of `inputs`."""
        return self._replace(name=name, sizes=[size | changes for size in self.sizes])


@dataclass(frozen=True)
class KernelResult:
    suite: str
    size: str
    provider: str
    status: str
    work: Work
    error: float | None = None  # see outcome.error
    times: Times | None = None  # None if the provider was not timed
    graph: bool | None = None  # whether a CUDA graph was timed
    took: float = 0.0  # total seconds for inputs, compilation, check and timing

    @property
    def cell(self) -> tuple[str, str]:
        """Returns (suite, size). Only results with the same cell are compared with each other."""
        return self.suite, self.size

    @property
    def typical(self) -> float | None:
        return self.times and self.times.median

    def figures(self, roof: Roof | None) -> dict[str, Any]:
        """Returns times, rates and the share of the roof; an empty dict without times or roof."""
        if self.times is None or roof is None:
            return {}
        median, p20, p80 = self.times
        return {
            "median_us": median * 1e6, "p20_us": p20 * 1e6, "p80_us": p80 * 1e6,
            "bytes": self.work.bytes, "flops": self.work.flops,
            "GB_per_s": self.work.bytes / median / 1e9,
            "TFLOP_per_s": self.work.flops / median / 1e12,
            "bound": roof.bound(self.work), "share_of_roof": roof.floor(self.work) / median,
            "graph": self.graph,
        }  # fmt: skip


@torch.no_grad()
def run(
    suite: Suite, size: str, device: torch.device, dtype: torch.dtype, roof: Roof | None,
    names: Iterable[str] | None = None,
) -> Iterator[KernelResult]:  # fmt: skip
    """Yields one result per provider in `names` (default: all). Times nothing if roof is None."""
    keywords = (suite.sizes if roof else suite.tiny)[size]
    work = suite.work(dtype.itemsize, **keywords)
    names = list(names or suite.names)
    try:
        expected = truth(suite, keywords, device, dtype)
    except Exception as problem:  # for example out of memory
        status = verdict(problem)
        yield from (KernelResult(suite.name, size, name, status, work) for name in names)
        return
    for name in names:
        own = work._replace(flops=0) if name == COPY else work
        result = KernelResult(suite.name, size, name, "ok", own)
        try:
            torch.cuda.empty_cache()  # so that each provider can use all memory
            if name != COPY:
                found = check(suite, name, keywords, device, dtype, expected)
                result = replace(result, error=found)
            if roof is None:
                result = replace(result, status=NOT_MEASURED)
            else:
                made = calls(suite, name, keywords, device, dtype)
                times, graph = device_times(made, partial(check_replay, suite, name, made, dtype))
                if name != COPY and times.median < 0.8 * roof.floor(work):
                    raise Wrong(f"{roof.floor(work) / times.median:.2g} times the roof's speed")
                result = replace(result, times=times, graph=graph)
        except Exception as problem:  # a rival may raise any exception
            result = replace(result, status=verdict(problem))
        yield result


def make_inputs(
    suite: Suite | Check, size: Size, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    given = suite.inputs(**size, device=device, dtype=dtype)
    if device.type == "cuda":
        torch.cuda.synchronize()  # kernels may read weights before earlier kernels have ended
    return given


def truth(suite: Suite, size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns the oracle's outputs for the inputs of seed 0, upcast to fp32."""
    return outputs(suite.oracle(*upcast(make_inputs(suite, size, device, dtype, 0))))


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def upcast(inputs: Iterable[Any], dtype: torch.dtype = torch.float32) -> list[Any]:
    return [x.to(dtype, copy=True) if is_float(x) else x for x in inputs]


def check(
    suite: Suite, name: str, size: Size, device: torch.device, dtype: torch.dtype,
    expected: tuple[Tensor, ...],
) -> float:  # fmt: skip
    """Returns the error of the provider's outputs for the inputs of seed 0. Raises Wrong if the
    error is too large, or if a shape or dtype is wrong. Exceptions of the provider pass through."""
    torch.compiler.reset()  # Dynamo stops compiling a function after eight sizes
    call = suite.providers[name](*make_inputs(suite, size, device, dtype, 0))
    found = outputs(call())
    kinds = [(x.dtype, tuple(x.shape)) for x in found]
    kept = [torch.float32 if i in suite.float32 else dtype for i in range(len(expected))]
    due = [(kind, tuple(x.shape)) for kind, x in zip(kept, expected, strict=True)]
    if kinds != due:
        raise Wrong(f"gives {kinds}, not {due}")
    worst = max(map(error, found, expected), key=lambda x: math.inf if math.isnan(x) else x)
    if not worst <= suite.tolerance[dtype]:
        raise Wrong(f"error {worst:.2g} exceeds the limit {suite.tolerance[dtype]:g}")
    return worst


def check_replay(
    suite: Suite, name: str, made: Sequence[Call], dtype: torch.dtype, left: Any
) -> None:
    """Raises Wrong if `left`, our output after the graph's last replay, differs from the output of
    a separate call. Overlapping kernels may cause such a difference. Rivals are not checked,
    because some of them overwrite their inputs."""
    if name.startswith(OURS):
        copies = [x.clone() for x in outputs(left)]  # a separate call may write to the same memory
        for found, by_itself in zip(copies, outputs(made[0]()), strict=True):
            if not (off := error(found, by_itself)) <= suite.tolerance[dtype]:
                raise Wrong(f"error {off:.2g} in the timed graph")


def outputs(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def calls(
    suite: Suite, name: str, size: Size, device: torch.device, dtype: torch.dtype
) -> list[Call]:
    """Returns the provider's calls, each with its own inputs. Together, they read and write more
    than four times the size of the L2 cache."""
    first = make_inputs(suite, size, device, dtype, 1)
    touched = int(suite.work(dtype.itemsize, **size).bytes)
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    sets = max(2, 1 + 4 * l2 // touched)
    if name == COPY:
        return [copy_of(touched // 2, device) for _ in range(sets)]
    provider = suite.providers[name]
    others = (make_inputs(suite, size, device, dtype, seed) for seed in range(2, sets + 1))
    return [provider(*first), *(provider(*inputs) for inputs in others)]


def copy_of(size: int, device: torch.device) -> Call:
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
