"""What the assembler made of a kernel: registers, spills, and what its loops wait for."""

import re
import subprocess
import tempfile
from pathlib import Path

import networkx
import triton
from triton.backends.nvidia.compiler import get_ptxas

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
# A store of RZ is no spill, but an argument of a call: of tile copies, on a path that is not taken
# (ptxas 12.9, on 12.0).
SPILL = r"\bSTL(?:\.(\d+))?\s+\[(.*?)\],\s*R\d"


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop that multiplies, by address. Nested loops are one.

    A loop is a strongly connected component of the graph of instructions, so it includes the blocks
    that the assembler places elsewhere, such as a wait that tries again.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    branches = len(re.findall(r"\bBRA\b", sass))
    assert instructions and branches == count(r"\bBRA\b", instructions), "lines were not read"
    graph = networkx.DiGraph()
    for i, instruction in enumerate(instructions):
        if branch := re.search(r"\bBRA\b.*(\.L_\w+)", instruction):
            graph.add_edge(i, labels[branch[1]])
        if not re.match(r"BRA[.\w]*\s+`|EXIT|RET", instruction):  # else it always goes elsewhere
            graph.add_edge(i, i + 1)
    found = (sorted(x) for x in networkx.strongly_connected_components(graph) if len(x) > 1)
    bodies = [[instructions[i] for i in loop] for loop in sorted(found)]
    return [body for body in bodies if count(r"MMA|FFMA", body)]


def count(pattern: str, instructions: list[str]) -> int:
    return sum(bool(re.search(pattern, x)) for x in instructions)


def spills_in_loops(sass: str) -> int:
    """Instructions that store or load a spilled register, in loops that multiply."""
    return sum(count(rf"{SPILL}|\bLDL\b", body) for body in loops(sass))


def spilled_bytes(sass: str) -> int:
    slots = {slot: int(bits or 32) // 8 for bits, slot in re.findall(SPILL, sass)}
    return sum(slots.values())


def softmax_in_loops(sass: str) -> list[dict[str, int]]:
    """For each loop with asynchronous matmuls and exponentials: how often it waits for matmuls, its
    exponentials, how many of them stand before the last wait, and how many matmuls follow it. Those
    run on while the next round computes softmax."""
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
    """Registers, bytes spilled, spills and softmax in loops, and the assembler's warnings that
    matmuls on the tensor cores run one by one."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "cubin"), Path(folder, "ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [BIN / "cuobjdump", "--dump-resource-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        spilled, spills, softmax, warnings = 0, 0, [], ""
        wgmma = "wgmma" in compiled.asm["ptx"]  # on 9.0
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
