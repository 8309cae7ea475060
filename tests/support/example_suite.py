"""Defines a benchmark suite for the tests, with a provider for each possible outcome."""

import torch

from gemma_fast.benchmarks.kernels.suite import Suite
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS


def missing(x):
    raise ModuleNotFoundError("No module named 'rival'", name="rival")


def windowless(x):
    raise NotImplementedError("no window")


def broken(x):
    raise RuntimeError("illegal instruction\nand a long story")


PROVIDERS = {
    EAGER: lambda x: lambda: x * 2,
    "off": lambda x: lambda: x * 2.001,
    "NaN": lambda x: lambda: torch.where(x > 1, torch.nan, x * 2),
    "infinite": lambda x: lambda: torch.where(x > 1, torch.inf, x * 2),
    "other shape": lambda x: lambda: (x * 2)[:1],
    "other dtype": lambda x: lambda: (x * 2).double(),
    "two outputs": lambda x: lambda: (x * 2, x),
    "absent": missing,
    "unable": windowless,
    "broken": broken,
    OURS: lambda x: lambda: x + x,
}
SUITE = Suite(
    name="double",
    about="2 * x of [n]",
    yardstick=True,
    sizes={"large": {"n": 1 << 20}},
    tiny={"small": {"n": 64}},
    inputs=lambda n, **make: (torch.randn(n, **make),),
    oracle=lambda x: 2 * x,
    work=lambda itemsize, n: Work(2 * n * itemsize, n),
    providers=PROVIDERS,
)
