"""Describes the machine (stamp). Measures its peak rates (roof) in each run that uses them."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gemma_fast.benchmarks.measure.timing import Call, event_seconds, settle, wall_seconds
from gemma_fast.kernels.matvec import linear


class Work(NamedTuple):
    """The minimum work of an op: bytes read or written, each counted once, and FLOPs."""

    bytes: float
    flops: float


def visible_pairs(t: int, window: int | None) -> int:
    """Returns the sum, over t causal queries, of the number of keys that a query sees. Query i, of
    1 … t, sees min(i, window) keys."""
    w = min(t, window or t)
    return w * (w + 1) // 2 + (t - w) * w


class Roof(NamedTuple):
    """This machine's peak rates, which limit the speed of every op."""

    copy: float  # bytes/s of a large copy, read + written
    product: float  # FLOP/s of a large matmul
    products: Mapping[str, float] = {}  # dtype → FLOP/s, if the run has several dtypes

    def of(self, dtype: str | None) -> Roof:
        """Returns the roof for a dtype. None: the dtype with the fastest matmul."""
        fastest = max(self.products.values(), default=self.product)
        return self._replace(product=self.products.get(dtype or "", fastest))

    def floor(self, work: Work) -> float:
        """Returns the least possible seconds: the larger of the bytes' time and the FLOPs' time."""
        return max(work.bytes / self.copy, work.flops / self.product)

    def bound(self, work: Work) -> str:
        return "memory" if work.bytes / self.copy >= work.flops / self.product else "compute"


def device_and_dtype(dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Returns the device and the dtype. The device is the GPU, or the CPU if there is no GPU.

    dtype: its name; None selects bfloat16 on a GPU, float32 on a CPU
    """
    cuda = torch.cuda.is_available()
    kind = getattr(torch, dtype or ("bfloat16" if cuda else "float32"))
    return torch.device("cuda" if cuda else "cpu"), kind


def measure_roof(device: torch.device, *dtypes: torch.dtype) -> Roof:
    """Returns the median rates of a copy of 1 GiB and a matmul of 8192³ (on a CPU 2048³), with
    random data. The matmul is F.linear on a GPU. On a CPU it is our `linear`, which in float32
    calls oneDNN and is faster than F.linear."""
    cuda = device.type == "cuda"
    n = 8192 if cuda else 2048
    product = F.linear if cuda else linear

    def seconds(work: Call) -> float:
        if cuda:
            settle(work, 0.5)
            return statistics.median(event_seconds(work, 50))
        return statistics.median([wall_seconds(work) for _ in range(9)][2:])

    source = torch.empty(1 << 27, dtype=torch.int64, device=device).random_()
    copy = 2 * source.nbytes / seconds(partial(torch.empty_like(source).copy_, source))
    rates = {}
    for dtype in dtypes:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        rates[dtype_name(dtype)] = 2 * n**3 / seconds(partial(product, a, b))
    return Roof(copy, rates[dtype_name(dtypes[0])], rates if len(rates) > 1 else {})


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure_again(stamp: dict[str, Any], device: torch.device, *dtypes: torch.dtype) -> None:
    """Measures the roof again, at the end of the run, and adds it to the stamp. If the GPU has
    failed, the stamp stays as it is."""
    with suppress(RuntimeError):
        stamp["roof_at_the_end"] = measure_roof(device, *dtypes)._asdict()


def stamp(
    device: torch.device, dtypes: Sequence[torch.dtype], rivals: Iterable[str],
    commit: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns a dict that describes the machine, the date and the versions of the software.

    rivals: packages whose versions are included; commit: replaces the commit that git returns
    """
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    cuda = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "commit": commit or _commit(Path(__file__)),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cpu": None if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "driver": _output(*driver) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": installed_version("triton"),
        "rivals": {name: version for name in rivals if (version := installed_version(name))},
        "dtype": ", ".join(map(dtype_name, dtypes)),
    }


def _commit(file: Path) -> str | None:
    """Returns git's current commit. Returns None if git does not track the file, because an
    installed package may be inside another project's repository."""
    git = ("git", "-C", str(file.parent))
    if _output(*git, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _output(*git, "describe", "--always", "--dirty", "--exclude=*")


def _output(*command: str) -> str | None:
    """Returns the command's first line of output. Returns None if there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip().split("\n")[0] or None


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
