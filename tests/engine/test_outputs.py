"""Tests that the results of forward and generate() have the names and items of transformers."""

import torch


def test_items_are_found_by_name_and_number(twins):
    ids = twins.prompt(1, 4)
    options = {"return_dict_in_generate": True, "max_new_tokens": 2, "do_sample": False}
    for more in ({}, {"output_scores": True}, {"output_logits": True, "output_scores": True}):
        theirs, ours = (m.generate(ids, **options, **more) for m in (twins.hf, twins.model))
        assert {*theirs.keys()} - {*ours.keys()} == {*theirs.keys()} & {"cache", "past_key_values"}
        assert torch.equal(ours["sequences"], theirs["sequences"])
        assert ours[0] is ours["sequences"] and torch.equal(ours[0], theirs[0])
        assert ours["scores"] is ours.scores
        assert ours.past_key_values is ours.cache is ours.attentions is ours.hidden_states is None
    out = twins.model(ids)
    assert out["logits"] is out[0] is out.logits and out["past_key_values"] is out.cache is out[1]
    assert out.keys() == ("logits", "past_key_values")
    assert twins.model(ids, use_cache=False).keys() == ("logits",)
