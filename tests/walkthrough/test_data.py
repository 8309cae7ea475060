"""Compares the figures of a walk-through with transformers' modules, on tiny random models."""

from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Twins
from tiny_tokenizer import tiny_backend
from torch import Tensor
from transformers_trace import Trace, trace, without_factor, without_norms

from gemma_fast.reference import Reference
from gemma_fast.text.tokenizer import Tokenizer
from gemma_fast.walkthrough.data import PROMPT_WORDS, collect, encode
from gemma_fast.walkthrough.record import SHOWN

RTOL = 1e-4  # figures have 5 significant digits, so they differ from the truth by 5e-5 at most


@dataclass
class Run:
    twins: Twins
    ids: Tensor  # [1, t]
    data: dict[str, Any]
    truth: Trace

    @property
    def layers(self) -> range:
        return range(self.twins.config.num_hidden_layers)


@pytest.fixture(scope="module", params=[20, 80], ids="{} tokens".format)
def run(request, twins) -> Run:
    """20 tokens are more than the windows of 8 and 13; 80 are more than a picture shows."""
    ids = twins.prompt(1, request.param, seed=request.param)
    tokenizer = Tokenizer(tiny_backend(), "tiny")
    data = collect(twins.reference, tokenizer, ids, words=())
    return Run(twins, ids, data, trace(twins.hf, ids))


def close(found: Any, expected: Any, rtol: float = RTOL, atol: float = 0) -> None:
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def std(x: Tensor) -> float:
    return float(x.double().std())


def rms(x: Tensor) -> Tensor:
    return x.double().square().mean(-1).sqrt()


def rms_of_all(x: Tensor) -> float:
    return float(x.double().square().mean()) ** 0.5


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def share(update: Tensor, skip: Tensor) -> float:
    return std(update) / (std(update) ** 2 + std(skip) ** 2) ** 0.5


def test_attention_maps(run):
    """A weight is None, and becomes NaN here, where transformers' mask hides the key."""
    maps = np.array(run.data["attention"]["maps"], dtype=float)
    for i in run.layers:
        expected = run.truth.attentions[i].masked_fill(~run.truth.visible[i], torch.nan)
        expected = expected[:, -SHOWN:, -SHOWN:].double()
        found = torch.from_numpy(maps[i])
        torch.testing.assert_close(found, expected, rtol=0, atol=6e-5, equal_nan=True)  # 4 decimals


def test_flatness(run):
    """Entropy of all weights of a query, over log(number of keys that it sees)."""
    for i in run.layers:
        weights, keys = run.truth.attentions[i].double(), run.truth.visible[i].sum(-1)
        rows = torch.special.entr(weights).sum(-1) / keys.log()  # NaN for a single key
        expected = rows[:, -SHOWN:].nanmean(-1)
        found = run.data["attention"]["flatness"][i]
        close(found, expected)
        order = run.data["attention"]["order"][i]
        assert [found[head] for head in order] == sorted(found, reverse=True)


def test_enlarged_head(run):
    """It gives the most weight to tokens that are neither the first nor the query's own."""
    maps = torch.stack(run.truth.attentions)[..., -SHOWN:, -SHOWN:]
    first = 1 if run.ids.shape[1] <= SHOWN else 0
    elsewhere = maps.tril(-1)[..., first:].sum((2, 3))
    enlarged = run.data["attention"]["enlarged"]
    assert elsewhere[enlarged["layer"], enlarged["head"]] >= (1 - 1e-5) * elsewhere.max()


def test_scale_of_the_stream(run):
    expected = [std(x) for x in run.truth.stream(len(run.layers))]
    close(run.data["hiddens"]["with_norms"], expected)


def test_scale_of_the_stream_without_norms(run):
    """In float64, because the numbers grow fast. transformers' softmax is in float32, where scores
    become infinite first."""
    weights = {name: x.double() for name, x in run.twins.reference.weights.items()}
    wide = Reference(run.twins.config, weights)
    found = collect(wide, Tokenizer(tiny_backend(), "tiny"), run.ids, words=())
    bare = trace(without_norms(run.twins.hf).double(), run.ids)
    expected = [x for x in map(std, bare.stream(len(run.layers))) if isfinite(x)]
    close(found["hiddens"]["without_norms"][: len(expected)], expected)
    assert len(expected) >= 7 and max(expected) > 1e4


def test_update_scales(run):
    """Each layer adds its updates, then it multiplies the stream by its scalar (Gemma 4)."""
    stream, expected = run.truth.stream(len(run.layers)), {}
    for i in run.layers:
        skip = stream[2 * i]
        for name, update in run.truth.updates(i).items():
            expected.setdefault(name, []).append(share(update, skip))
            skip = skip + update
            if name == "attention":
                torch.testing.assert_close(stream[2 * i + 1], skip)
        scalar = getattr(run.twins.hf.model.layers[i], "layer_scalar", 1)
        torch.testing.assert_close(stream[2 * i + 2], skip * scalar)
    assert run.data["updates"].keys() == expected.keys()
    for name, scales in expected.items():
        close(run.data["updates"][name], scales)


def test_embedding_scale(run):
    small = trace(without_factor(run.twins.hf), run.ids)
    for case, truth in (("with_factor", run.truth), ("without_factor", small)):
        found = run.data["embedding_scale"][case]
        close(found["embedding"], std(truth.stream(1)[0]))
        for name in ("attention", "mlp"):
            close(found[name], std(truth.updates(0)[name]))
    close(run.data["embedding_scale"]["factor"], run.twins.config.hidden_size**0.5)


def test_final_norm(run):
    before, after = (x["model.norm"] for x in (run.truth.inputs, run.truth.outputs))
    close(run.data["final_norm"]["before"], rms(before)[0, -SHOWN:])
    close(run.data["final_norm"]["after"], rms(after)[0, -SHOWN:])


def test_predictions(run):
    best = run.truth.logits[-SHOWN:].double().softmax(-1).topk(10)
    rows = [row["next"] for row in run.data["predictions"]]
    close([[x["probability"] for x in row] for row in rows], best.values)
    assert [[x["id"] for x in row] for row in rows] == best.indices.tolist()
    names = tiny_backend().id_to_token
    assert [x["token"] for x in rows[-1]] == [names(i) for i in best.indices[-1].tolist()]
    assert [x["token"] for x in run.data["predictions"]] == run.data["tokens"]["names"][-SHOWN:]


def test_soft_caps(run):
    """Largest scores of visible keys, and the largest logit of the shown tokens, before the cap."""
    own, config = run.data["own"], run.twins.config
    assert ("largest_scores" in own) == (config.attn_logit_softcapping is not None)
    if "largest_scores" in own:
        seen = [
            largest(scores.masked_fill(~visible, 0))
            for scores, visible in zip(run.truth.scores, run.truth.visible, strict=True)
        ]
        close(own["largest_scores"], seen)
        assert any(x > 1.01 * y for x, y in zip(map(largest, run.truth.scores), seen, strict=True))
    if config.final_logit_softcapping is None:
        assert "largest_logit" not in own
        return
    before = run.truth.outputs["lm_head"][0, -SHOWN:]  # transformers caps the output of lm_head
    expected = {"before": largest(before), "after": largest(run.truth.logits[-SHOWN:])}
    assert own["largest_logit"] == pytest.approx(expected, rel=RTOL)
    assert expected["after"] < config.final_logit_softcapping < expected["before"]


def test_norms_of_heads(run):
    """A layer that reads another layer's keys and values has no norms of its own for them."""
    config = run.twins.config
    if not config.qk_norm:
        assert "qk_norm" not in run.data["own"]
        return
    found, kinds = run.data["own"]["qk_norm"], "qkv" if config.v_norm else "qk"
    assert found.keys() == {f"{x}_{when}" for x in kinds for when in ("before", "after")}
    for x in kinds:
        for i, layer in enumerate(config.layers):
            before, after = found[f"{x}_before"][i], found[f"{x}_after"][i]
            if x != "q" and layer.kv_layer != i:
                assert before is after is None
                continue
            part = f"model.layers.{i}.self_attn"
            projection = "k" if x == "v" and layer.k_eq_v else x
            for value, name in ((before, f"{projection}_proj"), (after, f"{x}_norm")):
                close(value, rms_of_all(run.truth.outputs[f"{part}.{name}"]))
            if x == "v":
                assert after == pytest.approx(1, abs=0.01)  # eps is 0.01


def test_post_norms(run):
    if not run.twins.config.post_norms:
        assert "post_norms" not in run.data["own"]
        return
    norms = {
        "attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm",
        "per_layer": "post_per_layer_input_norm",
    }  # fmt: skip
    found = run.data["own"]["post_norms"]
    assert len(found) == 2 * len(run.truth.updates(0))
    for part in run.truth.updates(0):
        before = [std(run.truth.inputs[f"model.layers.{i}.{norms[part]}"]) for i in run.layers]
        after = [std(run.truth.updates(i)[part]) for i in run.layers]
        close(found[f"{part}_before"], before)
        close(found[f"{part}_after"], after)


def test_shared_keys_and_values(run):
    """transformers' attention says whether it shares, and with the last layer of its type."""
    found = run.data["own"].get("kv_layers", [*run.layers])
    kinds = run.twins.config.layer_types
    for i, layer in enumerate(run.twins.hf.model.layers):
        shares = getattr(layer.self_attn, "is_kv_shared_layer", False)
        own = [j for j in run.layers if found[j] == j and kinds[j] == kinds[i]]
        assert found[i] == (own[-1] if shares else i)
    assert ("kv_layers" in run.data["own"]) == (run.twins.config.num_kv_shared_layers > 0)


def test_per_layer_embeddings(run):
    text = run.twins.hf.model
    if not run.twins.config.hidden_size_per_layer_input:
        assert "per_layer" not in run.data["own"] and "per_layer" not in run.data["updates"]
        return
    found, embedded = run.data["own"]["per_layer"], text.embed_tokens(run.ids)
    inputs = text.project_per_layer_inputs(
        embedded, text.get_per_layer_inputs(run.ids, embedded)
    ).detach()
    for i in run.layers:
        layer = f"model.layers.{i}"
        close(found["inputs"][i], rms_of_all(inputs[:, :, i]))
        close(found["gated"][i], rms_of_all(run.truth.inputs[f"{layer}.per_layer_projection"]))
        gate = run.truth.outputs[f"{layer}.per_layer_input_gate"]
        close(found["open_gates"][i], float((gate > 0).double().mean()))


def test_experts_of_the_last_token(run):
    if not run.twins.config.num_experts:
        assert "experts" not in run.data["own"]
        return
    found = run.data["own"]["experts"]
    for i, layer in enumerate(run.twins.hf.model.layers):
        _, weights, chosen = layer.router(run.truth.inputs[f"model.layers.{i}.router"][-1:])
        assert found["chosen"][i] == chosen[0].tolist()
        close(found["weights"][i], weights[0].detach())


def test_layer_scalars(run):
    scalars = [getattr(layer, "layer_scalar", None) for layer in run.twins.hf.model.layers]
    if scalars[0] is None:
        assert "layer_scalars" not in run.data["own"]
        return
    close(run.data["own"]["layer_scalars"], [float(x) for x in scalars])


def test_shapes_of_the_layers(run):
    """The page reads the sizes of each layer from here."""
    found = run.data["model"]["layers"]
    assert [x["head_dim"] for x in found] == [q.shape[-1] for q in run.truth.queries]
    widths = [layer.mlp.gate_proj.out_features for layer in run.twins.hf.model.layers]
    assert [x["intermediate_size"] for x in found] == widths
    assert [x["kind"] for x in found] == [*run.twins.config.layer_types]


def test_query_lengths(run):
    """Length of each pair (i, i + d / 2) of the rotated queries, mean over tokens."""
    kinds = run.twins.config.layer_types
    found = run.data["rotary"]["query_lengths"]
    layers = [x["layer"] for x in found]
    assert layers == sorted({0, len(kinds) - 1, *map(kinds.index, kinds)})
    for x in found:
        q = run.truth.queries[x["layer"]].double()
        half = q.shape[-1] // 2
        close(x["lengths"], (q[..., :half] ** 2 + q[..., half:] ** 2).sqrt().mean(1))
        assert x["type"] == kinds[x["layer"]]


def test_keys_seen(run):
    """Counted in transformers' masks; the prompt is longer than the windows."""
    t, context = run.ids.shape[1], run.twins.config.max_position_embeddings
    if run.twins.config.sliding_window is None:
        assert "keys_seen" not in run.data["own"]
        return
    for seen, visible in zip(run.data["own"]["keys_seen"], run.truth.visible, strict=True):
        assert min(seen, t) == int(visible[-1].sum())
        assert seen in (context, run.twins.config.sliding_window)


def test_tokens(run):
    tokens, names = run.data["tokens"], tiny_backend().id_to_token
    assert tokens["ids"] == run.ids[0].tolist()
    assert tokens["shown"] == min(SHOWN, run.ids.shape[1])
    assert len(tokens["names"]) == run.ids.shape[1]
    assert tokens["names"][-1] == names(tokens["ids"][-1])
    lengths = {len(run.data["final_norm"]["after"]), len(run.data["predictions"])}
    assert lengths == {tokens["shown"]}


def test_similarity(run):
    """Cosines of the rows of transformers' embedding, for the first tokens of the prompt."""
    special = {*Tokenizer(tiny_backend(), "tiny").all_special_ids}
    ids = [*dict.fromkeys(i for i in run.ids[0].tolist() if i not in special)][:PROMPT_WORDS]
    rows = run.twins.hf.get_input_embeddings().weight[ids].detach().double()
    expected = torch.cosine_similarity(rows[:, None], rows[None], dim=-1)
    close(run.data["similarity"]["cosines"], expected, atol=1e-7)
    assert run.data["similarity"]["names"] == [tiny_backend().id_to_token(i) for i in ids]


def test_encode_refuses_ids_that_the_model_does_not_have(twins):
    """The tokenizer has more tokens than the tiny models, which have 199."""
    tokenizer = Tokenizer(tiny_backend(), "tiny")
    hello = tokenizer("hello").input_ids[-1]
    with pytest.raises(ValueError, match=f"token id {hello} of tiny is outside .* of 199"):
        encode(tokenizer, "hello", twins.config)
    ids = encode(tokenizer, "<start_of_turn>", twins.config)
    assert ids.tolist() == [tokenizer("<start_of_turn>").input_ids]


def test_bf16_figures_are_close(run):
    """One rounding to bf16 changes a number by 0.4 % at most; errors of many numbers cancel. Scores
    of about 10, as in the tiny Gemma 4, are changed by 0.03, so the weights of a token by 3 %. If a
    token gets other experts, they change by more."""
    weights = {name: x.bfloat16() for name, x in run.twins.reference.weights.items()}
    half = Reference(run.twins.config, weights)
    found = collect(half, Tokenizer(tiny_backend(), "tiny"), run.ids, words=())
    assert found["model"]["dtype"] == "bfloat16"
    for part, key in (("updates", "mlp"), ("hiddens", "with_norms")):
        close(found[part][key], run.data[part][key], rtol=0.01)
    each_token = 0.08 if run.twins.config.model_type == "gemma4" else 0.01
    close(found["final_norm"]["after"], run.data["final_norm"]["after"], rtol=each_token)
    flat = 0.1 if run.twins.config.num_experts else 0.03
    close(found["attention"]["flatness"], run.data["attention"]["flatness"], rtol=flat)
    assert found["hiddens"] != run.data["hiddens"]
