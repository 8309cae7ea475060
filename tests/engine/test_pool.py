"""Tests the decoders that a model keeps between texts: when they are reused and freed. Also tests
the errors that Decoder and generate() raise."""

import copy
import gc
import pickle
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from decoder_checks import NEVER, SAMPLINGS, Graph
from tiny_models import CONFIGS, random_model

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.engine.decoder import Decoder, bucket_of
from gemma_fast.model import cache as cache_module
from gemma_fast.model import gemma


def test_decoders_are_kept_by_batch_size(twins):
    model = random_model(twins.config)
    sizes = [bucket_of(batch) for batch in (1, 2, 3, 4, 5, 8, 9, 33, 64)]
    assert sizes == [1, 2, 4, 4, 8, 8, 16, 40, 64]
    first = model.decoders.take(model, 3, 20)
    assert (first.cache.batch, first.cache.max_length) == (4, 256)
    beside = model.decoders.take(model, 3, 20)  # for a second caller at the same time
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
    model.double().float()  # moves the weights to new addresses
    assert torch.equal(model.generate(ids, max_new_tokens=4, **NEVER), expected)
    model.bfloat16().generate(ids, max_new_tokens=4)
    assert model.decoders[1].cache.dtype == torch.bfloat16


def test_a_kept_decoder_keeps_nothing_of_the_last_call(twins):
    model, ids = random_model(twins.config), twins.prompt(2, 5)

    class Processor:
        def __call__(self, ids, logits):
            return logits

    options = {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [5]}
    given = Processor()
    out = model.generate(ids, max_new_tokens=3, logits_processor=given, **options)
    kept = weakref.ref(given), weakref.ref(out.logits[0])
    del given, out
    gc.collect()
    assert model.decoders and [reference() for reference in kept] == [None, None]
    expected = random_model(twins.config).generate(ids, max_new_tokens=3)
    assert torch.equal(model.generate(ids, max_new_tokens=3), expected)


def test_copies_of_a_model_have_no_decoders(twins):
    model = random_model(twins.config)
    ids = twins.prompt(1, 5)
    expected = model.generate(ids, max_new_tokens=3, **NEVER)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.decoders
        assert torch.equal(twin.generate(ids, max_new_tokens=3, **NEVER), expected)


def test_generate_works_inside_and_outside_of_inference_mode(twins):
    model = random_model(twins.config)
    for options in SAMPLINGS.values():
        for mode in (torch.inference_mode, nullcontext, torch.inference_mode):
            with mode():
                model.generate(twins.prompt(1, 5), max_new_tokens=3, **options, **NEVER)


def test_prefill_and_extend_equal_one_prefill(twins):
    ids = twins.prompt(2, 12)
    whole, parts = (Decoder(twins.model, 2, 32) for _ in range(2))
    whole.prefill(ids)
    parts.prefill(ids[:, :7])
    parts.extend(ids[:, 7:])
    for _ in range(4):
        assert torch.equal(parts.token, whole.token)
        parts.step()
        whole.step()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_full_decoder_raises_and_can_start_a_new_text(twins, asynchronous):
    decoder = Decoder(twins.model, 1, 256)
    decoder.asynchronous, decoder.graphs.capture = asynchronous, Graph
    decoder.prefill(twins.prompt(1, 253))
    for _ in range(3):
        decoder.step()
    for more in (decoder.step, lambda: decoder.extend(twins.prompt(1, 1))):
        with pytest.raises(ValueError, match="256 tokens so far and 1 more do not fit"):
            more()
    decoder.prefill(twins.prompt(1, 5))
    decoder.step()


def test_more_texts_than_a_decoder_holds_raise(twins):
    with pytest.raises(ValueError, match="a batch of 5 does not fit a decoder for 4"):
        Decoder(twins.model, 3, 20).prefill(twins.prompt(5, 4))


def interrupt(*args, **options):
    raise KeyboardInterrupt


def test_an_interrupted_prompt_cannot_be_continued(twins, monkeypatch):
    decoder = Decoder(twins.model, 1, 32)
    with monkeypatch.context() as patch:
        patch.setattr(gemma, "next_token", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decoder.prefill(twins.prompt(1, 5))
    with pytest.raises(ValueError, match="the prefill of a prompt did not finish"):
        decoder.step()
    decoder.prefill(twins.prompt(1, 5))


def test_the_rounded_cache_length_does_not_exceed_the_context():
    model = random_model(replace(CONFIGS["gemma-mqa"], max_position_embeddings=100))
    assert Decoder(model, 1, 60).cache.max_length == 100


def test_tensors_of_graphs_keep_their_addresses(twins):
    """A CUDA graph reads and writes the addresses that the tensors had during the capture."""

    def addresses(decoder):
        own = [x for x in vars(decoder.sampler).values() if isinstance(x, torch.Tensor)]
        cache = decoder.cache
        own += [cache.next_position, cache.counter, *cache.keys, *cache.values]
        own += [x for tables in cache.angles.values() for x in tables]
        return [x.data_ptr() for x in own]

    model, options = random_model(twins.config), {"repetition_penalty": 1.5, **NEVER}
    model.generate(twins.prompt(3, 5), max_new_tokens=4, **options)
    before = addresses(model.decoders[4])
    model.new_cache(1, 1000)  # creates longer rotary tables
    model.generate(twins.prompt(4, 9), max_new_tokens=6, **options)
    assert addresses(model.decoders[4]) == before


def test_a_decoder_does_not_fit_replaced_weights(twins):
    model = random_model(twins.config)
    ids = twins.prompt(1, 5)
    model.generate(ids, max_new_tokens=3, **NEVER)
    kept = model.decoders[1]
    assert kept.fits(model, 20)
    model.layers[1].down_proj = torch.nn.Parameter(model.layers[1].down_proj.clone(), False)
    assert not kept.fits(model, 20)
    assert model.cpu() is model and not model.decoders


def test_a_model_is_freed_with_its_last_reference(twins):
    model = random_model(twins.config)
    model.generate(twins.prompt(1, 5), max_new_tokens=3, **NEVER)
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


def test_old_cache_contents_do_not_change_the_next_text(twins):
    model = random_model(twins.config)
    ids = twins.prompt(1, 5)
    expected = model.generate(ids, max_new_tokens=8, **NEVER)
    for ring in (*model.decoders[1].cache.keys, *model.decoders[1].cache.values):
        ring.fill_(float("nan"))
    assert torch.equal(model.generate(ids, max_new_tokens=8, **NEVER), expected)


def test_bytes_needed_equals_the_nbytes_of_a_cache(twins):
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
def test_non_finite_logits_raise(options, request):
    if "top_k" not in options:  # "filtered" runs synchronously, the others do not
        request.getfixturevalue("graphs")
    model = random_model(CONFIGS["gemma3-gqa"])
    ids = torch.arange(3, 9).repeat(2, 1)
    expected = model.generate(ids, max_new_tokens=3, **options, **NEVER)
    with damaged(model), pytest.raises(ValueError, match=r"logits after 6 tokens are not finite"):
        model.generate(ids, max_new_tokens=3, **options, **NEVER)
    assert torch.equal(model.generate(ids, max_new_tokens=3, **options, **NEVER), expected)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}], ids=str)
def test_an_infinite_logit_raises_in_spite_of_the_soft_cap(options):
    model = random_model(CONFIGS["gemma2-gqa"])
    assert model.config.final_logit_softcapping
    ids = torch.arange(8, 14).unsqueeze(0)
    model.norm[0] = 1e6
    model.embed_tokens[7] = torch.eye(len(model.norm))[0]
    # In fp32, the logit of token 7 overflows: 3e38 times an input that norm[0] multiplies by 1e6.
    model.embed_tokens[7] *= 3e38 * model(ids).logits[0, -1, 7].sign()
    assert model(ids).logits[0, -1].isposinf().nonzero().tolist() == [[7]]
    with pytest.raises(ValueError, match="logits after 6 tokens are not finite"):
        model.generate(ids, max_new_tokens=3, **options, **NEVER)


def test_out_of_memory_for_the_cache_raises(twins, monkeypatch):
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


def test_kept_decoders_are_freed_when_memory_runs_out(twins, monkeypatch):
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
def test_out_of_memory_for_a_prompt_raises(twins, monkeypatch, message):
    def full(*args, **kwargs):
        raise RuntimeError(message)

    model = random_model(twins.config)
    with monkeypatch.context() as patch:
        patch.setattr(GemmaForCausalLM, "hidden_states", full)
        with pytest.raises(torch.OutOfMemoryError, match="prefill of 2 x 5 tokens on cpu; try a"):
            model.generate(twins.prompt(2, 5), max_new_tokens=3)
    assert model.generate(twins.prompt(2, 5), max_new_tokens=3, **NEVER).shape == (2, 8)
