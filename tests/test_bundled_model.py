"""The trained fixture: what the bundled model does, read from the pixels of its clips.

The bounds lie under the figures of docs/shapes.md by more than the noise of so few clips, and far above chance.
"""

import dataclasses

import pytest

from vdiff_jax.data.shapes import make_world
from vdiff_jax.evaluation.shapes_tasks import Evaluation, alignment, interpolation, prediction
from vdiff_jax.pipeline import ASSETS, load

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def evaluation():
    world = make_world("small", size=32, sizes=("large",), speeds=("fast",))
    sampling = dict(steps=16, guidance_scale=3.0, sampler="unipc")
    return Evaluation(load("shapes"), world, num_clips=32, batch_size=32, seed=11, sampling=sampling)


def test_clips_show_what_their_prompts_say(evaluation):
    result = alignment(evaluation, "iid")
    ours, wrong, clean = (
        {name: figure["value"] for name, figure in result[who].items()} for who in ("model", "wrong_prompt", "clean")
    )
    assert clean["all"] == 1.0 and result["codec"]["all"]["value"] == 1.0
    for name, bound in {"colour": 0.9, "shape": 0.9, "direction": 0.85, "background": 0.9, "all": 0.8}.items():
        assert ours[name] >= bound, (name, ours)
    assert wrong["colour"] < 0.4 and wrong["direction"] < 0.4 and wrong["all"] < 0.1


def test_the_same_weights_predict_and_interpolate(evaluation):
    # What is known leaves less to decide than a prompt alone: half the steps do.
    evaluation = dataclasses.replace(evaluation, sampling={**evaluation.sampling, "steps": 8})
    # prompted: (near, one_object)
    for prompted, bounds in {True: (0.95, 0.95), False: (0.7, 0.8)}.items():
        ahead = prediction(evaluation, prompted=prompted)
        assert ahead["gain"]["value"] >= 3.0 and ahead["near"]["value"] >= bounds[0], (prompted, ahead)
        assert ahead["near_codec"]["value"] == 1.0 and ahead["psnr_codec"]["value"] > ahead["psnr"]["value"]
        between = interpolation(evaluation, prompted=prompted)
        assert between["gain"]["value"] >= 3.0 and between["one_object"]["value"] >= bounds[1], (prompted, between)
        assert between["one_object_codec"]["value"] == 1.0


def test_files_fit_into_a_repository():
    sizes = {path.name: path.stat().st_size for path in (ASSETS / "shapes").iterdir()}
    assert {"config.json", "tokenizer.json", "unet.safetensors", "text_encoder.safetensors"} < sizes.keys()
    assert max(sizes.values()) < 16 * 2**20
