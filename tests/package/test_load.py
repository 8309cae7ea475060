"""Tests how weights are allocated, read and converted, and which models are refused."""

import io
import sys
import threading
from dataclasses import replace

import pytest
import torch
from packed_checkpoints import PackedCheckpoint
from tiny_models import CONFIGS, random_transformers_model

from gemma_fast import load
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.base import one_thread
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.checkpoint.transformers import TransformersCheckpoint
from gemma_fast.kernels.packed import PackedWeight
from gemma_fast.load import PER_LAYER, fits_without_table, load_model, refuse_head_dim

CPU = torch.device("cpu")


def test_out_of_memory_for_weights_is_reported(monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(load, "allocate", full)
    checkpoint = RandomCheckpoint(CONFIGS["gemma-mqa"], name="gemma")
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory: gemma in float32 takes 0\."):
        GemmaForCausalLM.from_checkpoint(checkpoint, dtype="float32", device="cpu")


def test_out_of_memory_for_copies_of_fused_weights_is_reported(monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    source = random_transformers_model(CONFIGS["gemma-mqa"])
    monkeypatch.setattr(load, "allocate", full)
    with pytest.raises(torch.OutOfMemoryError, match="memory: the copies of fused weights on cpu"):
        GemmaForCausalLM.from_transformers(source)


def test_all_weights_are_allocated_before_the_first_tensor_is_read(monkeypatch):
    done, allocate_one = [], load.allocate

    class Watched(RandomCheckpoint):
        def _read(self, name, out):
            done.append("read")

    def allocate(*args, **kwargs):
        done.append("allocate")
        return allocate_one(*args, **kwargs)

    monkeypatch.setattr(load, "allocate", allocate)
    config = CONFIGS["gemma3-gqa"]
    model = load_model(GemmaForCausalLM, Watched(config), "float32", CPU)
    weights = len(list(model.parameters()))
    assert done == ["allocate"] * weights + ["read"] * len(config.tensor_shapes())


def test_parts_lists_each_parameter_and_each_tensor_once():
    for config in CONFIGS.values():
        with torch.device("meta"):
            model = GemmaForCausalLM(config)
        assert model.parts.keys() == dict(model.named_parameters()).keys()
        tensors = [tensor for tensors in model.parts.values() for tensor in tensors]
        assert sorted(tensors) == sorted(config.tensor_shapes())


def test_tensors_in_memory_are_converted_to_the_given_dtype():
    source = random_transformers_model(CONFIGS["gemma2-gqa"])
    shared = GemmaForCausalLM.from_transformers(source)
    model = GemmaForCausalLM.from_checkpoint(TransformersCheckpoint(source), dtype="bfloat16")
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, shared.get_parameter(name).bfloat16()), name


def test_head_dim_without_a_kernel_is_refused_on_cuda():
    config = CONFIGS["gemma-mqa"]
    refuse_head_dim(config, CPU, (64, 128))
    refuse_head_dim(config, torch.device("cuda"), (32, 128))
    with pytest.raises(ValueError, match=r"head_dim=32: .* one of \(64, 128\); use device='cpu'"):
        refuse_head_dim(config, torch.device("cuda"), (64, 128))


def test_table_of_per_layer_embeddings_stays_on_the_host_if_the_rest_fits_the_gpu():
    with torch.device("meta"):
        weights = dict(GemmaForCausalLM(CONFIGS["gemma4-all"]).named_parameters())
    size, table = sum(weight.nbytes for weight in weights.values()), weights[PER_LAYER].nbytes
    found = {free: fits_without_table(weights, free) for free in (size, size - 1, size - table)}
    assert found == {size: False, size - 1: True, size - table: True}
    assert not fits_without_table(weights, size - table - 1)
    del weights[PER_LAYER]
    assert not fits_without_table(weights, size - table - 1)


def test_table_in_host_memory_stays_there_when_the_model_is_converted():
    """The meta device stands for a GPU."""
    model = GemmaForCausalLM.from_checkpoint(RandomCheckpoint(CONFIGS["gemma4-all"]), device="cpu")
    table = model.embed_tokens_per_layer
    model.embed_tokens_per_layer = None
    model.to("meta")
    model.embed_tokens_per_layer = table
    model.to("meta", torch.bfloat16)
    assert model.embed_tokens_per_layer is table and table.is_cpu
    assert model.dtype == table.dtype == torch.bfloat16
    assert model.memory()["host"] == table.nbytes


@pytest.mark.gpu
def test_model_reads_per_layer_embeddings_from_host_memory():
    checkpoint, ids = RandomCheckpoint(CONFIGS["gemma4-all"]), torch.arange(3, 17).unsqueeze(0)
    on_gpu, on_host = (
        GemmaForCausalLM.from_checkpoint(
            checkpoint, dtype="float32", device="cuda", on_host=on_host
        )
        for on_host in (False, True)
    )
    table = on_host.embed_tokens_per_layer
    assert table.is_pinned() and on_host.memory()["host"] == table.nbytes
    table.copy_(on_gpu.embed_tokens_per_layer)  # random values differ between devices
    tokens = [x.generate(ids, max_new_tokens=12, eos_token_id=[]).cpu() for x in (on_gpu, on_host)]
    assert torch.equal(*tokens)
    assert on_host.to("cuda", torch.bfloat16).embed_tokens_per_layer.is_pinned()
    assert on_host.embed_tokens_per_layer.dtype == torch.bfloat16


def test_packed_weights_are_written_on_one_thread(monkeypatch):
    """With more, loading took ten times as long while other processes ran."""
    threads, write = [], PackedWeight.write

    def watched(*args):
        threads.append(torch.get_num_threads())
        write(*args)

    monkeypatch.setattr(PackedWeight, "write", watched)
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # pytest-xdist has threads
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = replace(CONFIGS["gemma3-gqa"], intermediate_size=96)
        checkpoint = PackedCheckpoint(config, "int8-g16")
        load_model(GemmaForCausalLM, checkpoint, "float32", CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}


def test_progress_is_shown_after_a_second_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    names = list("abcdef")
    for start, shown in ((0.0, False), (-2.0, True)):
        stderr, clock = Terminal(), iter([start, *(i / 10 for i in range(100))])
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(load.time, "perf_counter", lambda clock=clock: next(clock))
        assert list(load._track(names, "Reading a.gguf")) == names
        monkeypatch.undo()
        assert ("Reading a.gguf" in stderr.getvalue()) == shown


@pytest.mark.parametrize("others", [False, True], ids=["alone", "other threads"])
def test_loading_sets_the_number_of_threads_only_if_no_thread_can_keep_it(others):
    """A thread begins with the number that any thread has set last."""
    done, before = threading.Event(), torch.get_num_threads()
    thread = threading.Thread(target=done.wait)
    if others:
        thread.start()
    try:
        torch.set_num_threads(2)
        alone = threading.active_count() == 1
        with one_thread():
            assert torch.get_num_threads() == (1 if alone else 2)
        assert torch.get_num_threads() == 2 and not (alone and others)
    finally:
        torch.set_num_threads(before)
        done.set()
