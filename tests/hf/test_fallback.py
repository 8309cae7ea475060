"""Checks that calls that the kernels do not support fall back to transformers' code."""

import copy
import inspect

import pytest
import torch
import transformers
from hf_models import FAMILIES, logits, make, padded, prompt, why
from tiny_models import close
from transformers.masking_utils import (
    blockwise_overlay,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from gemma_fast.hf import GemmaFastCache, accelerate
from gemma_fast.hf import attention as hf_attention
from gemma_fast.hf import masks as hf_masks

ONLY_ATTENTION = dict.fromkeys(("norm", "mlp", "router", "experts"), False)


@pytest.fixture(params=FAMILIES)
def model(request):
    return make(request.param)


@torch.no_grad()
def check_attention_falls_back(model, mention, **inputs):
    """Accelerates only attention. Checks that it falls back, that the reason contains `mention`,
    and that the logits are bitwise equal. Then checks that strict=True raises RuntimeError."""
    expected = model(**inputs).logits
    accelerate(model, **ONLY_ATTENTION)
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
def test_padding_that_is_not_only_on_the_left_falls_back(padding, attention):
    model = make("gemma3-gqa", attention)
    check_attention_falls_back(model, "more than causal", input_ids=prompt(),
                      attention_mask=torch.tensor(MASKS[padding]))  # fmt: skip


def test_custom_4d_mask_falls_back(model):
    seen = torch.tril(torch.ones(30, 30, dtype=torch.bool))
    seen[20:, 3:9] = False
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 30, 30)
    check_attention_falls_back(model, "more than causal", input_ids=prompt(), attention_mask=mask)


def test_bounds_are_distinguished_from_masks():
    bounds = torch.zeros(2, 3, 5, 1, dtype=torch.int32)
    assert hf_masks.is_bounds(bounds) and hf_masks.is_bounds(bounds[:, :, -2:])
    for mask in (None, bounds.float(), bounds[:1], bounds.expand(2, 3, 5, 5), bounds[:, :, 0, 0]):
        assert not hf_masks.is_bounds(mask)


def test_packed_sequences_fall_back(model):
    positions = torch.cat((torch.arange(12), torch.arange(18))).expand(2, 30)
    check_attention_falls_back(
        model, "more than causal", input_ids=prompt(), position_ids=positions, use_cache=False
    )


def test_mask_with_an_or_function_falls_back(model):
    """Multimodal models use such masks, so that image tokens attend to each other."""
    model = accelerate(model)
    config, embeds = model.config, torch.zeros(1, 6, 4)
    both = {"config": config, "inputs_embeds": embeds, "attention_mask": None}
    both |= {"past_key_values": None}
    plain = create_causal_mask(**both)
    assert plain.flatten().tolist() == [*range(6), *[0] * 6] and plain.dtype == torch.int32
    for t in (6, 1):
        both["inputs_embeds"] = embeds[:, :t]
        other = create_causal_mask(**both, or_mask_function=lambda b, h, q, k: q >= 0)
        assert other.shape == (1, 1, t, t) and (other == 0).all()
    config.is_causal = False
    assert create_causal_mask(**both) is None, "one bidirectional token needs no mask"


def test_only_empty_blocks_of_image_tokens_are_left_out():
    config = accelerate(make("gemma4")).config
    given = {"config": config, "inputs_embeds": torch.zeros(1, 6, 4), "attention_mask": None}
    given |= {"past_key_values": None}
    none, some = torch.full((1, 6), -1), torch.tensor([[-1, -1, 0, 0, -1, -1]])

    def is_plain(make_mask, **functions):
        return hf_masks.is_bounds(make_mask(**given, **functions))

    for blocks in (none, some):
        overlay, empty = blockwise_overlay(blocks), blocks is none
        assert is_plain(create_causal_mask, or_mask_function=overlay) == empty
        assert is_plain(create_sliding_window_causal_mask, or_mask_function=overlay) == empty
        window = sliding_window_overlay(config.sliding_window)
        assert (
            is_plain(create_causal_mask, or_mask_function=overlay, and_mask_function=window)
            == empty
        )
        assert not is_plain(
            create_causal_mask, or_mask_function=overlay, and_mask_function=lambda b, h, q, k: q < 3
        )
    assert not is_plain(create_causal_mask, and_mask_function=sliding_window_overlay(3))
    assert not is_plain(create_causal_mask, or_mask_function=sliding_window_overlay(3))


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("t", [1, 12])
def test_image_tokens_attend_to_their_whole_image(t, compiled):
    """Image tokens also attend to tokens of their image that are outside the window."""
    model = accelerate(make("gemma3-gqa"))
    cache = transformers.DynamicCache(config=model.config)
    logits(model, prompt(), past_key_values=cache)
    blocks = torch.zeros(2, 30 + t, dtype=torch.long)
    window = {"config": model.config, "inputs_embeds": torch.zeros(2, t, 4), "attention_mask": None}
    if "block_sequence_ids" not in inspect.signature(create_sliding_window_causal_mask).parameters:
        pytest.skip("transformers 5.17 has no block_sequence_ids")

    def make_mask():
        return create_sliding_window_causal_mask(
            **window, past_key_values=cache, block_sequence_ids=blocks
        )

    if compiled:
        torch._dynamo.reset()
        make_mask = torch.compile(make_mask, backend="eager", fullgraph=True)
    mask = make_mask()
    assert mask.shape[2] == t and (mask == 0).all()


@torch.no_grad()
def test_attend_falls_back_on_arguments_it_does_not_support():
    """Callers other than Gemma's layers may pass such arguments. The reason must be recorded."""
    model = accelerate(make("gemma3-gqa", "sdpa"))
    layer = model.model.layers[0].self_attn
    q, k, v = torch.randn(2, 4, 5, 32), torch.randn(2, 2, 5, 32), torch.randn(2, 2, 5, 32)
    bounds = torch.zeros(2, 2, 1, 1, dtype=torch.int32)

    def call(mention, *tensors, **options):
        hf_attention.attend("sdpa", layer, *tensors, bounds, 0.2, **options)
        assert (mention in layer.run.why) == (layer.run.path == "transformers"), layer.run

    call("nothing", q, k, v, position_ids=torch.arange(5), use_cache=True)
    call("dropout 0.5", q, k, v, dropout=0.5)
    call("position_bias: unknown", q, k, v, position_bias=torch.zeros(2, 4, 5, 5))
    model.config._output_attentions = True
    call("output_attentions", q, k, v)
    model.config._output_attentions = False
    with torch.enable_grad():
        call("gradients", q, k.requires_grad_(), v)
    call("nothing", q, k, v)


def test_recording_gradients_falls_back(model):
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


def test_training_mode_falls_back(model):
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
def test_output_attentions_falls_back(model):
    ids = prompt()
    expected = model(ids, output_attentions=True).attentions
    found = accelerate(model, **ONLY_ATTENTION)(ids, output_attentions=True).attentions
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    reasons = why(model, input_ids=ids, output_attentions=True)
    assert "output_attentions" in reasons["attention"][1]


def test_hidden_states_are_the_same_as_before_acceleration(model):
    ids = prompt()
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
        found = accelerate(model, strict=True)(ids, output_hidden_states=True).hidden_states
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def test_float64_falls_back(model):
    ids = prompt()
    expected = logits(model.double(), ids)
    assert torch.equal(logits(accelerate(model), ids), expected)
    assert all("float64" in note for _, note in why(model).values())


@torch.no_grad()
def test_autocast_falls_back():
    """Under autocast, v is bfloat16 because a projection returns it, but q and k are float32 after
    the rotation."""
    model, ids = make("gemma3-gqa", "sdpa"), prompt()
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = (model(ids, use_cache=False).logits - exact).square().mean().sqrt()
        ours = (accelerate(model)(ids, use_cache=False).logits - exact).square().mean().sqrt()
        path, reason = why(model, input_ids=ids, use_cache=False)["attention"]
    assert path == "transformers" and "values are torch.float32, torch.float32, torch.bf" in reason
    assert ours < 1.2 * theirs


def test_unsupported_device_falls_back(model):
    model.config._experts_implementation = "batched_mm"  # the others do not run on meta
    with torch.no_grad():
        reasons = why(accelerate(model).to("meta"), input_ids=prompt().to("meta"))
    assert all(note == "device meta: the kernels run on cuda" for _, note in reasons.values())


def test_exact_gelu_falls_back():
    model = make("gemma-mqa")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    ids = prompt()
    expected = logits(model, ids)
    close(logits(accelerate(model), ids), expected)
    path, reason = why(model)["mlp"]
    assert path == "transformers" and "not the GELU's tanh approximation" in reason


def test_rings_refuse_models_that_are_not_accelerated_and_unsupported_masks(model):
    """GemmaFastCache refuses a model that is not accelerated, even if another model with an equal
    config is accelerated. Gemma 1 has no windows, so it is not refused."""
    ids, fast = prompt(), accelerate(make_like(model))
    for owner in (model, fast):
        cache = GemmaFastCache(owner.config, 40)
        if model.config.model_type == "gemma":  # no windows, so no rings
            assert torch.equal(logits(model, ids, past_key_values=cache), logits(model, ids))
            continue
        with pytest.raises(ValueError, match="GemmaFastCache needs an accelerated model"):
            logits(model, ids, past_key_values=cache)
        with pytest.raises(ValueError, match="and a causal mask with padding on the left"):
            logits(fast, ids, torch.tensor(MASKS["in the middle"]), past_key_values=cache)
        logits(fast, ids, past_key_values=cache)
        with pytest.raises(ValueError, match="and a causal mask with padding on the left"):
            logits(fast, ids[:, :1], torch.zeros(2, 1, 1, 40), past_key_values=cache)
        with pytest.raises(ValueError, match="use a DynamicCache"):
            cache.crop(-1)
    with pytest.raises(ValueError, match=r"config must be model.config, not a Gemma"):
        GemmaFastCache(model, 40)
    for room in (0, 40.5):
        with pytest.raises(ValueError, match=f"max_cache_len={room} must be an integer"):
            GemmaFastCache(model.config, room)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("room", [6, 9, 12, 13, 14])
def test_short_cache_gives_the_same_logits_or_is_refused(room, accelerated):
    """sdpa builds no mask for a prompt shorter than the window, which is 13 here."""
    model, ids = make("gemma3-gqa", "sdpa"), prompt(t=6)
    expected, cache = logits(model, ids), GemmaFastCache(model.config, room)
    if accelerated:
        accelerate(model, strict=True)
    if not accelerated and room >= 13:
        with pytest.raises(ValueError, match="GemmaFastCache needs an accelerated model"):
            logits(model, ids, past_key_values=cache)
    else:
        for part, right in ((ids[:, :4], expected[:, :4]), (ids[:, 4:], expected[:, 4:])):
            found = logits(model, part, past_key_values=cache)
            close(found, right)


def make_like(model):
    other = type(model)(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_left_padding_is_distinguished_from_holes():
    mask = padded(prompt(t=6), 2, 0).bool()
    first, whole = hf_masks.left_padding(mask, 6)
    assert first.tolist() == [2, 0] and whole
    mask[1, 5] = False
    assert not hf_masks.left_padding(mask, 6)[1]
    assert hf_masks.left_padding(mask, 5)[1], "positions from `end` on must be ignored"
    mask[1, 5] = True
    assert not hf_masks.left_padding(mask, 7)[1], "a mask must cover all tokens"
    first, whole = hf_masks.left_padding(torch.zeros(1, 4, dtype=torch.bool), 4)
    assert first.tolist() == [4] and whole, "a row may contain only padding"
