"""Inspects a kernel's machine code (SASS): registers, spills, and waits in its loops."""

import re
import subprocess
import tempfile
from pathlib import Path

import networkx
import triton
from triton.backends.nvidia.compiler import get_ptxas

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
# Matches stores to local memory, except stores of RZ, which are arguments of a call. For compute
# capability 12.0, ptxas 12.9 emits such a call for tile copies, on a path that is never taken.
SPILL = r"\bSTL(?:\.(\d+))?\s+\[(.*?)\],\s*R\d"


def loops(sass: str) -> list[list[str]]:
    """Returns the instructions of each loop with matmul or FFMA instructions, ordered by address.

    A loop is a strongly connected component of the graph of instructions, so nested loops count as
    one. It includes the blocks that the assembler places elsewhere, such as the retry of a wait.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    branches = len(re.findall(r"\bBRA\b", sass))
    assert instructions and branches == count(r"\bBRA\b", instructions), "some SASS was not parsed"
    graph = networkx.DiGraph()
    for i, instruction in enumerate(instructions):
        if branch := re.search(r"\bBRA\b.*(\.L_\w+)", instruction):
            graph.add_edge(i, labels[branch[1]])
        # An unconditional jump never reaches the next instruction.
        if not re.match(r"BRA[.\w]*\s+`|EXIT|RET", instruction):
            graph.add_edge(i, i + 1)
    found = (sorted(x) for x in networkx.strongly_connected_components(graph) if len(x) > 1)
    bodies = [[instructions[i] for i in loop] for loop in sorted(found)]
    return [body for body in bodies if count(r"MMA|FFMA", body)]


def count(pattern: str, instructions: list[str]) -> int:
    return sum(bool(re.search(pattern, x)) for x in instructions)


def spills_in_loops(sass: str) -> int:
    """Counts the instructions in `loops` that store or load spilled registers."""
    return sum(count(rf"{SPILL}|\bLDL\b", body) for body in loops(sass))


def spilled_bytes(sass: str) -> int:
    slots = {slot: int(bits or 32) // 8 for bits, slot in re.findall(SPILL, sass)}
    return sum(slots.values())


def softmax_in_loops(sass: str) -> list[dict[str, int]]:
    """Counts instructions in each loop that has asynchronous matmuls and exponentials.

    Returns a dict per loop: the number of waits for matmuls (`waits`), of exponentials (`exps`), of
    exponentials before the last wait (`exps_before_wait`), and of matmuls after the last wait
    (`matmuls_after_wait`). These matmuls overlap the softmax of the next iteration.
    """
    found = []
    for body in loops(sass):
        waits = [i for i, x in enumerate(body) if "WARPGROUP.DEPBAR" in x]
        if waits and (exps := count("EX2", body)):
            before, after = body[: waits[-1]], body[waits[-1] :]
            found.append({
                "waits": len(waits), "exps": exps, "exps_before_wait": count("EX2", before),
                "matmuls_after_wait": count("GMMA", after),
            })  # fmt: skip
    return found


def assemble(compiled) -> dict:
    """Returns the kernel's registers per thread, its spilled bytes per thread, the results of
    `spills_in_loops` and `softmax_in_loops`, and the assembler's warnings about serialized matmuls.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "cubin"), Path(folder, "ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [BIN / "cuobjdump", "--dump-resource-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        spilled, spills, softmax, warnings = 0, 0, [], ""
        wgmma = "wgmma" in compiled.asm["ptx"]  # asynchronous matmuls, only on capability 9.0
        if int(stack) or wgmma:
            command = [BIN / "nvdisasm", "-c", cubin]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            spilled = spilled_bytes(sass)
            spills = spills_in_loops(sass) if spilled else 0
            softmax = softmax_in_loops(sass)
        if wgmma:
            ptx.write_text(compiled.asm["ptx"])
            command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", ptx, "-o", cubin]
            warnings = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(registers),
        "spilled": spilled,
        "spills_in_loops": spills,
        "softmax_in_loops": softmax,
        "serialized": re.findall(r"Potential Performance Loss: .*", warnings),
    }
