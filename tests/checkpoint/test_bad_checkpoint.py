"""Checks that bad safetensors checkpoints are refused before weights are read, with an error that
names the fault."""

import json
import random
from collections.abc import Callable

import pytest
import torch
from checkpoints import config_json, random_tensors, split, write_index, write_safetensors
from safetensors.torch import save_file

from gemma_fast.checkpoint.hub import MAX_JSON
from gemma_fast.checkpoint.open import open_checkpoint

SHARD_1 = "model-00001-of-00002.safetensors"
SHARD_2 = "model-00002-of-00002.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({UP: None}, f"tensor {UP} is missing"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)}, r"layers\.2\.mlp.* is unknown"),
        ({"lm_head.bias": torch.ones(12)}, r"lm_head\.bias is unknown"),
        ({UP: torch.ones(64, 96)}, rf"model\.safetensors: tensor {UP} has shape \(64, 96\)"),
        ({UP: torch.ones(96 * 64)}, rf"tensor {UP} has shape \(6144,\).* requires \(96, 64\)"),
        ({UP: torch.ones(96, 64, dtype=torch.int8)}, f"tensor {UP} has dtype I8"),
        ({UP: torch.ones(96, 64, dtype=torch.int64)}, f"tensor {UP} has dtype I64"),
        ({UP: torch.ones(96, 64).to(torch.float8_e4m3fn)}, f"tensor {UP} has dtype F8_E4M3"),
        ({f"language_model.{UP}": torch.ones(96, 64)}, f"tensor {UP} is in .* as well"),
    ],
    ids=[
        "missing", "extra-layer", "extra-tensor", "transposed", "flat", "int8", "int64", "fp8",
        "duplicate",
    ],
)  # fmt: skip
def test_tensors_must_match_the_config(tmp_path, change, match):
    tensors = random_tensors("gemma3") | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_safetensors(tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=match):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["", None, 5, b"model"], ids=repr)
def test_name_must_be_a_path_or_a_hub_id(name):
    with pytest.raises(ValueError, match="is neither a path nor a hub id"):
        open_checkpoint(name)


def test_tensors_of_another_family_are_refused(tmp_path):
    write_safetensors(tmp_path, tensors=random_tensors("gemma2"))
    with pytest.raises(ValueError, match=r"q_norm\.weight is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors", "/etc/outside.safetensors", "..\\outside.safetensors",
        "C:outside.safetensors", "sub/inside.safetensors", "..", "", "model.bin", "a\0.safetensors",
        "pytorch_model.bin", 7, None, ["model.safetensors"],
    ],
    ids=repr,
)  # fmt: skip
def test_shard_names_must_be_plain_file_names(tmp_path, shard):
    directory = tmp_path / "model"
    directory.mkdir()
    tensors = write_safetensors(directory)
    weight_map = split(directory, tensors)
    (directory / "sub").mkdir()
    for outside in (tmp_path / "outside.safetensors", directory / "sub" / "inside.safetensors"):
        save_file({UP: tensors[UP]}, outside)
    write_index(directory, weight_map | {UP: shard})
    with pytest.raises(ValueError, match=r"index\.json: .* is not the name of a \.safetensors"):
        open_checkpoint(directory)


def test_shards_must_exist(tmp_path):
    split(tmp_path, write_safetensors(tmp_path))
    (tmp_path / SHARD_2).unlink()
    with pytest.raises(FileNotFoundError, match=f"{SHARD_2} does not exist"):
        open_checkpoint(tmp_path)


def test_shards_must_contain_the_tensors_that_the_index_lists(tmp_path):
    weight_map = split(tmp_path, write_safetensors(tmp_path))
    other = {SHARD_1: SHARD_2, SHARD_2: SHARD_1}[weight_map[UP]]
    write_index(tmp_path, weight_map | {UP: other})
    with pytest.raises(ValueError, match=rf"{other}: tensor {UP} is missing"):
        open_checkpoint(tmp_path)


def test_shards_must_not_share_a_tensor(tmp_path):
    tensors = write_safetensors(tmp_path)
    split(tmp_path, tensors)
    for shard in (SHARD_1, SHARD_2):
        save_file(tensors, tmp_path / shard)
    with pytest.raises(ValueError, match=rf"{SHARD_2}: tensor .* is in .*{SHARD_1} as well"):
        open_checkpoint(tmp_path)


def test_shards_must_have_an_index(tmp_path):
    split(tmp_path, write_safetensors(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=f"neither .*index.json .shards: {SHARD_1}, {SHARD_2}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors"], ids=repr)
def test_index_must_have_a_weight_map(tmp_path, weight_map):
    split(tmp_path, write_safetensors(tmp_path))
    write_index(tmp_path, weight_map)
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        open_checkpoint(tmp_path)


BAD_JSON = {
    "empty": (b"", "is not valid JSON"),
    "truncated": (b'{"model_type": "gem', "is not valid JSON"),
    "binary": (b"\xff\xfe\x00", "is not valid JSON"),
    "deeply-nested": (b"[" * 100_000, "is not valid JSON"),
    "long-number": (b'{"a": 1' + b"0" * 9999 + b"}", "is not valid JSON"),
    "list": (b"[]", "must contain a JSON object, not a list"),
    "null": (b"null", "must contain a JSON object, not a NoneType"),
    "too-large": (b" " * (MAX_JSON + 1), f"is {MAX_JSON + 1} bytes long"),
}


@pytest.mark.parametrize("case", BAD_JSON)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_json_files_must_contain_a_valid_object(tmp_path, name, case):
    split(tmp_path, write_safetensors(tmp_path))
    content, match = BAD_JSON[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {match}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not one of gemma, gemma2, gemma3"),
        ({"hidden_size": "64"}, "hidden_size='64' must be an integer"),
        ({"hidden_size": -64}, "hidden_size=-64 must be"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 must be"),
        ({"vocab_size": 2**62}, "vocab_size=4611686018427387904 must be"),
        ({"intermediate_size": 2**18}, r"has shape \(96, 64\), but .* requires \(262144, 64\)"),
    ],
    ids=["family", "type", "negative", "layers", "vocabulary", "larger-than-the-file"],
)
def test_config_must_be_valid(tmp_path, change, match):
    write_safetensors(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_json("gemma3") | change))
    with pytest.raises(ValueError, match=match) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_config_must_exist(tmp_path):
    write_safetensors(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r" has no config\.json"):
        open_checkpoint(tmp_path)


BREAKAGES: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "truncated": lambda content, rng: content[: rng.randrange(len(content))],
    "trailing-bytes": lambda content, rng: content + bytes(rng.randrange(1, 99)),
    "random-header-length": lambda content, rng: bytearray(rng.randbytes(8)) + content[8:],
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_damaged_safetensors_are_refused(tmp_path, breakage):
    write_safetensors(tmp_path)
    file = tmp_path / "model.safetensors"
    whole, rng = file.read_bytes(), random.Random(0)
    for _ in range(50):
        file.write_bytes(BREAKAGES[breakage](bytearray(whole), rng))
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors"):
            open_checkpoint(tmp_path)


def test_directories_without_weights_are_refused(tmp_path):
    write_safetensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*shards: none"):
        open_checkpoint(tmp_path)


def test_an_adapter_beside_the_model_is_refused(tmp_path):
    write_safetensors(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: adapters are not supported"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("way", ["head", "embedding", "both"])
def test_a_damaged_head_is_refused(tmp_path, way):
    """Values of another shape must not be compared, and NaN does not equal NaN."""
    tensors = write_safetensors(tmp_path)
    changed = {"lm_head.weight": torch.full((12, 64), torch.nan)}
    if way != "head":
        changed["model.embed_tokens.weight"] = torch.zeros(3, 5)
    if way == "both":
        changed["lm_head.weight"] = torch.zeros(3, 5)
    save_file(tensors | changed, tmp_path / "model.safetensors")
    if way == "head":
        assert not open_checkpoint(tmp_path).config.tie_word_embeddings
        return
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \(3, 5\)"):
        open_checkpoint(tmp_path)
