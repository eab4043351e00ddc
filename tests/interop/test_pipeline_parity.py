"""Whole pipelines of diffusers, loaded from their folders, make the frames that diffusers makes.

Golden files: tests/golden/make_pipeline_golden.py. With torch and diffusers installed (the extra `oracle`) the same is
compared live with other weights, and what we save is loaded there.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from golden.pipeline_cases import (
    CASES,
    FPS,
    GUIDANCE,
    NEGATIVE,
    PROMPT,
    SIZE,
    STEPS,
    SVD,
    image,
    start_noise,
    write_pipeline,
)
from golden.seeded_weights import seeded_input
from safetensors.numpy import load_file

import vdiff_jax as vd

PREFIX = "text_model."
"""Before the names of a text encoder's tensors in files; in memory newer versions of transformers leave it out."""
GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")

    @functools.cache
    def load(family, seed=0):
        folder = write_pipeline(family, root / f"{family}{seed}", seed)
        return folder, vd.load(folder)

    return load


def run(model, family):
    """Latents and frames u8 of our model for the request of the golden file."""
    import jax

    options = dict(num_frames=CASES[family], size=SIZE, steps=STEPS, noise=start_noise(family))
    keys = jax.random.split(jax.random.key(0), 1)
    if family == "svd":
        noise = seeded_input("image noise", (1, 3, *SIZE)).transpose(0, 2, 3, 1)
        told = dict(fps=SVD["fps"], motion_bucket=SVD["motion_bucket_id"], noise_augmentation=SVD["noise_aug_strength"])
        model = model.with_image(image(), size=SIZE, noise=noise, **told)
        latents = model.generate_latents([""], keys=keys, **options)
    else:
        if family == "i2vgen":
            model = model.with_image(image(), size=SIZE, fps=FPS)
        asked = dict(guidance_scale=GUIDANCE, negative_prompt=NEGATIVE)
        latents = model.generate_latents([PROMPT], keys=keys, **asked, **options)
    return np.asarray(latents), model.decode(latents)


def compare(latents, frames, expected):
    assert np.abs(latents - expected["latents"]).max() <= 1e-3 * np.abs(expected["latents"]).max()
    theirs = np.round(expected["frames"] * 255)
    assert frames.shape == theirs.shape
    assert np.abs(frames.astype(float) - theirs).max() <= 2
    assert theirs.std() > 20  # not all grey


@pytest.mark.parametrize("family", CASES)
def test_frames_equal_those_of_diffusers(models, family):
    latents, frames = run(models(family)[1], family)
    compare(latents, frames, np.load(GOLDEN / f"pipeline_{family}" / "expected.npz"))


@pytest.mark.parametrize("family", CASES)
def test_what_is_saved_is_what_was_loaded(models, tmp_path, family):
    folder, model = models(family)
    model.save_pretrained(tmp_path / "saved")
    files = {path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*.safetensors")}
    assert files == {path.relative_to(folder) for path in folder.rglob("*.safetensors")}
    for file in files:
        ours, theirs = load_file(tmp_path / "saved" / file), load_file(folder / file)
        ours = {name.removeprefix(PREFIX): value for name, value in ours.items() if not name.endswith(".pos_embed.pe")}
        theirs = {name.removeprefix(PREFIX): value for name, value in theirs.items()}
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name])
    settings = dataclasses.replace(model.settings, fps=5.0, steps=7, guidance_scale=2.0, num_frames=9)
    dataclasses.replace(model, settings=settings).save_pretrained(tmp_path / "saved")  # over what is there
    again = vd.load(tmp_path / "saved")
    assert again.settings == settings
    assert again.component_digest("unet") == model.component_digest("unet")


@pytest.mark.parametrize("family", CASES)
def test_live(models, tmp_path, family):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from golden import make_pipeline_golden as maker

    _, model = models(family, 1)
    model.save_pretrained(tmp_path / "saved")
    pipeline = getattr(diffusers, type(maker.make(family)).__name__).from_pretrained(tmp_path / "saved")
    pipeline.set_progress_bar_config(disable=True)
    if family == "i2vgen":
        maker.named_as_before(pipeline.text_encoder)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    compare(*run(model, family), maker.run(pipeline, family))
