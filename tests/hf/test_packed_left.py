"""Checks which quantized linears `accelerate` leaves as they are, and the reasons that it gives."""

import logging
import types

import pytest
import torch
from hf_models import logits, prompt
from quantized_linears import (
    COMPRESSED,
    Subclass,
    lines_of,
    make,
)
from tiny_models import close
from torch import nn

from gemma_fast.hf import accelerate
from gemma_fast.hf import attention as hf_attention


def scheme(**values):
    return lambda module: vars(module.quantization_scheme).update(values)


def weights(**values):
    return lambda module: vars(module.quantization_scheme.weights).update(values)


def parameter(name, change):
    def act(module):
        new = change(module._parameters.get(name), module)
        module._parameters[name] = nn.Parameter(new, requires_grad=False)

    return act


def attribute(**values):
    return lambda module: vars(module.weight).update(values)


def of_class(kind):
    def act(module):
        weight = torch.Tensor._make_subclass(kind, module.expected, False)
        vars(weight).update(vars(module.weight))
        module._parameters["weight"] = weight

    return act


class Float8Tensor(Subclass): ...


class OtherLinear(nn.Linear): ...


def _doubled(module, x):
    return 2 * type(module).forward(module, x)


LEFT = {
    "activations": ("ct-int8-row", scheme(input_activations=object()), "activations are quant"),
    "outputs": ("ct-int8-row", scheme(output_activations=object()), "activations are quant"),
    "2 bits": ("ct-int4-g32", weights(num_bits=2), "its format is pack-quantized with 2 bits"),
    "bytes": (
        "ct-int4-g32",
        parameter("weight_packed", lambda x, _: x.view(torch.uint8)),
        "its format is pack-quantized",
    ),
    "order of columns": (
        "ct-int4-g32",
        parameter("weight_g_idx", lambda _, m: torch.zeros(m.in_features)),
        "its weight_g_idx is not supported",
    ),
    "missing column": (
        "ct-int4-g32", parameter("weight_packed", lambda x, _: x[:, 1:]), "do not fit a weight of"
    ),
    "scale per tensor": (
        "ct-int8-row", parameter("weight_scale", lambda x, _: x[:1, 0]), "do not fit a weight of"
    ),
    "groups of 8": (
        "ct-int8-row",
        parameter("weight_scale", lambda x, m: x.repeat(1, m.in_features // 8)),
        "groups of 8 columns must",
    ),
    "infinite scale": (
        "ct-int8-row", parameter("weight_scale", lambda x, _: x / 0), "a scale is float64 or not"
    ),
    "zero points not packed": (
        "ct-int4-g64-zero",
        parameter("weight_zero_point", lambda _, m: torch.zeros_like(m.weight_scale).char()),
        "do not fit a weight of",
    ),
    "scaled activations": ("ao-int8-row", attribute(act_pre_scale=1), "activations are scaled"),
    "activations in int8": ("ao-int8-row", attribute(act_quant_kwargs=1), "activations are scaled"),
    "activations in fp8": (
        "ao-int4-g32", attribute(activation_dtype=torch.float8_e4m3fn), "activations are scaled"
    ),
    "another layout": ("ao-int8-row", of_class(Float8Tensor), "its weight is a Float8Tensor"),
    "another class": (
        "ao-int8-row", lambda m: setattr(m, "__class__", OtherLinear), "OtherLinear is not torch.nn"
    ),
    "another forward": (
        "ao-int8-row",
        lambda m: setattr(m, "forward", types.MethodType(_doubled, m)),
        "its forward was replaced by code of ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_linear_that_the_kernels_cannot_compute_stays_and_is_listed(case):
    name, change, reason = LEFT[case]
    model, theirs, ids = make(name), make(name), prompt()
    for each in (model, theirs):
        change(each.model.layers[1].mlp.down_proj)
    with pytest.raises(RuntimeError, match=f"(?s)layers.1.mlp.down_proj.*strict=True.*{reason}"):
        accelerate(model, linear=True, strict=True)
    accelerate(model, linear=True)
    lines = {line.module: line for line in lines_of(model)}
    left = lines.pop("model.layers.1.mlp.down_proj")
    assert left.path == "transformers" and reason in left.why
    if name in COMPRESSED:  # it unpacks all of them, or none
        why = "compressed-tensors unpacks all weights at the first call, because of model.layers.1"
        assert all(line.path == "transformers" and why in line.why for line in lines.values())
    else:
        assert {line.path for line in lines.values()} == {"reference"}
        close(logits(model, ids), logits(theirs, ids))


def test_quantized_embedding_leaves_all_linears():
    model = make("ct-int4-g32")
    model.model.embed_tokens.quantization_scheme = types.SimpleNamespace(weights=object())
    with pytest.raises(RuntimeError, match=r"because of model\.embed_tokens: it is not a linear"):
        accelerate(model, linear=True, strict=True)


def test_weights_that_are_unpacked_already_are_listed():
    model, ids = make("ct-int4-g32"), prompt()
    expected = logits(model, ids)
    close(logits(accelerate(model, linear=True), ids), expected)
    assert all("unpacked its weight: load the model again" in x.why for x in lines_of(model))


def test_decoder_alone_is_left_because_the_whole_model_unpacks_it():
    model = make("ct-int4-g32")
    with pytest.raises(RuntimeError, match="first call of the whole model: accelerate that model"):
        accelerate(model.model, linear=True, strict=True)


def test_left_linears_are_logged_once(caplog, monkeypatch):
    logger = hf_attention.logger
    logger.warning_once.cache_clear()
    monkeypatch.setattr(logger, "propagate", True)
    for parent in ("transformers", "gemma_fast"):
        monkeypatch.setattr(logging.getLogger(parent), "propagate", True)
    model = make("ao-int8-row")
    LEFT["another layout"][1](model.model.layers[1].mlp.down_proj)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            accelerate(model, linear=True)
    said = [r.getMessage() for r in caplog.records if "gemma_fast leaves" in r.getMessage()]
    assert len(said) == 1 and "its weight is a Float8Tensor" in said[0]
