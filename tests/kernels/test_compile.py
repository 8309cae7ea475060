"""Every kernel, in every way its launchers launch it, compiled for each generation of GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from assembly import softmax_beside_products, spills_in_loops
from compile_kernels import GPUS
from marks import slow

# An 8.6 and an 8.9 have the shared memory of a 12.0, and the instructions of an 8.0.
ALL = {str(x): (str(x),) for x in GPUS if x not in (86, 89)}
FIRST = {f"{x}, first launches": (str(x), "--first") for x in (90, 86, 89)}


@pytest.fixture(scope="module", params=["90, first launches", *slow(*list(FIRST)[1:], *ALL)])
def compiled(request):
    """Capability, and what compile_kernels.py says of every launch, or of each kernel's first."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support/compile_kernels.py"
    arguments = (FIRST | ALL)[request.param]
    command = [sys.executable, script, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return int(arguments[0]), [json.loads(line) for line in run.stdout.splitlines()]


def test_kernels_fit(compiled):
    capability, kernels = compiled
    assert {k["kernel"] for k in kernels} == {
        "_attention_kernel", "_choose_token_kernel", "_decode_attention_kernel", "_embed_kernel",
        "_gate_up_geglu_kernel", "_geglu_kernel", "_matvec_kernel", "_next_token_kernel",
        "_rms_norm_kernel", "_rotary_write_kernel",
    }  # fmt: skip
    for kernel in kernels:
        # The assembler itself may spill two registers, so that twice as many programs fit; and more
        # where that is done once a program, for what is needed before and after its loops.
        few = kernel["stack"] <= 8 and kernel["registers"] <= 128
        once = kernel["stack"] <= 64 and not kernel["spills_in_loops"]
        assert few or once, f"spills registers: {kernel}"
        assert kernel["shared"] <= GPUS[capability].shared_memory, f"shared memory: {kernel}"


@pytest.mark.parametrize("compiled", slow("90"), indirect=True)  # tiles are chosen so for Hopper
def test_where_shared_memory_holds_two_programs_registers_do(compiled):
    """Attention's smaller tiles are chosen for it; each program has 1 KiB of shared memory more."""
    _, kernels = compiled
    attention = [
        k for k in kernels
        if "attention" in k["kernel"] and k["shared"] > 65_536 and k["options"]["BLOCK_M"] <= 64
    ]  # fmt: skip
    twice = [k for k in attention if 2 * (k["shared"] + 1024) <= GPUS[90].shared_memory + 1024]
    assert {k["kernel"] for k in twice} == {"_attention_kernel", "_decode_attention_kernel"}
    for kernel in twice:
        assert 2 * kernel["registers"] * 32 * kernel["options"]["num_warps"] <= 65_536, kernel


# Loads of less than 16 bytes a thread: of positions, norms, splits; none of weights, keys, values.
NARROW = {
    "_rms_norm_kernel": 0,
    "_geglu_kernel": 0,
    "_embed_kernel": 1,
    "_matvec_kernel": 8,
    "_choose_token_kernel": 16,
    "_next_token_kernel": 64,
    "_decode_attention_kernel": 24,
}


def test_kernels_bound_by_memory_load_16_bytes_at_a_time(compiled):
    _, kernels = compiled
    for kernel in kernels:
        options, narrow = kernel["options"], NARROW.get(kernel["kernel"])
        if kernel["kernel"] == "_rotary_write_kernel":
            narrow = 3 if options["HAS_NORM"] else 1  # start; the norm's weights, once a program
        if narrow is not None:
            assert kernel["wide_loads"] and kernel["narrow_loads"] <= narrow, kernel


ATTENTION_LOADS = {False: 5, True: 9}  # position, cos, sin; norms


def only_queries(kernel) -> bool:
    """Whether it is split_attention's, which transformers' layers call: it waits for no kernel."""
    return kernel["kernel"] == "_decode_attention_kernel" and kernel["types"][3] == "constexpr"


def test_weights_set_out_before_the_wait_for_the_kernel_ahead(compiled):
    """64 bytes a thread or more, and nothing that the kernel ahead may write."""
    capability, kernels = compiled
    steps = [k for k in kernels if "PREFETCH" in k["options"] and not only_queries(k)]
    assert len({k["kernel"] for k in steps}) == 4
    for kernel in steps:
        waits = kernel["loads_before_wait"] is not None
        assert waits == kernel["options"]["PREFETCH"] == (capability >= 90), kernel
        if not waits:
            continue
        one_row = kernel["options"].get("BLOCK_B") == 1
        weights = 4 if one_row else 0  # loaded; of more rows, prefetched to the L2 cache
        if kernel["kernel"] == "_embed_kernel":
            assert kernel["loads_before_wait"] == 0
        elif kernel["kernel"] == "_decode_attention_kernel":  # not of qkv
            assert kernel["loads_before_wait"] <= ATTENTION_LOADS[kernel["options"]["HAS_NORM"]]
        else:
            assert kernel["loads_before_wait"] == kernel["wide_loads_before_wait"] >= weights
            assert one_row or (kernel["loads_before_wait"] == 0 < kernel["prefetches_before_wait"])


@pytest.mark.parametrize("compiled", slow(*ALL), indirect=True)
def test_prompts_are_made_for_each_generation(compiled):
    capability, kernels = compiled
    prompts = [
        k for k in kernels
        if k["kernel"] in ("_attention_kernel", "_gate_up_geglu_kernel")
        and k["options"]["BLOCK_M"] > 16 and "fp32" not in k["types"][0]
    ]  # fmt: skip
    assert {k["options"]["BLOCK_M"] for k in prompts} >= ({64, 128} if capability == 90 else {64})
    used = {(k["kernel"], k["options"]["DESCRIPTORS"]) for k in prompts}
    ways = {("_attention_kernel", False), ("_gate_up_geglu_kernel", capability >= 90)}
    if capability >= 90:  # without, too: rings that do not end on a block
        ways.add(("_attention_kernel", True))
    assert used == ways
    for kernel in prompts:
        assert kernel["tile_copies"] == kernel["options"]["DESCRIPTORS"]
        assert kernel["wgmma"] == (capability == 90), f"not on the tensor cores: {kernel}"
        assert not kernel["serialized"], kernel["serialized"]
        if capability == 90 and kernel["kernel"] == "_attention_kernel":
            assert kernel["softmax_beside_products"] == [True, True], kernel


def test_spills_are_found_in_loops_of_each_generation():
    def sass(*end: str) -> str:
        lines = ["STL [R1], R2", ".L_x_1:", "HGMMA R4", "LDL R3, [R1]", *end, "LDL R2, [R1]"]
        return "\n".join(x if x.endswith(":") else f"        /*0010*/   {x} ;" for x in lines)

    for end in (
        ["@!P0 BRA `(.L_x_1)"], ["BRA.U !UP1, `(.L_x_1)"],
        ["@P1 CALL.REL.NOINC `(.L_x_2)", "BRA `(.L_x_1)"],
    ):  # fmt: skip
        assert spills_in_loops(sass(*end)) == 1
    for no_loop in ("@!P0 BRA `(.L_x_9)", "BRA `(.L_x_1)"):  # the way back from a wait
        with pytest.raises(AssertionError, match="no loop found"):
            spills_in_loops(sass(no_loop))


def test_softmax_is_beside_products_that_are_waited_for_later():
    def loops(*body: str) -> list[bool]:
        return softmax_beside_products("\n".join(["\n$L__BB0_1:", *body, "@%p1 bra $L__BB0_1;"]))

    scores, values = "wgmma.mma_async.scores;", "wgmma.mma_async.values;"
    wait = "wgmma.wait_group.sync.aligned 0;"
    assert loops("ex2;", scores, wait, values) == [True]
    assert loops(scores, wait, "ex2;", values) == [False]
    assert loops("ex2;", scores, values, wait) == [False]
    assert loops("ex2;", scores, wait, values, wait) == [False]
    assert loops(scores, wait) == []
