"""Every kernel's suite by its name, and the libraries that the rivals need."""

from gemma_fast.benchmarks.kernels.attention import ATTENTION
from gemma_fast.benchmarks.kernels.decode_attention import DECODE_ATTENTION
from gemma_fast.benchmarks.kernels.geglu import GATE_UP_GEGLU, GEGLU
from gemma_fast.benchmarks.kernels.lm_head import LM_HEAD
from gemma_fast.benchmarks.kernels.matvec import LINEAR, NORM_LINEAR
from gemma_fast.benchmarks.kernels.rmsnorm import ADD_RMS_NORM, ADD_RMS_NORM_POST, RMS_NORM
from gemma_fast.benchmarks.kernels.rotary import ROTARY_WRITE
from gemma_fast.benchmarks.measure.machine import installed_version

SUITES = {
    suite.name: suite
    for suite in (
        RMS_NORM, ADD_RMS_NORM, ADD_RMS_NORM_POST, GEGLU, ROTARY_WRITE, ATTENTION, GATE_UP_GEGLU,
        NORM_LINEAR, DECODE_ATTENTION, LINEAR, LM_HEAD,
    )
}  # fmt: skip

# What providers need beside torch: distributions, as pip calls them.
PACKAGES = {
    "liger": ["liger-kernel"],
    "liger (CuTe)": ["liger-kernel", "nvidia-cutlass-dsl"],
    "quack": ["quack-kernels"],
    "flashinfer": ["flashinfer-python"],
    "flash-attn-4": ["flash-attn-4"],
}
RIVALS = sorted({package for packages in PACKAGES.values() for package in packages})


def missing(provider: str) -> list[str]:
    """The packages that a provider lacks here."""
    needed = ["transformers"] if provider.startswith("transformers") else PACKAGES.get(provider, [])
    return [x for x in needed if installed_version(x) is None]
