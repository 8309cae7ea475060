"""Tests the option `quantize` of from_pretrained and of the commands."""

import json

import pytest
import torch
from chat_checkpoint import write_chat_checkpoint
from click.testing import CliRunner

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.rounded import BITS, with_quantize
from gemma_fast.cli import commands
from gemma_fast.compat import QUANTIZE
from gemma_fast.kernels.packed import PackedWeight
from gemma_fast.reference import Reference
from gemma_fast.walkthrough import write as walkthrough

# Rows of 88 columns stay unpacked.
pytestmark = pytest.mark.filterwarnings("ignore:.*are not packed in 8 bits")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_chat_checkpoint(tmp_path_factory.mktemp("tiny"))


def run(*args: str):
    return CliRunner().invoke(commands.main, args)


def test_commands_offer_every_value():
    assert set(QUANTIZE) == set(BITS)
    for command in ("predict", "generate", "chat", "walkthrough", "bench", "verify"):
        result = run(command, "--help")
        assert "--quantize [int8|int4|none]" in result.output, command


def test_predict_runs_the_packed_model(path):
    found = []
    for quantize in ([], ["--quantize", "none"], ["--quantize", "int8"]):
        where = ("--model", str(path), "--device", "cpu", "--dtype", "float32", "--json")
        result = run("predict", "hello", "--top", "1", *where, *quantize)
        assert result.exit_code == 0, result.output
        found.append([row["next"][0]["probability"] for row in json.loads(result.stdout)])
    assert found[0] == found[1]
    assert found[2] != found[0] and found[2] == pytest.approx(found[0], abs=0.05)


def test_memory_counts_the_packed_bytes(path):
    plain, packed = (
        GemmaForCausalLM.from_pretrained(path, dtype="float32", device="cpu", quantize=quantize)
        for quantize in (None, "int8")
    )
    weights = [module for module in packed.modules() if isinstance(module, PackedWeight)]
    others = [x for x in packed.parameters() if x.dtype == torch.float32]
    # Rows of 48 columns have groups of 16, rows of 128 a group of 128; a scale takes 2 bytes.
    assert {weight.nbytes / weight.numel() for weight in weights} == {1 + 2 / 16, 1 + 2 / 128}
    size = sum(x.nbytes for x in (*weights, *others))
    assert packed.memory()["weights"] == size < 0.6 * plain.memory()["weights"]
    assert packed.dtype == torch.float32
    assert packed.num_parameters() == plain.num_parameters()


def test_packed_model_generates_after_a_move_and_a_conversion(path):
    model = GemmaForCausalLM.from_pretrained(path, dtype="float32", device="cpu", quantize="int8")
    ids = torch.arange(3, 20)[None]
    before = model.generate(ids, max_new_tokens=5)
    assert model.to("cpu").generate(ids, max_new_tokens=5).equal(before)
    model.bfloat16()
    assert model.dtype == torch.bfloat16 and model(ids).logits.dtype == torch.bfloat16


def test_state_dict_of_a_packed_model_loads_into_another(path):
    model, other = (
        GemmaForCausalLM.from_pretrained(path, dtype="float32", device="cpu", quantize="int8")
        for _ in range(2)
    )
    for x in other.parameters():
        x.zero_()
    other.load_state_dict(model.state_dict())
    ids = torch.arange(3, 20)[None]
    assert other(ids).logits.equal(model(ids).logits)


def test_walkthrough_has_the_values_of_the_packed_model(path, tmp_path, monkeypatch):
    seen = {}

    def collect(reference, *_):
        seen.update(reference.weights)
        raise KeyboardInterrupt

    monkeypatch.setattr(walkthrough, "collect", collect)
    with pytest.raises(KeyboardInterrupt):
        walkthrough.write_walkthrough(
            "hello", path, tmp_path / "out", device="cpu", dtype="float32", quantize="int8"
        )
    checkpoint = with_quantize(open_checkpoint(path), "int8")
    expected = Reference.from_checkpoint(checkpoint, dtype=torch.float32, device="cpu").weights
    plain = Reference.from_pretrained(path).weights
    assert all(seen[name].equal(expected[name]) for name in expected)
    assert not all(seen[name].equal(plain[name]) for name in plain)


def test_lm_harness_takes_quantize(path):
    pytest.importorskip("lm_eval")
    from gemma_fast.lm_harness import GemmaFastLM

    model = GemmaFastLM(str(path), dtype="float32", device="cpu", quantize="int8")
    assert any(isinstance(module, PackedWeight) for module in model.model.modules())
    with pytest.raises(ValueError, match="quantize=… is for a path"):
        GemmaFastLM(model.model, tokenizer=str(path), quantize="int8")
