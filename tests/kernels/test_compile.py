"""Compiles every kernel for each GPU generation, as its launchers launch it, and applies the gates
(gates.py): conditions that each compiled kernel must meet."""

import re
from pathlib import Path

import pytest
from assembly import softmax_in_loops, spilled_bytes, spills_in_loops
from gates import GATES, fits_twice, is_prompt, only_queries
from gemma_launches import GPUS
from marks import slow
from tritons import compile_with

# ALL omits capabilities 8.6 and 8.9: the tests of 12.0 cover their limit of shared memory, and the
# tests of 8.0 cover their instructions.
ALL = {str(x): (str(x),) for x in GPUS if x not in (86, 89)}
FIRST = {f"{x}, first launches": (str(x), "--first") for x in sorted(GPUS, key=lambda x: x != 90)}


@pytest.fixture(scope="module", params=["90, first launches", *slow(*list(FIRST)[1:], *ALL)])
def compiled(request):
    """Returns the GPU, and compile_kernels.py's reports on all kernels. With --first, there is one
    report per variant (DESCRIPTORS, BLOCK_M) of a kernel. Otherwise, each distinct launch has a
    report (in bf16 or fp32), and the first launch of a variant also has one in fp16."""
    arguments = (FIRST | ALL)[request.param]
    return GPUS[int(arguments[0])], compile_with(None, *arguments)


@pytest.mark.parametrize("gate", GATES)
def test_every_kernel_passes_the_gate(compiled, gate):
    gpu, kernels = compiled
    broken = [(wrong, kernel) for kernel in kernels if (wrong := GATES[gate](kernel, gpu))]
    assert not broken, f"{len(broken)} of {len(kernels)} kernels fail; the first one is {broken[0]}"


def test_every_kernel_is_compiled(compiled):
    _, kernels = compiled
    sources = [x.read_text() for x in (Path(__file__).parents[2] / "kernels").glob("*.py")]
    written = {name for x in sources for name in re.findall(r"^def (_\w+_kernel)\(", x, re.M)}
    assert {k["kernel"] for k in kernels} == written
    assert len(written) >= 10
    steps = [k for k in kernels if "PDL" in k["options"] and not only_queries(k)]
    assert len({k["kernel"] for k in steps}) == 9


@pytest.mark.parametrize("compiled", slow("90"), indirect=True)  # configs are tuned for 9.0 only
def test_two_programs_of_decode_attention_fit_a_multiprocessor_in_some_config(compiled):
    """Without such a launch config, the gate `two programs` would not check decode attention."""
    gpu, kernels = compiled
    decode = [k for k in kernels if k["kernel"] == "_decode_attention_kernel"]
    assert any(k["shared"] > 65_536 and fits_twice(k, gpu) for k in decode)


@pytest.mark.parametrize("compiled", slow(*ALL), indirect=True)
def test_prefill_kernels_use_the_blocks_and_descriptors_of_each_gpu(compiled):
    gpu, kernels = compiled
    prompts = [k for k in kernels if is_prompt(k)]
    hopper = gpu.capability == 90
    assert {k["options"]["BLOCK_M"] for k in prompts} >= ({64, 128} if hopper else {64})
    used = {(k["kernel"], k["options"]["DESCRIPTORS"]) for k in prompts}
    describes = gpu.capability >= 90
    ways = {("_attention_kernel", False), ("_gate_up_geglu_kernel", describes)}
    if describes:  # only for rings of whole blocks; other rings are loaded through pointers
        ways.add(("_attention_kernel", True))
    assert used == ways


def sass(*lines: str) -> str:
    return "\n".join(x if x.endswith(":") else f"        /*0010*/   {x} ;" for x in lines)


def test_spills_are_found_in_loops_of_each_gpu_generation():
    for end in (
        ["@!P0 BRA `(.L_x_1)"], ["BRA.U !UP1, `(.L_x_1)"],
        ["@P1 BRA `(.L_x_2)", "BRA `(.L_x_1)", ".L_x_2:"],
        ["@!P1 BRA `(.L_x_3)", ".L_x_2:", "@P0 BRA `(.L_x_1)", "EXIT", ".L_x_3:", "BRA `(.L_x_2)"],
    ):  # fmt: skip
        begin = ["STL [R1], R2", ".L_x_1:", "HGMMA R4", "LDL R3, [R1]"]
        assert spills_in_loops(sass(*begin, *end, "LDL R2, [R1]", "EXIT")) == 1
    assert spilled_bytes(sass("STL [R1+0x8], R5", "STL [R1+0x8], R6", "STL.64 [R1], R8")) == 12
    call = sass(".L_x_1:", "HGMMA R4", "STL.64 [R1], RZ", "@P0 BRA `(.L_x_1)", "EXIT")
    assert spills_in_loops(call) == spilled_bytes(call) == 0
    other = sass(".L_x_1:", "LDL R2, [R1]", "@P0 BRA `(.L_x_1)", "HGMMA R4", "EXIT")
    assert spills_in_loops(other) == 0  # the loop has no matmul
    for unread in ("", other + "\nan unknown format: BRA `(.L_x_1)"):
        with pytest.raises(AssertionError, match="some SASS was not parsed"):
            spills_in_loops(unread)


def test_softmax_in_loops_counts_waits_exponentials_and_matmuls():
    def found(*body: str) -> list[tuple[int, ...]]:
        """Returns (waits, exponentials, exponentials before the last wait, matmuls after the last
        wait) of each loop that softmax_in_loops finds."""
        loop = sass(".L_x_1:", *body, "@P1 BRA `(.L_x_1)", "EXIT")
        return [tuple(x.values()) for x in softmax_in_loops(loop)]

    scores, values, exp = "HGMMA R8", "HGMMA R24", "MUFU.EX2 R2, R3"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert found(exp, scores, wait, values) == [(1, 1, 1, 1)]
    assert found(scores, wait, exp, values) == [(1, 1, 0, 1)]
    assert found(wait, exp, scores, wait, values) == [(2, 1, 1, 1)]
    assert found(exp, scores, values, wait) == [(1, 1, 1, 0)]
    assert found(scores, wait) == []
