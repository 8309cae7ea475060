"""Checks models whose output projection has a weight of its own, in every kind of checkpoint.

transformers' model with the same weights gives the expected logits and texts. In GGUF the expected
model is built from the same tensors.
"""

import json

import pytest
import torch
import transformers
from checkpoints import random_tensors, split, write_gguf, write_safetensors
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, close, random_transformers_model

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.reference import Reference

IDS = torch.arange(3, 30)[None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(params=["gemma-mqa", "gemma2-gqa", "gemma3-gqa"])
def fine_tune(request, tmp_path):
    """Saves a model with a new head as a fine-tune does: config.json still says that it is tied."""
    hf = random_transformers_model(CONFIGS[request.param])
    generator = torch.Generator().manual_seed(2)
    head = torch.nn.Linear(*reversed(hf.lm_head.weight.shape), bias=False)
    head.weight.data.normal_(std=0.3, generator=generator)
    hf.set_output_embeddings(head)
    hf.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert HEAD in load_file(tmp_path / "model.safetensors")
    return tmp_path


def loaded(path):
    """Returns transformers' model, which must have read the head, too."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    assert not hf.lm_head.weight.equal(hf.get_input_embeddings().weight)
    return hf


def test_logits_and_text_equal_transformers(fine_tune):
    hf, model = loaded(fine_tune), GemmaForCausalLM.from_pretrained(fine_tune, device="cpu")
    expected = hf(IDS).logits
    close(model(IDS).logits, expected)
    close(Reference.from_pretrained(fine_tune)(IDS).logits, expected)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert model.generate(IDS, **options).equal(hf.generate(IDS, **options))


def test_memory_counts_the_head(fine_tune):
    model = GemmaForCausalLM.from_pretrained(fine_tune, device="cpu")
    memory = model.memory()
    assert memory["lm_head"] == model.lm_head.nbytes == model.embed_tokens.nbytes
    assert memory["weights"] + memory["lm_head"] == 4 * model.config.num_parameters


def test_an_equal_head_is_tied(fine_tune):
    tensors = load_file(fine_tune / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, fine_tune / "model.safetensors")
    model = GemmaForCausalLM.from_pretrained(fine_tune, device="cpu")
    assert model.lm_head is None
    assert model.config.tie_word_embeddings
    assert "lm_head" not in model.memory()


def test_the_head_of_a_sharded_checkpoint_is_read(fine_tune):
    split(fine_tune, load_file(fine_tune / "model.safetensors"))
    model = GemmaForCausalLM.from_pretrained(fine_tune, device="cpu")
    close(model(IDS).logits, loaded(fine_tune)(IDS).logits)


def test_a_head_stands_in_for_a_tied_embedding(fine_tune):
    tensors = load_file(fine_tune / "model.safetensors")
    del tensors[EMBEDDING]
    save_file(tensors, fine_tune / "model.safetensors")
    model = GemmaForCausalLM.from_pretrained(fine_tune, device="cpu")
    hf = transformers.AutoModelForCausalLM.from_pretrained(fine_tune, attn_implementation="eager")
    assert model.embed_tokens.equal(tensors[HEAD])
    close(model(IDS).logits, hf(IDS).logits)


@pytest.mark.parametrize(
    "prefixes", [("language_model.model.", "language_model."), ("model.language_model.", "")]
)
def test_the_head_of_a_multimodal_checkpoint_is_read(tmp_path, prefixes):
    text, head = prefixes
    tensors = random_tensors("gemma3") | {HEAD: torch.rand(12, 64)}
    stored = {text + name.removeprefix("model."): x for name, x in tensors.items() if name != HEAD}
    save_file(stored | {head + HEAD: tensors[HEAD]}, tmp_path / "model.safetensors")
    config = {"model_type": "gemma3_text"} | _sizes(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": config, "vision_config": {}})
    )
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.tie_word_embeddings
    model = GemmaForCausalLM.from_checkpoint(checkpoint, device="cpu")
    assert model.lm_head.equal(tensors[HEAD])


def _sizes(path):
    scratch = path / "sizes"
    scratch.mkdir()
    write_safetensors(scratch)
    return json.loads((scratch / "config.json").read_text())


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_the_output_tensor_of_a_gguf_file_is_the_head(tmp_path, family):
    head = torch.rand(12, 64)
    path = tmp_path / "model.gguf"
    tensors = write_gguf(path, family, extra={"output.weight": head.numpy()})
    model = GemmaForCausalLM.from_pretrained(path, dtype="float32", device="cpu")
    assert model.lm_head.equal(head)
    weights = {name: model.state_dict()[name] for name in ("embed_tokens", "norm")}
    assert weights["embed_tokens"].equal(tensors[EMBEDDING])
    close(model(IDS % 12).logits, Reference.from_pretrained(path)(IDS % 12).logits)
    write_gguf(path, family, extra={"output.weight": tensors[EMBEDDING].numpy()})
    assert GemmaForCausalLM.from_pretrained(path, device="cpu").lm_head is None


def test_a_head_of_another_shape_is_refused(tmp_path):
    tensors = random_tensors("gemma3") | {HEAD: torch.rand(13, 64)}
    write_safetensors(tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(13, 64\), but the config"):
        open_checkpoint(tmp_path)


def test_an_untied_config_without_a_head_is_refused(tmp_path):
    write_safetensors(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        open_checkpoint(tmp_path)
