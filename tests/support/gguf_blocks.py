"""Makes random blocks of GGUF's quantized types."""

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

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
