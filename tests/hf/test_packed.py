"""Checks linears whose weight compressed-tensors or torchao has quantized. Their kernels read the
same integers, so outputs must equal those of the dequantized weight. The tests use stand-ins with
the structure of both libraries; test_packed_libraries.py runs the libraries themselves."""

import pytest
import torch
from c_kernels import needs_c, without_c
from hf_models import generate, logits, prompt
from marks import slow
from quantized_linears import (
    FORMATS,
    dequantized,
    linears,
    lines_of,
    make,
    tiny_model,
)
from tiny_models import close
from torch import nn
from triton_interpreter import interpreter

from gemma_fast.hf import accelerate, explain, restore
from gemma_fast.hf import layers as hf_layers
from gemma_fast.hf.packed import pack
from gemma_fast.kernels.packed import PackedWeight


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_dequantized_weights(name):
    ids = prompt()
    expected = logits(make(name), ids)
    model = accelerate(make(name), linear=True, strict=True)
    close(logits(model, ids), expected)
    lines = lines_of(model)
    assert {line.module for line in lines} == set(linears(model))
    assert {line.path for line in lines} == {"reference"}
    assert all(line.path == "reference" for line in explain(model, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_unpacked_weight_is_the_dequantized_weight(name, dtype):
    """Without zero points bit for bit. A zero point's product with the scale is rounded."""
    for module in linears(make(name, dtype=dtype)).values():
        packed = pack(module)
        values, scale, point = module.integers
        exact = dequantized(values, scale.float(), point)
        if packed.minimum is None:
            assert torch.equal(packed.weight.unpack(torch.float32), exact)
        error = (packed.weight.unpack(torch.float32) - exact).abs().max()
        assert error <= (1e-6 if dtype == torch.float32 else 2**-10) * exact.abs().max()


@needs_c
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_of_a_cpu_run_by_default(name):
    """In bf16 the error must be about that of the library, which rounds the weights. The
    state_dict and the restored model have the library's tensors."""
    ids, exact = prompt(b=1, t=1), tiny_model(dtype=torch.bfloat16).float()
    model = make(name, dtype=torch.bfloat16)
    for module, quantized in zip(linears(exact).values(), linears(model).values(), strict=True):
        values, scale, point = quantized.integers
        module.weight.data = dequantized(values, scale.float(), point)
    exact = logits(exact, ids)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    accelerate(model, strict=True)
    assert all(isinstance(x.packed, PackedWeight) for x in linears(model).values())
    found = logits(model, ids)
    assert {line.path for line in lines_of(model)} == {"reference"}
    theirs = (logits(make(name, dtype=torch.bfloat16), ids) - exact).square().mean().sqrt()
    assert (found - exact).square().mean().sqrt() < 1.2 * theirs
    for state in (model.state_dict(), restore(model).state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(x, before[n]) for n, x in state.items())


BITS = {"ct-int4-g32": 4, "ct-int4-g64-zero": 4, "ct-int4-g16": 8, "ct-int8-row": 8,
        "ao-int8-row": 8, "ao-intx4-g32": 4, "ao-intx4-g32-zero": 4, "ao-int4-g32": 4}  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_weights_are_packed_in_as_few_bits_as_the_layout_allows(name):
    model = accelerate(make(name), linear=True)
    assert {x.packed.packing.bits for x in linears(model).values()} == {BITS[name]}


def test_wrong_kernel_changes_the_logits(monkeypatch):
    ids, kernel = prompt(), hf_layers.linear
    expected = logits(make("ct-int4-g32"), ids)
    monkeypatch.setattr(hf_layers, "linear", lambda *args: kernel(*args).roll(1, -1))
    model = accelerate(make("ct-int4-g32"), linear=True)
    assert (logits(model, ids) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["ct-int8-row", *slow("ct-int4-g64-zero", "ao-int4-g32")])
def test_triton_kernels_give_the_same_logits(name):
    """Runs a prompt and decode steps. Where Triton runs, linears are accelerated by default."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = prompt(b=1, t=12).to(device)
    expected = logits(make(name, layers=1).to(device), ids)
    model = make(name, layers=1).to(device)
    with interpreter():
        accelerate(model, norm=False, attention=False, mlp=False, strict=True)
        assert {line.path for line in lines_of(model)} == {"triton"}
        found = [logits(model, ids[:, : i + 1])[:, -1] for i in (0, 11)]
    close(torch.stack(found, 1), expected[:, [0, 11]])


def test_without_c_kernels_linears_stay_by_default():
    ids = prompt()
    expected = logits(make("ct-int4-g32"), ids)
    with without_c():
        model = accelerate(make("ct-int4-g32"), strict=True)
        assert hasattr(model, "ct_decompress_hook")
        close(logits(model, ids), expected)
        close(logits(accelerate(make("ct-int4-g32"), linear=True), ids), expected)
        (line,) = {(x.path, x.why) for x in lines_of(accelerate(make("ao-int8-row")))}
    why = "without gcc, which compiles kernels for this CPU, only with linear=True"
    assert line == ("transformers", f"not accelerated: {why}")


def test_linears_of_a_model_that_is_not_quantized_are_not_listed():
    model = accelerate(tiny_model(), linear=True, strict=True)
    assert not lines_of(model) and type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_memory_holds_the_integers_once():
    linear = accelerate(make("ct-int4-g32"), linear=True).model.layers[0].mlp.up_proj
    assert linear.weight_packed is None and linear.packed.scale.data_ptr() == (
        linear.weight_scale.data_ptr()
    )
    linear = accelerate(make("ao-int8-row"), linear=True).model.layers[0].mlp.up_proj
    assert linear.packed.data.data_ptr() == linear.weight.qdata.data_ptr()


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_reach_the_input(name):
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    grads = []
    for model in (make(name), accelerate(make(name), linear=True)):
        inputs = x.clone().requires_grad_()
        model(inputs_embeds=inputs).logits.square().sum().backward()
        grads.append(inputs.grad)
    close(grads[1] / grads[0].abs().max(), grads[0] / grads[0].abs().max())
    (reason,) = {(x.path, x.why) for x in lines_of(model, inputs_embeds=inputs)}
    assert reason[0] == "transformers" and reason[1].startswith("gradients are recorded")


def test_strict_raises_for_training():
    model = accelerate(make("ct-int4-g32"), norm=False, mlp=False, linear=True, strict=True)
    with pytest.raises(RuntimeError, match=r"linear cannot run on the kernels, .*gradients"):
        model(inputs_embeds=torch.randn(1, 3, 64, requires_grad=True))


@pytest.mark.parametrize("name", ["ct-int8-g16-zero", "ao-int8-row"])
def test_bias_and_hooks_are_honored(name):
    ids = prompt()

    def biased():
        model = make(name, bias=True)
        for module in linears(model).values():
            if module.bias is not None:
                torch.manual_seed(5)
                module.bias.data.normal_()
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, x, y: 2 * y)
        return model

    expected = logits(biased(), ids)
    assert (expected - logits(make(name), ids)).abs().max() > 0.01
    close(logits(accelerate(biased(), linear=True, strict=True), ids), expected)


@pytest.mark.parametrize("name", ["ct-int4-g64-zero", "ao-int8-row"])
def test_generate_gives_the_same_tokens(name):
    ids = prompt()
    expected = generate(make(name), ids)
    assert torch.equal(generate(accelerate(make(name), linear=True), ids), expected)


@pytest.mark.parametrize("name", ["ct-int4-g32", "ao-int8-row"])
def test_model_compiles_into_one_graph(name):
    ids = prompt()
    expected = logits(make(name), ids, use_cache=False)
    model = accelerate(make(name), linear=True, attention=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled, ids, use_cache=False), expected)
