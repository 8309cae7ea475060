"""Checks linears whose weight compressed-tensors or torchao has quantized. Their kernels read the
same integers, so outputs must equal those of the dequantized weight. The tests use stand-ins with
the structure of both libraries; test_packed_libraries.py runs the libraries themselves."""

import copy
import logging
import pickle
import types

import peft
import pytest
import torch
from hf_models import generate, logits, prompt
from marks import slow
from quantized_linears import (
    COMPRESSED,
    TORCHAO,
    Subclass,
    dequantized,
    linears,
    quantize,
    tiny_model,
)
from tiny_models import close
from torch import nn
from triton_interpreter import interpreter

from gemma_fast.hf import accelerate, accelerated, explain, restore
from gemma_fast.hf import attention as hf_attention
from gemma_fast.hf import layers as hf_layers
from gemma_fast.hf.packed import pack
from gemma_fast.kernels.packed_cpu import CPUPackedWeight

FORMATS = [*COMPRESSED, *TORCHAO]


def make(name, **options):
    return quantize(tiny_model(**options), name)


def lines_of(model, **inputs):
    return [line for line in explain(model, **inputs) if line.part == "linear"]


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
def test_unpacked_weight_is_the_dequantized_weight(name, dtype, monkeypatch):
    """Without zero points bit for bit. A zero point's product with the scale is rounded."""
    monkeypatch.setattr(CPUPackedWeight, "supports", lambda rows: False)  # the layout of a GPU
    for module in linears(make(name, dtype=dtype)).values():
        packed = pack(module)
        values, scale, point = module.integers
        exact = dequantized(values, scale.float(), point)
        if packed.minimum is None:
            assert torch.equal(packed.weight.unpack(torch.float32), exact)
        error = (packed.weight.unpack(torch.float32) - exact).abs().max()
        assert error <= (1e-6 if dtype == torch.float32 else 2**-10) * exact.abs().max()


@pytest.mark.skipif(not CPUPackedWeight.supports([]), reason="this CPU has no int4 kernels")
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_of_a_cpu_run_by_default_in_bfloat16(name):
    """The error must be less than 1.5 times that of the library in bf16. The state_dict and the
    restored model have the library's tensors."""
    ids = prompt(b=1, t=1)
    exact = logits(make(name, dtype=torch.bfloat16).float(), ids)
    model = make(name, dtype=torch.bfloat16)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    accelerate(model, strict=True)
    assert all(isinstance(x.packed, CPUPackedWeight) for x in linears(model).values())
    found = logits(model, ids)
    assert {line.path for line in lines_of(model)} == {"reference"}
    theirs = (logits(make(name, dtype=torch.bfloat16), ids) - exact).square().mean().sqrt()
    assert (found - exact).square().mean().sqrt() < 1.5 * theirs
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
    expected = logits(make(name).to(device), ids)
    model = make(name).to(device)
    with interpreter():
        accelerate(model, strict=True)
        assert {line.path for line in lines_of(model)} == {"triton"}
        found = [logits(model, ids[:, : i + 1])[:, -1] for i in (0, 11)]
    close(torch.stack(found, 1), expected[:, [0, 11]])


def test_linears_stay_on_a_cpu_by_default():
    ids = prompt()
    expected = logits(make("ct-int4-g32"), ids)
    model = accelerate(make("ct-int4-g32"), strict=True)
    assert hasattr(model, "ct_decompress_hook")
    assert torch.equal(logits(model, ids), logits(accelerate(make("ct-int4-g32")), ids))
    close(logits(model, ids), expected)
    model = accelerate(make("ao-int8-row"))
    assert {(line.path, line.why) for line in lines_of(model)} == {
        (
            "transformers",
            "not accelerated: on this CPU only with linear=True, and with kernels only in bfloat16",
        )
    }


def test_linears_of_a_model_that_is_not_quantized_are_not_listed():
    model = accelerate(tiny_model(), linear=True, strict=True)
    assert not lines_of(model) and type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("name", FORMATS)
def test_restored_model_is_as_before_acceleration(name):
    model, ids = make(name), prompt()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    classes, attributes = [[f(m) for m in model.modules()] for f in (type, lambda m: set(vars(m)))]
    accelerate(model, linear=True, strict=True)
    logits(model, ids)
    for act in (lambda: None, lambda: restore(model)):  # what a checkpoint would get, then restored
        act()
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[n], before[n]) for n in before)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert hasattr(model, "ct_decompress_hook") == (name in COMPRESSED)
    assert torch.equal(logits(model, ids), logits(make(name), ids))


def test_memory_holds_the_integers_once():
    linear = accelerate(make("ct-int4-g32"), linear=True).model.layers[0].mlp.up_proj
    assert linear.weight_packed is None and linear.packed.scale.data_ptr() == (
        linear.weight_scale.data_ptr()
    )
    linear = accelerate(make("ao-int8-row"), linear=True).model.layers[0].mlp.up_proj
    assert linear.packed.data.data_ptr() == linear.weight.qdata.data_ptr()


def test_weights_are_not_unpacked_at_the_first_call():
    """And a text decoder alone also restores the whole model."""
    model = accelerate(make("ct-int8-row"), linear=True)
    logits(model, prompt())
    assert not hasattr(model, "ct_decompress_hook")
    assert all("weight" not in x._parameters for x in linears(model).values())
    restore(model.model)
    assert hasattr(model, "ct_decompress_hook")
    assert torch.equal(logits(model, prompt()), logits(make("ct-int8-row"), prompt()))


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


def test_adapters_around_linears_can_be_trained_and_loaded():
    """peft does not adapt linears of compressed-tensors, which have no weight until the first
    call."""
    ids = prompt(b=1, t=9)
    model = accelerate(make("ao-int8-row"), linear=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    lora = peft.get_peft_model(model, config)
    lora(input_ids=ids, labels=ids).loss.backward()
    trained = {n: x for n, x in lora.named_parameters() if x.requires_grad}
    assert len(trained) == 8 and all(x.grad is not None and "lora" in n for n, x in trained.items())
    for x in trained.values():
        x.data.normal_(std=0.1)
    lora.eval()
    peft.set_peft_model_state_dict(lora, peft.get_peft_model_state_dict(lora))
    found = logits(lora, ids)
    assert {x.path for x in lines_of(lora)} == {"reference"}
    expected = logits(restore(lora), ids)
    close(found, expected)
    assert (expected - logits(make("ao-int8-row"), ids)).abs().max() > 0.01


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


@pytest.mark.parametrize("name", ["ct-int4-g64-zero", "ct-int8-row"])
def test_model_can_be_converted_to_another_dtype(name):
    ids = prompt()
    exact = logits(make(name), ids)
    theirs = (logits(make(name).bfloat16(), ids).float() - exact).square().mean().sqrt()
    model = accelerate(make(name), linear=True).bfloat16()
    found = logits(model, ids)
    packed = model.model.layers[0].mlp.up_proj.packed
    assert found.dtype == torch.bfloat16 and packed.packing.scale != torch.float32
    assert (found.float() - exact).square().mean().sqrt() < 1.1 * theirs
    expected = make(name).bfloat16().state_dict()
    assert all(torch.equal(x, expected[n]) for n, x in restore(model).state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ct-int4-g64-zero", "ct-int8-row"])
def test_model_can_be_moved_between_devices(name):
    ids = prompt()
    expected = logits(model := accelerate(make(name), linear=True), ids)
    close(logits(model.cuda(), ids.cuda()).cpu(), expected)
    assert {line.path for line in lines_of(model)} == {"triton"}
    assert torch.equal(logits(model.cpu(), ids), expected)


def test_context_manager_restores_the_state_before_it():
    model, ids = make("ct-int4-g32"), prompt()
    expected = logits(make("ct-int4-g32"), ids)
    with accelerated(model, linear=True):
        close(logits(model, ids), expected)
    assert hasattr(model, "ct_decompress_hook") and not lines_named_fast(model)
    accelerate(model, linear=True)
    with accelerated(model, linear=False):
        assert hasattr(model, "ct_decompress_hook") and not lines_named_fast(model)
    assert not hasattr(model, "ct_decompress_hook")
    close(logits(model, ids), expected)
    assert len(lines_named_fast(accelerate(model, linear=True))) == len(linears(model))


def lines_named_fast(model):
    return [n for n, x in model.named_modules() if isinstance(x, hf_layers.FastLinear)]


@pytest.mark.parametrize("name", ["ct-int4-g32", "ao-int8-row"])
def test_copies_are_accelerated_independently(name):
    ids = prompt()
    model = accelerate(make(name), linear=True, strict=True)
    expected = logits(model, ids)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), expected)
    restore(other)
    assert {line.path for line in lines_of(model)} == {"reference"}
    close(logits(other, ids), expected)


def test_pickled_model_gives_the_same_logits():
    """compressed-tensors' own models cannot be pickled, because of their hook."""
    ids = prompt()
    model = accelerate(tiny_model(), linear=True)
    module = quantize(model, "ao-int8-row") and accelerate(model, linear=True)
    expected = logits(module, ids)
    other = pickle.loads(pickle.dumps(module.model.layers[0].mlp.up_proj))
    assert isinstance(other, hf_layers.FastLinear) and not expected.isnan().any()
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(other(x), module.model.layers[0].mlp.up_proj(x))


def test_state_dict_must_be_loaded_into_a_restored_model():
    model = accelerate(make("ct-int4-g32"), linear=True)
    with pytest.raises(RuntimeError, match=r"q_proj\.\*: call gemma_fast.hf.restore\(model\)"):
        model.load_state_dict(model.state_dict())
    state = make("ct-int4-g32").state_dict()
    restore(model).load_state_dict(state)


@pytest.mark.parametrize("name", ["ct-int4-g32", "ao-int8-row"])
def test_model_compiles_into_one_graph(name):
    ids = prompt()
    expected = logits(make(name), ids, use_cache=False)
    model = accelerate(make(name), linear=True, attention=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled, ids, use_cache=False), expected)


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
