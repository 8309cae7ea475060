"""`pytest benchmarks/` runs a test for each suite, size and provider, timed by pytest-benchmark.

pytest-benchmark's clock waits for the GPU, so these times include kernel launches. Each provider is
also timed without launches, as in `python -m benchmarks`; these times are in extra_info. Without a
GPU, tiny sizes are checked and nothing is measured.
"""

import itertools

import pytest
import torch

from gemma_fast.benchmarks.kernels.suite import Suite, calls, run
from gemma_fast.benchmarks.kernels.table import SUITES
from gemma_fast.benchmarks.measure.machine import Roof, device_and_dtype, measure_roof
from gemma_fast.benchmarks.measure.outcome import serious
from gemma_fast.benchmarks.measure.timing import clock

DEVICE, DTYPE = device_and_dtype(None)
CELLS = [
    pytest.param(suite, size, provider, id=f"{suite.name}-{size}-{provider}")
    for suite in SUITES.values()
    for size in suite.sizes_on(DEVICE)
    for provider in suite.names
]


@pytest.fixture(scope="session")
def roof() -> Roof | None:
    return measure_roof(DEVICE, DTYPE) if DEVICE.type == "cuda" else None


@pytest.mark.usefixtures("benchmark")  # otherwise --benchmark-only skips the test
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("suite", "size", "provider"), CELLS)
def test_provider_matches_the_oracle_and_is_timed(
    suite: Suite, size: str, provider: str, roof: Roof | None, request: pytest.FixtureRequest
) -> None:
    (result,) = run(suite, size, DEVICE, DTYPE, roof, [provider])
    if not result.status.startswith("ok"):
        (pytest.fail if serious([result]) else pytest.skip)(result.status)
    if roof is None:
        return
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = f"{suite.name}, {size}"
    benchmark.extra_info.update(result.figures(roof), status=result.status, error=result.error)
    cycle = itertools.cycle(calls(suite, provider, suite.sizes[size], DEVICE, DTYPE))
    with torch.no_grad():
        benchmark.pedantic(lambda: next(cycle)(), rounds=30, warmup_rounds=5)
