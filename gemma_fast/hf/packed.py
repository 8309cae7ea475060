"""Reads the weights of linears that compressed-tensors or torchao has quantized to integers, and
packs them for the kernels.

    weight[o, i] = scale[o, i // group] * (value[o, i] - zero[o, i // group])

compressed-tensors  pack-quantized: weight_packed :: [out, in * bits / 32], int32, has value +
                    2^(bits-1) in order, from the lowest bits on; weight_scale :: [out, in / group];
                    weight_zero_point :: [out * bits / 32, in / group], packed along out, or none
torchao             Linear.weight is a tensor subclass: Int8Tensor and IntxUnpackedToInt8Tensor with
                    qdata :: [out, in], int8, and scale, zero_point :: [out, in / group]; Int4Tensor
                    with qdata :: [out, in / 2], columns 2j and 2j + 1 in byte j, and scale and
                    zero_point :: [in / group, out], where weight = scale * value + zero_point

Neither library is imported: modules are recognized by their attributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemma_fast.kernels.cpu.calls import runs_c
from gemma_fast.kernels.launch import runs_triton
from gemma_fast.kernels.packed import PackedRows, PackedWeight, Packing, check_packing

# Parameters that a linear of the format pack-quantized may have.
PACK_QUANTIZED = {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias"}
# Tensor subclasses of torchao, and attributes that must be None: they change the activations.
PLAIN = {
    "Int8Tensor": ("act_pre_scale", "act_quant_kwargs"),
    "IntxUnpackedToInt8Tensor": ("activation_quantization",),
    "Int4Tensor": ("act_pre_scale",),
}


def is_quantized(module: nn.Module) -> bool:
    """Returns True for a linear of compressed-tensors, or of torchao."""
    return isinstance(module, nn.Linear) and (has_scheme(module) or _has_subclass(module))


def has_scheme(module: nn.Module) -> bool:
    """Returns True if compressed-tensors has quantized this module's weight."""
    return getattr(vars(module).get("quantization_scheme"), "weights", None) is not None


def _has_subclass(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return any(hasattr(weight, name) for name in ("qdata", "tensor_impl"))  # newer, older torchao


def why_not_packed(module: nn.Linear) -> str | None:
    """Returns why the kernels cannot read this quantized weight, or None if they can."""
    if type(module) is not nn.Linear:
        return f"{type(module).__module__}.{type(module).__qualname__} is not torch.nn.Linear"
    return _why_not_scheme(module) if has_scheme(module) else _why_not_subclass(module)


def _why_not_scheme(module: nn.Linear) -> str | None:
    scheme: Any = module.quantization_scheme
    out, dim, bits = module.out_features, module.in_features, bits_of(module)
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return "its activations are quantized, too, which the kernels do not do"
    tensors = {name: x for name, x in module._parameters.items() if x is not None}
    weight = tensors.get("weight")
    if weight is not None and weight.is_floating_point() and weight.element_size() > 1:
        return (
            "compressed-tensors has unpacked its weight: load the model again, and call accelerate"
            " before the first call of the model"
        )
    packed = tensors.get("weight_packed")
    if packed is None or packed.dtype != torch.int32 or bits not in (4, 8):
        return f"its format is {getattr(scheme.format, 'value', scheme.format)} with {bits} bits"
    if unknown := tensors.keys() - PACK_QUANTIZED:
        return f"its {', '.join(sorted(unknown))} is not supported"
    scale, zero = tensors["weight_scale"], tensors.get("weight_zero_point")
    fits = packed.shape == (out, -(-dim * bits // 32)) and scale.shape[:1] == (out,)
    if zero is not None:
        fits &= zero.dtype == torch.int32 and zero.shape == (-(-out * bits // 32), scale.shape[-1])
    return _why_not_groups(module, fits, scale)


def _why_not_subclass(module: nn.Linear) -> str | None:
    weight: Any = module.weight
    kind = type(weight).__name__
    if kind not in PLAIN:
        return f"its weight is a {kind}, whose layout the kernels do not read"
    eight_bits = getattr(weight, "activation_dtype", None) == torch.float8_e4m3fn
    if eight_bits or any(getattr(weight, name) is not None for name in PLAIN[kind]):
        return "its activations are scaled or quantized, too, which the kernels do not do"
    out, dim = module.out_features, module.in_features
    scale, zero = _factors(weight)
    fits = weight.shape == (out, dim) and weight.qdata.dtype == torch.int8
    fits &= weight.qdata.shape == (out, dim // 2 if kind == "Int4Tensor" else dim)
    fits &= scale.shape[:1] == (out,) and (zero is None or zero.shape == scale.shape)
    return _why_not_groups(module, fits, scale)


def _why_not_groups(module: nn.Linear, fits: bool, scale: Tensor) -> str | None:
    out, dim = module.out_features, module.in_features
    if not fits or scale.ndim != 2 or not scale.shape[1] or dim % scale.shape[1]:
        return (
            f"scales of shape {tuple(scale.shape)} do not fit a weight of {out} x {dim}: the"
            " kernels need one for each group of columns of each row"
        )
    if scale.dtype == torch.float64 or not scale.isfinite().all():
        return "a scale is float64 or not finite"
    try:
        check_packing(dim, Packing(8, dim // scale.shape[1], False, scale.dtype))
    except ValueError as error:
        return str(error)
    return None


def has_kernels(x: Tensor) -> bool:
    """Returns True if kernels multiply activations of this device and dtype with packed weights.
    Where there are none, each call unpacks the weight."""
    return runs_triton(x) or runs_c(x)


@torch.no_grad()
def pack(module: nn.Linear) -> PackedWeight:
    """Returns the weight of a linear for which why_not_packed is None. It shares memory with the
    module's tensors where these have the same layout: int8 values, and scales."""
    values, scale, minimum = _rows(module)
    packing = _packing(values, scale, minimum)
    if packing.bits == 4 and minimum is not None:  # values from 0 on
        values, minimum = values + 8, minimum - 8 * scale.float()
    with torch.device(values.device):
        packed = PackedWeight(values.shape, packing)
    packed.write(0, PackedRows(values, scale, minimum))
    if packing.bits == 8:
        packed.data.data = values
    if packing.scale == scale.dtype:
        packed.scale.data = scale
    return packed


def _rows(module: nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns values :: [out, in], int8; scale and minimum :: [out, in / group], where weight =
    scale * value + minimum. minimum is fp32, or None."""
    if has_scheme(module):
        tensors: Any = module._parameters
        scale, zero = tensors["weight_scale"].data, tensors.get("weight_zero_point")
        values = _unpack(tensors["weight_packed"].data, bits_of(module))[:, : module.in_features]
        if zero is not None:
            zero = _unpack(zero.data.T, bits_of(module))[:, : module.out_features].T
        return values, scale, _minimum(scale, zero)
    weight: Any = module.weight
    scale, zero = _factors(weight)
    if type(weight).__name__ == "Int4Tensor":
        return _unpack(weight.qdata, 4, sign=8), scale, zero.float()
    return weight.qdata, scale, _minimum(scale, zero)


def bits_of(module: nn.Module) -> int:
    """Returns the bits of a weight that compressed-tensors has quantized."""
    scheme: Any = module.quantization_scheme
    return int(scheme.weights.num_bits)


def _minimum(scale: Tensor, zero: Tensor | None) -> Tensor | None:
    return None if zero is None or not zero.any() else -zero.float() * scale.float()


def _factors(weight: Any) -> tuple[Tensor, Any]:
    """Returns scale and zero_point of a tensor of torchao, both [out, in / group]."""
    scale, zero = weight.scale, weight.zero_point
    if type(weight).__name__ == "Int4Tensor":
        return scale.T.contiguous(), zero.T
    return scale, zero


def _packing(values: Tensor, scale: Tensor, minimum: Tensor | None) -> Packing:
    """Returns the smallest packing. Scales keep their dtype. But a minimum, a product of a bf16
    scale, has more digits: both become fp16 if that holds them, else fp32."""
    group, dtype = values.shape[1] // scale.shape[1], scale.dtype
    if minimum is not None and dtype == torch.bfloat16:
        exact = torch.equal(scale.half().float(), scale.float())
        lowest = (minimum - 8 * scale.float()).half()
        dtype = torch.float16 if exact and lowest.isfinite().all() else torch.float32
    four_bits = group % 32 == 0 and (values >= -8).all() and (values <= 7).all()
    return Packing(4 if four_bits else 8, group, minimum is not None, dtype)


def _unpack(packed: Tensor, bits: int, sign: int = 0) -> Tensor:
    """Returns the integers of each row, int8. sign=8: 4 bits are in two's complement, and not
    value + 8."""
    data = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return (data ^ 128).view(torch.int8)
    halves = torch.stack((data & 15, data >> 4), dim=-1).flatten(1)  # [rows, columns]
    return (halves ^ sign).view(torch.int8) - 8


def weight_packed(packed: PackedWeight, bits: int) -> Tensor:
    """Returns the weight in compressed-tensors' layout."""
    shifted = packed.packing.bits == 4 and packed.minimum is not None  # by 8
    data = packed.weight.values().view(torch.uint8) + (2 ** (bits - 1) - 8 * shifted)
    if bits == 4:
        low, high = data.unflatten(1, (-1, 2)).unbind(2)  # [out, in / 2]
        data = low | high << 4
    return data.contiguous().view(torch.int32)
