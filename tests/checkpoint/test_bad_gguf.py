"""Checks that bad GGUF files raise ValueError with the file's name. The files are built byte by
byte here."""

import struct

import gguf
import numpy as np
import pytest
from checkpoints import random_tensors, write_gguf
from gguf import GGMLQuantizationType as Type

from gemma_fast.checkpoint.gguf_reader import MAX_ARRAY, MAX_STRING, GGUFFile
from gemma_fast.checkpoint.open import open_checkpoint

U8, U32, STRING, ARRAY = 0, 4, 8, 9
F32, Q8_0 = 0, 8
HUGE = (1 << 64) - 1
UP = "blk.1.ffn_up.weight"


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: bytes) -> bytes:
    return u64(len(text)) + text


def field(value: bytes, name: bytes = b"key") -> bytes:
    return string(name) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return field(u32(ARRAY) + u32(kind) + u64(count) + items)


def tensor(*dims: int, kind: int = F32, offset: int = 0, name: bytes = b"t") -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def file(*fields: bytes, tensors: tuple[bytes, ...] = (), data: bytes = bytes(256)) -> bytes:
    header = b"GGUF" + u32(3) + u64(len(tensors)) + u64(len(fields)) + b"".join(fields + tensors)
    return header + bytes(-len(header) % 32) + data


def tensors(*infos: bytes) -> bytes:
    return file(tensors=infos)


one = field(u32(U32) + u32(1))
BAD = {
    "empty": (b"", "empty"),
    "shorter-than-the-magic": (b"GG", "truncated"),
    "wrong-magic": (b"PK\x03\x04" + bytes(99), "magic"),
    "old-version": (b"GGUF" + u32(1) + bytes(16), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + bytes(99), "byte order"),
    "too-many-fields": (b"GGUF" + u32(3) + u64(0) + u64(HUGE) + one, "truncated"),
    "too-many-tensors": (b"GGUF" + u32(3) + u64(HUGE) + u64(0) + tensor(8), "truncated"),
    "long-key": (file(u64(HUGE)), f"a string of {HUGE} bytes"),
    "long-string": (file(field(u32(STRING) + u64(1 << 40))), f"a string of {1 << 40} bytes"),
    "string-past-end": (file(field(u32(STRING) + u64(9999))), "truncated"),
    "bad-field-type": (file(field(u32(99))), "99.* is not a valid GGUFValueType"),
    "key-not-utf8": (file(field(u32(U32) + u32(1), b"\xff")), "utf-8"),
    "string-not-utf8": (file(field(u32(STRING) + string(b"\xff"))), "utf-8"),
    "item-not-utf8": (file(array(STRING, 1, string(b"\xff"))), "utf-8"),
    "name-not-utf8": (tensors(tensor(8, name=b"\xff")), "utf-8"),
    "duplicate-key": (file(one, one), "Duplicate key"),
    "duplicate-tensor": (tensors(tensor(8), tensor(8)), "duplicated tensor with name t"),
    "long-array": (file(array(U8, HUGE, b"")), f"an array of {HUGE} items"),
    "long-string-array": (file(array(STRING, 1 << 62, b"")), f"an array of {1 << 62} items"),
    "array-past-end": (file(array(U32, MAX_ARRAY, bytes(64))), "truncated"),
    "string-array-past-end": (file(array(STRING, 99, string(b"a"))), "truncated"),
    "long-item": (file(array(STRING, 1, u64(HUGE))), f"a string of {HUGE} bytes"),
    "item-past-end": (file(array(STRING, 1, u64(9999))), "a string of 9999 bytes"),
    "nested-array": (file(array(ARRAY, 1, u32(ARRAY) + u64(1))), "an array of ARRAY"),
    "no-dims": (tensors(tensor()), "'t' has 0 dimensions"),
    "too-many-dims": (tensors(tensor(1, 1, 1, 1, 8)), "'t' has 5 dimensions"),
    "huge-number-of-dims": (tensors(string(b"t") + u32(1 << 31)), "truncated"),
    "zero-dim": (tensors(tensor(8, 0)), "does not fit"),
    "large-dim": (tensors(tensor(1 << 62)), "does not fit"),
    "dims-overflow-to-0": (tensors(tensor(1 << 32, 1 << 32)), "does not fit"),
    "dims-overflow-to-8": (tensors(tensor((1 << 61) + 1, 8)), "does not fit"),
    "tensor-past-end": (tensors(tensor(65)), "truncated"),
    "offset-past-end": (tensors(tensor(8, offset=1 << 40)), "does not fit"),
    "offset-overflow": (tensors(tensor(8, offset=HUGE - 31)), "does not fit"),
    "bad-tensor-type": (tensors(tensor(8, kind=200)), "200.* is not a valid GGMLQuantizationType"),
    "partial-block": (tensors(tensor(33, 2, kind=Q8_0)), "not a multiple of Q8_0 block size"),
    "bad-alignment": (file(field(u32(U32) + u32(3), b"general.alignment")), "alignment"),
    "alignment-of-wrong-type": (file(field(u32(U8) + b"\x20", b"general.alignment")), "alignment"),
}  # fmt: skip


def test_valid_files_from_the_same_builder_are_read(tmp_path):
    path = tmp_path / "good.gguf"
    long = field(u32(STRING) + string(b"b" * MAX_STRING), b"long")
    infos = tensor(32, 2, kind=Q8_0), tensor(8, 8, name=b"u")
    path.write_bytes(file(long, array(STRING, 2, string(b"c") * 2), tensors=infos))
    good = GGUFFile(path)
    assert good.metadata == {"long": "b" * MAX_STRING, "key": ["c", "c"]}
    assert [(t.name, t.shape.tolist()) for t in good.tensors] == [("t", [32, 2]), ("u", [8, 8])]


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused(tmp_path, case):
    content, match = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.gguf is not a readable GGUF file: .*{match}"):
        GGUFFile(path)


def test_error_for_a_missing_file_contains_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        GGUFFile(tmp_path / "absent.gguf")


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "cut.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    header = GGUFFile(path).data_offset
    for length in [*range(0, header, 7), *range(header, len(whole), 9973), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is not a readable GGUF file"):
            open_checkpoint(path)


def test_other_architectures_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"model\.gguf: .*'llama' is not one of gemma, gemma2"):
        open_checkpoint(tmp_path / "model.gguf")


def test_tensors_must_match_the_config(tmp_path):
    path, name = tmp_path / "model.gguf", "model.layers.1.mlp.up_proj.weight"
    tensors = random_tensors("gemma2")

    write_gguf(path, "gemma2", {key: t for key, t in tensors.items() if key != name})
    with pytest.raises(ValueError, match=rf"model\.gguf: tensor {name} is missing"):
        open_checkpoint(path)
    write_gguf(path, "gemma2", tensors | {name: tensors[name].T.contiguous()})
    with pytest.raises(ValueError, match=rf"{name} has shape \(64, 96\), .* requires \(96, 64\)"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("blk.2.ffn_up.weight", r"model\.layers\.2\.mlp\.up_proj\.weight is unknown"),
        ("blk.01.ffn_up.weight", r"blk\.01\.ffn_up\.weight is unknown: gemma2 has"),
        ("blk.1.ffn_up.bias", r"blk\.1\.ffn_up\.bias is unknown"),
        ("blk.1.attn_q_norm.weight", r"blk\.1\.attn_q_norm\.weight is unknown"),
        ("model.norm.weight", r"model\.norm\.weight is unknown"),  # its name in transformers
        ("token_embd", "token_embd is unknown"),
    ],
)
def test_unknown_tensors_are_refused(tmp_path, name, match):
    path = tmp_path / "model.gguf"
    write_gguf(path, "gemma2", extra={name: np.ones(8, np.float32)})
    with pytest.raises(ValueError, match=rf"model\.gguf: tensor {match}"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", [Type.I8, Type.I32, Type.F64], ids=lambda kind: kind.name)
def test_types_that_cannot_be_dequantized_are_refused(tmp_path, kind):
    dtype = {Type.I8: np.int8, Type.I32: np.int32, Type.F64: np.float64}[kind]
    path = tmp_path / "model.gguf"
    write_gguf(path, quantize=lambda t: (t.numpy().astype(dtype), kind))
    with pytest.raises(ValueError, match=f"embed_tokens.weight has type {kind.name}, which the"):
        open_checkpoint(path)
