"""Defines gates: conditions that each compiled kernel must meet. A gate takes the kernel's report
from compile_kernels.py, and the GPU. It returns why the kernel fails, or None."""

from collections.abc import Callable
from typing import Any

from gemma_fast.kernels.launch import Gpu

Kernel = dict[str, Any]

COMPUTE_BOUND = ("_attention_kernel", "_gate_up_geglu_kernel")
LATENCY_BOUND = ("_sort_pairs_kernel",)
GROUPED = ("_grouped_gate_up_kernel", "_grouped_down_kernel")
# Maximum number of loads narrower than 16 bytes per thread, by kernel. These loads read ids,
# positions, scalars, norm weights, scales, minimums and partial results, but no weights of
# projections, keys or values.
NARROW_LOADS = {
    "_embed_kernel": 1,
    "_per_layer_inputs_kernel": 4,
    "_matvec_kernel": 8,
    "_sample_token_kernel": 16,
    "_next_token_kernel": 64,
    "_decode_attention_kernel": 24,
    "_packed_linear_kernel": 16,
    "_norm_router_kernel": 8,
    "_router_kernel": 8,
    "_experts_gate_up_kernel": 8,
    "_experts_down_kernel": 8,
    "_grouped_gate_up_kernel": 8,
    "_grouped_down_kernel": 12,
    "_weighted_sum_kernel": 8,
}


def spills(kernel: Kernel, gpu: Gpu) -> str | None:
    """ptxas may spill up to 64 bytes outside the loops. It may spill 8 bytes (two registers)
    anywhere if the kernel uses at most 128 registers, because then twice as many programs fit."""
    few = kernel["spilled"] <= 8 and kernel["registers"] <= 128
    once = kernel["spilled"] <= 64 and not kernel["spills_in_loops"]
    return None if few or once else f"{kernel['spills_in_loops']} spills in loops"


def slack(kernel: Kernel, gpu: Gpu) -> str | None:
    """Prefill attention with descriptors must leave at least 10 of Hopper's 255 registers unused,
    because the next compiler version may need more registers."""
    main = is_prefill_attention(kernel) and kernel["options"]["DESCRIPTORS"]
    registers = kernel["registers"]
    return f"{registers} registers" if main and gpu.capability == 90 and registers > 245 else None


def shared_memory(kernel: Kernel, gpu: Gpu) -> str | None:
    used = kernel["shared"]
    return f"{used} bytes of shared memory" if used > gpu.shared_memory else None


def two_programs(kernel: Kernel, gpu: Gpu) -> str | None:
    """On Hopper, two programs of prefill attention with BLOCK_M = 64 must fit in a multiprocessor,
    except at head_dim 512, where BLOCK_M = 64 is the largest tile that fits in registers. If the
    shared memory of two programs of decode attention fits, their registers must fit too. Two
    programs of a grouped matmul must fit."""
    if gpu.capability == 90 and kernel["kernel"] in GROUPED:
        held = fits_twice(kernel, gpu) and 2 * registers_used(kernel) <= 65_536
        return None if held else f"{kernel['shared']} bytes, {registers_used(kernel)} registers"
    if gpu.capability != 90 or kernel["options"].get("BLOCK_M", 128) > 64:
        return None
    if not fits_twice(kernel, gpu):
        small = is_prefill_attention(kernel) and kernel["options"]["dim"] < 512
        return f"needs 2 * {kernel['shared']} bytes" if small else None
    if "attention" not in kernel["kernel"] or kernel["shared"] <= 65_536:
        return None
    registers = registers_used(kernel)
    return f"two programs use 2 * {registers} registers" if 2 * registers > 65_536 else None


def registers_used(kernel: Kernel) -> int:
    """Returns the number of registers of one program."""
    return kernel["registers"] * 32 * kernel["options"]["num_warps"]


def fits_twice(kernel: Kernel, gpu: Gpu) -> bool:
    """Returns whether the shared memory of two programs fits in a multiprocessor.

    CUDA reserves 1 KiB per program, and a multiprocessor has 1 KiB more than gpu.shared_memory,
    the limit of one program.
    """
    return 2 * (kernel["shared"] + 1024) <= gpu.shared_memory + 1024


def wide_loads(kernel: Kernel, gpu: Gpu) -> str | None:
    """Kernels that are bound by memory must load 16 bytes per thread at a time. Of a packed weight
    that is the operand of a matmul, Triton loads 8 bytes at a time."""
    narrow = NARROW_LOADS.get(kernel["kernel"], 0) + 2 * narrow_scales(kernel)
    if kernel["kernel"] == "_rotary_write_kernel":
        norm = kernel["types"]["rotary.norm_weight"] != "constexpr"
        narrow = 3 if norm else 1  # loads of the query offset and of norm weights
    if kernel["kernel"] == "_rms_norm_kernel":
        narrow = int(kernel["types"]["layer_scalar_ptr"] != "constexpr")
    narrow += factors(kernel)
    if kernel["options"].get("DENSE"):
        block_n = kernel["options"]["DENSE"]["block_n"]
        narrow += 2 * narrow_scales(kernel, "dense_weight", block_n)
    packed = kernel["kernel"] in GROUPED and narrow_scales(kernel) > 0
    held = (kernel["wide_loads"] or packed) and kernel["narrow_loads"] <= narrow
    if held or kernel["kernel"] in COMPUTE_BOUND + LATENCY_BOUND:
        return None
    return f"{kernel['narrow_loads']} loads are narrower than 16 bytes"


def factors(kernel: Kernel) -> int:
    """Returns the number of loads of scales and minimums in a kernel that gathers packed rows."""
    per_part = {"_embed_kernel": 1, "_per_layer_inputs_kernel": 2}.get(kernel["kernel"], 0)
    parts = ("weight.scale", "weight.minimum", "table.scale", "table.minimum")
    return per_part * sum(kernel["types"].get(x, "constexpr") != "constexpr" for x in parts)


def weights_before_wait(kernel: Kernel, gpu: Gpu) -> str | None:
    """Checks the loads before a kernel waits for the previous kernel (PDL).

    A matmul kernel must fetch weights before the wait: for one row, at least 64 bytes per thread.
    No kernel may load data before the wait that the previous kernel may write. split_attention,
    which transformers' layers call, never waits and is not checked. Norms of prompts do not wait.
    """
    name, options, waits = kernel["kernel"], kernel["options"], kernel["before_waits"]
    if "PDL" not in options or only_queries(kernel):
        return None
    if name == "_rms_norm_kernel" and not options["PDL"]:
        return "waits" if waits else None
    if bool(waits) != options["PDL"] or options["PDL"] != (gpu.capability >= 90):
        return "waits" if waits else "does not wait"
    if not waits:
        return None
    expected = 2 if name in ("_norm_router_kernel", "_experts_gate_up_kernel") else 1  # branches
    if options.get("DENSE", 0) is None:
        expected = 1
    held = len(waits) == expected and fetches(kernel, waits)
    return None if held else f"before the wait: {waits}"


def fetches(kernel: Kernel, waits: list[dict[str, int]]) -> bool:
    """Returns whether the kernel fetches before each wait what it can fetch, and nothing else."""
    name, options, first = kernel["kernel"], kernel["options"], waits[0]
    loads, wide = first["loads"], first["wide"]
    if name == "_embed_kernel":
        return loads == 0
    if name == "_rms_norm_kernel":
        return loads == 0 < first["prefetches"]
    if name == "_decode_attention_kernel":  # may load position, cos, sin and norms, not qkv
        norm = kernel["types"]["rotary.q_norm"] != "constexpr"
        return loads <= (9 if norm else 5)
    if name == "_per_layer_inputs_kernel":  # loads ids, rows of the table and the norm's weight
        expected = (3, 4) if factors(kernel) else (5, 10)  # the latter in fp32
        return loads == kernel["narrow_loads"] + wide and wide in expected
    if name == "_experts_down_kernel":  # loads the chosen experts, and weights of the first
        return wide > 0 and loads <= wide + narrow_scales(kernel) + 1
    if name == "_experts_gate_up_kernel":  # the experts are not known; the dense weight is
        *dense, chosen = waits
        one_row = dense and options["DENSE"]["block_b"] == 1
        scales = dense and narrow_scales(kernel, "dense_weight", options["DENSE"]["block_n"])
        return not any(chosen.values()) and all(fetched(x, one_row, scales) for x in dense)
    one_row, scales = options.get("BLOCK_B") == 1, narrow_scales(kernel)
    if name == "_norm_router_kernel":  # the router's programs have one row each
        router, *waits = waits
        if not fetched(router, True, 0):
            return False
    return all(fetched(x, one_row, scales) for x in waits)


def fetched(before: dict[str, int], one_row: bool, scales: int) -> bool:
    """Returns whether weights are loaded before the wait for one row, and prefetched into the L2
    cache for more rows."""
    if one_row:
        return before["wide"] >= 4 and before["loads"] <= before["wide"] + scales
    return before["loads"] == 0 < before["prefetches"]


def narrow_scales(kernel: Kernel, weight: str = "weight", rows: int | None = None) -> int:
    """Returns how many loads of less than 16 bytes a thread may make for a block of a packed
    weight: one per row for its scale, and one for its minimum."""
    factors = (f"{weight}.scale", f"{weight}.minimum")
    packed = sum(kernel["types"].get(name, "constexpr") != "constexpr" for name in factors)
    options = kernel["options"]
    return packed * (rows or options.get("BLOCK_N") or options.get("block_n", 0))


def only_queries(kernel: Kernel) -> bool:
    """Returns whether split_attention launched the kernel: it is the op that passes cos = None."""
    decode = kernel["kernel"] == "_decode_attention_kernel"
    return decode and kernel["types"]["rotary.cos"] == "constexpr"


def is_prompt(kernel: Kernel) -> bool:
    """Returns whether the kernel is attention or gate_up_geglu for prompts, in bf16 or fp16."""
    matmul = kernel["kernel"] in ("_attention_kernel", "_gate_up_geglu_kernel")
    fp32 = "*fp32" in (kernel["types"].get("q.ptr"), kernel["types"].get("x"))
    return matmul and kernel["options"]["BLOCK_M"] > 16 and not fp32


def is_weight_first(kernel: Kernel) -> bool:
    """Returns whether the kernel is packed_linear or a grouped matmul in bf16 or fp16, with enough
    rows of the weight in a block for asynchronous matmuls."""
    left = kernel["kernel"] in ("_packed_linear_kernel", *GROUPED)  # operand: the weight
    return left and kernel["options"]["BLOCK_N"] >= 64 and kernel["types"]["out_ptr"] != "*fp32"


def is_prefill_attention(kernel: Kernel) -> bool:
    return kernel["kernel"] == "_attention_kernel" and is_prompt(kernel)


def tensor_cores(kernel: Kernel, gpu: Gpu) -> str | None:
    """On Hopper, prefill kernels must use asynchronous matmuls (wgmma), and ptxas must not
    serialize them. Kernels with descriptors must copy tiles in hardware."""
    if is_weight_first(kernel) and gpu.capability == 90:
        serialized = kernel["serialized"][0] if kernel["serialized"] else None
        return serialized if kernel["wgmma"] else "no wgmma"
    if not is_prompt(kernel):
        return None
    if kernel["tile_copies"] != kernel["options"]["DESCRIPTORS"]:
        return "tile copies do not match DESCRIPTORS"
    if kernel["wgmma"] != (gpu.capability == 90):
        return "no wgmma" if gpu.capability == 90 else "wgmma"
    return kernel["serialized"][0] if kernel["serialized"] else None


def softmax_beside_matmuls(kernel: Kernel, gpu: Gpu) -> str | None:
    """Prefill attention on Hopper must wait for its matmuls once per iteration. The matmul after
    the wait runs during the next iteration's softmax. At least half of the next iteration's
    exponentials must run during this matmul, or enough to fill the matmul's time."""
    if not is_prefill_attention(kernel) or gpu.capability != 90:
        return None
    loops, options = kernel["softmax_in_loops"], kernel["options"]
    if len(loops) != 1 or loops[0]["waits"] != 1 or not loops[0]["matmuls_after_wait"]:
        return f"waits for matmuls: {loops}"
    # Each of the 4 schedulers runs a quarter of the warps. It computes 4 exponentials per cycle, so
    # an EX2 instruction takes 8 cycles for the 32 threads of a warp. The tensor cores of a
    # multiprocessor compute 2,048 multiplications per cycle.
    beside = loops[0]["exps_before_wait"] * 8 * options["num_warps"] // 4  # in cycles
    matmul = options["BLOCK_M"] * options["BLOCK_N"] * options["dim"] // 2048
    late = 2 * loops[0]["exps_before_wait"] < loops[0]["exps"] and beside < matmul
    return f"exponentials after the wait: {loops}" if late else None


def fp_fusion(kernel: Kernel, gpu: Gpu) -> str | None:
    """Launches must set enable_fp_fusion, because the default may differ between environments."""
    return None if kernel["options"].get("enable_fp_fusion") is True else "FP fusion is not set"


GATES: dict[str, Callable[[Kernel, Gpu], str | None]] = {
    "spills": spills,
    "spare registers": slack,
    "shared memory": shared_memory,
    "two programs": two_programs,
    "16-byte loads": wide_loads,
    "weights before the wait": weights_before_wait,
    "tensor cores": tensor_cores,
    "softmax overlaps matmuls": softmax_beside_matmuls,
    "FP fusion": fp_fusion,
}
