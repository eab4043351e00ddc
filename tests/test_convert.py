"""convert.py: public models to our format and back, told beforehand, nothing half-written."""

import numpy as np
import pytest
from golden.pipeline_cases import write_pipeline
from safetensors.numpy import load_file, save_file
from script_runner import run_scripts

import vdiff_jax as vd


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline("modelscope", tmp_path_factory.mktemp("public") / "modelscope")


def test_there_and_back_is_bit_equal_and_a_dry_run_tells_names_and_memory(folder, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    forth, back, dry = run_scripts(
        [
            ["convert.py", f"--from={folder}", f"--to={ours}"],
            ["convert.py", f"--from={ours}", f"--to={theirs}", "--layout=diffusers"],
            ["convert.py", f"--from={folder}", "--dry_run"],
        ]
    )
    assert forth.code == back.code == dry.code == 0, forth.stderr + back.stderr + dry.stderr
    assert {path.name for path in ours.iterdir()} >= {"config.json", "unet.safetensors", "tokenizer.json"}
    model, original = vd.load(ours), vd.load(folder)
    assert model.digest == original.digest and model.settings == original.settings
    for part in ("unet", "vae"):
        before, after = load_part(folder, part), load_part(theirs, part)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) for key in before)

    lines = dry.stdout.splitlines()
    assert sum(line.startswith("unet ") for line in lines) == len(load_part(folder, "unet"))
    (line,) = [line for line in lines if " down_blocks.0.temp_convs.0.conv4.3.weight " in line]
    assert line.split()[2:] == ["32x32x3x1x1", "->", "down.0.temporal_conv.convs.3.kernel", "3x32x32"]
    total = sum(value.size for part in ("unet", "vae") for value in load_part(folder, part).values())
    counted = {line.split(":")[0]: float(line.split()[1]) for line in lines if "million" in line}
    assert counted["unet"] + counted["autoencoder"] == pytest.approx(total / 1e6, abs=0.1)
    assert "GiB in float32" in lines[-1]


def load_part(folder, part):
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def test_what_cannot_be_converted_is_said_and_leaves_nothing(folder, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    broken = write_pipeline("modelscope", tmp_path / "broken")
    weights = load_part(broken, "vae")
    del weights["decoder.conv_in.bias"]
    save_file(weights, broken / "vae" / "diffusion_pytorch_model.safetensors")
    cases = (
        ([f"--from={folder}", f"--to={full}"], "is there already"),
        ([f"--to={tmp_path / 'a'}"], "--from is missing"),
        ([f"--from={folder}"], "--to is missing"),
        ([f"--from={tmp_path / 'nothing'}", f"--to={tmp_path / 'a'}"], "no model"),
        ([f"--from={broken}", f"--to={tmp_path / 'a'}"], "missing decoder.conv_in.bias (64,)"),
        (["--from=shapes", f"--to={tmp_path / 'a'}", "--layout=diffusers"], "belongs to no pipeline of diffusers"),
    )
    results = run_scripts([["convert.py", *flags] for flags, _ in cases])
    for (flags, message), result in zip(cases, results):
        assert result.code == 1 and message in result.stderr, (flags, result.stderr)
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full"]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
