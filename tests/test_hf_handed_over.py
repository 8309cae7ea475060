"""gemma_fast.hf: what the kernels cannot take runs transformers' code, to the same numbers, and is
told; what cannot be accelerated is refused, and left as it was."""

import logging

import pytest
import torch
import transformers
from hf_models import FAMILIES, logits, make, padded, prompt
from transformers.masking_utils import create_causal_mask

from gemma_fast.hf import GemmaFastCache, accelerate, explain
from gemma_fast.hf import attention as hf_attention

TIGHT = {"rtol": 0, "atol": 3e-5}


@pytest.fixture(params=FAMILIES)
def model(request):
    return make(request.param)


def why(model, **inputs):
    """Why each part's modules ran as they did, in this call."""
    reasons = {}
    for line in explain(model, **inputs):
        reasons.setdefault(line.part, set()).add((line.path, line.why))
    assert all(len(reason) == 1 for reason in reasons.values()), "layers differ"
    return {part: reason.pop() for part, reason in reasons.items()}


@torch.no_grad()
def check_handed_over(model, mention, **inputs):
    """Only attention; to the very numbers of transformers' own, without the kernels' norms."""
    expected = model(**inputs).logits
    accelerate(model, norm=False, mlp=False)
    assert torch.equal(model(**inputs).logits, expected)
    path, reason = why(model, **inputs)["attention"]
    assert path == "transformers" and mention in reason
    accelerate(model, strict=True)
    with pytest.raises(
        RuntimeError, match="attention cannot run on the kernels, which strict=True"
    ):
        model(**inputs)


MASKS = {
    "on the right": [[1] * 20 + [0] * 10, [1] * 30],
    "in the middle": [[1] * 9 + [0] * 3 + [1] * 18, [1] * 30],
    "on both sides": [[0] * 5 + [1] * 20 + [0] * 5, [1] * 30],
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", MASKS)
def test_padding_elsewhere_than_on_the_left(padding, attention):
    model = make("gemma3-gqa", attention)
    check_handed_over(model, "more than causal", input_ids=prompt(),
                      attention_mask=torch.tensor(MASKS[padding]))  # fmt: skip


def test_a_mask_of_the_caller(model):
    seen = torch.tril(torch.ones(30, 30, dtype=torch.bool))
    seen[20:, 3:9] = False
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 30, 30)
    check_handed_over(model, "more than causal", input_ids=prompt(), attention_mask=mask)


def test_packed_sequences(model):
    positions = torch.cat((torch.arange(12), torch.arange(18))).expand(2, 30)
    check_handed_over(
        model, "more than causal", input_ids=prompt(), position_ids=positions, use_cache=False
    )


@pytest.mark.parametrize("family", ["gemma3-gqa", "gemma3-mqa"])
def test_both_directions(family):
    model = make(family)
    model.config.use_bidirectional_attention = True
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    check_handed_over(model, "more than causal", input_ids=prompt())


def test_more_than_causal_by_function(model):
    """As multimodal models let image tokens see each other."""
    model = accelerate(model)
    config, embeds = model.config, torch.zeros(1, 6, 4)
    both = {"config": config, "inputs_embeds": embeds, "attention_mask": None}
    both |= {"past_key_values": None}
    plain = create_causal_mask(**both)
    assert plain.flatten().tolist() == [0, 0] and plain.dtype == torch.int32
    other = create_causal_mask(**both, or_mask_function=lambda b, h, q, k: q >= 0)
    assert other.shape == (1, 1, 6, 6) and (other == 0).all()


def test_gradients(model):
    ids = prompt()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    accelerate(model)
    again = model(input_ids=ids, labels=ids).loss
    again.backward()
    assert torch.equal(again, loss)
    assert all(map(torch.equal, expected, (weight.grad for weight in model.parameters())))
    reasons = why(model, input_ids=ids)
    assert all(path == "transformers" and "no_grad" in note for path, note in reasons.values())
    for weight in model.parameters():
        weight.requires_grad_(False)
    assert {path for path, _ in why(model, input_ids=ids).values()} == {"reference"}


def test_training_mode_with_dropout(model):
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    ids = prompt()
    torch.manual_seed(1)
    expected = logits(model.train(), ids)
    accelerate(model)
    torch.manual_seed(1)
    assert torch.equal(logits(model, ids), expected)
    assert all("training" in note for _, note in why(model).values())
    assert not torch.equal(logits(model.eval(), ids), expected)
    assert {path for path, _ in why(model).values()} == {"reference"}


@torch.no_grad()
def test_attention_weights(model):
    ids = prompt()
    expected = model(ids, output_attentions=True).attentions
    found = accelerate(model, norm=False, mlp=False)(ids, output_attentions=True).attentions
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    reasons = why(model, input_ids=ids, output_attentions=True)
    assert "output_attentions" in reasons["attention"][1]


def test_hidden_states(model):
    ids = prompt()
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
        found = accelerate(model, strict=True)(ids, output_hidden_states=True).hidden_states
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-5)


def test_float64(model):
    ids = prompt()
    expected = logits(model.double(), ids)
    assert torch.equal(logits(accelerate(model), ids), expected)
    assert all("float64" in note for _, note in why(model).values())


def test_an_exact_gelu():
    model = make("gemma-mqa")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    ids = prompt()
    expected = logits(model, ids)
    torch.testing.assert_close(logits(accelerate(model), ids), expected, **TIGHT)
    path, reason = why(model)["mlp"]
    assert path == "transformers" and "not the GELU's tanh approximation" in reason


def test_it_is_said_once(model, caplog, monkeypatch):
    logger = hf_attention.logger
    logger.warning_once.cache_clear()
    monkeypatch.setattr(logger, "propagate", True)
    for parent in ("transformers", "gemma_fast"):
        monkeypatch.setattr(logging.getLogger(parent), "propagate", True)
    ids = prompt()
    accelerate(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            logits(model, ids, torch.tensor(MASKS["on the right"]))
    said = [r.getMessage() for r in caplog.records if "leaves attention" in r.getMessage()]
    assert len(said) == 1 and "explain(model" in said[0]


def test_explain(model):
    accelerate(model, mlp=False)
    lines = explain(model)
    layers = model.config.num_hidden_layers
    names = dict(model.named_modules())
    assert all(line.module in names for line in lines)
    assert sum(line.part == "attention" for line in lines) == layers
    assert sum(line.part == "norm" for line in lines) == sum(
        "RMSNorm" in type(m).__name__ for m in model.modules()
    )
    reasons = {(line.part, line.path, line.why) for line in lines}
    assert ("mlp", "transformers", "not accelerated: mlp=False") in reasons
    assert ("norm", "reference", "on cpu there is no Triton") in reasons
    with pytest.raises(
        RuntimeError, match=r"strict=True.*layers\.0\.mlp: not accelerated: mlp=False"
    ):
        explain(model, strict=True)


@pytest.mark.parametrize("part", ["norm", "mlp"])
def test_strict(model, part):
    accelerate(model, attention=False, strict=True, **{"norm" if part == "mlp" else "mlp": False})
    with pytest.raises(RuntimeError, match=f"{part} cannot run on the kernels.*no_grad"):
        model(prompt())


def test_another_architecture():
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_key_value_heads=1,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    for call in (accelerate, explain):
        with pytest.raises(
            ValueError, match=r"LlamaForCausalLM cannot be accelerated: only .*Gemma3"
        ):
            call(llama)


@pytest.mark.parametrize("fault", ["device", "forward"])
def test_refused_and_left_as_it_was(model, fault):
    if fault == "device":
        model = model.to("meta")
        message = "the model lies on meta: the kernels run on cuda"
    else:
        mlp = model.model.layers[1].mlp
        mlp.forward = mlp.forward
        message = r"replaced the forward of layers\.1\.mlp"
    classes = list(map(type, model.modules()))
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert list(map(type, model.modules())) == classes
    assert model.config._attn_implementation == "eager"


def test_a_wrong_version_of_transformers():
    import subprocess
    import sys

    code = "import transformers; transformers.__version__ = '5.3.1'; import gemma_fast.hf"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "ImportError: gemma_fast.hf supports transformers from 5.17 to below 6" in run.stderr
    assert "found 5.3.1: pip install 'gemma_fast[hf]'" in run.stderr
    code = "import sys; sys.modules['transformers'] = None; import gemma_fast.hf"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "gemma_fast.hf needs transformers, which is not installed: pip install" in run.stderr


def test_rings_without_acceleration_and_with_other_masks(model):
    ids = prompt()
    cache = GemmaFastCache(model.config, 40)
    with pytest.raises(
        ValueError, match="for accelerated models, and this one's attention is 'eager'"
    ):
        logits(model, ids, past_key_values=cache)
    if model.config.model_type == "gemma":
        return  # no windows, no rings
    accelerate(model)
    with pytest.raises(ValueError, match="padding on the left, and no other: use a DynamicCache"):
        logits(model, ids, torch.tensor(MASKS["in the middle"]), past_key_values=cache)


def test_left_padding_is_told_from_holes():
    mask = padded(prompt(t=6), 2, 0).bool()
    first, whole = hf_attention.left_padding(mask, 6)
    assert first.tolist() == [2, 0] and whole
    mask[1, 5] = False
    assert not hf_attention.left_padding(mask, 6)[1]
    assert hf_attention.left_padding(mask, 5)[1], "what is still to come does not matter"
    assert not hf_attention.left_padding(mask, 7)[1], "a mask must cover all tokens"
    first, whole = hf_attention.left_padding(torch.zeros(1, 4, dtype=torch.bool), 4)
    assert first.tolist() == [4] and whole, "a row may be padding so far"
