"""Checks that gemma_fast.hf accelerates a model in place, and that its logits stay the same."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from hf_models import FAMILIES, logits, make, padded, prompt
from marks import slow
from tiny_models import close, rounding_error
from triton_interpreter import interpreter

from gemma_fast import hf
from gemma_fast.hf import accelerate, accelerated, explain, restore
from gemma_fast.hf import attention as hf_attention
from gemma_fast.hf import layers as hf_layers

EXPERTS = ("router", "experts")
PARTS = ("norm", "mlp", "attention", *EXPERTS)


@pytest.fixture(params=FAMILIES)
def model(request):
    return make(request.param)


def test_logits_are_the_same_as_before_acceleration(model):
    ids = prompt()
    mask = padded(ids, 7, 0)
    before, plain = logits(model, ids, mask), logits(model, ids)
    accelerate(model, strict=True)
    real = mask.bool()
    close(logits(model, ids, mask)[real], before[real])
    close(logits(model, ids), plain)


@pytest.mark.parametrize("family", ["gemma3-gqa", *slow("gemma-mqa", "gemma2-gqa")])
def test_triton_kernels_give_the_same_logits_as_transformers(family):
    """Runs a prompt and then decode steps, in Triton's interpreter or on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = make(family).to(device), prompt(t=20).to(device)
    mask = padded(ids.cpu(), 5, 0).to(device)
    expected = logits(model, ids, mask)
    accelerate(model, strict=True)
    with interpreter():
        assert {line.path for line in explain(model)} == {"triton"}
        cache = transformers.DynamicCache(config=model.config)
        found = [logits(model, ids[:, :14], mask[:, :14], past_key_values=cache)]
        for i in range(14, 20):
            part = ids[:, i : i + 1]
            found.append(logits(model, part, mask[:, : i + 1], past_key_values=cache))
    real = mask.bool()
    close(torch.cat(found, dim=1)[real], expected[real])


@pytest.mark.parametrize("t", [1, 20])
@pytest.mark.parametrize("family", ["gemma3-gqa", *slow("gemma-mqa", "gemma-mha")])
def test_triton_kernels_without_a_cache_give_the_same_logits_as_transformers(family, t):
    """Without a cache, the strides of keys can differ from those of values. With t = 1 they can
    differ even if both tensors are contiguous."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = make(family).to(device), prompt(t=t).to(device)
    expected = logits(model, ids, use_cache=False)
    accelerate(model, strict=True)
    with interpreter():
        close(logits(model, ids, use_cache=False), expected)


def skip_without(part, model):
    if part in EXPERTS and not hasattr(model.config, "num_experts"):
        pytest.skip("the model has no experts")


@pytest.mark.parametrize("part", PARTS)
def test_each_part_can_be_accelerated_alone(model, part):
    skip_without(part, model)
    ids = prompt()
    expected = logits(model, ids)
    accelerate(model, **dict.fromkeys(PARTS, False) | {part: True})
    close(logits(model, ids), expected)
    ours = {line.part for line in explain(model) if line.path != "transformers"}
    assert ours == {part}


KERNELS = [
    (hf_layers, "rms_norm"), (hf_layers, "geglu"), (hf_attention, "attention"),
    (hf_layers, "route"), (hf_layers, "experts"),
]  # fmt: skip


def wrong(out):
    """Returns a kernel's output, or all its outputs, with elements of the first one in other places
    (of the experts' indices, for the router)."""
    if not isinstance(out, tuple):
        return out.roll(1, -1)
    place = 1 if len(out) == 3 else 0
    return *out[:place], out[place].roll(1, -1), *out[place + 1 :]


@pytest.mark.parametrize(("module", "name"), KERNELS, ids=[name for _, name in KERNELS])
def test_wrong_kernel_changes_the_logits(model, monkeypatch, module, name):
    skip_without("router" if name == "route" else name, model)
    ids, kernel = prompt(), getattr(module, name)
    expected = logits(model, ids)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: wrong(kernel(*args, **kwargs)))
    assert (logits(accelerate(model), ids) - expected).abs().max() > 0.01


def test_model_keeps_its_class_config_and_weights(model):
    kind, config, weights = type(model), model.config, model.state_dict()
    settings, kinds = copy.deepcopy(config.to_dict()), [type(m) for m in model.modules()]
    assert accelerate(model) is model
    assert type(model) is kind and model.config is config and config.to_dict() == settings
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(after[name].data_ptr() == weights[name].data_ptr() for name in weights)
    assert all(map(isinstance, model.modules(), kinds))


def test_restored_model_is_as_before_acceleration(model):
    ids = prompt()
    expected = logits(model, ids)
    classes, attributes = [[f(m) for m in model.modules()] for f in (type, lambda m: set(vars(m)))]
    accelerate(model, strict=True)
    logits(model, ids)
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, ids), expected)
    assert restore(model) is model


def test_accelerating_again_replaces_the_selected_parts(model):
    accelerate(model)
    accelerate(model, attention=False, norm=False, router=False, experts=False)
    assert model.config._attn_implementation == "eager"
    assert {line.part for line in explain(model) if line.path != "transformers"} == {"mlp"}


def test_context_manager_restores_the_state_before_it(model):
    with accelerated(model, mlp=False) as inside:
        assert inside is model and model.config._attn_implementation == "gemma_fast+eager"
    assert model.config._attn_implementation == "eager"
    with pytest.raises(RuntimeError, match="strict"), accelerated(model, strict=True):
        model(prompt())
    accelerate(model, mlp=False, strict=True)
    before = [(type(m), getattr(m, "strict", None)) for m in model.modules()]
    with accelerated(model, attention=False):
        assert model.config._attn_implementation == "eager"
    assert [(type(m), getattr(m, "strict", None)) for m in model.modules()] == before
    assert model.config._attn_implementation == "gemma_fast+eager"


def test_saved_model_can_be_loaded_with_and_without_acceleration(model, tmp_path):
    ids = prompt()
    expected = logits(accelerate(model), ids)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(m, hf_layers.Fast) for m in loaded.modules())
    fast = hf.FastGemma.from_pretrained(tmp_path, attn_implementation="eager", dtype="float32")
    assert type(fast) is type(model) and torch.equal(logits(fast, ids), expected)
    assert all(line.path == "reference" for line in explain(fast))


def test_from_pretrained_has_the_signature_of_transformers():
    theirs = transformers.AutoModelForCausalLM.from_pretrained
    assert inspect.signature(hf.FastGemma.from_pretrained) == inspect.signature(theirs)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_accelerated_independently(model, copied):
    ids = prompt()
    expected = logits(accelerate(model, strict=True), ids)
    other = copied(model)
    assert torch.equal(logits(other, ids), expected)
    assert all(line.path == "reference" for line in explain(other))
    restore(other)
    assert all(line.path == "reference" for line in explain(model)), "restore changed the original"


@pytest.mark.parametrize("model", slow(*FAMILIES), indirect=True)
def test_unpickled_model_in_a_new_process_gives_the_same_logits(model, tmp_path):
    import subprocess
    import sys

    ids = prompt()
    expected = logits(accelerate(model, norm=False, mlp=False), ids)
    torch.save((model, ids, expected), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, ids, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): found = model(ids).logits\n"
        "assert (found - expected).abs().max() < 3e-5\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    subprocess.run(command, check=True, timeout=300)


@pytest.mark.parametrize("first", ["accelerated", "converted"])
def test_model_can_be_converted_to_another_dtype(model, first):
    """Accelerates before or after the conversion to bfloat16. In both cases the error must be less
    than 1.1 times that of transformers."""
    ids, experts = prompt(), getattr(model.config, "num_experts", None) is not None
    exact = logits(model, ids)
    theirs = rounding_error(logits(copy.deepcopy(model).bfloat16(), ids), exact, experts)
    ours = accelerate(model).bfloat16() if first == "accelerated" else accelerate(model.bfloat16())
    found = logits(ours, ids)
    assert found.dtype == torch.bfloat16
    assert rounding_error(found, exact, experts) < 1.1 * theirs
    restored = logits(ours.float(), ids)
    assert {line.path for line in explain(ours)} == {"reference"} and not restored.isnan().any()


@pytest.mark.gpu
def test_model_can_be_moved_between_devices(model):
    ids = prompt()
    expected = logits(accelerate(model, strict=True), ids)
    found = logits(model.cuda(), ids.cuda()).cpu()
    close(found, expected)
    assert torch.equal(logits(model.cpu(), ids), expected)


def test_several_families_can_be_accelerated_at_once():
    ids, models = prompt(), [make(family) for family in FAMILIES]
    expected = [logits(model, ids) for model in models]
    for model in models:
        accelerate(model, strict=True)
    for _ in range(2):
        for model, right in zip(models, expected, strict=True):
            close(logits(model, ids), right)
    restore(models[0])
    assert torch.equal(logits(models[0], ids), expected[0])
    close(logits(models[2], ids), expected[2])


def test_model_with_sdpa_can_be_accelerated():
    ids, model = prompt(), make("gemma3-gqa", "sdpa")
    mask = padded(ids, 7, 0)
    expected = logits(model, ids, mask)[mask.bool()]
    found = logits(accelerate(model, strict=True), ids, mask)[mask.bool()]
    close(found, expected)
    assert model.config._attn_implementation == "gemma_fast+sdpa"
    assert restore(model).config._attn_implementation == "sdpa"


def test_attention_and_mask_functions_are_registered():
    """If no mask function is registered, transformers silently ignores all masks, even padding."""
    for original in ("eager", "sdpa", "flex_attention", "flash_attention_2"):
        assert hf_attention.PREFIX + original in transformers.AttentionInterface._global_mapping
        assert hf_attention.PREFIX + original in transformers.AttentionMaskInterface._global_mapping
