"""An interrupted run, resumed in a new process, ends bitwise where an uninterrupted one ends."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from script_runner import run_scripts

STEPS = 4
RECIPE = '''"""A diffusion run of toy size."""

from vdiff_jax.recipe import default_recipe


def get_config():
    config = default_recipe("diffusion")
    config.model.autoencoder_from = "{folder}"
    config.model.text_encoder.update(features=8, hidden_features=16, layers=1, head_dim=8)
    config.model.unet.update(channels=(8,), attention=(True,), embedding_features=16, head_dim=8)
    config.data.update(size=16, num_frames=3, world_frames=8, batch_size=2, context_length=12)
    config.data.update(strides=(1, 2), stride_weights=(0.5, 0.5))
    config.optimizer.update(warmup_steps=1, learning_rate=1e-2)
    config.train.update(num_steps={steps}, log_steps=1, checkpoint_steps=0, sample_steps=0)
    return config
'''


def checkpoint(workdir, step):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir.absolute() / "checkpoints" / str(step) / "state")


def log(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "clips_per_s" and "goodput" not in name}
        for line in lines
    ]


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("resume")
    recipe = tmp / "tiny.py"
    recipe.write_text(RECIPE.format(folder=model_folder, steps=STEPS))
    whole, cut = (["train.py", f"--config={recipe}", f"--workdir={tmp / name}"] for name in ("whole", "cut"))
    # Settings that change nothing here: one that nobody needs to know of, and one that it does warn of.
    changed = "--config.train.keep_checkpoints=3", "--config.lora.alpha=5.0"
    return tmp, *run_scripts([whole, [*cut, "--config.train.max_minutes=1e-9"], [*cut, *changed]], timeout_s=900)


def test_a_resumed_run_ends_bitwise_like_an_uninterrupted_one(runs):
    tmp, whole, stopped, resumed = runs
    assert whole.code == 0, whole.stderr
    assert stopped.code == 75 and "stopping at step 1: time limit reached" in stopped.stderr, stopped.stderr
    assert resumed.code == 0 and "resumed at step 1" in resumed.stderr, resumed.stderr
    warned = [line for line in resumed.stderr.splitlines() if "settings changed" in line]
    assert len(warned) == 1 and warned[0].startswith("warning: ") and warned[0].endswith(": lora.alpha 4.0 -> 5.0")
    assert "settings changed" not in whole.stderr + stopped.stderr
    expected, got = (checkpoint(tmp / name, STEPS) for name in ("whole", "cut"))
    assert set(expected) == {"step", "params", "opt_state", "ema", "skipped", "skipped_in_row", "history"}
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    first = checkpoint(tmp / "cut", 1)["params"]
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(expected["params"])))
    # Equal losses at each step: the same clips, levels and noise, so the data position went on too.
    assert [line["step"] for line in log(tmp / "whole")] == [1, 2, 3, 4]
    assert log(tmp / "cut") == log(tmp / "whole")
    record = json.loads((tmp / "cut" / "goodput.json").read_text())
    assert record["starts"] == 2 and record["seconds"]["lost"] == 0 and record["wall_s"] > 0
    assert sum(record["percent"].values()) == pytest.approx(100, abs=0.1)
    assert all(record["seconds"][phase] > 0 for phase in ("step", "compile", "data", "checkpoint", "startup", "export"))
    for path in (tmp / "whole" / "model").iterdir():
        assert path.read_bytes() == (tmp / "cut" / "model" / path.name).read_bytes(), path.name


def test_a_run_leaves_a_model_that_loads_and_its_recipe(runs):
    from vdiff_jax.pipeline import load

    tmp = runs[0]
    model = load(tmp / "whole")
    ema = checkpoint(tmp / "whole", STEPS)["ema"]
    np.testing.assert_array_equal(model.params["unet"]["conv_in"]["kernel"], ema["unet"]["conv_in"]["kernel"])
    assert model.settings.size == 16 and set(model.components) == {"autoencoder", "text_encoder", "unet"}
    assert model.encode_prompts(["a red circle moving right"])[0].shape == (1, 12, 8)
    recipe = json.loads((tmp / "whole" / "recipe.json").read_text())
    assert recipe["data"]["size"] == 16 and recipe["train"]["num_steps"] == STEPS
