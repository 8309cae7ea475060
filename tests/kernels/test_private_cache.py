"""Tests that the cache folder is private: it is refused if another user could change its content.

Only root can give a folder to another user, so tests replace the owner that lstat returns.
"""

import os
import stat
from pathlib import Path

import pytest

from gemma_fast.kernels.cpu.private_cache import private_directory

SAFE_MODES = [0o700, 0o755, 0o500, 0o711]
UNSAFE_MODES = [0o770, 0o720, 0o702, 0o777, 0o1777]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Returns the folder, which does not exist yet. Its parent and grandparent do not, either."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    return tmp_path / "home" / "cache" / "gemma_fast"


@pytest.fixture
def disown(monkeypatch):
    """Returns a function that makes another user the owner of a folder, for this test."""
    foreign, lstat = [], Path.lstat

    def owned(path):
        status = lstat(path)
        return os.stat_result(
            x + 12345 if i == stat.ST_UID and path in foreign else x for i, x in enumerate(status)
        )

    monkeypatch.setattr(Path, "lstat", owned)
    return foreign.append


def test_new_folders_are_private(cache):
    old = os.umask(0)
    try:
        assert private_directory() == cache
    finally:
        os.umask(old)
    for folder in (cache, cache.parent, cache.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert private_directory() == cache


def test_home_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert private_directory() == tmp_path / ".cache" / "gemma_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert private_directory() == tmp_path / ".cache" / "gemma_fast"


@pytest.mark.parametrize("mode", SAFE_MODES, ids=oct)
def test_folder_that_others_cannot_write_is_used(cache, mode):
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert private_directory() == cache


@pytest.mark.parametrize("mode", UNSAFE_MODES, ids=oct)
def test_folder_that_others_can_write_is_refused(cache, mode):
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert private_directory() is None
    assert stat.S_IMODE(cache.stat().st_mode) == mode


@pytest.mark.parametrize("mode", UNSAFE_MODES, ids=oct)
def test_folder_above_needs_the_sticky_bit_if_others_can_write(cache, mode):
    home = cache.parent.parent
    home.mkdir()
    home.chmod(mode)
    sticky = bool(mode & stat.S_ISVTX)
    assert private_directory() == (cache if sticky else None)
    assert cache.parent.exists() == sticky, "nothing is created in a folder that is not safe"


def test_folder_of_another_user_is_refused(cache, disown):
    assert private_directory() == cache
    disown(cache)
    assert private_directory() is None


def test_nothing_is_created_in_a_folder_of_another_user(cache, disown):
    """With sudo, which may keep HOME, root must neither trust the user's files nor create some."""
    cache.parent.parent.mkdir()
    disown(cache.parent.parent)
    assert private_directory() is None
    assert not cache.parent.exists()


def test_symlinks_above_are_resolved(cache, tmp_path):
    (tmp_path / "disk").mkdir()
    cache.parent.parent.mkdir()
    cache.parent.symlink_to(tmp_path / "disk")
    assert private_directory() == tmp_path / "disk" / "gemma_fast"
    (tmp_path / "disk").chmod(0o777)
    assert private_directory() is None


def test_symlink_is_refused(cache, tmp_path):
    (tmp_path / "other").mkdir()
    cache.parent.mkdir(parents=True)
    cache.symlink_to(tmp_path / "other")
    assert private_directory() is None


def test_none_without_a_place(cache, tmp_path, monkeypatch):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    assert private_directory() is None
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    monkeypatch.setenv("XDG_CACHE_HOME", str(loop))
    assert private_directory() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such/place")
    assert private_directory() is None
    monkeypatch.setattr(os, "name", "nt")
    assert private_directory() is None
