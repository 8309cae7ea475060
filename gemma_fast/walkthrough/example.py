"""Small computed examples: rotations of a vector, wavelengths, and an MLP with two inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from gemma_fast.config import GemmaConfig
from gemma_fast.reference import angles, geglu, rotate

POSITIONS = 5
SECOND = 1 / 8  # place of the second example pair, as a share of all channel pairs
POINTS = 41  # of a surface, a side
SEED = 1228  # its four functions look different
SLICE = 0.5  # second input of the slice


def rotations(config: GemmaConfig) -> dict[str, Any]:
    """Returns the vector (1, 0), rotated at the first positions, for two channel pairs.

    vectors :: [pairs, positions, 2]; a head of two channels has one pair only
    """
    kind, d = config.layers[0].kind, config.layers[0].head_dim
    pairs = [0, max(1, int(SECOND * d / 2))][: d // 2]
    x = torch.zeros(1, 1, POSITIONS, d)
    x[..., : d // 2] = 1  # the first component of each pair
    x = rotate(x, *angles(config.rope(kind), d, torch.arange(POSITIONS)[None]))
    vectors = torch.stack(x[0, 0].chunk(2, dim=-1), dim=-1)[:, pairs].transpose(0, 1)
    return {"pairs": pairs, "type": kind, "vectors": vectors.tolist()}


def wavelengths(config: GemmaConfig) -> dict[str, list[float]]:
    """Returns after how many positions each channel pair has turned once, by type of layer;
    infinity for a pair that is not rotated.

    Read off the cosines and sines of a small fraction of a position, where no pair has turned once.
    """
    position = torch.full((1, 1), 1e-4)
    found = {}
    for kind in dict.fromkeys(config.layer_types):
        cos, sin = angles(config.rope(kind), config.head_dim_of(kind), position)
        turned = torch.atan2(sin, cos)[0, 0, 0].double() / (2 * math.pi)
        found[kind] = (1e-4 / turned).tolist()
    return found


def mlp_example() -> dict[str, Any]:
    """Returns four functions of two inputs with the same random weights: 2 inputs, 3 hidden, 1 out.

    surfaces :: [points, points], first axis: second input; slices :: [points]
    """
    generator = torch.Generator().manual_seed(SEED)
    w_gate, w_up = torch.randn(2, 3, 2, generator=generator)
    w_down = torch.randn(1, 3, generator=generator)
    line = torch.linspace(-2, 2, POINTS)
    second, first = torch.meshgrid(line, line, indexing="ij")
    x = torch.stack((first, second), dim=-1)  # [points, points, 2]
    gate, up = F.linear(x, w_gate), F.linear(x, w_up)  # [points, points, 3]
    hidden = {
        "linear": gate, "ReLU": gate.relu(), "ReGLU": gate.relu() * up, "GeGLU": geglu(gate, up),
    }  # fmt: skip
    surfaces = {name: F.linear(z, w_down)[..., 0] for name, z in hidden.items()}
    row = int((line - SLICE).abs().argmin())
    wide = torch.linspace(-4, 4, 2 * POINTS - 1)
    return {
        "inputs": line.tolist(),
        "weights": {"gate": w_gate.tolist(), "up": w_up.tolist(), "down": w_down.tolist()},
        "surfaces": {name: y.tolist() for name, y in surfaces.items()},
        "slices": {name: y[row].tolist() for name, y in surfaces.items()},
        "slice_at": float(line[row]),
        "gelu": {
            "x": wide.tolist(), "gelu": geglu(wide, torch.ones_like(wide)).tolist(),
            "relu": wide.relu().tolist(),
        },
    }  # fmt: skip
