"""Counts the bytes of weights that the launches of a mixture of experts read for one row, with the
shapes of Gemma 4 26B-A4B.

    python tests/support/expert_bytes.py

Prints a JSON object: packings → the bytes read, and the bytes of the chosen experts, of the dense
MLP and of the router. Each program reads all columns of BLOCK_N rows of its weight. Tests run this
script as a separate process, like compile_kernels.py.
"""

import json

import gemma_launches
import torch
from gemma_launches import A4B, GPUS, MORE_PACKED_EXPERTS, PACKED_EXPERTS, record_launches

from gemma_fast.kernels.launch import as_on
from gemma_fast.kernels.packed import Weight

launched: list[tuple] = []


class GridRecorder(gemma_launches.Recorder):
    """Records a kernel's launches with their grids."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: launched.append((self.kernel, grid[0], args, kwargs))


def line(weight: Weight) -> int:
    """Returns the bytes of a row."""
    return weight.nbytes // weight.shape[0]


def bytes_read(name: str, programs: int, args: tuple, kwargs: dict) -> int:
    weights = [x for x in args if isinstance(x, Weight)]
    if name == "_norm_router_kernel":
        spec, block = kwargs["SPEC"], kwargs["BLOCK_E"]
        routers = -(-spec.experts // block)
        dense = (programs - routers) * kwargs["BLOCK_N"] * line(weights[0])
        return routers * block * line(Weight(args[2].proj)) + dense
    if name == "_experts_gate_up_kernel":
        spec, dense = kwargs["SPEC"], kwargs["DENSE"]
        dense_programs = -(-dense.out // dense.block_n)
        read = (programs - dense_programs) * spec.block_n * line(weights[0])
        return read + dense_programs * dense.block_n * line(weights[1])
    assert name == "_experts_down_kernel"
    return programs * kwargs["SPEC"].block_n * kwargs["TOP_K"] * line(weights[0])


def count(packings: tuple) -> tuple[int, int]:
    """Returns the bytes read, and the bytes of the weights that are used."""
    launched.clear()
    gemma_launches.launch_experts(torch.float16, [(packings, 1)])
    dim, ffn, experts, width, top_k = A4B
    step = launched[:3]
    assert len({kernel.__name__ for kernel, *_ in step}) == 3
    dense, gate_up, down = (args[1] for _, _, args, _ in step)
    used = 2 * ffn * line(dense) + dim * line(step[1][2][5]) + experts * dim * 2
    used += top_k * (2 * width * line(gate_up) + dim * line(down))
    return sum(bytes_read(kernel.__name__, *rest) for kernel, *rest in step), used


if __name__ == "__main__":
    gemma_launches.Recorder = GridRecorder
    record_launches()
    kinds = {packings for packings, _ in PACKED_EXPERTS + MORE_PACKED_EXPERTS}
    with as_on(GPUS[90]):
        print(json.dumps({str(packings): count(packings) for packings in kinds}))
