"""Tests that demo weights are assembled and verified, and that errors leave no file behind."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from gemma_fast import demo

CONTENT = [b"GGUF", b"weights" * 500, b"", b"the end"]
DAMAGES = ["empty", "truncated", "wrong bytes"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gemma_fast"


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """Replaces the demo packages by small ones, and returns the folder of the small packages."""
    parts = {f"fake_demo_part{i}": f"{demo.NAME}.part{i:02}" for i in range(len(CONTENT))}
    for (package, name), content in zip(parts.items(), CONTENT, strict=True):
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('imported')")
        (tmp_path / package / "data" / name).write_bytes(content)
    monkeypatch.setattr(demo, "PARTS", parts)
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(b"".join(CONTENT)).hexdigest())
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*"))


def test_parts_are_assembled_in_order(site, cache):
    path = demo.demo_checkpoint()
    assert path == cache / demo.NAME
    assert path.read_bytes() == b"".join(CONTENT)
    assert files(cache) == [demo.NAME]


def test_intact_file_is_used_without_the_packages(site, cache, monkeypatch):
    before = demo.demo_checkpoint().stat()
    monkeypatch.setattr(demo, "PARTS", {"no_such_package": "no such file"})
    after = demo.demo_checkpoint().stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("damaged", [b"", b"GGUF", b"x" * len(b"".join(CONTENT))], ids=DAMAGES)
def test_damaged_file_is_replaced(site, cache, damaged):
    cache.mkdir(parents=True)
    (cache / demo.NAME).write_bytes(damaged)
    assert demo.demo_checkpoint().read_bytes() == b"".join(CONTENT)


def test_several_callers_can_assemble_the_file_at_once(site, cache):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: demo.demo_checkpoint(), range(32)))
    assert set(paths) == {cache / demo.NAME}
    assert files(cache) == [demo.NAME]


def test_error_for_a_missing_package_names_the_extra(site, cache, monkeypatch):
    monkeypatch.setattr(demo, "PARTS", {"no_such_package": "no such file"})
    with pytest.raises(ModuleNotFoundError, match=r'no_such_package.*"gemma_fast\[demo\]"'):
        demo.demo_checkpoint()
    assert not cache.exists()


@pytest.mark.parametrize("damaged", [b"", b"weights", b"WEIGHTS" * 500], ids=DAMAGES)
def test_damaged_part_is_refused(site, cache, damaged):
    part = site / "fake_demo_part1" / "data" / demo.PARTS["fake_demo_part1"]
    part.write_bytes(damaged)
    found = hashlib.sha256(b"".join([CONTENT[0], damaged, *CONTENT[2:]])).hexdigest()
    with pytest.raises(ValueError, match=f"expected sha256 {demo.SHA256}, found {found}") as error:
        demo.demo_checkpoint()
    assert demo.NAME in str(error.value)
    assert str(part) in str(error.value)
    assert files(cache) == []


def test_missing_part_leaves_no_file(site, cache):
    (site / "fake_demo_part3" / "data" / demo.PARTS["fake_demo_part3"]).unlink()
    with pytest.raises(FileNotFoundError, match="part03"):
        demo.demo_checkpoint()
    assert files(cache) == []


@pytest.mark.skipif(not all(map(find_spec, demo.PARTS)), reason='needs the extra "demo"')
def test_real_weights_are_assembled(cache):
    path = demo.demo_checkpoint()
    assert path.stat().st_size == 253_113_024
    assert path.read_bytes()[:4] == b"GGUF"
