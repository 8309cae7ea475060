"""All kernel suites by name, all checks, and the packages that rivals need."""

from gemma_fast.benchmarks.kernels import (
    attention,
    decode_attention,
    embed,
    geglu,
    lm_head,
    matvec,
    rmsnorm,
    rotary,
)
from gemma_fast.benchmarks.measure.machine import installed_version

SUITES = {
    suite.name: suite
    for suite in (
        rmsnorm.RMS_NORM, rmsnorm.ADD_RMS_NORM, rmsnorm.ADD_RMS_NORM_POST, geglu.GEGLU,
        rotary.ROTARY_WRITE, attention.ATTENTION, geglu.GATE_UP_GEGLU, matvec.NORM_LINEAR,
        decode_attention.DECODE_ATTENTION, matvec.LINEAR, lm_head.LM_HEAD,
    )
}  # fmt: skip

MODULES = (embed, rmsnorm, rotary, attention, decode_attention, geglu, matvec, lm_head)
CHECKS = [check for module in MODULES for check in module.CHECKS]

# Packages that providers need besides torch, by their names on PyPI.
PACKAGES = {
    "liger": ["liger-kernel"],
    "liger (CuTe)": ["liger-kernel", "nvidia-cutlass-dsl"],
    "quack": ["quack-kernels"],
    "flashinfer": ["flashinfer-python"],
    "flash-attn-4": ["flash-attn-4"],
}
RIVALS = sorted({package for packages in PACKAGES.values() for package in packages})


def missing(provider: str) -> list[str]:
    """Returns the packages that a provider needs and that are not installed."""
    needed = ["transformers"] if provider.startswith("transformers") else PACKAGES.get(provider, [])
    return [x for x in needed if installed_version(x) is None]
