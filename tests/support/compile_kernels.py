"""Compiles every kernel, as its launchers launch it, for one GPU, which need not be present.

    python tests/support/compile_kernels.py 90
    python tests/support/compile_kernels.py 90 --hash
    python tests/support/compile_kernels.py 90 --first

Prints a JSON object for each compiled kernel: its name, types and options, registers, spilled
bytes, shared memory, spills and softmax in loops, widths of its loads, its tensor-core instructions
and the assembler's warnings.

With --hash it instead prints a line with a hash of each kernel's PTX, and the kernel's options and
types. Renaming a kernel or a file changes no hash. With --first it compiles only the first launch
of each variant (DESCRIPTORS, BLOCK_M) of a kernel.

Tests run it as a separate process, because in their process the interpreter replaces the compiler.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context

import torch
import triton
from assembly import assemble
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from gemma_fast.config import PRESETS, GemmaConfig
from gemma_fast.kernels import (
    attention,
    decode_attention,
    embed,
    geglu,
    lm_head,
    matvec,
    rmsnorm,
    rotary,
    sample,
)
from gemma_fast.kernels.launch import Gpu, as_on

# Limits of an A100, A10, L4, H100, B200 and RTX 5090. The key 90 is compute capability 9.0.
GPUS = {
    gpu.capability: gpu
    for gpu in (
        Gpu(80, 166_912, 108), Gpu(86, 101_376, 72), Gpu(89, 101_376, 58), Gpu(90, 232_448, 132),
        Gpu(100, 232_448, 148), Gpu(120, 101_376, 170),
    )
}  # fmt: skip
WHOLE = 90  # the GPU for which MORE_PROMPTS and fp32 kernels are compiled, too
PROMPTS = (  # kv heads, query heads per kv head, head dim, window, soft cap, q and k norms
    (1, 8, 256, None, None, False),  # Gemma 2B
    (4, 2, 256, 4096, 50.0, False),  # Gemma 2 2B, layers with a window
    (16, 2, 128, None, 50.0, False),  # Gemma 2 27B, layers without a window
    (16, 2, 128, 4096, 50.0, False),  # Gemma 2 27B, layers with a window
    (1, 4, 256, 512, None, True),  # Gemma 3 270M and 1B, layers with a window
)
MORE_PROMPTS = (  # shapes with nearly the same launch configs as PROMPTS
    (16, 1, 256, None, None, False),  # Gemma 7B
    (8, 2, 256, 1024, None, True),  # Gemma 3 12B, layers with a window
    (16, 2, 128, None, None, True),  # Gemma 3 27B, layers without a window
    (16, 2, 128, 1024, None, True),  # Gemma 3 27B, layers with a window
    (1, 4, 256, None, None, True),  # Gemma 3 270M and 1B, layers without a window
    (4, 2, 256, None, 50.0, False),  # Gemma 2 2B, layers without a window
    (2, 4, 64, None, None, False),  # two kv heads, because one has too few rows for BLOCK_M = 128
    (2, 4, 32, None, None, False),
)
TYPES = {
    torch.float32: "fp32",
    torch.float16: "bf16",  # launched as fp16, because ops refuse bf16 on a CPU; see `report`
    torch.int32: "i32",
    torch.int64: "i64",
}
MODULES = (
    attention, decode_attention, embed, geglu, lm_head, matvec, rmsnorm, rotary, sample
)  # fmt: skip
# Options of the compiler, not of the kernel.
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "enable_fp_fusion")
LOAD = re.compile(r"ld\.global\S* ")
WIDE_LOAD = re.compile(r"ld\.global\S*\.v4\S* ")
NARROW_LOAD = re.compile(r"ld\.global(?!\S*\.v4)\S* ")
launches: list[tuple] = []


class Recorder:
    """Replaces a kernel. Records the kernel's launches instead of running them."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **kwargs: launches.append((self.kernel, args, kwargs))


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
    """Returns constants and compiler options by name, and the fields of constant NamedTuples."""
    options = dict(kwargs)
    for value in kwargs.values():
        if isinstance(value, tuple):
            options |= value._asdict()
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


def launch_all(dtype: torch.dtype, prompts: Sequence[tuple]) -> None:
    """Calls each op with the shapes of Gemma 1, 2 and 3, for prompts and for decode steps."""
    memory = torch.empty(256_000 * 2304, dtype=dtype)  # never written, so it takes no memory

    def blank(*shape: int) -> Tensor:
        return memory[: math.prod(shape)].view(shape)

    launch_prompts(dtype, blank, prompts)
    for name in ("gemma-2b", "gemma-2-2b", "gemma-3-270m")[2 * (dtype == torch.float32) :]:
        for batch in (1, 8):
            launch_step(PRESETS[name], batch, blank)


def launch_step(config: GemmaConfig, batch: int, blank: Callable[..., Tensor]) -> None:
    """Calls the ops of a decode step, and split_attention, which transformers' layers call."""
    dim, ffn, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads, n = config.num_attention_heads, config.num_key_value_heads
    x, norm, vocab = blank(batch, dim), blank(dim), blank(config.vocab_size, dim)
    post_norm = norm if config.post_norms else None
    token, position = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.int32)
    counter = torch.zeros(128, dtype=torch.int32)
    drawn = torch.ones(batch), torch.ones(batch).long()
    embed.embed(token.unsqueeze(1), vocab, dim**0.5, prefetch=True)
    for out, geglu_too in (((heads + 2 * n) * d, False), (2 * ffn, True)):
        matvec.norm_linear(
            x, x, norm, post_norm, blank(out, dim), geglu=geglu_too, prefetch=True
        )  # fmt: skip
    for columns in (heads * d, ffn):
        matvec.linear(blank(batch, columns), blank(dim, columns), prefetch=True)
    for choice in ((), drawn):
        lm_head.next_token(
            x, x, norm, post_norm, vocab, position, token, counter, *choice,
            softcap=config.final_logit_softcapping, prefetch=True,
        )  # fmt: skip
        sample.sample_token(
            torch.empty(batch, config.vocab_size), position, token, counter, *choice
        )
    qk_norm = blank(d) if config.qk_norm else None
    for slots in (512, 8192):
        ring = blank(batch, n, slots, d)
        decode_attention.decode_attention(
            blank(batch, heads + 2 * n, d), ring, ring, *torch.empty(2, slots, d // 2), position,
            counter, qk_norm, qk_norm, scale=1.0, window=config.window(0),
            softcap=config.attn_logit_softcapping, prefetch=True,
        )  # fmt: skip
        for left_padding in (None, position):
            decode_attention.split_attention(
                blank(batch, heads, d), ring, ring, position, left_padding, counter, scale=1.0,
                window=config.window(0), softcap=config.attn_logit_softcapping,
            )  # fmt: skip


def launch_prompts(
    dtype: torch.dtype, blank: Callable[..., Tensor], prompts: Sequence[tuple]
) -> None:
    weight = blank(5376)
    for dim in (640, 2048, 2304, 3072, 5376):
        x = blank(2, dim)
        rmsnorm.rms_norm(x, weight[:dim])
        rmsnorm.add_rms_norm(x, x, weight[:dim])
        rmsnorm.add_rms_norm(x, x, weight[:dim], weight[:dim])
    for rows in (1, 512):
        geglu.geglu(*blank(rows, 32768).chunk(2, dim=-1))
        geglu.geglu(*blank(2, rows, 6912))
        geglu.gate_up_geglu(blank(rows, 2048), blank(4096, 2048))
    for n, m, d, window, softcap, norm in prompts:
        for t, spare in ((2, 0), (128, 0), (128, 8), (8192, 0), (8192, 8)):
            qkv = blank(1, t, n * m + 2 * n, d)
            q, k, v = qkv.split((n * m, n, n), dim=2)
            keys, values = blank(2, 1, n, max(t, 128) + spare, d)
            cos, sin = torch.empty(2, 1, t, d // 2)
            query_offset = torch.zeros(1, dtype=torch.int32)
            norm_weight = weight[:d] if norm else None
            rotary.rotary_write(k, v, keys, values, cos, sin, query_offset, norm_weight)
            attention.attention(
                q, keys, values, cos, sin, query_offset, norm_weight,
                scale=d**-0.5, window=window, softcap=softcap,
            )  # fmt: skip
            attention.attention(  # as called by transformers' layers: rotated q, left padding
                q, keys, values, None, None, query_offset,
                scale=d**-0.5, left_padding=query_offset, window=window, softcap=softcap,
            )  # fmt: skip


def ptx_hash(job: tuple[int, str], capability: int) -> str:
    """Returns a line with the hash of the PTX without debug information and the kernel's name."""
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
    before_wait, wait, _ = ptx.partition("griddepcontrol.wait")
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
        "loads_before_wait": len(LOAD.findall(before_wait)) if wait else None,
        "prefetches_before_wait": before_wait.count("prefetch.global.L2"),
        "wide_loads_before_wait": len(WIDE_LOAD.findall(before_wait)),
        "tile_copies": "cp.async.bulk.tensor" in ptx,
        "wgmma": "wgmma" in ptx,
    })  # fmt: skip


def record_launches() -> None:
    """Makes all ops append their launches to `launches` instead of running kernels."""
    for module in MODULES:
        for name, value in vars(module).copy().items():
            if name.startswith("_") and name.endswith("_kernel"):
                setattr(module, name, Recorder(value))
    knobs.runtime.interpret = True  # makes ops launch kernels for CPU tensors


def main(capability: int, describe: Callable[..., str], only_first: bool) -> None:
    record_launches()
    with as_on(GPUS[capability]):
        prompts = PROMPTS + MORE_PROMPTS * (capability == WHOLE)
        launch_all(torch.float16, prompts)
        if capability == WHOLE:
            launch_all(torch.float32, prompts)
    different, first = {}, {}
    for i, (kernel, args, kwargs) in enumerate(launches):
        different[repr((kernel.__name__, [type_of(a) for a in args], kwargs))] = i
        kind = kernel.__name__, kwargs.get("DESCRIPTORS"), kwargs.get("BLOCK_M")
        first.setdefault(kind, i)
    jobs = [(i, "bf16") for i in (first if only_first else different).values()]
    jobs += [] if only_first else [(i, "fp16") for i in first.values()]
    with get_context("fork").Pool() as pool:  # forked processes inherit `launches`
        for line in pool.imap(partial(describe, capability=capability), jobs):
            print(line)


if __name__ == "__main__":
    main(int(sys.argv[1]), ptx_hash if "--hash" in sys.argv else report, "--first" in sys.argv)
