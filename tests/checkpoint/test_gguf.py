"""Checks that valid GGUF files are read: files of each family, every type that can be
dequantized, and metadata of every type."""

import gc
import sys

import gguf
import numpy as np
import pytest
import torch
from checkpoints import ALL_FAMILIES, assert_holds, random_tensors, read, write_gguf
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from torch import Tensor

from gemma_fast.checkpoint import gguf as gguf_checkpoint
from gemma_fast.checkpoint import gguf_reader
from gemma_fast.checkpoint.gguf_reader import GGUFFile, open_gguf
from gemma_fast.checkpoint.open import open_checkpoint

NOT_FLOAT = (Type.I8, Type.I16, Type.I32, Type.I64)
NOT_DEQUANTIZED = (*NOT_FLOAT, Type.F64, Type.Q1_0, Type.Q8_1, Type.Q8_K)


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Shrinks BLOCK to a few rows, so tiny tensors need several blocks, and the last is partial."""
    monkeypatch.setattr(gguf_checkpoint, "BLOCK", 5 * 256)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize(
    "kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0], ids=lambda k: k.name
)
def test_files_in_the_format_of_llama_cpp_are_read(tmp_path, small_blocks, family, kind):
    path = tmp_path / "model.gguf"
    tensors = write_gguf(path, family, quantize=lambda t: (quantize(t.numpy(), kind), kind))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.model_type == family
    assert checkpoint.path == path
    assert checkpoint.dtype is None
    assert checkpoint.generation_config == {}
    expected = {
        name: tensor
        if tensor.dim() == 1
        else torch.from_numpy(dequantize(quantize(tensor.numpy(), kind), kind))
        for name, tensor in tensors.items()
    }
    assert_holds(checkpoint, expected, atol=5e-7)  # rounding of (1 + weight) - 1 in fp32


def test_one_is_subtracted_from_norms_before_rounding(tmp_path):
    name = "model.layers.0.self_attn.q_norm.weight"
    tensors = random_tensors("gemma3")
    tensors[name] = torch.linspace(-1, 1, 32) * 1e-2  # bf16(1 + weight) would lose most digits
    write_gguf(tmp_path / "model.gguf", tensors=tensors)
    norm = read(open_checkpoint(tmp_path / "model.gguf"), name, torch.bfloat16)
    torch.testing.assert_close(norm, tensors[name].bfloat16(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(set(Type) - set(NOT_DEQUANTIZED)), ids=lambda k: k.name)
def test_each_quantization_type_is_read(tmp_path, small_blocks, kind):
    def random_blocks(tensor: Tensor) -> tuple[np.ndarray, Type]:
        block, n_bytes = GGML_QUANT_SIZES[kind]
        shape = tensor.shape[0], tensor.shape[1] // block * n_bytes
        # random bytes are read as floats (values or scales of blocks); bytes < 60 keep them below 1
        data = np.random.default_rng(0).integers(0, 60, shape, np.uint8)
        stored.append(data)
        return data.view(np.dtype(PLAIN.get(kind, np.uint8))), kind

    stored: list[np.ndarray] = []
    path = tmp_path / "model.gguf"
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128, "num_hidden_layers": 1}
    tensors = write_gguf(path, "gemma", quantize=random_blocks, **sizes)
    checkpoint = open_checkpoint(path)
    matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    assert len(matrices) == len(stored) == 8
    for name, data in zip(matrices, stored, strict=True):
        expected = torch.from_numpy(dequantize(data, kind))
        torch.testing.assert_close(read(checkpoint, name), expected, rtol=0, atol=0)


PLAIN = {Type.F32: np.float32, Type.F16: np.float16}


def test_rope_freqs_without_an_effect_are_ignored(tmp_path):
    factors = np.ones(16, np.float32)
    tensors = write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})
    assert_holds(open_checkpoint(tmp_path / "model.gguf"), tensors, atol=5e-7)
    factors[3] = 2
    write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight scales rotary frequencies"):
        open_checkpoint(tmp_path / "model.gguf")


def test_metadata_of_every_type_is_read(tmp_path):
    values = {
        "a.uint8": 200, "a.int8": -100, "a.uint16": 60000, "a.int16": -30000, "a.uint32": 1 << 31,
        "a.int32": -(1 << 31), "a.uint64": 1 << 63, "a.int64": -(1 << 63), "a.float32": 0.5,
        "a.float64": 0.1, "a.bool": True, "a.string": "▁é\n", "a.array": [1, -2, 3],
    }  # fmt: skip
    lists = {"b.floats": [0.5, -1.0], "b.bools": [True, False], "b.strings": ["", "é", "▁" * 99]}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "any")
    for name, value in values.items():
        getattr(writer, f"add_{name.removeprefix('a.')}")(name, value)
    for name, value in lists.items():
        writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(tmp_path / "a.gguf")
    assert file.metadata == {"general.architecture": "any"} | values | lists
    assert [type(value) for value in file.metadata["b.bools"]] == [bool, bool]


def test_items_of_arrays_are_not_read_one_by_one(tmp_path, monkeypatch):
    """The package's own reader calls _get for each item: 9 s for this vocabulary."""
    write_gguf(tmp_path / "model.gguf", "gemma", vocab_size=262_144, hidden_size=32)
    calls, get = [], GGUFFile._get

    def counted(*args, **kwargs):
        calls.append(args)
        return get(*args, **kwargs)

    monkeypatch.setattr(GGUFFile, "_get", counted)
    metadata = GGUFFile(tmp_path / "model.gguf").metadata
    assert 100 < len(calls) < 2000
    assert metadata["tokenizer.ggml.tokens"][-1] == "▁tokén 262143"
    assert metadata["tokenizer.ggml.scores"][-1] == -262143.0


def test_error_without_the_package_gguf_names_the_extra(tmp_path, monkeypatch):
    for name in ("gguf", "gguf_reader"):
        monkeypatch.delitem(sys.modules, f"gemma_fast.checkpoint.{name}")
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ImportError, match=r'pip install "gemma_fast\[gguf\]"'):
        open_checkpoint(tmp_path / "model.gguf")


def test_demo_weights_are_read(demo_gguf):
    checkpoint = open_checkpoint(demo_gguf)
    assert checkpoint.config.num_parameters == 268_098_176
    norm = read(checkpoint, "model.norm.weight")
    assert norm[:3].tolist() == [6.125, 8.5625, 46.0]
    k_proj = read(checkpoint, "model.layers.17.self_attn.k_proj.weight", torch.bfloat16)
    assert k_proj.isfinite().all()
    assert 0.01 < k_proj.float().std() < 0.1


def test_file_in_use_is_parsed_once(tmp_path):
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    write_gguf(path, "gemma")
    file = open_gguf(path)
    assert open_gguf(str(path)) is file
    write_gguf(other, "gemma3")
    other.replace(path)
    changed = open_gguf(path)
    assert changed.metadata["general.architecture"] == "gemma3"
    assert file.metadata["general.architecture"] == "gemma"
    assert open_gguf(path) is changed
    del file, changed
    gc.collect()
    assert not [file for file in gguf_reader._files.values() if file.path == path]
