"""What the assembler made of a kernel: registers, spills, and what its loops do at once."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


def spills_in_loops(sass: str) -> int:
    """How often loops that multiply store or load a register, each round. A loop ends in a branch
    back: on a condition, or behind a call on one, which leaves it."""
    labels, instructions, spills, loops = {}, [""], set(), 0
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    for end, instruction in enumerate(instructions):
        called = re.match(r"@\S+\s+CALL\.REL", instructions[end - 1])
        condition = "" if called else r"(?:@\S+\s+BRA|BRA\.U)"
        branch = re.match(condition + r"\S*\s.*?(\.L_\w+)", instruction)
        loop = range(labels.get(branch[1], end) if branch else end, end)
        if any(re.search(r"MMA|FFMA", instructions[i]) for i in loop):
            loops += 1
            spills.update(i for i in loop if re.search(r"\b(STL|LDL)\b", instructions[i]))
    assert loops, "no loop found"
    return len(spills)


def softmax_beside_products(ptx: str) -> list[bool]:
    """Of each loop with both: whether products of the round before are still under way when it
    computes softmax, and are waited for once."""
    found, wait = [], "wgmma.wait_group"
    for branch in re.finditer(r"\bbra(?:\.uni)?\s+(\$L\w+);", ptx):
        begin = ptx.find(f"\n{branch[1]}:", 0, branch.start())
        loop = ptx[begin : branch.start()] if begin >= 0 else ""
        if "ex2" in loop and wait in loop:
            waits = loop.index(wait)
            beside = loop.index("ex2") < waits < loop.rindex("wgmma.mma_async")
            found.append(beside and loop.count(wait) == 1)
    return found


def assemble(compiled) -> dict:
    """Registers, stack, spills in loops, and the assembler's warnings that tensor-core products run
    one by one."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "cubin"), Path(folder, "ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [BIN / "cuobjdump", "--dump-resource-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        spills = 0
        if int(stack):
            command = [BIN / "nvdisasm", "-c", cubin]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            spills = spills_in_loops(sass)
        warnings = ""
        if "wgmma" in compiled.asm["ptx"]:  # on 9.0
            ptx.write_text(compiled.asm["ptx"])
            command = [BIN / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", cubin]
            warnings = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills_in_loops": spills,
        "serialized": re.findall(r"Potential Performance Loss: .*", warnings),
    }
