"""Tests the cases of the model benchmark, and their minimum bytes and FLOPs."""

import pytest
import torch
from tiny_models import CONFIGS

from gemma_fast.benchmarks.model.cases import TINY, Case, cases, experts_read, find, pass_work
from gemma_fast.presets import PRESETS

GEMMA = PRESETS["gemma-2b"]


def test_cases_are_named_as_in_llama_bench():
    found = cases([512, 8192], [128], [0, 4096], [1, 4])
    names = [case.name for case in found if case.batch == 1]
    assert names[:3] == ["pp512", "pp8192", "tg128"]
    assert names[3:] == ["pp512 @ d4096", "pp8192 @ d4096", "tg128 @ d4096"]
    assert len(found) == 12 and {case.batch for case in found} == {1, 4}
    assert [case.name for case in cases([0], [4], [0], [1])] == ["tg4"]
    own = cases([512], [32, (64, 512), (0, 5)], [0, 8], [1])  # a count with a depth of its own
    names = ["pp512", "tg32", "pp512 @ d8", "tg32 @ d8", "tg64 @ d512"]
    assert [case.name for case in own] == names
    assert [case.room for case in cases([8], [4], [0, 5], [1])] == [8, 1 + 4, 5 + 8, 5 + 4]


def test_bytes_and_flops_of_a_tiny_model_equal_numbers_computed_by_hand():
    layer = 48 * 32 * (2 * 4 + 2 * 2) + 3 * 48 * 88 + 4 * 48 + 2 * 32
    embedding = 199 * 48
    assert TINY.num_parameters == embedding + 3 * layer + 48 == 103_680
    # A decode step after 20 tokens: the layers see 8, 21 and 8 tokens, including the new one. K and
    # V have 2 heads of 32 numbers, 4 bytes each.
    assert [TINY.window(i) for i in range(3)] == [8, None, 8]
    step = pass_work(TINY, 4, 3, 20, 1)
    assert step.bytes == 4 * (103_680 + 3 * 2 * 2 * 32 * (8 + 21 + 8))
    assert step.flops == 3 * (2 * 103_680 + 4 * 4 * 32 * (8 + 21 + 8))
    # A prefill of 10 tokens after 5. The layer without a window reads 5 keys and writes 10, and its
    # queries see 6 to 15 keys. A layer with a window reads 5 keys and writes 8 keys; its first two
    # queries see 6 and 7 keys, the other eight see 8 keys.
    read = pass_work(TINY, 4, 1, 5, 10)
    assert read.bytes == 4 * (103_680 + 2 * 2 * 32 * (15 + 2 * 13))
    pairs = 2 * (6 + 7 + 8 * 8) + sum(range(6, 16))
    products = 2 * (10 * (103_680 - embedding) + embedding)
    assert read.flops == products + 4 * 4 * 32 * pairs


def test_bytes_and_flops_of_gemma_2b_equal_numbers_computed_by_hand():
    embedding, layer = 256_000 * 2048, 2048 * (256 * (8 + 2) + 256 * 8 + 3 * 16384 + 2)
    weights = embedding + 18 * layer + 2048
    assert weights == GEMMA.num_parameters == 2_506_172_416  # 5.01 GB in bf16
    one = Case("tg", 1, depth=512).work(GEMMA, 2)
    assert one.bytes == 2 * weights + 513 * 18_432  # K and V of a token: 18 * 2 * 256 * 2 bytes
    assert one.flops == 2 * weights + 18 * 4 * 8 * 256 * 513
    many = Case("tg", 128, depth=512, batch=4).work(GEMMA, 2)
    assert many.bytes == 128 * 2 * weights + 4 * 18_432 * sum(range(513, 641))
    prompt = Case("pp", 512).work(GEMMA, 2)
    products = 2 * (512 * (18 * layer + 2048) + embedding)
    assert prompt.flops == products + 18 * 4 * 8 * 256 * 512 * 513 // 2
    assert prompt.bytes == 2 * weights + 512 * 18_432


def test_bytes_and_flops_of_a_tiny_gemma_4_equal_numbers_computed_by_hand():
    """Layers 0, 1 and 3 have a window of 13, layers 2 and 4 none. Layers 3 and 4 read the keys and
    values of layers 1 and 2. Full layers have head dim 64, one KV head, and values that are keys.
    """
    config = CONFIGS["gemma4-all"]
    hidden, p, scalar = 48, 16, 1
    per_layer = 2 * p * hidden + hidden + 4 * hidden + scalar
    own = 3 * hidden * 88 + per_layer, 3 * hidden * 2 * 88 + per_layer  # own; shared: twice as wide
    sliding = own[0] + hidden * 32 * (4 + 2 * 2 + 4) + 2 * 32
    full = own[0] + hidden * 64 * (4 + 1 + 4) + 2 * 64
    reading = [own[1] + hidden * d * (4 + 4) + d for d in (32, 64)]
    projection, embedding = 5 * p * hidden, 199 * hidden
    rest = p + hidden  # per_layer_projection_norm and norm
    weights = embedding + projection + rest + 2 * sliding + full + sum(reading)
    assert config.num_parameters == weights + 211 * 5 * p
    # A decode step after 20 tokens: the layers see 13, 13, 21, 13 and 21 tokens, including the new
    # one. K and V have 2 heads of 32 numbers, or 1 head of 64.
    step = pass_work(config, 4, 3, 20, 1)
    seen = 13 + 13 + 21 + 13 + 21
    assert step.bytes == 4 * (weights + 3 * 5 * p + 3 * 2 * 64 * seen)
    heads = 4 * 4 * (32 * 3 * 13 + 64 * 2 * 21)
    assert step.flops == 3 * (2 * weights + heads)
    # A prefill of 20 tokens after 5. Layers 0 and 1 read 5 keys and write 13; layer 2 reads 5 and
    # writes 20. Layers 3 and 4 compute the last token, which sees 13 and 25 keys.
    read = pass_work(config, 4, 1, 5, 20)
    positions = 2 * (5 + 13) + (5 + 20) + 13 + 25
    assert read.bytes == 4 * (weights + (3 * 20 + 2) * p + 2 * 64 * positions)
    layers = 20 * (2 * sliding + full + rest + 3 * p * hidden) + sum(reading) + 2 * p * hidden
    windowed = 2 * (sum(range(6, 14)) + 12 * 13) + 13
    pairs = 32 * windowed + 64 * (sum(range(6, 26)) + 25)
    assert read.flops == 2 * (layers + embedding) + 4 * 4 * pairs


def test_bytes_of_gemma_4_e2b_equal_numbers_computed_by_hand():
    """35 layers: every fifth one is full, and the last 20 read keys and values of layers 13 and 14.
    A token gathers one row of the per-layer embeddings, which are half of the parameters."""
    config, hidden = PRESETS["gemma-4-e2b"], 1536
    table, projection = 262_144 * 35 * 256, 35 * 256 * hidden
    others = 2 * 256 * hidden + 5 * hidden + 1
    own = [hidden * d * (8 + 2 + 8) + 2 * d + 3 * hidden * 6144 + others for d in (256, 512)]
    shared = [hidden * d * 16 + d + 3 * hidden * 12_288 + others for d in (256, 512)]
    layers = 12 * own[0] + 3 * own[1] + 16 * shared[0] + 4 * shared[1]
    read = 262_144 * hidden + projection + 256 + layers + hidden
    assert config.num_parameters == table + read == 4_628_569_379  # 4.63 B
    step = Case("tg", 1, depth=8191).work(config, 2)
    keys_and_values = 28 * 512 * 2 * 256 + 7 * 8192 * 2 * 512
    assert step.bytes == 2 * (read + 35 * 256 + keys_and_values)
    assert 2 * read == 4_559_518_278  # bytes in bf16


def test_bytes_and_flops_of_a_mixture_of_experts_equal_numbers_computed_by_hand():
    """5 layers with 6 experts of 3 * 40 * 48 weights. A token uses 3 of them. Two tokens use
    6 * (1 - (1 / 2)^2) = 4.5 on average."""
    config, expert = CONFIGS["gemma4-experts"], 3 * 40 * 48
    others = config.num_parameters - 5 * 6 * expert
    assert config.num_active_parameters == others + 5 * 3 * expert
    keys_and_values = 2 * (64 * 3 * 8 + 64 * 2 * 21)  # layers see 8, 8, 21, 8 and 21 tokens
    heads = 4 * 4 * (32 * 3 * 8 + 64 * 2 * 21)
    for batch, experts in ((1, 3), (2, 4.5)):
        step = pass_work(config, 4, batch, 20, 1)
        assert step.bytes == 4 * (others + 5 * experts * expert + batch * keys_and_values)
        assert step.flops == batch * (2 * (others + 5 * 3 * expert) + heads)
    read = pass_work(config, 4, 1, 0, 8)  # all experts but 6 / 2^8
    embedding = 199 * 48
    products = 2 * (8 * (others - embedding + 5 * 3 * expert) + embedding)
    assert read.flops == products + 4 * 4 * (32 * 3 + 64 * 2) * 36
    positions = 8 * 2 * 64 * 3 + 8 * 2 * 64 * 2
    assert read.bytes == 4 * (others + 5 * (6 - 6 / 2**8) * expert + positions)


@pytest.mark.parametrize("tokens", [1, 2, 8, 100])
def test_number_of_experts_equals_that_of_random_choices(tokens):
    config = PRESETS["gemma-4-26b-a4b"]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(400, tokens, 128, generator=generator).topk(8).indices.flatten(1)
    counts = torch.zeros(400, 128).scatter_(1, chosen, 1).sum(1)
    error = 4 * counts.std() / 400**0.5
    assert abs(counts.mean() - experts_read(config, tokens)) <= error + 1e-9
    assert experts_read(config, 1) == 8


def test_active_parameters_are_those_of_a_token():
    config = PRESETS["gemma-4-26b-a4b"]
    idle = 30 * 120 * 3 * 704 * 2816
    assert config.num_parameters - config.num_active_parameters == idle
    assert round(config.num_active_parameters / 1e9, 2) == 3.82
    assert GEMMA.num_active_parameters == GEMMA.num_parameters


def test_random_gemma_4_of_every_size_is_found():
    for name in ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b"):
        assert find(name).config == PRESETS[name]
