"""Compares one kernel, RMSNorm, with the same formula in PyTorch.

    python docs/examples/one_kernel.py
    TRITON_INTERPRET=1 python docs/examples/one_kernel.py   # interprets the kernel, without a GPU

Prints the largest relative error of both, compared with float64. On a CUDA GPU, also prints their
times and bandwidths. Without a GPU the op runs its PyTorch reference, unless Triton interprets the
kernel.
"""

import torch
from torch import Tensor

from gemma_fast.kernels.launch import runs_triton
from gemma_fast.kernels.rmsnorm import rms_norm

ON_GPU = torch.cuda.is_available()
ROWS, DIM = (8192 if ON_GPU else 64), 2048
DTYPE, DEVICE = (torch.bfloat16, "cuda") if ON_GPU else (torch.float32, "cpu")


def rms_norm_in_pytorch(x: Tensor, weight: Tensor) -> Tensor:
    """Computes x / sqrt(mean(x²) + eps) * (1 + weight) in float32, and rounds it to x's dtype."""
    z = x.float()  # [rows, dim]
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6)
    return (z * (1 + weight.float())).to(x.dtype)


torch.manual_seed(0)
x = torch.randn(ROWS, DIM, device=DEVICE).to(DTYPE)
weight = (0.1 * torch.randn(DIM, device=DEVICE)).to(DTYPE)
exact = torch.nn.functional.rms_norm(x.double(), (DIM,), 1 + weight.double(), eps=1e-6)

which = "its Triton kernel" if runs_triton(x) else "its PyTorch reference: there is no CUDA GPU"
print(f"rms_norm of {DTYPE} [{ROWS}, {DIM}] on {DEVICE} runs {which}")
for name, norm in {"gemma_fast": rms_norm, "PyTorch": rms_norm_in_pytorch}.items():
    error = ((norm(x, weight).double() - exact) / exact).abs().max()
    line = f"{name:>10}: largest relative error {error:.1e}"
    if ON_GPU:
        from triton.testing import do_bench

        milliseconds = do_bench(lambda norm=norm: norm(x, weight))
        gigabytes = 2 * x.nbytes / 1e9  # x is read once, the result is written once
        line += f", {1e3 * milliseconds:.1f} µs, {gigabytes / milliseconds * 1e3:.0f} GB/s"
    print(line)
