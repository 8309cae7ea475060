"""The engine under generate(): launches, graphs, what is kept between texts, what can go wrong."""

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import interpreter
from test_model import left_padded
from twins import CONFIGS, random_model

from gemma_fast import cache as cache_module
from gemma_fast.decoder import Decoder, bucket_of
from gemma_fast.kernels._op import Gpu
from gemma_fast.load import RandomCheckpoint
from gemma_fast.model import GemmaForCausalLM
from gemma_fast.sampling import Sampling

NEVER = {"eos_token_id": []}
SAMPLINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 2.0, "seed": 3},
    "filtered": {"do_sample": True, "temperature": 2.0, "seed": 3, "top_k": 9, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.5},
}


@pytest.mark.parametrize(
    ("config", "batch"), [("gemma-mqa", 1), ("gemma2-gqa", 8), ("gemma3-mqa", 1)], ids=str
)
def test_a_token_is_five_launches_a_layer_and_three(config, batch):
    """And texts with prompts of other lengths compile nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, Path(__file__).with_name("launches.py"), config, str(batch)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    layers = CONFIGS[config].num_hidden_layers
    assert layers * 5 < len(found["step"]) <= layers * 5 + 3, found["step"]
    assert not any(found["compiled"].values()), found["compiled"]


def check_kernels(model, ids, **options):
    expected = model.generate(ids, **options, **NEVER)
    with interpreter():
        assert torch.equal(model.generate(ids, **options, **NEVER), expected)


def test_kernels_give_the_references_tokens(twins):
    """A batch of three, in a decoder for four; past the windows."""
    _, ids, mask = left_padded(twins, [11, 3, 6])
    check_kernels(twins.model, ids, attention_mask=mask, max_new_tokens=4)


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=list(SAMPLINGS))
def test_kernels_give_the_references_choice(options):
    ids = torch.arange(3, 17).view(2, 7)
    check_kernels(random_model(CONFIGS["gemma2-gqa"]), ids, max_new_tokens=4, **options)


@pytest.mark.parametrize("config", ["gemma-mqa", "gemma2-gqa", "gemma3-gqa"])
def test_kernels_give_the_references_tokens_of_one_text(config):
    check_kernels(random_model(CONFIGS[config]), torch.arange(3, 9).unsqueeze(0), max_new_tokens=4)


def test_rows_do_not_see_each_other(twins):
    """Five, in a decoder for eight."""
    prompts, ids, mask = left_padded(twins, [4, 9, 2, 7, 3])
    out = twins.model.generate(ids, attention_mask=mask, max_new_tokens=6, **NEVER)
    for prompt, row in zip(prompts, out, strict=True):
        alone = twins.model.generate(prompt, max_new_tokens=6, **NEVER)
        assert torch.equal(row[-6:], alone[0, -6:])


class Graph:
    """Stands in for a CUDA graph: what is recorded is run when it is replayed."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.replays = decoder, 0

    def replay(self) -> None:
        length = self.decoder.cache.length
        self.decoder._step()
        self.decoder.cache.length = length
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """Decoders on the CPU go about as on a GPU."""
    made: list[Graph] = []

    def capture(self):
        self._graph_bytes += 7
        made.append(Graph(self))
        return made[-1]

    init = Decoder.__init__

    def asynchronous(self, *args):
        init(self, *args)
        self.asynchronous = True

    def read(self):
        token = self.token.clone()
        return lambda: token

    monkeypatch.setattr(Decoder, "_capture", capture)
    monkeypatch.setattr(Decoder, "__init__", asynchronous)
    monkeypatch.setattr(Decoder, "read", read)
    return made


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
    # Another temperature or seed lies on the device; another filter is another graph.
    model.generate(ids, **options | {"temperature": 0.5, "seed": 9})
    assert len(graphs) == 1
    for _ in range(2):
        model.generate(ids, **options | {"do_sample": True, "top_k": 4})
        model.generate(ids, **options)
    assert len(graphs) == 2


def test_a_text_ends_one_step_ahead(graphs):
    """The step that was under way when a text ended is lost, and does no harm."""
    model = random_model(CONFIGS["gemma3-gqa"])
    ids = torch.arange(3, 9).unsqueeze(0)
    free = model.generate(ids, max_new_tokens=12, **NEVER)
    out = model.generate(ids, max_new_tokens=12, eos_token_id=int(free[0, 8]))
    end = 7 + free[0, 6:].tolist().index(int(free[0, 8]))
    assert torch.equal(out, free[:, :end])
    assert torch.equal(model.generate(ids, max_new_tokens=12, **NEVER), free)


def test_decoders_are_kept_by_batch_size(twins):
    model = random_model(twins.config)
    sizes = [bucket_of(batch) for batch in (1, 2, 3, 4, 5, 8, 9, 33, 64)]
    assert sizes == [1, 2, 4, 4, 8, 8, 16, 40, 64]
    first = model.decoders.take(model, 3, 20)
    assert (first.cache.batch, first.cache.max_length) == (4, 256)
    beside = model.decoders.take(model, 3, 20)  # another caller's, at the same time
    assert beside is not first
    model.decoders.give_back(first)
    assert model.decoders.take(model, 4, 256) is first
    model.decoders.give_back(first)
    kept = model.memory()
    assert kept["weights"] == 4 * twins.config.num_parameters
    assert kept["cache"] > first.cache.nbytes > 0 == kept["graph"]
    model.free_memory()
    assert model.memory()["cache"] == 0
    assert model.decoders.take(model, 4, 256) is not first


def test_a_longer_text_and_another_dtype_need_another_decoder():
    model = random_model(CONFIGS["gemma-mqa"])
    long = random_model(replace(CONFIGS["gemma-mqa"], max_position_embeddings=2048))
    kept = long.decoders.take(long, 1, 300)
    assert kept.cache.max_length == 512
    long.decoders.give_back(kept)
    assert long.decoders.take(long, 1, 513).cache.max_length == 768
    ids = torch.arange(3, 9).unsqueeze(0)
    expected = model.generate(ids, max_new_tokens=4, **NEVER)
    model.double().float()  # other memory
    assert torch.equal(model.generate(ids, max_new_tokens=4, **NEVER), expected)
    model.bfloat16().generate(ids, max_new_tokens=4)
    assert model.decoders[1].cache.dtype == torch.bfloat16


def test_copies_of_a_model_have_no_decoders(twins):
    model = random_model(twins.config)
    ids = twins.prompt(1, 5)
    expected = model.generate(ids, max_new_tokens=3, **NEVER)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.decoders
        assert torch.equal(twin.generate(ids, max_new_tokens=3, **NEVER), expected)


def test_in_and_out_of_inference_mode(twins):
    model = random_model(twins.config)
    for options in SAMPLINGS.values():
        for mode in (torch.inference_mode, nullcontext, torch.inference_mode):
            with mode():
                model.generate(twins.prompt(1, 5), max_new_tokens=3, **options, **NEVER)


def test_extend_continues_a_text(twins):
    ids = twins.prompt(2, 12)
    whole, parts = (Decoder(twins.model, 2, 32) for _ in range(2))
    whole.prefill(ids)
    parts.prefill(ids[:, :7])
    parts.extend(ids[:, 7:])
    for _ in range(4):
        assert torch.equal(parts.token, whole.token)
        parts.step()
        whole.step()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_decoder_that_is_full(twins, asynchronous):
    decoder = Decoder(twins.model, 1, 256)
    decoder.asynchronous, decoder._capture = asynchronous, lambda: Graph(decoder)
    decoder.prefill(twins.prompt(1, 253))
    for _ in range(3):
        decoder.step()
    for more in (decoder.step, lambda: decoder.extend(twins.prompt(1, 1))):
        with pytest.raises(ValueError, match="256 tokens so far and 1 more do not fit"):
            more()
    decoder.prefill(twins.prompt(1, 5))
    decoder.step()


def test_more_texts_than_a_decoder_has_room_for(twins):
    with pytest.raises(ValueError, match="5 texts do not fit a decoder for 4"):
        Decoder(twins.model, 3, 20).prefill(twins.prompt(5, 4))


def test_a_prompt_that_was_not_read_to_its_end(twins, monkeypatch):
    decoder = Decoder(twins.model, 1, 32)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_choose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            decoder.prefill(twins.prompt(1, 5))
    with pytest.raises(ValueError, match="a prompt was not read to its end"):
        decoder.step()
    decoder.prefill(twins.prompt(1, 5))


def test_a_context_that_is_no_multiple_of_what_is_rounded_up_to():
    model = random_model(replace(CONFIGS["gemma-mqa"], max_position_embeddings=100))
    assert Decoder(model, 1, 60).cache.max_length == 100


def test_graphs_keep_their_memory(twins):
    """What a graph reads and writes lies where it was captured."""

    def addresses(decoder):
        own = [decoder._token, decoder._seen, decoder._seed, decoder._temperature]
        cache = decoder.cache
        own += [cache.next_position, cache.arrived, *cache.keys, *cache.values]
        return [x.data_ptr() for x in own]

    model, options = random_model(twins.config), {"repetition_penalty": 1.5, **NEVER}
    model.generate(twins.prompt(3, 5), max_new_tokens=4, **options)
    before = addresses(model.decoders[4])
    model.generate(twins.prompt(4, 9), max_new_tokens=6, **options)
    assert addresses(model.decoders[4]) == before


def test_weights_that_were_replaced(twins):
    model = random_model(twins.config)
    ids = twins.prompt(1, 5)
    model.generate(ids, max_new_tokens=3, **NEVER)
    kept = model.decoders[1]
    assert kept.fits(model, 20)
    model.layers[1].down_proj = torch.nn.Parameter(model.layers[1].down_proj.clone(), False)
    assert not kept.fits(model, 20)
    assert model.cpu() is model and not model.decoders


def test_a_model_goes_with_its_last_reference(twins):
    model = random_model(twins.config)
    model.generate(twins.prompt(1, 5), max_new_tokens=3, **NEVER)
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


def test_what_a_text_left_behind_does_not_reach_the_next(twins):
    model = random_model(twins.config)
    ids = twins.prompt(1, 5)
    expected = model.generate(ids, max_new_tokens=8, **NEVER)
    for ring in (*model.decoders[1].cache.keys, *model.decoders[1].cache.values):
        ring.fill_(float("nan"))
    assert torch.equal(model.generate(ids, max_new_tokens=8, **NEVER), expected)


def test_bytes_needed_are_those_of_a_cache(twins):
    for batch, length in ((1, 5), (3, 200)):
        cache = cache_module.KVCache(twins.config, batch, length, dtype=torch.float16)
        needed = cache.bytes_needed(twins.config, batch, length, torch.float16)
        assert needed == cache.nbytes


@contextmanager
def damaged(model):
    weight = model.layers[1].down_proj
    before = weight.clone()
    weight[0, 0] = float("nan")
    yield
    weight.copy_(before)


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=list(SAMPLINGS))
def test_logits_that_are_not_finite(options, request):
    if "top_k" not in options:  # one step ahead, or not
        request.getfixturevalue("graphs")
    model = random_model(CONFIGS["gemma3-gqa"])
    ids = torch.arange(3, 9).repeat(2, 1)
    expected = model.generate(ids, max_new_tokens=3, **options, **NEVER)
    with damaged(model), pytest.raises(ValueError, match=r"logits after 6 tokens are not finite"):
        model.generate(ids, max_new_tokens=3, **options, **NEVER)
    assert torch.equal(model.generate(ids, max_new_tokens=3, **options, **NEVER), expected)


def test_no_memory_for_the_cache(twins, monkeypatch):
    model = random_model(twins.config)
    ids = twins.prompt(2, 5)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.KVCache, "_allocate", full)
        message = r"out of memory: a KV cache for 2 sequences of 256 tokens takes 0\.\d\d GB"
        with pytest.raises(torch.OutOfMemoryError, match=message + r".*try a smaller batch"):
            model.generate(ids, max_new_tokens=3)
    assert model.generate(ids, max_new_tokens=3, **NEVER).shape == (2, 8)


def test_what_other_batches_left_makes_room(twins, monkeypatch):
    model = random_model(twins.config)
    model.generate(twins.prompt(2, 5), max_new_tokens=3, **NEVER)
    allocate, tried = cache_module.KVCache._allocate, []

    def full_once(self, length):
        tried.append(len(model.decoders))
        if len(tried) == 1:
            raise RuntimeError("CUDA error: out of memory")
        allocate(self, length)

    monkeypatch.setattr(cache_module.KVCache, "_allocate", full_once)
    model.generate(twins.prompt(1, 5), max_new_tokens=3, **NEVER)
    assert tried == [1, 0] and list(model.decoders) == [1]


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory", "Triton Error [CUDA]: out of memory",
                "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory"],
)  # fmt: skip
def test_no_memory_for_a_prompt(twins, monkeypatch, message):
    def full(*args):
        raise RuntimeError(message)

    model = random_model(twins.config)
    with monkeypatch.context() as patch:
        patch.setattr(GemmaForCausalLM, "hidden_states", full)
        with pytest.raises(torch.OutOfMemoryError, match=r"reading 2 x 5 tokens on cpu; try a sm"):
            model.generate(twins.prompt(2, 5), max_new_tokens=3)
    assert model.generate(twins.prompt(2, 5), max_new_tokens=3, **NEVER).shape == (2, 8)


def test_no_memory_for_the_weights(monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(GemmaForCausalLM, "to_empty", full)
    checkpoint = RandomCheckpoint(CONFIGS["gemma-mqa"], name="gemma")
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory: gemma in float32 takes 0\."):
        GemmaForCausalLM.from_checkpoint(checkpoint, dtype="float32", device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 8, 20], ids=str)
@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=list(SAMPLINGS))
@pytest.mark.parametrize("config", list(CONFIGS))
def test_graphs_give_the_tokens_of_eager_steps(config, options, batch, monkeypatch):
    """Of which each kernel waits for the one ahead."""
    model = random_model(CONFIGS[config]).cuda()
    ids = torch.randint(3, 199, (batch, 5), device="cuda")
    decoder = Decoder(model, batch, 40)
    decoder.asynchronous = False
    with monkeypatch.context() as patch:
        patch.setattr(Gpu, "overlap", lambda self, prefetch: {"PREFETCH": False})
        decoder.prefill(
            ids, None, Sampling(**{k: v for k, v in options.items() if k != "seed"}),
            options.get("seed", 0),
        )  # fmt: skip
        expected = [decoder.token.clone()]
        for _ in range(11):
            decoder.step()
            expected.append(decoder.token.clone())
    for _ in range(2):
        out = model.generate(ids, max_new_tokens=12, **options, **NEVER)
        assert torch.equal(out[:, 5:], torch.stack(expected, dim=1))


@pytest.mark.gpu
def test_the_next_text_compiles_nothing(monkeypatch):
    from triton import knobs

    model = random_model(CONFIGS["gemma3-mqa"]).cuda()
    options = {"max_new_tokens": 8, **NEVER}
    model.generate(torch.randint(3, 199, (1, 19), device="cuda"), **options)
    compiled: list[str] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **x: compiled.append(str(x["src"])))
    model.generate(torch.randint(3, 199, (1, 32), device="cuda"), **options)
    assert not compiled
    assert model.memory()["graph"] > 0 < model.decoders[1].capture_seconds


@pytest.mark.gpu
def test_a_text_and_all_that_is_kept_for_it_are_small():
    """Beside weights and cache."""
    model = random_model(CONFIGS["gemma-mqa"]).cuda()
    torch.cuda.reset_peak_memory_stats()
    model.generate(torch.randint(3, 199, (1, 100), device="cuda"), max_new_tokens=50, **NEVER)
    kept = model.memory()
    assert torch.cuda.max_memory_allocated() - kept["weights"] - kept["cache"] < 300e6
