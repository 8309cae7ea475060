"""Compiles every kernel, as its launcher would launch it, for one GPU that need not be here.

    python tests/compile_kernels.py 90

Prints a JSON object for each: kernel, registers, bytes of stack (spills) and of shared memory, and
whether its loads are 16 bytes wide. A process of its own, because in the tests' the interpreter has
taken the compiler's place.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gemma_fast.kernels import attention, geglu, rmsnorm, rotary

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*bf16",  # launched as fp16, since off the GPU bf16 is refused
    torch.int32: "*i32",
}
launches: list[tuple] = []


class Recorder:
    """Stands in for a kernel: notes what it was launched with."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **kwargs: launches.append((self.kernel, args, kwargs))


def compile_launch(kernel, args, kwargs, capability: int):
    kwargs = dict(kwargs)
    options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
    signature, constants, attributes = {}, dict(kwargs), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None:
            signature[name], constants[name] = "constexpr", None
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(kwargs, "constexpr")
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def launch_all(dtype: torch.dtype) -> None:
    """Calls each op with the shapes of Gemma 1, 2 and 3, for a prompt and for one token."""
    weight = torch.zeros(3072, dtype=dtype)
    for dim in (640, 2048, 3072):
        x = torch.zeros(2, dim, dtype=dtype)
        rmsnorm.rms_norm(x, weight[:dim])
        rmsnorm.add_rms_norm(x, x, weight[:dim])
    geglu.geglu(torch.zeros(2, 32768, dtype=dtype))
    for t, n, m, d, window, softcap, norm in (
        (1, 1, 8, 256, None, None, False),
        (512, 1, 8, 256, None, None, False),
        (512, 16, 1, 256, None, None, False),
        (1, 4, 2, 256, 4096, 50.0, False),
        (512, 16, 2, 128, 4096, 50.0, False),
        (1, 1, 4, 256, 512, None, True),
        (512, 1, 4, 256, 512, None, True),
    ):
        qkv = torch.zeros(1, t, n * m + 2 * n, d, dtype=dtype)
        q, k, v = qkv.split((n * m, n, n), dim=2)
        keys, values = torch.zeros(2, 1, n, max(t, 64), d, dtype=dtype)
        cos, sin = torch.zeros(2, 1, t, d // 2)
        start = torch.zeros(1, dtype=torch.int32)
        norm_weight = weight[:d] if norm else None
        rotary.rotary_write(k, v, keys, values, cos, sin, start, norm_weight)
        attention.attention(
            q, keys, values, cos, sin, start, norm_weight,
            scale=d**-0.5, window=window, softcap=softcap,
        )  # fmt: skip


def main(capability: int) -> None:
    for module in (attention, geglu, rmsnorm, rotary):
        module.wrap_triton = Recorder
    knobs.runtime.interpret = True  # CPU tensors take the launch path
    for dtype in (torch.float16, torch.float32):
        launch_all(dtype)
    for kernel, args, kwargs in launches:
        compiled = compile_launch(kernel, args, kwargs, capability)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        ptx = compiled.asm["ptx"]
        print(
            json.dumps({
                "kernel": kernel.__name__,
                "dtype": TYPES[args[0].dtype].removeprefix("*"),
                "shape": list(args[0].shape),
                "registers": int(registers),
                "stack": int(stack),
                "shared": compiled.metadata.shared,
                "wide_loads": bool(re.search(r"ld\.global[.\w:]*\.v4|cp\.async\S* .*, 16", ptx)),
                "wgmma": "wgmma" in ptx,
            })
        )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
