"""Compiles the recorded launches of every kernel for one compute capability. No GPU is needed.

    python tests/support/compile_kernels.py 90
    python tests/support/compile_kernels.py 90 --hash
    python tests/support/compile_kernels.py 90 --first

Compiles every distinct launch, with bf16 in place of fp16. Also compiles the first launch of each
variant (DESCRIPTORS, BLOCK_M, bits of a packed weight) of a kernel with fp16. With --first,
compiles only the first launch of each variant, with bf16.

For each compiled launch, prints a JSON object (see `report`) with registers, spills, loads, etc.
With --hash, prints a line with a hash of the PTX instead. The hash does not change when a kernel
is renamed or moved to another file.

Tests run this script as a separate process, because without a GPU the tests' own process defines
all kernels for Triton's interpreter, so it cannot compile them.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context

import torch
import triton
from assembly import assemble
from gemma_launches import (
    GEMMA_4,
    GPUS,
    MORE_GEMMA_4,
    MORE_PACKED,
    MORE_PACKED_EXPERTS,
    MORE_PROMPTS,
    PACKED,
    PACKED_EXPERTS,
    PROMPTS,
    WHOLE,
    launch_all,
    launch_experts,
    launch_gemma_4,
    launch_grouped_experts,
    launch_packed,
    launch_packed_prompts,
    launches,
    record_launches,
)
from ptx import NARROW_LOAD, before_waits
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from gemma_fast.kernels.launch import as_on

TYPES = {
    torch.float32: "fp32",
    # Launches use fp16, because ops refuse bf16 on a CPU. Each job replaces this value.
    torch.float16: "bf16",
    torch.bfloat16: "bf16",  # of scales
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Options of the compiler, not of the kernel.
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "enable_fp_fusion")


def type_of(value) -> str | tuple:
    if isinstance(value, tuple):
        return tuple(map(type_of, value))
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "constexpr" if value is None else "i32"


def types_by_name(kernel, args) -> dict[str, str]:
    """Returns the arguments' types by name; "q.ptr" is the field `ptr` of the NamedTuple `q`."""
    types = {}
    for parameter, value in zip(kernel.params, args, strict=False):
        fields = value._asdict() if isinstance(value, tuple) else {"": value}
        for field, x in fields.items():
            types[f"{parameter.name}.{field}".rstrip(".")] = type_of(x)
    return types


def options_by_name(kwargs) -> dict:
    """Returns constants and compiler options by name. A constant NamedTuple is a dict of its
    fields, and these are options, too."""
    options = dict(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, tuple):
            options |= value._asdict() | {name: value._asdict()}
    return options


def specialized(kernel, args, kwargs) -> tuple[dict, dict, dict]:
    """Returns the signature, constants and attributes for which Triton would compile the launch."""
    constants, attributes = dict(kwargs), {}

    def specialize(value, path: tuple, fixed: bool):
        if isinstance(value, tuple):
            return type(value)(*(specialize(x, (*path, i), fixed) for i, x in enumerate(value)))
        is_int = isinstance(value, int)
        if value is None or (is_int and value == 1 and fixed):
            constants[path] = value
            return "constexpr"
        divisible = is_int and value % 16 == 0 and fixed
        if divisible or (isinstance(value, Tensor) and value.data_ptr() % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return type_of(value)

    signature = {
        parameter.name: specialize(value, (i,), not parameter.do_not_specialize)
        for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=False))
    }
    return signature | dict.fromkeys(kwargs, "constexpr"), constants, attributes


def compile_launch(kernel, args, kwargs, capability: int):
    kwargs = dict(kwargs)
    options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
    source = ASTSource(kernel, *specialized(kernel, args, kwargs))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def ptx_hash(job: tuple[int, str], capability: int) -> str:
    """Returns a line with a hash of the PTX. The hash ignores debug information and the kernel's
    name."""
    index, TYPES[torch.float16] = job
    kernel, args, kwargs = launches[index]
    knobs.compilation.disable_line_info = True
    ptx = compile_launch(kernel, args, kwargs, capability).asm["ptx"]
    digest = hashlib.sha256(ptx.replace(kernel.__name__, "kernel").encode()).hexdigest()[:16]
    options = " ".join(f"{name}={value}" for name, value in sorted(kwargs.items()))
    types = ",".join(types_by_name(kernel, args).values())
    return f"{capability} {kernel.__name__} {digest} {options} {types}"


def report(job: tuple[int, str], capability: int) -> str:
    index, TYPES[torch.float16] = job
    kernel, args, kwargs = launches[index]
    compiled = compile_launch(kernel, args, kwargs, capability)
    ptx = compiled.asm["ptx"]
    return json.dumps({
        "kernel": kernel.__name__,
        "types": types_by_name(kernel, args),
        "options": options_by_name(kwargs),
        **assemble(compiled),
        "shared": compiled.metadata.shared,
        "wide_loads": bool(
            re.search(r"ld\.global[.\w:]*\.v4|cp\.async\S* .*, 0x10|cp\.async\.bulk\.tensor", ptx)
        ),
        "narrow_loads": len(NARROW_LOAD.findall(ptx)),
        "before_waits": before_waits(ptx),
        "tile_copies": "cp.async.bulk.tensor" in ptx,
        "wgmma": "wgmma" in ptx,
    })  # fmt: skip


def main(capability: int, describe: Callable[..., str], only_first: bool) -> None:
    record_launches()
    with as_on(GPUS[capability]):
        whole = capability == WHOLE
        prompts, layers = PROMPTS + MORE_PROMPTS * whole, GEMMA_4 + MORE_GEMMA_4 * whole
        for dtype in (torch.float16, torch.float32)[: 1 + whole]:
            launch_all(dtype, prompts)
            launch_gemma_4(dtype, layers)
            launch_packed_prompts(dtype)
            launch_grouped_experts(dtype)
        launch_packed(torch.float16, PACKED + MORE_PACKED * whole)
        launch_experts(torch.float16, PACKED_EXPERTS + MORE_PACKED_EXPERTS * whole)
        if whole:
            launch_experts(torch.float32, PACKED_EXPERTS[:2])
    different, first = {}, {}
    for i, (kernel, args, kwargs) in enumerate(launches):
        different[repr((kernel.__name__, [type_of(a) for a in args], kwargs))] = i
        data = types_by_name(kernel, args).get("weight.data")
        packed = data if data in ("*i8", "*u8") else None
        kind = kernel.__name__, kwargs.get("DESCRIPTORS"), kwargs.get("BLOCK_M"), packed
        first.setdefault(kind, i)
    jobs = [(i, "bf16") for i in (first if only_first else different).values()]
    jobs += [] if only_first else [(i, "fp16") for i in first.values()]
    needed = {i for i, _ in jobs}
    for i in range(len(launches)):
        if i not in needed:  # frees tensors: a process with too many of them cannot be forked
            launches[i] = ()
    with get_context("fork").Pool() as pool:  # forked processes inherit `launches`
        for line in pool.imap(partial(describe, capability=capability), jobs):
            print(line)


if __name__ == "__main__":
    main(int(sys.argv[1]), ptx_hash if "--hash" in sys.argv else report, "--first" in sys.argv)
