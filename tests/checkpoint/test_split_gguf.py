"""Checks that the parts of a split GGUF file are read. Also checks that parts that do not belong
together are refused."""

import gguf
import pytest
from checkpoints import assert_holds, config_json, random_tensors, write_gguf, write_metadata

from gemma_fast.checkpoint.config_json import config_from_json
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.text.tokenizer import Tokenizer

NAME = "model-{:05}-of-00003.gguf"


def write_parts(path, change=None):
    """Writes a model in three parts, as gguf-split does: only the first part has the model's
    metadata. change: part → {key: value} that replaces the part's split metadata. Returns the path
    of the first part, and the tensors."""
    tensors = random_tensors("gemma3")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 2)
    for part in range(3):
        writer = gguf.GGUFWriter(path / NAME.format(part + 1), "gemma3")
        if part == 0:
            write_metadata(writer, config_from_json(config_json("gemma3")))
        split = {"split.no": part, "split.count": 3, "split.tensors.count": len(tensors)}
        for key, value in (split | (change or {}).get(part, {})).items():
            writer.add_uint16(key, value)
        for name, tensor in list(tensors.items())[part::3]:
            data = (tensor + 1 if tensor.dim() == 1 else tensor).numpy()
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path / NAME.format(1), tensors


def test_parts_beside_the_first_are_read(tmp_path):
    first, tensors = write_parts(tmp_path)
    checkpoint = open_checkpoint(first)
    assert_holds(checkpoint, tensors, atol=5e-7)
    assert {file.name for file in checkpoint.files.values()} == {NAME.format(i) for i in (1, 2, 3)}


@pytest.mark.parametrize("load", [open_checkpoint, Tokenizer.from_pretrained])
def test_another_part_is_refused_with_the_name_of_the_first(tmp_path, load):
    write_parts(tmp_path)
    with pytest.raises(
        ValueError, match=r"part 2 of 3 .* pass the first part, model-00001-of-00003"
    ):
        load(tmp_path / NAME.format(2))


def test_a_missing_part_is_named(tmp_path):
    first, _ = write_parts(tmp_path)
    (tmp_path / NAME.format(3)).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00003-of-00003\.gguf does not exist"):
        open_checkpoint(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: {"split.count": 2}}, r"split\.count=2 and .* the name says the first of 3"),
        ({0: {"split.no": 1}}, r"split\.no=1, but the name says the first of 3"),
        ({1: {"split.count": 2}}, r"00002.*split\.count=2 must be 3"),
        ({2: {"split.no": 1}}, r"00003.*split\.no=1 must be 2"),
        ({0: {"split.tensors.count": 7}}, r"split\.tensors\.count=7, but the parts have"),
    ],
    ids=str,
)
def test_parts_that_disagree_are_refused(tmp_path, change, message):
    first, _ = write_parts(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(first)


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    first, _ = write_parts(tmp_path)
    third = (tmp_path / NAME.format(3)).read_bytes()
    second = third.replace(b"split.no\x02\x00\x00\x00\x02", b"split.no\x02\x00\x00\x00\x01")
    assert second != third
    (tmp_path / NAME.format(2)).write_bytes(second)
    with pytest.raises(ValueError, match=r"00003.*is in .*00002.* as well"):
        open_checkpoint(first)


def test_a_part_that_is_renamed_is_refused(tmp_path):
    first, _ = write_parts(tmp_path)
    first.rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"split\.count=3 .*, but the name says the first of 1"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_directory_with_only_gguf_files_says_so(tmp_path):
    write_parts(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(ValueError, match="pass the path of model-00001-of-00003"):
        open_checkpoint(tmp_path)


def test_a_truncated_part_is_refused(tmp_path):
    first, _ = write_parts(tmp_path)
    second = tmp_path / NAME.format(2)
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00002.* is not a readable GGUF file"):
        open_checkpoint(first)


def test_a_merged_file_has_a_count_of_zero(tmp_path):
    """gguf-split --merge writes split.count = 0."""
    tensors = write_gguf(tmp_path / "a.gguf", keys={"split.no": 0, "split.count": 0})
    assert_holds(open_checkpoint(tmp_path / "a.gguf"), tensors, atol=5e-7)
