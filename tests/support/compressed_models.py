"""Saves tiny transformers models that the library compressed-tensors has quantized."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.utils import get_direct_state_dict
from torch import Tensor, nn


def ints(bits: int, group: int | None = None, symmetric: bool = True) -> dict[str, Any]:
    """Returns the arguments of integer weights, in groups of columns or per channel."""
    strategy = "group" if group else "channel"
    return {"num_bits": bits, "group_size": group, "strategy": strategy, "symmetric": symmetric}


def preset(name: str) -> dict[str, Any]:
    return {key: args.model_dump() for key, args in PRESET_SCHEMES[name].items()}


ACTIVATIONS = {"num_bits": 8, "strategy": "token", "dynamic": True}
# Scheme → config group, without targets.
SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16-g32": {"weights": ints(4, 32)},
    "w4a16-g128": {"weights": ints(4, 128)},
    "w4a16-channel": {"weights": ints(4)},
    "w4a16-g32-asymmetric": {"weights": ints(4, 32, symmetric=False)},
    "w4a16-g128-asymmetric": {"weights": ints(4, 128, symmetric=False)},
    "w4a16-channel-asymmetric": {"weights": ints(4, symmetric=False)},
    "w4a16-g16": {"weights": ints(4, 16)},
    "w8a16-g32": {"weights": ints(8, 32)},
    "w8a16-g128": {"weights": ints(8, 128)},
    "w8a16-channel": {"weights": ints(8)},
    "w8a16-g32-asymmetric": {"weights": ints(8, 32, symmetric=False)},
    "w8a16-channel-asymmetric": {"weights": ints(8, symmetric=False)},
    "w8a16-tensor": {"weights": {"num_bits": 8, "strategy": "tensor"}},
    "w8a8": {"weights": ints(8), "input_activations": ACTIVATIONS},
    "w8a8-asymmetric": {"weights": ints(8, symmetric=False), "input_activations": ACTIVATIONS},
    "w4a8": {"weights": ints(4, 32), "input_activations": ACTIVATIONS},
    "w4a8-asymmetric": {
        "weights": ints(4, 32, symmetric=False), "input_activations": ACTIVATIONS,
    },
    "int8-naive": {"weights": ints(8), "format": "naive-quantized"},
    "fp8-dynamic": preset("FP8_DYNAMIC"),
    "fp8-tensor": preset("FP8"),
    "fp8-block": preset("FP8_BLOCK"),
    "nvfp4a16": preset("NVFP4A16"),
    "nvfp4": preset("NVFP4"),
    "mxfp4a16": preset("MXFP4A16"),
    "mxfp8a16": preset("MXFP8A16"),
}  # fmt: skip
NOT_PACKED = ("fp8-dynamic", "fp8-tensor", "fp8-block", "mxfp8a16")


def with_linear_experts(hf: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Replaces the parameters of all experts by a Linear for each matrix of an expert, as libraries
    do before they quantize. The model can be saved, but not run."""
    for layer in hf.model.layers:
        up, down = layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach()
        layer.experts = nn.ModuleList()
        for gate_up_proj, down_proj in zip(up, down, strict=True):
            gate_proj, up_proj = gate_up_proj.chunk(2)
            expert = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj}
            layer.experts.append(nn.ModuleDict({x: _linear(w) for x, w in expert.items()}))
    return hf


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    return linear


def save_compressed(
    hf: transformers.PreTrainedModel,
    path: Path,
    groups: dict[str, dict[str, Any]],
    ignore: tuple[str, ...] = ("lm_head",),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Quantizes the model as the groups say, and saves it. Returns the quantized weights by name
    as the library unpacks them: in its dtype, and in fp32 with the same scales."""
    config = QuantizationConfig(config_groups=groups, ignore=list(ignore))
    apply_quantization_config(hf, config, show_progress=False)
    modules = {
        name: module
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and hasattr(module, "quantization_scheme")
    }
    for module in modules.values():
        _calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(hf)
    compressor.compress_model(hf)
    unpacked = {f"{name}.weight": _unpack(module) for name, module in modules.items()}
    wide = {f"{name}.weight": _unpack_to_fp32(module) for name, module in modules.items()}
    hf.save_pretrained(path)
    compressor.update_config(path)
    return unpacked, wide


def _unpack(module: nn.Module) -> Tensor:
    scheme = module.quantization_scheme
    library = BaseCompressor.get_value_from_registry(scheme.format)
    return library.decompress(get_direct_state_dict(module), scheme)["weight"].detach()


def _unpack_to_fp32(module: nn.Module) -> Tensor:
    """Unpacks with the scales in fp32, because the library computes in their dtype. The library
    fixes that of mxfp8, mxfp4 and nvfp4, so these are unpacked with its functions."""
    scheme, state = module.quantization_scheme, get_direct_state_dict(module)
    scale, packed = state["weight_scale"], state.get("weight_packed")
    scale = (decompress_mx_scale(scale) if scale.dtype == torch.uint8 else scale).float()
    if packed is not None and packed.dtype == torch.uint8:
        values = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], torch.float32)
        total = state.get("weight_global_scale")
        return dequantize(values, scale, args=scheme.weights, global_scale=total)
    library = BaseCompressor.get_value_from_registry(scheme.format)
    if scheme.format == "mxfp8-quantized":
        library = NaiveQuantizationCompressor
    return library.decompress(state | {"weight_scale": scale}, scheme)["weight"].detach()


def _calibrate(module: nn.Module) -> None:
    """Computes scales and zero points of a module's weight from the extremes of its blocks."""
    args, weight = module.quantization_scheme.weights, module.weight.data
    (out, dim), group = weight.shape, args.group_size
    rows, columns = {
        "tensor": (out, dim), "channel": (1, dim), "group": (1, group), "tensor_group": (1, group),
        "block": args.block_structure,
    }[args.strategy]  # fmt: skip
    padded = F.pad(weight, (0, -dim % columns, 0, -out % rows))
    blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    total = None
    if args.strategy == "tensor_group":
        total = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(total)
    scale, zero = calculate_qparams(low, high, args, global_scale=total)
    module.weight_scale.data = scale.view(module.weight_scale.shape)
    module.weight_zero_point.data = zero.view(module.weight_scale.shape)
    for name in ("input_scale", "input_global_scale"):
        if hasattr(module, name):
            getattr(module, name).data.fill_(1)
