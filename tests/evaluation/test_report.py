"""Evaluation of models whose right score is known: one that renders the truth, and some that do one thing wrong."""

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vdiff_jax.data import shapes
from vdiff_jax.data.transforms import to_uint8
from vdiff_jax.evaluation import shapes_tasks
from vdiff_jax.evaluation.prompt_influence import ATTRIBUTES, changed
from vdiff_jax.evaluation.report import METRICS, evaluate, rounded, table
from vdiff_jax.evaluation.shapes_tasks import Evaluation, accuracy, average, blend_frames, share

WORLD = shapes.small_world(32, sizes=("large",), speeds=("fast",))
render = jax.jit(shapes.render, static_argnames="world")


@functools.cache
def every_scene():
    """A scene of every caption of the world, and its number by caption."""
    parts = [shapes.draw_records(shapes.split_rng(s, 5), WORLD, s, n) for s, n in (("iid", 9000), ("combo", 2500))]
    records = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return records, {caption: number for number, caption in enumerate(shapes.captions(records))}


class TrueModel:
    """Its latents are pixels. It draws what the prompt says, and completes a clip by `fill(latents, known [b f])`."""

    settings = SimpleNamespace(
        size=32, num_frames=16, steps=25, guidance_scale=3.0, sampler="dpmpp_2m", noise="gaussian"
    )
    digest = "true"

    def __init__(self, fill=lambda latents, known: latents, follow=True):
        self.fill, self.follow = fill, follow
        self.records, self.index = every_scene()

    def generate_latents(self, prompts, *, keys, num_frames, size, **sampling):
        assert sampling == {"steps": 7, "guidance_scale": 2.0, "sampler": "ddim"} and size == 32
        wanted = [self._wanted(prompt) for prompt in prompts]
        records = shapes.select(self.records, np.asarray([self.index[caption] for caption in wanted]))
        return np.asarray(render(records, shapes.native_times(WORLD, len(prompts), num_frames), world=WORLD))

    def _wanted(self, prompt):
        if self.follow:
            return prompt
        colour = shapes.parse_caption(prompt)["objects"][0]["colour"]  # right in all but the colour
        return next(c for c in (prompt.replace(colour, other) for other in WORLD.colours if other != colour)
                    if c in self.index)  # fmt: skip

    def estimate(self, z, logsnr, prompts):
        """What the prompt says at the places of the clip: here, all of it but the direction and the shape."""
        assert z.shape[:2] == logsnr.shape and len(prompts) == len(z)
        out = np.zeros(z.shape, np.float32)
        for row, prompt in enumerate(prompts):
            if prompt:
                scene = shapes.parse_caption(prompt)
                out[row] = shapes.COLOURS.index(scene["objects"][0]["colour"])
                out[row, ..., 0] += shapes.BACKGROUNDS.index(scene["background"])
        return out

    def encode(self, video):
        return np.asarray(video)

    def decode(self, latents):
        return to_uint8(np.asarray(latents))

    def complete(self, known, prompts, *, keys, guidance_scale, steps, sampler):
        assert guidance_scale == 1.0 and (steps, sampler) == (7, "ddim")
        given = np.asarray(known.mask).min(axis=(2, 3, 4)) > 0.5
        out = np.array(known.latents)
        out[~given] = np.asarray(self.fill(known.latents, given))[~given]
        return out


SETTINGS = dict(num_clips=24, batch_size=10, steps=7, guidance_scale=2.0, sampler="ddim")


def run(model, metrics, **settings):
    return evaluate(model, WORLD, metrics=metrics, **{**SETTINGS, **settings})["results"]


def repeat_last(latents, known):
    last = known.shape[1] - 1 - np.argmax(known[:, ::-1], axis=1)
    return np.broadcast_to(latents[np.arange(len(latents)), last][:, None], latents.shape)


def test_the_true_model_scores_one_and_wrong_prompts_score_chance():
    result = run(TrueModel(), ("alignment",), splits=("iid", "combo"), num_clips=60)["alignment"]
    for split in ("iid", "combo"):
        for column in ("model", "codec", "clean"):
            assert all(figure["value"] > 0.98 for figure in result[split][column].values()), (split, column)
        wrong = result[split]["wrong_prompt"]
        assert wrong["readable"]["value"] == result[split]["model"]["readable"]["value"]
        assert wrong["all"]["value"] == 0.0  # every prompt was exchanged for another
        assert wrong["colour"]["value"] < 0.4 and wrong["direction"]["value"] < 0.35
        assert result[split]["n"] == wrong["all"]["n"] == 60


def test_a_model_with_wrong_colours_loses_the_colour_and_nothing_else():
    model = run(TrueModel(follow=False), ("alignment",))["alignment"]["iid"]["model"]
    assert model["colour"]["value"] == model["all"]["value"] == 0.0
    assert all(model[key]["value"] > 0.95 for key in ("readable", "shape", "direction", "background"))


def test_the_true_continuation_is_perfect_and_repeating_gains_nothing():
    for prompted in ("with prompt", "without prompt"):
        true = run(TrueModel(), ("prediction",))["prediction"][prompted]
        assert true["near"]["value"] == 1.0 and true["error_px"]["value"] < 0.2
        assert true["psnr"]["value"] > 50 and true["gain"]["value"] > 20
    still = run(TrueModel(repeat_last), ("prediction",))["prediction"]["without prompt"]
    assert abs(still["gain"]["value"]) < 0.05  # only the rounding to u8
    # Fast objects go 0.525 of the side in 15 intervals: 4 frames on, they are that much away.
    assert still["error_px"]["value"] == pytest.approx(4 * 0.525 * 32 / 15, abs=0.15)
    assert still["near"]["value"] == 0.0
    assert [figure["n"] for figure in still["near_by_context"].values()] == [8, 8, 8]


def test_interpolation_knows_truth_from_blend():
    true = run(TrueModel(), ("interpolation",))["interpolation"]["with prompt"]
    assert true["one_object"] == true["one_object_true"] and true["one_object"]["value"] == 1.0
    assert true["gain"]["value"] > 15 and true["one_object_blend"]["value"] < 0.9
    model = TrueModel(lambda latents, known: blend_frames(np.asarray(latents)))
    blend = run(model, ("interpolation",))["interpolation"]["with prompt"]
    assert abs(blend["gain"]["value"]) < 0.05
    assert blend["one_object"]["value"] == pytest.approx(blend["one_object_blend"]["value"], abs=0.1)


def test_blend_keeps_keyframes_and_is_linear_between():
    video = np.arange(9, dtype=np.float32)[None, :, None, None, None] ** 2 * np.ones((2, 1, 4, 4, 3), np.float32)
    assert np.allclose(blend_frames(video)[0, :, 0, 0, 0], [0, 4, 8, 12, 16, 28, 40, 52, 64])


def test_codec_measures_the_error_of_the_autoencoder():
    class Offset(TrueModel):
        def decode(self, latents):
            return to_uint8(latents + 5 / 127.5)  # no pixel of this world is that near to white

    result = run(Offset(), ("codec",))["codec"]["iid"]
    # Every pixel is off by 5 of 255 levels, and by at most half a level from rounding.
    assert 20 * math.log10(255 / 5.5) <= result["psnr"]["value"] <= 20 * math.log10(255 / 4.5)
    perfect = run(TrueModel(), ("codec",))["codec"]["iid"]
    assert perfect["psnr"]["value"] > 55 and perfect["ssim"]["value"] > 0.999


def test_influence_is_that_of_the_attributes_an_estimate_uses():
    result = run(TrueModel(), ("influence",))["influence"]["iid"]
    levels = {"-9", "-7", "-5", "-3", "-1"}
    for name in ("error", "direction", "shape", "colour", "background", "prompt"):
        assert result[name].keys() == levels and all(figure["n"] == 24 for figure in result[name].values())
    for name in ("direction", "shape"):  # this estimate does not know them
        assert all(figure["value"] == 0.0 for figure in result[name].values())
    for name in ("colour", "background", "prompt"):
        assert all(abs(figure["value"]) > 0.05 for figure in result[name].values()), name


def test_one_attribute_is_made_wrong_and_no_other():
    records, _ = every_scene()
    ev = Evaluation(TrueModel(), WORLD)
    moving = [n for n in range(200) if "direction" in shapes.attributes(records, n)["objects"][0]]
    for number in moving[:20]:
        scene = shapes.attributes(records, number)
        words = set(shapes.caption(scene).replace("-", " - ").split())
        for name in ATTRIBUTES:
            wrong = changed(scene, name, ev)
            where = (wrong, scene) if name == "background" else (wrong["objects"][0], scene["objects"][0])
            assert where[0][name] != where[1][name]
            where[0][name] = where[1][name]
            assert wrong == scene
        assert words == set(shapes.caption(scene).replace("-", " - ").split())


def test_clips_and_noise_do_not_depend_on_the_batch_size():
    ev = Evaluation(TrueModel(), WORLD, num_clips=7, batch_size=3)
    index = list(ev.batches(7))
    assert [list(part) for part in index] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    one = dataclasses.replace(ev, batch_size=7)
    keys = jax.random.key_data(one.keys("iid", np.arange(7)))
    assert (jax.random.key_data(ev.keys("iid", index[1])) == keys[3:6]).all()
    assert (jax.random.key_data(ev.keys("combo", index[1])) != keys[3:6]).any()
    assert shapes_tasks.gather([[0, 1, 2], [3, 4, 5], [6, 6, 6]], 7) == list(range(7))


def test_standard_errors():
    figure = share([True] * 30 + [False] * 10)
    assert figure == {"value": 0.75, "se": math.sqrt(0.75 * 0.25 / 40), "n": 40}
    figures = accuracy([{"a": True}, {"a": False, "b": True}])
    assert figures["a"]["n"] == 2 and figures["b"]["n"] == 1 and figures["b"]["value"] == 1.0
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    mean = average([*values, math.inf, math.nan])
    assert mean["n"] == 4000 and mean["se"] == pytest.approx(2.0 / math.sqrt(4000), rel=0.05)


def test_the_report_is_json_and_says_how_it_was_made():
    report = evaluate(TrueModel(), WORLD, metrics=METRICS, splits=("combo",), **{**SETTINGS, "num_clips": 3})
    written = json.loads(json.dumps(rounded(report), allow_nan=False))
    assert written["model"] == "true" and written["world"]["size"] == 32
    assert written["settings"] == {
        "steps": 7, "guidance_scale": 2.0, "sampler": "ddim", "num_clips": 3, "num_frames": 16, "seed": 0,
    }  # fmt: skip
    assert list(written["results"]) == list(METRICS) and list(written["results"]["alignment"]) == ["combo"]
    text = table(report)
    assert "ddim, 7 steps, guidance 2, 3 clips of 16 frames" in text
    assert "alignment, combo (n = 3)" in text and "wrong prompt" in text and "1.000 ± 0.000" in text


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(metrics=("alignement",)), "unknown metric 'alignement'"),
        (dict(splits=("test",)), "unknown split 'test'"),
        (dict(num_clips=0), "num_clips=0"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(TrueModel(), WORLD, **settings)
    with pytest.raises(ValueError, match="64 pixels"):
        evaluate(TrueModel(), shapes.small_world(64))
