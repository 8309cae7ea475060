"""Tests that the tolerance of logits detects known mistakes, in each family that has the step."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import close

from gemma_fast import reference
from gemma_fast.config import SLIDING
from gemma_fast.reference import Reference

OF_STEPS = {
    "embeddings not scaled": {"embed": lambda ids, embeddings, *_: embeddings[ids]},
    "norm with or without 1 +": {
        "rms_norm": lambda x, weight, eps, offset=1.0, right=reference.rms_norm: right(
            x, weight, eps, 1 - offset
        )
    },
    "GELU by erf": {"geglu": lambda gate, up: F.gelu(gate) * up},
    "gate and up swapped": {"geglu": lambda gate, up: F.gelu(up, approximate="tanh") * gate},
    "cos and sin rounded": {
        "angles": lambda *args, right=reference.angles: [x.half().float() for x in right(*args)]
    },
    "neighboring channels rotated": {
        "rotate": lambda x, cos, sin: torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
        ).flatten(-2)
    },
    "no soft cap": {"cap": lambda x, softcap: x},
}


@pytest.mark.parametrize("mistake", OF_STEPS)
def test_mistake_in_a_step_is_detected(twins, mistake, monkeypatch):
    ids = twins.prompt(2, 40)
    expected = twins.model(ids).logits
    close(twins.reference(ids).logits, expected)
    if mistake == "no soft cap" and twins.config.final_logit_softcapping is None:
        pytest.skip("no soft cap")
    for name, wrong in OF_STEPS[mistake].items():
        monkeypatch.setattr(reference, name, wrong)
    with pytest.raises(AssertionError, match="not close"):
        close(twins.reference(ids).logits, expected)


@pytest.mark.parametrize(
    "field",
    [
        "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping",
        "final_logit_softcapping", "rms_norm_eps",
    ],
)  # fmt: skip
def test_wrong_value_of_a_field_is_detected(twins, field):
    value = getattr(twins.config, field)
    if value is None:
        pytest.skip(f"{twins.config.model_type} has no {field}")
    refuse(
        twins,
        **{field: {"sliding_window": value + 1, "rms_norm_eps": 1e-4}.get(field, 1.01 * value)},
    )


@pytest.mark.parametrize("field", ["rope_theta", "factor", "attention_factor"])
@pytest.mark.parametrize("kind", ["full_rope", "sliding_rope"])
def test_wrong_rotary_parameter_is_detected(twins, kind, field):
    rope = getattr(twins.config, kind)
    if (kind == "sliding_rope") and SLIDING not in twins.config.layer_types:
        pytest.skip("no layer has a window")
    if field == "factor" and rope.rope_type == "default":
        pytest.skip("angles are not scaled")
    refuse(twins, **{kind: rope._replace(**{field: 1.01 * getattr(rope, field)})})


def refuse(twins, **wrong):
    """Fails unless the tolerance detects that these fields of the config are wrong."""
    ids, config = twins.prompt(2, 40), replace(twins.config, **wrong)
    with pytest.raises(AssertionError, match="not close"):
        close(Reference(config, twins.reference.weights)(ids).logits, twins.model(ids).logits)
