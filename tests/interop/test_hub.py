"""Models from the hub: its cache is used, only safe files are asked for, and what cannot be had is said."""

import shutil

import numpy as np
import pytest
from golden.pipeline_cases import write_pipeline

import vdiff_jax as vd
from vdiff_jax.interop import hub


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_model_in_the_cache_is_loaded_without_a_network(offline, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--tiny-video"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    folder = write_pipeline("modelscope", tmp_path / "written")
    shutil.copytree(folder, repository / "snapshots" / commit)
    model = vd.load("owner/tiny-video", cache_dir=tmp_path)
    assert model.digest == vd.load(folder).digest
    with pytest.raises(FileNotFoundError, match="no folder 'owner/other' here, and the hub does not give it"):
        vd.load("owner/other", cache_dir=tmp_path)


def test_only_weights_and_texts_are_asked_for(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="owner/name on the hub has no plain safetensors weights"):
        hub.download("owner/name")
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert hub.download("owner/name", revision="v1") == tmp_path
    assert asked["name"] == "owner/name" and asked["revision"] == "v1"
    assert not any("bin" in pattern or "ckpt" in pattern for pattern in asked["allow_patterns"])
    assert "*.fp16*" in asked["ignore_patterns"]
    hub.download("owner/name", parts=("unet",))
    assert set(asked["allow_patterns"]) == {"model_index.json", "unet/*.json", "unet/*.txt", "unet/*.model"} | {
        "unet/*.safetensors*"
    }
    hub.download("owner/name", variant="fp16")
    assert "*.fp16*.safetensors*" in asked["allow_patterns"] and asked["ignore_patterns"] is None


def test_names_of_the_hub_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert hub.is_hub_name("owner/name") and hub.is_hub_name("damo-vilab/text-to-video-ms-1.7b")
    assert not any(map(hub.is_hub_name, ("shapes", "runs/mine", "/a/b", "a/b/c", "./a", np.str_("a b/c"))))
