"""Quantizes the linears of a tiny transformers model as compressed-tensors and torchao hold them,
without these libraries: the same attributes, tensors, layouts and forward."""

import copy
import types

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import Gemma3TextConfig

from gemma_fast.hf import explain
from gemma_fast.hf import packed as hf_packed

# name → bits, columns of a group (None: a row), zero points
COMPRESSED = {
    "ct-int4-g32": (4, 32, False),
    "ct-int4-g64-zero": (4, 64, True),
    "ct-int4-g16": (4, 16, False),
    "ct-int4-row": (4, None, False),
    "ct-int8-row": (8, None, False),
    "ct-int8-g16-zero": (8, 16, True),
}
# name → tensor subclass, columns of a group, zero points
TORCHAO = {
    "ao-int8-row": ("Int8Tensor", None, False),
    "ao-int8-g32-zero": ("Int8Tensor", 32, True),
    "ao-intx4-g32": ("IntxUnpackedToInt8Tensor", 32, False),
    "ao-intx4-g32-zero": ("IntxUnpackedToInt8Tensor", 32, True),
    "ao-int4-g32": ("Int4Tensor", 32, True),
}
FORMATS = [*COMPRESSED, *TORCHAO]


def make(name, **options):
    """Returns a tiny model whose projections have this format."""
    return quantize(tiny_model(**options), name)


def lines_of(model, **inputs):
    """Returns what `explain` says of the quantized linears."""
    return [line for line in explain(model, **inputs) if line.part == "linear"]


def tiny_model(dtype=torch.float32, attention="eager", bias=False, hidden=64, tied=True, layers=2):
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=199, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=2 * hidden, sliding_window=13,
        layer_types=["sliding_attention", "full_attention"][:layers], attention_bias=bias,
        eos_token_id=None, tie_word_embeddings=tied,
    )  # fmt: skip
    config._attn_implementation = attention
    model = transformers.Gemma3ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(std=0.3)
            elif "proj" in name:
                weight.normal_(std=0.1)
    return model


def linears(model):
    return {n: x for n, x in model.named_modules() if n.rpartition(".")[2].endswith("_proj")}


def quantize(model, name):
    """Quantizes the projections of the decoder in place. Returns the model."""
    for module in linears(model).values():
        if name in COMPRESSED:
            compress(module, *COMPRESSED[name])
        else:
            subclass(module, *TORCHAO[name])
    if name in COMPRESSED:
        model.ct_decompress_hook = model.register_forward_pre_hook(_unpack_all)
    return model


def integers(weight, bits, group, zero, dtype=None):
    """Returns values :: [out, in], int8, and scale and zero point :: [out, in / group]."""
    groups = weight.data.float().unflatten(1, (-1, group or weight.shape[1]))
    low, high = groups.amin(2), groups.amax(2)
    top = 2 ** (bits - 1)
    scale = (high - low) / (2 * top - 1) if zero else groups.abs().amax(2) / (top - 1)
    scale = scale.to(dtype or weight.dtype)
    point = (-top - low / scale.float()).round().clamp(-top, top - 1) if zero else scale * 0
    values = (groups / scale.float().unsqueeze(2)).round() + point.unsqueeze(2)
    return values.clamp(-top, top - 1).to(torch.int8).flatten(1), scale, point.to(torch.int8)


def dequantized(values, scale, point):
    """As the libraries compute it, in the scale's dtype."""
    groups = values.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
    return ((groups - point.to(scale.dtype).unsqueeze(2)) * scale.unsqueeze(2)).flatten(1)


# --- compressed-tensors -----------------------------------------------------------------------


def pack_to_int32(values, bits):
    """Packs the integers of a row in order, from the lowest bits of an int32 on."""
    per = 32 // bits
    shifted = F.pad(values.long() + 2 ** (bits - 1), (0, -values.shape[1] % per))
    words = (shifted.unflatten(1, (-1, per)) << torch.arange(per) * bits).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def compress(module, bits, group, zero):
    values, scale, point = integers(module.weight, bits, group, zero)
    module.integers = values, scale, point
    module.expected = dequantized(values, scale, point)
    module.quantization_scheme = types.SimpleNamespace(
        weights=types.SimpleNamespace(num_bits=bits, type="int"),
        input_activations=None, output_activations=None,
        format=types.SimpleNamespace(value="pack-quantized"),
    )  # fmt: skip
    tensors = {"weight_scale": scale, "weight_packed": pack_to_int32(values, bits)}
    if zero:
        tensors["weight_zero_point"] = pack_to_int32(point.T, bits).T.contiguous()
    tensors["weight_shape"] = torch.tensor(module.weight.shape)
    del module.weight
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    module.forward = _quantized_forward.__get__(module)


def _forward(self, input):
    return self.__class__.forward(self, input)


_quantized_forward = types.FunctionType(
    _forward.__code__, {"__name__": "compressed_tensors.quantization.lifecycle.forward"}
)


def _unpack_all(model, args):
    for module in model.modules():
        if hf_packed.has_scheme(module):
            values, scale, point = module.integers
            weight = dequantized(values, scale.to(module.weight_scale.dtype), point)
            module.weight = nn.Parameter(weight, requires_grad=False)
            del module.weight_packed
    model.ct_decompress_hook.remove()
    del model.ct_decompress_hook


# --- torchao ----------------------------------------------------------------------------------


def subclass(module, kind, group, zero):
    """The tensor's own elements are the dequantized weight, so PyTorch's functions work on it."""
    bits = 8 if kind == "Int8Tensor" else 4
    values, scale, point = integers(module.weight, bits, group, zero, torch.float32)
    attributes = dict.fromkeys(hf_packed.PLAIN[kind])
    if kind == "Int4Tensor":
        zero_point = -point.float() * scale  # in units of the weight
        data = values.view(torch.uint8) & 15
        values_packed = (data[:, ::2] | data[:, 1::2] << 4).view(torch.int8)
        attributes |= {
            "qdata": values_packed, "scale": scale.T.contiguous(),
            "zero_point": zero_point.T.contiguous(), "activation_dtype": torch.bfloat16,
        }  # fmt: skip
    else:
        attributes |= {"qdata": values, "scale": scale, "zero_point": point}
    dense = dequantized(values, scale, point).to(module.weight.dtype)
    weight = torch.Tensor._make_subclass(SUBCLASSES[kind], dense, False)
    vars(weight).update(attributes, _is_param=True)
    module.integers, module.expected = (values, scale, point), dense
    module._parameters["weight"] = weight


class Subclass(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo):
        new = torch.Tensor._make_subclass(type(self), self.detach().clone(), False)
        vars(new).update(copy.deepcopy(vars(self), memo))
        return memo.setdefault(id(self), new)


SUBCLASSES = {name: type(name, (Subclass,), {"__module__": __name__}) for name in hf_packed.PLAIN}
globals().update(SUBCLASSES)  # pickle finds them by name
