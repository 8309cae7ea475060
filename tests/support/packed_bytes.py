"""Counts the bytes of weights that a decode step reads, from its recorded launches.

    python tests/support/packed_bytes.py gemma-2b

Prints a JSON object: the bytes with weights in 16 bits, int8 (groups of 128) and int4 (groups of
32), both with scales in fp16. No memory is written, so any model fits. Tests run this script as a
separate process, like compile_kernels.py.
"""

import json
import sys

import torch
from gemma_launches import GPUS, launches, record_launches
from torch import nn

from gemma_fast.config import GemmaConfig
from gemma_fast.engine.decoder import Decoder
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


def blank_model(config: GemmaConfig, packing: Packing | None) -> Gemma:
    """Returns a model without values. With a packing, all its matrices are packed."""
    with torch.device("meta"):
        model = Gemma(config).half()  # the ops refuse bf16 on a CPU
    for name, parameter in list(model.named_parameters()):
        module, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        delattr(module, attribute)
        if packing is not None and parameter.ndim == 2:
            setattr(module, attribute, PackedWeight(parameter.shape, packing))
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
    for kernel, args, _ in launches:
        for weight in args:
            if isinstance(weight, Weight):
                rows = weight.shape[0] if kernel.__name__ in ONE_ROW else 1
                total += weight.nbytes // rows
    return total


if __name__ == "__main__":
    record_launches()
    config = PRESETS[sys.argv[1]]
    with as_on(GPUS[90]):
        print(json.dumps({name: weight_bytes(config, x) for name, x in PACKINGS.items()}))
