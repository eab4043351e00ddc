"""The scripts and a user's mistakes: one sentence, a non-zero exit code, and nothing half-written."""

import json

import numpy as np
import pytest
from script_runner import run_scripts

from vdiff_jax.data.video_io import Clip

LONG = "a red circle moving right on black background and grey"

TRAIN = ["train.py", "--config=configs/shapes_autoencoder.py", "--workdir={tmp}/run"]
FOLDER = [*TRAIN, "--config.data.source=folder"]
DIFFUSION = ["train.py", "--config=configs/shapes.py", "--workdir={tmp}/run", "--config.model.autoencoder_from={model}"]
SMALL = [
    *FOLDER,
    "--config.data.folder={tmp}/mixed",
    "--workdir={tmp}/good/run",
    "--config.model.autoencoder.channels=(8,)",
    "--config.model.autoencoder.mid_attention=False",
    "--config.data.size=16",
    "--config.data.batch_size=2",
    "--config.data.num_frames=2",
    "--config.data.strides=(1,)",
    "--config.train.num_steps=1",
    "--config.train.sample_steps=0",
]
BRIEF = ["--config.data.folder={tmp}/brief", "--config.data.split=all"]
SAMPLE = ["sample.py", "--model={model}", "--prompt=a red circle", "--out={tmp}/out.mp4"]
EDIT = ["edit.py", "--model={model}", "--input={tmp}/clip.gif", "--out={tmp}/edited.gif", "--steps=1"]
EVALUATE = ["evaluate.py", "--model={model}", "--config=configs/shapes.py", "--out={tmp}/report.json"]

# name: (command, what the one sentence must say)
MISTAKES = {
    "missing model": (["sample.py", "--model={tmp}/nowhere", "--out={tmp}/out.mp4"], "no model '{tmp}/nowhere'"),
    "half a model": (["sample.py", "--model={tmp}/half", "--out={tmp}/out.mp4"], "unet.safetensors is missing"),
    "unwritable out": ([*SAMPLE, "--out={tmp}/a_file/out.mp4"], "a_file"),
    "unknown suffix": ([*SAMPLE, "--out={tmp}/out.xyz"], ".xyz"),
    "no frames": ([*SAMPLE, "--num_frames=0"], "num_frames=0: it must be at least 1"),
    "no steps": ([*SAMPLE, "--steps=0"], "steps=0: it must be at least 1"),
    "odd size": ([*SAMPLE, "--size=15"], "size 15x15 does not fit this model"),
    "a size in words": ([*SAMPLE, "--size=wide"], "--size=wide: give one number of pixels, or HEIGHTxWIDTH"),
    "a picture for a model of prompts": ([*SAMPLE, "--image={tmp}/clip.gif"], "this model animates no picture"),
    "a type for a model of ours": ([*SAMPLE, "--dtype=bfloat16"], "is no pipeline of diffusers: it takes no dtype"),
    "a mesh that is none": ([*SAMPLE, "--mesh=2x2"], "--mesh=2x2: give three numbers of devices"),
    "a mesh too large": ([*SAMPLE, "--mesh=2x2x2"], "does not match 1 devices"),
    "unknown sampler": ([*SAMPLE, "--sampler=ddimm"], "did you mean 'ddim'"),
    "bad interval": ([*SAMPLE, "--guidance_interval=low,high"], "guidance_interval"),
    "no samples": ([*SAMPLE, "--num_samples=0"], "num_samples"),
    "unknown flag": ([*SAMPLE, "--promt=x"], "promt"),
    "stray argument": ([*SAMPLE, "a red circle"], "unexpected argument 'a red circle'"),
    "not a number": ([*SAMPLE, "--num_frames=many"], "num_frames"),
    "no workdir": (TRAIN[:2], "workdir"),
    "missing config": (["train.py", "--config={tmp}/none.py", "--workdir={tmp}/run"], "none.py"),
    "broken config": (["train.py", "--config={tmp}/broken.py", "--workdir={tmp}/run"], "broken.py"),
    "unknown key": ([*TRAIN, "--config.train.num_step=3"], 'Did you mean "num_steps"'),
    "wrong type": ([*TRAIN, "--config.train.num_steps=few"], "num_steps"),
    "unknown source": ([*TRAIN, "--config.data.source=vimeo"], "data.source='vimeo': choose one of"),
    "workdir is a file": ([*TRAIN[:2], "--workdir={tmp}/a_file"], "a_file"),
    "missing folder": ([*FOLDER, "--config.data.folder={tmp}/nowhere"], "nowhere is not a folder"),
    "empty folder": ([*FOLDER, "--config.data.folder={tmp}/empty"], "empty"),
    "text named mp4": ([*FOLDER, "--config.data.folder={tmp}/texts"], "texts"),
    "videos of no length": ([*FOLDER, "--config.data.folder={tmp}/zero"], "zero"),
    "unknown stage": ([*TRAIN, "--config.stage=autoencode"], "config.stage='autoencode': choose one of"),
    "unknown world": ([*TRAIN, "--config.data.world=flat"], "shapes world 'flat'"),
    "unknown dtype": ([*TRAIN, "--config.model.autoencoder.dtype=float31"], "dtype='float31': choose one of float32"),
    "weighting of nothing": ([*DIFFUSION, "--config.diffusion.weighting=snr"], "loss weighting 'snr' is unknown"),
    "channels of nothing": ([*DIFFUSION, "--config.diffusion.channel_weighting=pixel"], "choose equal or pixels"),
    "no unet": (["sample.py", "--model={tmp}/coder", "--out={tmp}/out.mp4"], "no unet to sample from"),
    "no time": ([*SAMPLE, "--stride=0"], "stride=0.0: it must be above 0"),
    "unwritable sheet": ([*SAMPLE, "--sheet={tmp}/sheet.xyz"], ".xyz"),
    "no input": (["edit.py", "--out={tmp}/edited.gif"], "--input must have a value"),
    "input that is no video": ([*EDIT, "--input={tmp}/a_file"], "a_file"),
    "no such input": ([*EDIT, "--input={tmp}/none.mp4"], "none.mp4 does not exist"),
    "unknown task": ([*EDIT, "--task=repaint"], "task"),
    "inpaint without a mask": ([*EDIT, "--task=inpaint"], "--task=inpaint needs --mask"),
    "a mask of nothing": ([*EDIT, "--task=inpaint", "--mask=box:90,90,4,4"], "covers nothing of the clip"),
    "a mask that is none": ([*EDIT, "--task=inpaint", "--mask=box:1,2"], "has no box in '1,2'"),
    "unknown edit method": ([*EDIT, "--method=magic"], "edit method 'magic' is unknown"),
    "too strong": ([*EDIT, "--strength=2"], "strength=2.0"),
    "unknown effect": ([*EDIT, "--then=brihtness=0.1"], "brightness"),
    "unknown restoration": ([*EDIT, "--task=restore", "--restore=sharpen"], "restoration 'sharpen' is unknown"),
    "extend to less": ([*EDIT, "--task=extend", "--num_frames=2"], "num_frames=2"),
    "prompt without a frame": ([*EDIT, "--task=extend", "--num_frames=9", "--prompt_at=red"], "give FRAME:PROMPT"),
    "join with nothing": ([*EDIT, "--task=join"], "--task=join needs --second"),
    "sides of what": ([*EDIT, "--task=outpaint", "--sides=1,2"], "--sides=1,2: give 4 numbers"),
    "unknown metric": (
        ["evaluate.py", "--model={model}", "--config=configs/shapes.py", "--metrics=fvd"],
        "metric 'fvd'",
    ),
    "world of another size": (EVALUATE, "32 pixels a side"),
    "uneven mesh": ([*TRAIN, "--config.parallel.data=3"], "does not match 1 devices"),
    "no autoencoder": (
        ["train.py", "--config=configs/shapes.py", "--workdir={tmp}/run", "--config.model.autoencoder_from={tmp}/ae"],
        "no model '{tmp}/ae'",
    ),
}
PREFLIGHT = {  # said before anything is trained; the last one finds what GOOD has left
    "clips too short": (
        [
            *SMALL,
            "--workdir={tmp}/run",
            "--config.data.folder={tmp}/brief",
            "--config.data.split=all",
            "--config.data.num_frames=9",
        ],
        "all 2 clips of {tmp}/brief are too short: the longest has 6 frames",
    ),
    "no captions": (
        [*DIFFUSION, "--config.data.source=folder", "--config.data.folder={tmp}/mixed", "--config.data.num_frames=2"],
        "none of the 2 clips of {tmp}/mixed has a caption, and the model learns from captions",
    ),
    "no captions for a model to go on with": (  # which is known once the recipe is filled with what the model has
        ["train.py", "--config=configs/finetune.py", "--workdir={tmp}/run", "--config.init_from={model}", *BRIEF],
        "none of the 2 clips of {tmp}/brief has a caption, and the model learns from captions",
    ),
    "too little memory": (
        [*SMALL, "--workdir={tmp}/run", "--config.train.memory_limit_gb=1e-5"],
        "the training step does not fit: each device needs",
    ),
    "checkpoint of another config": (
        [*SMALL, "--config.model.autoencoder.channels=(16,)"],
        "conv_in.bias: checkpoint (8,), this config (16,)",
    ),
}
GOOD = {
    "help of sample": ["sample.py", "--help"],
    "one clip of three is broken": SMALL,
    "a look before training": [*SMALL, "--workdir={tmp}/good/looked", "--preflight"],
    "only effects": ["edit.py", "--task=none", "--input={tmp}/clip.gif", "--out={tmp}/good/fx", "--then=reverse"],
    "an edit": [*EDIT, "--task=edit", "--prompt=a blue square", "--strength=1", "--out={tmp}/good/edited.gif"],
    "too long a prompt": [*SAMPLE[:2], f"--prompt={LONG}", "--out={tmp}/good/cut.gif", "--steps=1"],
}


@pytest.fixture(scope="module")
def outcome(model_folder, tmp_path_factory):
    """(folder, results by name); every command runs once, in one process."""
    tmp = tmp_path_factory.mktemp("scripts")
    for name in ("empty", "texts", "zero", "half", "good", "coder", "mixed/train", "brief"):
        (tmp / name).mkdir(parents=True)
    (tmp / "a_file").write_text("kept")
    ramp = np.arange(3 * 16 * 16 * 3, dtype=np.int64).reshape(3, 16, 16, 3) // 9 % 256
    Clip(ramp.astype(np.uint8), 8.0).save(tmp / "clip.gif")
    (tmp / "broken.py").write_text("def get_config(:\n")
    for index in range(3):
        (tmp / "texts" / f"{index}.mp4").write_text("this is no video\n" * 50)
        (tmp / "zero" / f"{index}.mp4").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, size=(2, 6, 16, 16, 3)).astype(np.uint8)
    for index in range(2):
        for name in ("mixed/train", "brief"):
            Clip(noise[index], 8.0).save(tmp / name / f"{index}.mp4")
    (tmp / "mixed" / "train" / "broken.mp4").write_text("this is no video\n" * 50)
    (tmp / "half" / "config.json").write_text((model_folder / "config.json").read_text())
    for name in ("autoencoder.safetensors", "text_encoder.safetensors"):
        (tmp / "half" / name).write_bytes((model_folder / name).read_bytes())
    config = json.loads((model_folder / "config.json").read_text())
    config["components"] = {"autoencoder": config["components"]["autoencoder"]}
    (tmp / "coder" / "config.json").write_text(json.dumps(config))
    (tmp / "coder" / "autoencoder.safetensors").write_bytes((model_folder / "autoencoder.safetensors").read_bytes())
    before = {path for path in tmp.rglob("*") if path.is_file()}
    mistakes, looks = ({n: command for n, (command, _) in part.items()} for part in (MISTAKES, PREFLIGHT))
    commands = {**mistakes, **GOOD, **looks}
    filled = [[part.format(tmp=tmp, model=model_folder) for part in command] for command in commands.values()]
    results = dict(zip(commands, run_scripts(filled)))
    created = sorted(str(path.relative_to(tmp)) for path in tmp.rglob("*") if path.is_file() and path not in before)
    return tmp, results, created


@pytest.mark.parametrize("name", {**MISTAKES, **PREFLIGHT})
def test_a_mistake_ends_in_one_sentence(name, outcome):
    tmp, results, _ = outcome
    result = results[name]
    assert result.code not in (0, 75), result
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0], result.stderr
    assert {**MISTAKES, **PREFLIGHT}[name][1].format(tmp=tmp) in errors[0]
    assert len(errors[0]) < 600


def test_mistakes_leave_no_files(outcome):
    tmp, _, created = outcome
    kept = [name for name in created if not name.startswith(("good/run/", "good/fx/"))]
    assert [name for name in kept if name != "run/.lock"] == [  # the lock of a work folder stays, an empty file
        "good/cut.gif",
        "good/edited.gif",
    ]
    assert (tmp / "a_file").read_text() == "kept"


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(outcome):
    tmp, results, _ = outcome
    result = results["too long a prompt"]
    assert result.code == 0 and result.stdout.split() == [str(tmp / "good" / "cut.gif")], result
    warning = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warning) == 1 and "cut from it: 'black background and grey'" in warning[0]
    assert "Traceback" not in result.stderr and "tokenizer.py" not in result.stderr


def test_a_clip_that_cannot_be_used_is_left_out_and_named(outcome):
    _, results, created = outcome
    result = results["one clip of three is broken"]
    assert result.code == 0 and "good/run/model/autoencoder.safetensors" in created, result
    warning = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warning) == 1 and "1 clip was skipped: broken.mp4: " in warning[0], result.stderr


def test_a_look_before_training_tells_what_it_will_need(outcome):
    _, results, created = outcome
    result = results["a look before training"]
    assert result.code == 0 and not [name for name in created if name.startswith("good/looked")], result
    for line in ("clips     2 usable of 3", "batches   1.0 of 2 clips in an epoch", "each device needs", "can begin"):
        assert line in result.stderr, result.stderr


def test_edits_are_clips_of_the_input_s_size(outcome):
    from vdiff_jax.data.video_io import read_video

    tmp, results, _ = outcome
    given, effects, edited = (read_video(tmp / name) for name in ("clip.gif", "good/fx", "good/edited.gif"))
    assert results["only effects"].code == 0 and results["an edit"].code == 0, results["an edit"]
    np.testing.assert_array_equal(effects.frames, given.frames[::-1])
    assert edited.frames.shape == given.frames.shape and edited.fps == given.fps
    assert edited.metadata["edits"][0]["prompt"] == "a blue square" and effects.metadata["effects"] == ["reverse"]


def test_help_teaches(outcome):
    text = outcome[1]["help of sample"].stdout
    assert "python sample.py --model=shapes" in text and "--guidance_scale" in text


def test_the_model_that_was_sampled_is_written_into_the_file(outcome, model):
    from vdiff_jax.data.video_io import read_video

    clip = read_video(outcome[0] / "good" / "cut.gif")
    assert clip.frames.shape == (3, 16, 16, 3)
    assert clip.metadata["model"] == model.digest and clip.metadata["prompt"] == LONG
    json.dumps(clip.metadata)
