"""Tests Decoder: the number of launches in a step, the tokens that it gives, and CUDA graphs."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from decoder_checks import NEVER, SAMPLINGS
from marks import ALL_FAMILIES, slow
from tiny_models import CONFIGS, left_padded, random_model, two_layers
from triton_interpreter import interpreter

from gemma_fast.engine.decoder import Decoder
from gemma_fast.engine.sampling import Sampling
from gemma_fast.kernels.launch import Gpu, as_on


@pytest.mark.parametrize(
    ("config", "batch"),
    [
        ("gemma3-mqa", 1), ("gemma4-all", 1), ("gemma4-experts", 1), ("gemma4-experts", 8),
        *slow(("gemma-mqa", 1), ("gemma2-gqa", 8), ("gemma4-k-eq-v", 1), ("gemma4-shared", 8)),
    ],
    ids=str,
)  # fmt: skip
def test_a_step_takes_five_launches_per_layer_plus_three(config, batch):
    """With per-layer embeddings, it takes seven per layer plus five; with experts, seven per layer
    plus three. Also checks that prompts of other lengths compile no further kernels, except those
    of the experts, and that the texts of a warm scheduler compile none at all."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [
        sys.executable,
        Path(__file__).parents[1] / "support/launches.py",
        config,
        str(batch),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    layers = CONFIGS[config].num_hidden_layers
    per_layer = 2 if CONFIGS[config].hidden_size_per_layer_input else 0
    experts = 2 if CONFIGS[config].num_experts else 0
    expected = layers * (5 + per_layer + experts) + 3 + per_layer
    assert len(found["step"]) == expected, found["step"]
    compiled = {x for kernels in found["compiled"].values() for x in kernels}
    # The tiles of grouped matmuls depend on the length of the prompt.
    assert not {x for x in compiled if not x.startswith("('_grouped_")}, compiled
    assert found["scheduled"] == []


def check_kernels(model, ids, **options):
    expected = model.generate(ids, **options, **NEVER)
    with interpreter():
        assert torch.equal(model.generate(ids, **options, **NEVER), expected)


@ALL_FAMILIES
@pytest.mark.slow  # the default run has the similar test_model_on_kernels_equals_reference
def test_kernels_give_the_references_tokens(twins):
    """Decodes three texts in a decoder for four. The longest text is longer than the windows."""
    _, ids, mask = left_padded(twins, [11, 3, 6])
    check_kernels(twins.model, ids, attention_mask=mask, max_new_tokens=3)


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=list(SAMPLINGS))
def test_kernels_sample_the_references_tokens(options):
    ids = torch.arange(3, 17).view(2, 7)
    check_kernels(random_model(two_layers("gemma2-gqa")), ids, max_new_tokens=3, **options)


@pytest.mark.parametrize("config", ["gemma3-gqa", *slow("gemma-mqa", "gemma2-gqa")])
def test_kernels_give_the_references_tokens_for_one_text(config):
    model = random_model(two_layers(config))
    check_kernels(model, torch.arange(3, 9).unsqueeze(0), max_new_tokens=3)


@ALL_FAMILIES
def test_rows_do_not_affect_each_other(twins):
    """Decodes five texts in a decoder for eight."""
    prompts, ids, mask = left_padded(twins, [4, 9, 2, 7, 3])
    out = twins.model.generate(ids, attention_mask=mask, max_new_tokens=6, **NEVER)
    for prompt, row in zip(prompts, out, strict=True):
        alone = twins.model.generate(prompt, max_new_tokens=6, **NEVER)
        assert torch.equal(row[-6:], alone[0, -6:])


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_texts_with_different_settings_share_a_step(kernels):
    """A row gets the same tokens as in a batch in which all rows have the settings of this row."""
    model, ids = random_model(CONFIGS["gemma2-gqa"]), torch.arange(3, 38).view(5, 7)
    texts = [
        Sampling(), Sampling(do_sample=True, temperature=2.0, seed=3),
        Sampling(do_sample=True, temperature=3.0, top_k=9, seed=4),
        Sampling(do_sample=True, temperature=3.0, top_p=0.8, min_p=0.01, seed=5),
        Sampling(repetition_penalty=1.5),
    ]  # fmt: skip

    def written(texts):
        decoder, tokens = Decoder(model, 5, 32), []
        decoder.prefill(ids, None, texts)
        for _ in range(4):
            tokens.append(decoder.token.clone())
            decoder.step()
        return torch.stack(tokens, dim=1)

    with interpreter() if kernels else nullcontext():
        mixed = written(texts)
    for row, text in enumerate(texts):
        assert torch.equal(mixed[row], written([text] * 5)[row]), text
    assert not torch.equal(mixed, written([]))


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=list(SAMPLINGS))
def test_the_second_step_is_captured_and_then_replayed(options, graphs):
    model, other = (random_model(CONFIGS["gemma3-gqa"]) for _ in range(2))
    ids = torch.arange(3, 9).unsqueeze(0)
    options = {"max_new_tokens": 9, **options, **NEVER}
    other.decoders[1] = Decoder(other, 1, 32)
    other.decoders[1].asynchronous = False
    expected = other.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert [graph.replays for graph in graphs] == [7]
    assert torch.equal(model.generate(ids, **options), expected)
    assert [graph.replays for graph in graphs] == [7 + 8]
    assert model.memory()["graph"] == 7
    # The graph reads temperature and seed from device tensors, so their values may change.
    model.generate(ids, **options | {"temperature": 0.5, "seed": 9})
    assert len(graphs) == 1
    for _ in range(2):  # logits that are kept need another graph
        model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
        model.generate(ids, **options)
    assert len(graphs) == 2


def test_a_step_that_started_before_the_last_token_was_read_is_discarded(graphs):
    """On a GPU the next step starts before the host reads a token that ends the text."""
    model = random_model(CONFIGS["gemma3-gqa"])
    ids = torch.arange(3, 9).unsqueeze(0)
    free = model.generate(ids, max_new_tokens=12, **NEVER)
    out = model.generate(ids, max_new_tokens=12, eos_token_id=int(free[0, 8]))
    end = 7 + free[0, 6:].tolist().index(int(free[0, 8]))
    assert torch.equal(out, free[:, :end])
    assert torch.equal(model.generate(ids, max_new_tokens=12, **NEVER), free)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 8, 20], ids="batch {}".format)
@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=list(SAMPLINGS))
@pytest.mark.parametrize("config", list(CONFIGS))
def test_graphs_give_the_tokens_of_eager_steps(config, options, batch):
    """Eager steps run without PDL, so each kernel starts after the previous kernel has finished."""
    model = random_model(CONFIGS[config]).cuda()
    ids = torch.randint(3, 199, (batch, 5), device="cuda")
    decoder = Decoder(model, batch, 40)
    decoder.asynchronous = False
    with as_on(Gpu(80, 101_376, 132)):
        decoder.prefill(ids, None, [Sampling(**options)] * batch)
        expected = [decoder.token.clone()]
        for _ in range(11):
            decoder.step()
            expected.append(decoder.token.clone())
    for _ in range(2):
        out = model.generate(ids, max_new_tokens=12, **options, **NEVER)
        assert torch.equal(out[:, 5:], torch.stack(expected, dim=1))


@pytest.mark.gpu
def test_the_next_text_compiles_no_kernels(monkeypatch):
    from triton import knobs

    model = random_model(CONFIGS["gemma3-mqa"]).cuda()
    options = {"max_new_tokens": 8, **NEVER}
    model.generate(torch.randint(3, 199, (1, 19), device="cuda"), **options)
    compiled: list[str] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **x: compiled.append(str(x["src"])))
    model.generate(torch.randint(3, 199, (1, 32), device="cuda"), **options)
    assert not compiled
    assert model.memory()["graph"] > 0 < model.decoders[1].graphs.capture_seconds


@pytest.mark.gpu
def test_generate_takes_little_memory_besides_weights_and_cache():
    model = random_model(CONFIGS["gemma-mqa"]).cuda()
    torch.cuda.reset_peak_memory_stats()
    model.generate(torch.randint(3, 199, (1, 100), device="cuda"), max_new_tokens=50, **NEVER)
    kept = model.memory()
    assert torch.cuda.max_memory_allocated() - kept["weights"] - kept["cache"] < 300e6
