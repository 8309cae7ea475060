"""Makes random blocks of GGUF's quantized types, and files of them."""

from pathlib import Path

import numpy as np
import torch
from checkpoints import EXPERTS, random_tensors, stacked, unstacked, write_gguf
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from torch import Tensor

# Every matrix has rows of 256 or 512 columns, so that it can have every type.
WIDE = {"hidden_size": 256, "head_dim": 128, "intermediate_size": 256, "vocab_size": 199}
WIDE_4 = WIDE | {
    "global_head_dim": 128, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 199
}  # fmt: skip
# Type that stays packed → bytes at which a block has its scale and, if any, its minimum, in fp16.
FACTORS = {
    Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,),
    Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,),
}  # fmt: skip
# Minimum / scale with which the weights are about as often negative as positive.
MINIMUM = {Type.Q4_1: -7.5, Type.Q5_1: -15.5, Type.Q4_K: 7.5, Type.Q5_K: 15.5}


def random_bytes(shape: tuple[int, int], kind: Type, rng: np.random.Generator) -> np.ndarray:
    """Returns rows of random bytes for a matrix of this shape :: [rows, bytes]. The factors may be
    NaN."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    assert shape[1] % block == 0, f"{kind.name} needs multiples of {block}, not {shape}"
    return rng.integers(0, 256, (shape[0], shape[1] // block * block_bytes), np.uint8)


def set_factor(rows: np.ndarray, kind: Type, which: int, factor: np.ndarray | float) -> None:
    """Sets the scale (which = 0) or minimum (1) of all blocks of rows :: [rows, bytes]. factor:
    [rows, blocks] or a number."""
    blocks = rows.reshape(len(rows), -1, GGML_QUANT_SIZES[kind][1])  # a view
    stored = np.broadcast_to(np.asarray(factor, np.float16), blocks.shape[:2])
    byte = FACTORS[kind][which]
    blocks[..., byte : byte + 2] = np.ascontiguousarray(stored)[..., None].view(np.uint8)


def random_blocks(shape: tuple[int, int], kind: Type, std: float, seed: int = 0) -> np.ndarray:
    """Returns random rows of blocks :: [rows, bytes] of weights with about this standard deviation.
    Scales differ by a factor of up to 3."""
    rng = np.random.default_rng(seed)
    rows = random_bytes(shape, kind, rng)
    blocks = shape[0], rows.shape[1] // GGML_QUANT_SIZES[kind][1]
    factors = rng.uniform(0.5, 1.5, blocks).astype(np.float32)
    for scale in (1, None):
        if scale is None:
            scale = factors * (std / dequantize(rows, kind).std())
        set_factor(rows, kind, 0, scale)
        if kind in MINIMUM:
            set_factor(rows, kind, 1, scale * MINIMUM[kind])
    return rows


def write_quantized(
    path: Path,
    family: str = "gemma3",
    kinds: dict[str, Type] | None = None,
    default: Type = Type.Q4_0,
    experts: bool = False,
    separate: bool = False,
) -> dict[str, Tensor]:
    """Writes a GGUF file whose matrices have types `default`, or others. Returns what gguf
    dequantizes, by transformers' names, with one tensor for each matrix of an expert.

    kinds: part of a name → type; experts: with a mixture of experts; separate: see `stacked`
    """
    sizes = (WIDE_4 if family == "gemma4" else WIDE) | (EXPERTS if experts else {})
    stored = {}
    tensors = random_tensors(family, **sizes)
    for i, (name, tensor) in enumerate(stacked(tensors, separate).items()):
        found = [kind for part, kind in (kinds or {}).items() if part in name]
        kind = found[0] if found else default
        if tensor.dim() > 1 and kind in FACTORS:
            blocks = random_blocks(tensor.flatten(0, -2).shape, kind, 0.1, seed=i)
            stored[name] = blocks.reshape(*tensor.shape[:-1], -1), kind
        elif tensor.dim() > 1:
            stored[name] = quantize(tensor.numpy() * 0.1, kind), kind
    write_gguf(path, family, tensors, stored=stored, separate=separate, **sizes)
    return unstacked(
        {name: torch.from_numpy(dequantize(*blocks)) for name, blocks in stored.items()}
    )
