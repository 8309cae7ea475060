"""Tests that `gemma-fast verify` compares with what transformers reads from the files itself, so
that a mistake of our reader fails it.

A mistake is put back by a checkpoint whose path is that of other files, or whose config is wrong.
"""

import json
from dataclasses import replace

import pytest
import torch
from certificate_lines import BF16, CPU, FP32, failed, model_lines
from checkpoints import ALL_FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS
from verified_files import verify, write_directory, write_gguf_file

from gemma_fast.benchmarks.verify import truth as verify_truth
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.config import FULL, SLIDING, RopeParameters
from gemma_fast.text.tokenizer import Tokenizer

QUARTER = RopeParameters(1e6, "proportional", partial_rotary_factor=0.25)
# Weights of a Gemma 4 whose layers differ from those of write_gguf_file: layer 1 has values of its
# own; the layers that share keys and values have no wider MLP.
GEMMA4_VALUES = {"blk.1.attn_v.weight": torch.randn(64, 64) * 0.3}
GEMMA4_NARROW = {
    f"blk.{i}.ffn_{part}.weight": torch.randn(*shape) * 0.3
    for i in (2, 3)
    for part, shape in {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}.items()
}
GEMMA4 = ("gemma4-all", "gemma4-k-eq-v", "gemma4-experts", "multimodal4")
DELTA = "|Δ logit|, mean / max"
IDS_AND_ENDS = "differing ids of the text / end tokens"


@pytest.mark.parametrize("name", ["gemma-mqa", "gemma2-gqa", "gemma3-gqa", "multimodal", *GEMMA4])
def test_correct_directory_passes_against_transformers_own_reading(name, tmp_path):
    reader, lines = verify(open_checkpoint(write_directory(tmp_path, name)), FP32, BF16)
    assert reader == "reading the checkpoint itself"
    assert not failed(lines) and lines[0].check == IDS_AND_ENDS


@pytest.mark.filterwarnings("ignore:.*num_beams")
def test_options_of_generation_config_do_not_change_the_verdict(tmp_path):
    write_directory(tmp_path)
    ids = {"eos_token_id": 1, "pad_token_id": 0}
    options = {"suppress_tokens": [*range(3, 250)], "stop_strings": ["a"], "num_beams": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(ids | options))
    _, lines = verify(open_checkpoint(tmp_path), FP32)
    assert not failed(lines)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_correct_gguf_passes_against_llama_cpps_rules(family, tmp_path):
    keys = {"attention__sliding_window": 8} if family != "gemma" else {}
    theta = 1e4 if family in ("gemma", "gemma2") else 1e6
    path = write_gguf_file(tmp_path / "x.gguf", family, rope__freq_base=theta, **keys)
    reader, lines = verify(open_checkpoint(path), FP32, BF16)
    assert reader == "reading the GGUF file by llama.cpp's rules"
    assert not failed(lines) and lines[0].check == IDS_AND_ENDS


@pytest.mark.parametrize("experts", ["stacked", "separate"])
def test_correct_gguf_with_experts_passes_against_llama_cpps_rules(experts, tmp_path):
    path = write_gguf_file(tmp_path / "x.gguf", "gemma4", experts=experts)
    checkpoint = open_checkpoint(path)
    reader, lines = verify(checkpoint)
    assert reader == "reading the GGUF file by llama.cpp's rules"
    assert not failed(lines)
    checkpoint.config = replace(checkpoint.config, top_k_experts=1)
    assert DELTA in failed(verify(checkpoint)[1])


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gemma3", {}),  # no window: all layers are global
        ("gemma3", {"attention__sliding_window": 8, "attention__sliding_window_pattern": 2}),
        ("gemma3", {"attention__sliding_window": 8, "rope__freq_base_swa": 5e4}),
        ("gemma3", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 9.0}),
        ("gemma3", {"rope__scaling__factor": 4.0}),
        ("gemma2", {"rope__scale_linear": 4.0, "attention__sliding_window_pattern": 3}),
        ("gemma", {"rope__scaling__factor": 4.0}),
        ("gemma4", {"rope__freq_base_swa": 5e4, "final_logit_softcapping": 9.0}),
        ("gemma4", {"rope__freq_base_swa": None, "rope__scaling__factor": 4.0}),
        ("gemma4", {"feed_forward_length": 96, "final_logit_softcapping": 0.0}),
    ],
    ids=str,
)
def test_metadata_are_read_as_in_llama_cpp(family, keys, tmp_path):
    narrow = GEMMA4_NARROW if "feed_forward_length" in keys else {}
    path = write_gguf_file(tmp_path / "x.gguf", family, narrow, **keys)
    reader, lines = verify(open_checkpoint(path))
    assert reader == "reading the GGUF file by llama.cpp's rules"
    assert not failed(lines)


@pytest.mark.parametrize(
    "name", ["gemma-mqa", "gemma2-gqa", "gemma3-gqa", "multimodal", "gemma4-all"]
)
def test_output_head_of_its_own_passes(name, tmp_path):
    checkpoint = open_checkpoint(write_directory(tmp_path, name, head=True))
    assert not checkpoint.config.tie_word_embeddings
    assert not failed(verify(checkpoint)[1])


def test_dropped_end_of_a_turn_in_a_gguf_file_fails(tmp_path):
    keys = {"attention__sliding_window": 8}
    checkpoint = open_checkpoint(write_gguf_file(tmp_path / "x.gguf", "gemma3", **keys))
    assert not failed(verify(checkpoint)[1])
    checkpoint.generation_config = {"eos_token_id": 1}  # without <end_of_turn>
    assert failed(verify(checkpoint)[1]) == {IDS_AND_ENDS}


@pytest.mark.parametrize(
    ("tensors", "mistake"),
    [
        (GEMMA4_VALUES, {"attention_k_eq_v": True}),
        ({"blk.2.attn_k.weight": torch.randn(64, 64)}, {"sliding_window": 9}),
        ({"rope_freqs.weight": torch.tensor([1.0] * 16 + [1e30] * 16)}, {"full_rope": QUARTER}),
    ],
    ids=["with attn_v", "with keys of a shared layer", "half of the pairs rotate"],
)
def test_facts_in_tensors_of_gemma_4_are_read_as_in_llama_cpp(tensors, mistake, tmp_path):
    checkpoint = open_checkpoint(write_gguf_file(tmp_path / "x.gguf", "gemma4", tensors))
    reader, lines = verify(checkpoint)
    assert reader == "reading the GGUF file by llama.cpp's rules"
    assert not failed(lines)
    checkpoint.config = replace(checkpoint.config, **mistake)
    assert DELTA in failed(verify(checkpoint)[1])


@pytest.mark.parametrize("name", ["gemma4-all", "multimodal4"])
@pytest.mark.parametrize(
    "mistake", [{"sliding_window": 12}, {"full_rope": RopeParameters(1e6)}], ids=str
)
def test_mistake_of_the_reader_of_gemma_4_fails(name, mistake, tmp_path):
    checkpoint = open_checkpoint(write_directory(tmp_path, name))
    checkpoint.config = replace(checkpoint.config, **mistake)
    assert DELTA in failed(verify(checkpoint)[1])


def test_dropped_output_head_fails(tmp_path):
    plain, headed = tmp_path / "plain", tmp_path / "headed"
    checkpoint = open_checkpoint(write_directory(plain))
    checkpoint.path = write_directory(headed, head=True)
    assert DELTA in failed(verify(checkpoint, FP32, BF16)[1])


@pytest.mark.parametrize("name", ["gemma2-gqa", "gemma3-gqa"])
def test_tanh_instead_of_exact_gelu_fails(name, tmp_path):
    checkpoint = open_checkpoint(write_directory(tmp_path / "tanh", name))
    checkpoint.path = write_directory(tmp_path / "exact", name, hidden_activation="gelu")
    assert DELTA in failed(verify(checkpoint)[1])


def test_soft_cap_of_attention_in_gemma_3_fails(tmp_path):
    path = write_directory(tmp_path, attn_logit_softcapping=3.0)
    checkpoint = open_checkpoint(path)
    checkpoint.config = replace(checkpoint.config, attn_logit_softcapping=None)
    assert not failed(verify(checkpoint)[1]), "transformers applies no such cap"
    checkpoint.config = replace(checkpoint.config, attn_logit_softcapping=3.0)
    assert DELTA in failed(verify(checkpoint)[1])


def test_window_in_a_gguf_file_without_the_key_fails(tmp_path):
    path = write_gguf_file(tmp_path / "x.gguf", "gemma3", rope__freq_base=1e6)
    checkpoint = open_checkpoint(path)
    assert not failed(verify(checkpoint)[1])
    kinds = (*[SLIDING] * 5, FULL, SLIDING)
    checkpoint.config = replace(checkpoint.config, layer_types=kinds, sliding_window=4096)
    assert DELTA in failed(verify(checkpoint)[1])


def test_other_ids_or_end_tokens_fail(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_directory(tmp_path))
    checkpoint.generation_config = {"eos_token_id": [1, 106]}
    (line,) = [x for x in verify(checkpoint)[1] if not x.ok]
    assert [figure.ours for figure in line.figures] == [0, 1]
    checkpoint.generation_config = {}
    call = Tokenizer.__call__
    monkeypatch.setattr(Tokenizer, "__call__", lambda self, text: call(self, text.strip()))
    assert failed(verify(checkpoint)[1]) == {IDS_AND_ENDS}


def test_reader_says_what_stopped_transformers(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise KeyError("rope")

    path = write_directory(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(verify_truth, "read_directory", broken)
        reader, lines = verify(open_checkpoint(path))
    why = "because its own reading failed with KeyError: 'rope'"
    assert reader == f"given what gemma_fast's reader read, {why}"
    assert not failed(lines) and IDS_AND_ENDS not in {x.check for x in lines}
    monkeypatch.setattr(verify_truth, "ids_by_transformers", broken)
    (line,) = [x for x in verify(open_checkpoint(path))[1] if x.check.startswith("ids")]
    assert line.check == "ids of the text: not compared, because of KeyError: 'rope'" and line.ok


def test_missing_weight_is_not_replaced_by_random_numbers(tmp_path):
    path = write_directory(tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model\.norm\.weight"):
        verify_truth.read_directory(path, torch.float32, "cpu")


def test_random_weights_are_given_to_transformers():
    reader, lines = verify(RandomCheckpoint(CONFIGS["gemma3-gqa"]))
    assert reader.endswith("because random weights are in no file")
    assert not failed(lines)


@pytest.mark.parametrize(
    ("version", "said"), [(None, "is not installed"), ("4.57.1", "is 4.57.1, older than 5.17")]
)
def test_reference_replaces_a_missing_or_old_transformers(version, said, monkeypatch):
    monkeypatch.setattr(verify_truth, "installed_version", lambda _: version)
    truth, _ = verify_truth.truth_of(RandomCheckpoint(CONFIGS["gemma3-gqa"]), CPU)
    assert truth.name == "eager reference"
    assert truth.reader == f"read by gemma_fast's own reader, because transformers {said}"
    assert not failed(model_lines(dtypes=(FP32, BF16)).values())
