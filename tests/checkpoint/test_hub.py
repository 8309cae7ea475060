"""Checks the files to which a path or a hub id resolves, in the Hub's cache or after a download.
Also checks that bad names are refused."""

from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from checkpoints import assert_holds, split, write_gguf, write_safetensors
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.hub import resolve
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.text.tokenizer import Tokenizer


def test_paths_resolve_to_themselves(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    assert resolve(tmp_path / "a.gguf") == tmp_path / "a.gguf"


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """Turns off the network, and uses an empty hub cache. Returns the path of the cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_cache_is_read_through_its_symlinks(offline):
    repo = offline / "models--owner--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / commit
    for folder in (blobs, snapshot, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    tensors = write_safetensors(blobs)
    split(blobs, tensors)
    for i, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    assert_holds(open_checkpoint("owner/tiny"), tensors)


def test_pickles_are_not_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repo_id: str, **kwargs) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/model") == tmp_path
    assert asked["repo_id"] == "owner/model"
    files = ["config.json", "model.safetensors", "chat_template.jinja", "pytorch_model.bin", "a.py"]
    taken = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"])
    assert list(taken) == files[:3]


@pytest.mark.parametrize("load", [GemmaForCausalLM.from_pretrained, Tokenizer.from_pretrained])
def test_options_of_a_download_are_passed_on(monkeypatch, tmp_path, load):
    asked = {}

    def snapshot_download(repo_id: str, **kwargs) -> str:
        asked.update(kwargs)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    options = {"revision": "v2", "token": "hf_x", "cache_dir": "here", "local_files_only": True}
    with pytest.raises(FileNotFoundError):
        load("owner/model", **options)
    del asked["allow_patterns"]
    assert asked == options


def test_error_for_an_offline_hub_id_suggests_a_local_path(offline):
    with pytest.raises(OSError, match=r"owner/absent .*LocalEntryNotFoundError.*pass the path of"):
        resolve("owner/absent")


def test_error_for_a_gated_hub_id_suggests_a_login(monkeypatch):
    def snapshot_download(*_, **__):
        raise GatedRepoError("401", response=Mock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        OSError, match=r"https://huggingface.co/owner/gated and run `hf auth login`"
    ):
        resolve("owner/gated")


@pytest.mark.parametrize("name", ["a.bin", "/absent/a.pth", "owner/a.pt", "./a.ckpt"])
def test_pickles_are_refused(name):
    with pytest.raises(ValueError, match="is a pickle, which can run code: convert it to safetens"):
        resolve(name)


def test_directories_of_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model-00001-of-00002\.bin is a pickle"):
        resolve(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert resolve(tmp_path) == tmp_path


def test_single_files_other_than_gguf_are_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors is neither a directory"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["absent", "./absent/model", "a/b/c", "/absent", "a/b.gguf", "../a/b"]
)
def test_missing_paths_are_not_treated_as_hub_ids(name):
    with pytest.raises(FileNotFoundError, match="does not exist, and is not a hub id"):
        resolve(name)
