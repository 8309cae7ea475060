"""Counts the bytes of weights that a decode step reads, from its recorded launches.

    python tests/support/packed_bytes.py gemma-2b

Prints a JSON object: the bytes with weights in 16 bits, int8 (groups of 128, or 64 if 128 does not
divide the row) and int4 (groups of 32), both with scales in fp16. No memory is written, so any
model fits. Tests run this script as a separate process, like compile_kernels.py.
"""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from gemma_launches import GPUS, launches, record_launches
from torch import nn

from gemma_fast.config import GemmaConfig
from gemma_fast.engine.decoder import Decoder
from gemma_fast.kernels._routing import Router
from gemma_fast.kernels.launch import as_on
from gemma_fast.kernels.packed import PackedWeight, Packing, Weight
from gemma_fast.model.gemma import Gemma
from gemma_fast.presets import PRESETS

PACKINGS = {
    "16 bits": None,
    "int8": Packing(8, 128, False, torch.float16),
    "int4": Packing(4, 32, False, torch.float16),
}
ONE_ROW = ("_embed_kernel", "_per_layer_inputs_kernel")  # these read one row of their table
CHOSEN = ("_experts_gate_up_kernel", "_experts_down_kernel")  # `weight`: of all experts


def blank_model(config: GemmaConfig, packing: Packing | None) -> Gemma:
    """Returns a model without values. With a packing, all its matrices are packed."""
    with torch.device("meta"):
        model = Gemma(config).half()  # the ops refuse bf16 on a CPU
    for name, parameter in list(model.named_parameters()):
        module, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        delattr(module, attribute)
        if packing is not None and parameter.ndim == 2 and attribute != "router_proj":
            group = math.gcd(packing.group, parameter.shape[1])
            packed = PackedWeight(parameter.shape, packing._replace(group=group))
            setattr(module, attribute, packed)
        else:
            empty = torch.empty_like(parameter, device="cpu")
            setattr(module, attribute, nn.Parameter(empty, requires_grad=False))
    return model


def weight_bytes(config: GemmaConfig, packing: Packing | None) -> int:
    decoder = Decoder(blank_model(config, packing), 1, 40)
    decoder.prefill(torch.ones(1, 1, dtype=torch.long))
    launches.clear()
    decoder.step()
    total = 0
    for kernel, args, options in launches:
        for parameter, x in zip(kernel.params, args, strict=False):
            if isinstance(x, Router):
                total += x.proj.nbytes
            elif isinstance(x, Weight):
                part = x.nbytes // parts(config, kernel.__name__, parameter.name, x)
                total += round(part * padding(parameter.name, x, options))
    return total


def padding(parameter: str, weight: Weight, options: Mapping[str, Any]) -> float:
    """Returns the rows that programs read, divided by the rows of the weight: the last block may
    have more rows than there are."""
    spec = options.get("DENSE" if parameter == "dense_weight" else "SPEC")
    block = getattr(spec, "block_n", options.get("BLOCK_N", 1))
    return math.ceil(weight.shape[0] / block) * block / weight.shape[0]


def parts(config: GemmaConfig, kernel: str, parameter: str, weight: Weight) -> int:
    """Returns into how many parts the weight is divided, of which the step reads one."""
    if kernel in CHOSEN and parameter == "weight":
        return config.num_experts // config.top_k_experts
    return weight.shape[0] if kernel in ONE_ROW else 1


if __name__ == "__main__":
    record_launches()
    config = PRESETS[sys.argv[1]]
    with as_on(GPUS[90]):
        print(json.dumps({name: weight_bytes(config, x) for name, x in PACKINGS.items()}))
