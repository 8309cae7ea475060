"""What each compiled kernel must hold. A gate takes what compile_kernels.py reports of a kernel,
and the GPU that it was compiled for; it returns what is wrong, or None."""

from collections.abc import Callable
from typing import Any

from gemma_fast.kernels.launch import Gpu

Kernel = dict[str, Any]

# Loads of less than 16 bytes a thread: positions, norms, splits; never weights, keys, values.
NARROW_LOADS = {
    "_rms_norm_kernel": 0,
    "_geglu_kernel": 0,
    "_embed_kernel": 1,
    "_matvec_kernel": 8,
    "_sample_token_kernel": 16,
    "_next_token_kernel": 64,
    "_decode_attention_kernel": 24,
}


def spills(kernel: Kernel, gpu: Gpu) -> str | None:
    """ptxas may spill two registers where that lets twice as many programs fit, and up to 64 bytes
    outside the loops."""
    few = kernel["spilled"] <= 8 and kernel["registers"] <= 128
    once = kernel["spilled"] <= 64 and not kernel["spills_in_loops"]
    return None if few or once else f"{kernel['spills_in_loops']} spills in loops"


def slack(kernel: Kernel, gpu: Gpu) -> str | None:
    """Hopper's prefill attention by descriptors has 10 of the 255 registers to spare, so that the
    next compiler does not spill."""
    main = is_prefill_attention(kernel) and kernel["options"]["DESCRIPTORS"]
    registers = kernel["registers"]
    return f"{registers} registers" if main and gpu.capability == 90 and registers > 245 else None


def shared_memory(kernel: Kernel, gpu: Gpu) -> str | None:
    used = kernel["shared"]
    return f"{used} bytes of shared memory" if used > gpu.shared_memory else None


def two_programs(kernel: Kernel, gpu: Gpu) -> str | None:
    """Hopper: prefill attention's tiles of 64 rows are chosen so that two programs fit a
    multiprocessor. Where decode attention's shared memory fits twice, its registers must, too."""
    if gpu.capability != 90 or kernel["options"].get("BLOCK_M", 128) > 64:
        return None
    if not fits_twice(kernel, gpu):
        return f"{kernel['shared']} bytes, twice" if is_prefill_attention(kernel) else None
    if "attention" not in kernel["kernel"] or kernel["shared"] <= 65_536:
        return None
    registers = kernel["registers"] * 32 * kernel["options"]["num_warps"]
    return f"{registers} registers, twice" if 2 * registers > 65_536 else None


def fits_twice(kernel: Kernel, gpu: Gpu) -> bool:
    """Whether two programs fit in a multiprocessor's shared memory, with 1 KiB more each."""
    return 2 * (kernel["shared"] + 1024) <= gpu.shared_memory + 1024


def wide_loads(kernel: Kernel, gpu: Gpu) -> str | None:
    """Kernels that are bound by memory load 16 bytes a thread at a time."""
    narrow = NARROW_LOADS.get(kernel["kernel"])
    if kernel["kernel"] == "_rotary_write_kernel":
        norm = kernel["types"]["rotary.norm_weight"] != "constexpr"
        narrow = 3 if norm else 1  # query offset; the norm's weights, once
    if narrow is None or (kernel["wide_loads"] and kernel["narrow_loads"] <= narrow):
        return None
    return f"{kernel['narrow_loads']} narrow loads"


def weights_before_wait(kernel: Kernel, gpu: Gpu) -> str | None:
    """Before its wait for the previous kernel (PDL) a kernel fetches 64 bytes of weights a thread
    or more, and nothing that the previous kernel may write. split_attention, which transformers'
    layers call, never waits."""
    name, options = kernel["kernel"], kernel["options"]
    if "PREFETCH" not in options or only_queries(kernel):
        return None
    loads = kernel["loads_before_wait"]
    if (loads is not None) != options["PREFETCH"] or options["PREFETCH"] != (gpu.capability >= 90):
        return "waits" if loads is not None else "does not wait"
    one_row = options.get("BLOCK_B") == 1
    if loads is None:
        held = True
    elif name == "_embed_kernel":
        held = loads == 0
    elif name == "_decode_attention_kernel":  # position, cos, sin; norms. Not qkv
        norm = kernel["types"]["rotary.q_norm"] != "constexpr"
        held = loads <= (9 if norm else 5)
    elif one_row:
        held = loads == kernel["wide_loads_before_wait"] >= 4
    else:  # to the L2 cache
        held = loads == 0 < kernel["prefetches_before_wait"]
    return None if held else f"{loads} loads before the wait"


def only_queries(kernel: Kernel) -> bool:
    return kernel["types"].get("rotary.cos") == "constexpr" and "PREFETCH" in kernel["options"]


def is_prompt(kernel: Kernel) -> bool:
    """Whether it multiplies a prompt's rows in 16 bits."""
    matmul = kernel["kernel"] in ("_attention_kernel", "_gate_up_geglu_kernel")
    fp32 = "*fp32" in (kernel["types"].get("q.ptr"), kernel["types"].get("x"))
    return matmul and kernel["options"]["BLOCK_M"] > 16 and not fp32


def is_prefill_attention(kernel: Kernel) -> bool:
    return kernel["kernel"] == "_attention_kernel" and is_prompt(kernel)


def tensor_cores(kernel: Kernel, gpu: Gpu) -> str | None:
    """Prompts: Hopper's asynchronous matmuls (wgmma), none of them serialized; descriptors copy
    tiles in hardware."""
    if not is_prompt(kernel):
        return None
    if kernel["tile_copies"] != kernel["options"]["DESCRIPTORS"]:
        return "tile copies do not match DESCRIPTORS"
    if kernel["wgmma"] != (gpu.capability == 90):
        return "no wgmma" if gpu.capability == 90 else "wgmma"
    return kernel["serialized"][0] if kernel["serialized"] else None


def softmax_beside_matmuls(kernel: Kernel, gpu: Gpu) -> str | None:
    """Hopper's prefill attention waits once a round for its matmuls. After the wait it starts a
    matmul that runs on beside the next round's softmax: beside most of its exponentials, or beside
    as many as take the matmul's time."""
    if not is_prefill_attention(kernel) or gpu.capability != 90:
        return None
    loops, options = kernel["softmax_in_loops"], kernel["options"]
    if len(loops) != 1 or loops[0]["waits"] != 1 or not loops[0]["matmuls_after_wait"]:
        return f"waits for matmuls: {loops}"
    # A scheduler has a quarter of the warps, and 4 exponentials a cycle; the tensor cores together
    # 2,048 multiplications.
    beside = loops[0]["exps_before_wait"] * 8 * options["num_warps"] // 4  # cycles
    matmul = options["BLOCK_M"] * options["BLOCK_N"] * options["dim"] // 2048
    late = 2 * loops[0]["exps_before_wait"] < loops[0]["exps"] and beside < matmul
    return f"exponentials after the wait: {loops}" if late else None


def fp_fusion(kernel: Kernel, gpu: Gpu) -> str | None:
    """Set by the launch, so that no default and no environment changes results."""
    return None if kernel["options"].get("enable_fp_fusion") is True else "the default is used"


GATES: dict[str, Callable[[Kernel, Gpu], str | None]] = {
    "spills": spills,
    "slack": slack,
    "shared memory": shared_memory,
    "two programs": two_programs,
    "16-byte loads": wide_loads,
    "weights before the wait": weights_before_wait,
    "tensor cores": tensor_cores,
    "softmax beside matmuls": softmax_beside_matmuls,
    "FP fusion": fp_fusion,
}
