"""Every suite by its name, and the libraries that the rivals need."""

from importlib.util import find_spec

from benchmarks.bench_attention import ATTENTION
from benchmarks.bench_geglu import GATE_UP_GEGLU, GEGLU
from benchmarks.bench_model import MODEL
from benchmarks.bench_rmsnorm import ADD_RMS_NORM, ADD_RMS_NORM_POST, RMS_NORM
from benchmarks.bench_rotary import ROTARY_WRITE

SUITES = {
    suite.name: suite
    for suite in (
        RMS_NORM, ADD_RMS_NORM, ADD_RMS_NORM_POST, GEGLU, ROTARY_WRITE, ATTENTION, GATE_UP_GEGLU,
        MODEL,
    )
}  # fmt: skip

# provider → package on PyPI, module
LIBRARIES = {
    "liger": ("liger-kernel", "liger_kernel"),
    "liger (CuTe)": ("liger-kernel", "liger_kernel"),
    "quack": ("quack-kernels", "quack"),
    "flashinfer": ("flashinfer-python", "flashinfer"),
    "flash-attn-4": ("flash-attn-4", "flash_attn"),
    "transformers (sdpa)": ("transformers", "transformers"),
}


def missing(provider: str) -> str | None:
    """The package that a provider lacks here."""
    package, module = LIBRARIES.get(provider, ("torch", "torch"))
    return None if find_spec(module) else package
