"""Effects against truth computed another way: closed forms, whole numbers, geometry, and colorsys; then the chains."""

import colorsys
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from vdiff_jax.data import effects
from vdiff_jax.data.effects import EFFECTS, apply_effects, effect_help, effect_usage, parse_effects
from vdiff_jax.data.effects_pixels import disc
from vdiff_jax.data.sound import Sound
from vdiff_jax.data.video_io import Clip, VideoError, read_video, save_image

LUMA = np.array([0.2126, 0.7152, 0.0722])


def noise(num_frames=4, h=12, w=16, fps=8.0, seed=0, sound=None):
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, h, w, 3), np.uint8)
    return Clip(frames, fps, {"seed": seed}, sound)


def plain(color, num_frames=1, h=4, w=5, fps=8.0):
    return Clip(np.broadcast_to(np.array(color, np.uint8), (num_frames, h, w, 3)).copy(), fps)


def counting(num_frames, fps=10.0, sound=None):
    """Frame i is level i everywhere."""
    return Clip(np.arange(num_frames, dtype=np.uint8).repeat(48).reshape(num_frames, 4, 4, 3), fps, {}, sound)


def numbers(clip):
    return clip.frames[:, 0, 0, 0].tolist()


def tone(hertz, seconds, rate=8000):
    times = np.arange(round(seconds * rate)) / rate
    return Sound((0.5 * np.sin(2 * np.pi * hertz * times)).astype(np.float32)[:, None], rate)


def frequency(sound):
    wave = sound.samples[:, 0] * np.hanning(len(sound.samples))
    return np.abs(np.fft.rfft(wave)).argmax() / sound.duration_s


# ---- colour -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain",
    [
        *("brightness=0", "contrast=1", "gamma=1", "saturation=1", "hue=0", "hue=360", "hue=-720", "lens_blur=0"),
        *("resize=1", "resize=12,16", "crop=0,0,12,16", "speed=1", "cut=0", "set_fps=8", "fade=0,0"),
        *("invert;invert", "reverse;reverse"),
    ],
)
def test_identities_are_exact(chain):
    clip = noise()
    np.testing.assert_array_equal(apply_effects(clip, chain).frames, clip.frames)


def test_levels_follow_their_formulas():
    levels = np.arange(256)
    clip = Clip(levels.astype(np.uint8).repeat(3).reshape(1, 16, 16, 3), 8.0)

    def level_after(result):
        return result.frames[..., 0].ravel().astype(int)

    # Amounts for which every product is a whole number or far from a half.
    np.testing.assert_array_equal(level_after(effects.brightness(clip, 51 / 255)), np.minimum(levels + 51, 255))
    np.testing.assert_array_equal(level_after(effects.brightness(clip, -1)), 0)
    np.testing.assert_array_equal(level_after(effects.contrast(clip, 3)), np.clip(3 * levels - 255, 0, 255))
    np.testing.assert_array_equal(level_after(effects.invert(clip)), 255 - levels)
    expected = [255 * math.sqrt(level / 255) for level in levels]
    np.testing.assert_allclose(level_after(effects.gamma(clip, 2)), expected, atol=0.501)


def test_saturation_and_grayscale_are_about_the_bt709_luma():
    clip = noise()
    luma = (clip.frames @ LUMA)[..., None]
    grey = effects.grayscale(clip).frames
    assert np.ptp(grey, axis=-1).max() == 0
    np.testing.assert_allclose(grey, np.broadcast_to(luma, grey.shape), atol=0.501)
    np.testing.assert_array_equal(effects.saturation(clip, 0).frames, grey)
    strong = np.clip(luma + 1.4 * (clip.frames - luma), 0, 255)
    np.testing.assert_allclose(effects.saturation(clip, 1.4).frames, strong, atol=0.501)


@pytest.mark.parametrize("degrees", [30, 120, 180, 240, 330])
def test_hue_keeps_luma_and_greys(degrees):
    clip = noise()
    turned = effects.hue(clip, degrees).frames
    np.testing.assert_allclose(turned @ LUMA, clip.frames @ LUMA, atol=0.51)  # the rounding of three channels
    assert np.abs(turned.astype(int) - clip.frames).max() > 50
    grey = effects.grayscale(clip)
    np.testing.assert_array_equal(effects.hue(grey, degrees).frames, grey.frames)


@pytest.mark.parametrize(("degrees", "hue"), [(120, 1 / 3), (240, 2 / 3), (60, 1 / 6), (180, 1 / 2), (-120, 2 / 3)])
def test_hue_turns_red_to_the_named_colour(degrees, hue):
    """Red, green and blue and the colours half-way between them have the same places on the circle of colorsys."""
    red = plain((255, 0, 0))
    pixel = effects.hue(red, degrees).frames[0, 0, 0]
    assert colorsys.rgb_to_hsv(*(pixel / 255))[0] == pytest.approx(hue, abs=5e-3)
    assert pixel @ LUMA == pytest.approx(255 * LUMA[0], abs=0.51)


def test_hue_and_back_is_the_colour_where_it_fits():
    clip = effects.saturation(Clip(noise().frames // 4 + 96, 8.0), 0.5)
    back = effects.hue(effects.hue(clip, 70), -70)
    np.testing.assert_allclose(back.frames.astype(int), clip.frames, atol=1)


# ---- blur and size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1.0, 2.5, 6.0])
def test_a_point_becomes_a_disc(radius):
    kernel = disc(radius)
    assert kernel.sum() == pytest.approx(1) and 1 / kernel.max() == pytest.approx(math.pi * radius**2, rel=2e-3)
    frames = np.zeros((1, 31, 33, 3), np.uint8)
    frames[0, 15, 16] = 255
    blurred = effects.lens_blur(Clip(frames, 8.0), radius).frames[0, :, :, 0].astype(float)
    y, x = np.mgrid[0:31, 0:33]
    distance = np.hypot(y - 15, x - 16)
    assert (blurred[distance > radius + 0.75] == 0).all()
    inside = blurred[distance < radius - 0.75]
    np.testing.assert_allclose(inside, 255 / (math.pi * radius**2), atol=0.51)
    assert blurred.sum() == pytest.approx(255, abs=0.5 * (blurred > 0).sum())


def test_blur_equals_the_sum_over_the_disc():
    clip, kernel = noise(2, 9, 11), disc(2.5)
    reach = len(kernel) // 2
    mask = np.random.default_rng(1).uniform(0, 1, (2, 9, 11)) > 0.4
    got = effects.lens_blur(clip, 2.5, mask).frames
    for f, y, x in [(0, 0, 0), (1, 4, 5), (0, 8, 3), (1, 2, 10), (0, 5, 5)]:
        total, weight = np.zeros(3), 0.0
        for v in range(max(0, y - reach), min(9, y + reach + 1)):
            for u in range(max(0, x - reach), min(11, x + reach + 1)):
                share = kernel[v - y + reach, u - x + reach] * mask[f, v, u]
                total, weight = total + share * clip.frames[f, v, u], weight + share
        expected = total / weight if mask[f, y, x] else clip.frames[f, y, x]
        np.testing.assert_allclose(got[f, y, x], expected, atol=0.51)


def test_sharp_and_blurred_do_not_bleed():
    """Left half sharp and white, right half blurred and dark: both keep their level up to the seam and the border."""
    frames = np.full((2, 20, 20, 3), 255, np.uint8)
    frames[:, :, 10:] = 40
    mask = np.zeros((20, 20))
    mask[:, 10:] = 1
    blurred = effects.lens_blur(Clip(frames, 8.0), 4, mask)
    np.testing.assert_array_equal(blurred.frames, frames)
    assert effects.lens_blur(Clip(frames, 8.0), 4).frames[0, 10, 10, 0] not in (40, 255)  # without a mask they do


def test_masks_of_another_shape_or_range_are_refused():
    for mask, match in ((np.ones((3, 3)), "12 x 16"), (np.full((12, 16), 255), "divide 8-bit levels by 255")):
        with pytest.raises(ValueError, match=match):
            effects.lens_blur(noise(), 2, mask)


def test_resize_and_crop():
    y, x = np.mgrid[0:40, 0:60]
    smooth = np.broadcast_to((2 * y + 2 * x)[..., None], (2, 40, 60, 3)).astype(np.uint8)
    clip = Clip(smooth.copy(), 8.0)
    small = effects.resize(clip, 0.5).frames
    assert small.shape == (2, 20, 30, 3)
    means = smooth.reshape(2, 20, 2, 30, 2, 3).mean((2, 4))  # a ramp has the mean of its block in the middle of it
    np.testing.assert_allclose(small[:, 3:-3, 3:-3], means[:, 3:-3, 3:-3], atol=1)
    assert effects.resize(clip, 20, 90).frames.shape == (2, 20, 90, 3)
    np.testing.assert_array_equal(effects.crop(clip, 5, 7, 10, 20).frames, smooth[:, 7:17, 5:25])
    for wrong in ((50, 0, 10, 20), (-1, 0, 2, 2), (0, 0, 0, 2)):
        with pytest.raises(ValueError, match=r"crop: .* 40 x 60"):
            effects.crop(clip, *wrong)


# ---- time -------------------------------------------------------------------------------------------------------


def test_speed_two_halves_the_frames_and_doubles_the_tone():
    clip = counting(20, sound=tone(500, 2.0))
    fast = effects.speed(clip, 2)
    assert numbers(fast) == list(range(0, 20, 2)) and fast.fps == 10.0
    assert fast.sound is not None and fast.sound.duration_s == pytest.approx(1.0, abs=1e-3)
    assert frequency(fast.sound) == pytest.approx(1000, abs=2)
    slow = effects.speed(clip, 0.5)
    assert numbers(slow) == [i // 2 for i in range(40)]
    assert slow.sound is not None and frequency(slow.sound) == pytest.approx(250, abs=1)


def test_frame_rates_keep_the_duration():
    clip = counting(12, fps=24.0, sound=tone(500, 0.5))
    assert numbers(effects.set_fps(clip, 8)) == [0, 3, 6, 9]
    assert numbers(effects.set_fps(clip, 48)) == [i // 2 for i in range(24)]
    assert numbers(effects.set_fps(clip, 18)) == [0, 1, 2, 4, 5, 6, 8, 9, 10]  # 4/3 frames on each time
    other = effects.set_fps(clip, 30)
    assert other.duration_s == clip.duration_s and other.sound is clip.sound


def test_cut_and_reverse_take_the_sound_along():
    burst = np.zeros((16_000, 1), np.float32)
    burst[4000:4100] = 0.5  # at 0.5 s of 2 s
    clip = counting(20, sound=Sound(burst, 8000))
    part = effects.cut(clip, 0.3, 1.2)
    assert numbers(part) == list(range(3, 12)) and part.sound is not None
    assert part.sound.duration_s == pytest.approx(0.9) and np.argmax(part.sound.samples) == 1600
    between = effects.cut(clip, 0.33, 0.97)  # to the nearest frames, 3 and 10, and the sound to those
    assert numbers(between) == list(range(3, 10)) and between.sound is not None
    assert between.sound.duration_s == pytest.approx(0.7) and np.argmax(between.sound.samples) == 1600
    backwards = effects.reverse(clip)
    assert numbers(backwards) == list(range(19, -1, -1)) and backwards.sound is not None
    assert np.argmax(backwards.sound.samples) == 16_000 - 4100
    assert numbers(effects.cut(clip, 1.5)) == numbers(effects.cut(clip, 1.5, 99)) == [15, 16, 17, 18, 19]
    for start, stop in ((0.5, 0.5), (2.5, 3.0), (1.0, 0.5), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="cut: "):
            effects.cut(clip, start, stop)


def test_fades_go_to_black_and_silence():
    sound = Sound(np.full((16_000, 1), 0.5, np.float32), 8000)
    clip = Clip(np.full((20, 4, 4, 3), 200, np.uint8), 10.0, {}, sound)
    faded = effects.fade(clip, 0.5, 1.0)
    rise, fall = [0, 40, 80, 120, 160], [20 * i for i in range(9, -1, -1)]
    assert numbers(faded) == rise + [200] * 5 + fall
    assert faded.sound is not None
    assert faded.sound.samples[[0, 2000, 6000, 12_000, -1], 0] == pytest.approx([0, 0.25, 0.5, 0.25, 0], abs=1e-3)


def test_concatenation_is_by_time_and_of_one_size():
    first, second = counting(10, sound=tone(400, 1.0)), counting(40, fps=20.0)
    joined = effects.concatenate([first, second, first])
    assert numbers(joined) == [*range(10), *range(0, 40, 2), *range(10)] and joined.fps == 10.0
    assert joined.sound is not None and joined.sound.duration_s == pytest.approx(joined.duration_s)
    assert not joined.sound.cut(1.0, 3.0).samples.any() and frequency(joined.sound.cut(3.0)) == pytest.approx(
        400, abs=2
    )
    with pytest.raises(ValueError, match=r"4 x 4 and 12 x 16 pixels; .*resize=4,4"):
        effects.concatenate([first, noise()])


def test_crossfade_mixes_in_a_straight_line():
    a, b = plain((200, 0, 100), 10, fps=10.0), plain((0, 100, 100), 10, fps=10.0)
    mixed = effects.crossfade(a, b, 0.3)
    assert mixed.num_frames == 17
    np.testing.assert_array_equal(mixed.frames[:7], a.frames[:7])
    np.testing.assert_array_equal(mixed.frames[10:], b.frames[3:])
    assert mixed.frames[7:10, 0, 0].tolist() == [[150, 25, 100], [100, 50, 100], [50, 75, 100]]
    nothing_shared = effects.crossfade(a, b, 0)
    np.testing.assert_array_equal(nothing_shared.frames, np.concatenate([a.frames, b.frames]))
    with pytest.raises(ValueError, match=r"duration_s must be 0\.\.1, got 1\.5"):
        effects.crossfade(a, b, 1.5)


def test_overlay_equals_numpy_by_hand():
    clip, logo = noise(5, 12, 16), noise(1, 4, 6, seed=1)
    expected = clip.frames.copy()
    expected[:, 3:7, 2:8] = logo.frames[0]
    np.testing.assert_array_equal(effects.overlay(clip, logo, 2, 3).frames, expected)
    corner = clip.frames.copy()
    corner[:, :2, :3] = logo.frames[0, 2:, 3:]
    np.testing.assert_array_equal(effects.overlay(clip, logo, -3, -2).frames, corner)
    np.testing.assert_array_equal(effects.overlay(clip, logo, 16, 0).frames, clip.frames)
    mask = np.random.default_rng(2).uniform(0, 1, (4, 6))
    share = 0.6 * mask[..., None]
    blended = clip.frames.astype(float)
    blended[:, 3:7, 2:8] += share * (logo.frames[0] - blended[:, 3:7, 2:8])
    got = effects.overlay(clip, logo, 2, 3, 0.6, mask).frames
    np.testing.assert_allclose(got, blended, atol=0.501)
    np.testing.assert_array_equal(effects.overlay(clip, logo, 2, 3, 0).frames, clip.frames)


def test_an_overlaid_clip_runs_at_its_own_speed_and_then_stays():
    base, other = counting(10), Clip(counting(3, fps=5.0).frames + np.uint8(100), 5.0)
    assert numbers(effects.overlay(base, other)) == [100, 100, 101, 101, *[102] * 6]


# ---- metadata and chains ----------------------------------------------------------------------------------------


def test_every_effect_is_written_down():
    mask = np.ones((12, 16))
    clip = effects.lens_blur(effects.overlay(effects.hue(noise(), 90.0), noise(), 1, opacity=0.5), 1.5, mask)
    assert clip.metadata == {"seed": 0, "effects": ["hue=90", "overlay=clip,1,0,0.5", "lens_blur=1.5,mask"]}
    assert json.loads(json.dumps(clip.metadata)) == clip.metadata
    assert noise().metadata == {"seed": 0}


def test_a_chain_equals_the_functions_by_hand(tmp_path):
    clip = noise(16, sound=tone(400, 2.0))
    logo = save_image(tmp_path / "logo.png", noise(1, 4, 4, seed=3).frames[0])
    white = np.zeros((12, 16, 3), np.uint8)
    white[:, 8:] = 255
    mask = save_image(tmp_path / "mask.png", white)
    second = noise(8, seed=2).save(tmp_path / "second")
    chain = (
        f"brightness=0.1; saturation=1.4;cut=0.5,2;reverse;lens_blur=2,{mask};overlay={logo},4,4,0.5;"
        f"concatenate={second},{second};crossfade={second},0.5;fade=0.25;"
    )
    got = apply_effects(clip, chain)
    by_hand = effects.reverse(effects.cut(effects.saturation(effects.brightness(clip, 0.1), 1.4), 0.5, 2))
    by_hand = effects.lens_blur(by_hand, 2, white[..., 0] / 255)
    by_hand = effects.overlay(by_hand, read_video(logo), 4, 4, 0.5)
    by_hand = effects.concatenate([by_hand, read_video(second), read_video(second)])
    by_hand = effects.fade(effects.crossfade(by_hand, read_video(second), 0.5), 0.25)
    np.testing.assert_array_equal(got.frames, by_hand.frames)
    assert got.num_frames == 12 + 8 + 8 + 8 - 4 and got.fps == 8.0
    assert got.sound is not None and by_hand.sound is not None
    np.testing.assert_array_equal(got.sound.samples, by_hand.sound.samples)
    assert got.metadata["seed"] == 0 and len(got.metadata["effects"]) == 9
    again = apply_effects(clip, ";".join(got.metadata["effects"]))  # the record is a chain again
    np.testing.assert_array_equal(again.frames, got.frames)


def test_files_go_through_load():
    asked = []

    def load(path):
        asked.append(path)
        return noise(seed=5)

    assert apply_effects(noise(), "concatenate=a.mp4, b.mp4", load=load).num_frames == 12
    assert asked == ["a.mp4", "b.mp4"]
    assert apply_effects(noise(), " ; ").metadata == {"seed": 0}


@pytest.mark.parametrize(
    ("chain", "match"),
    [
        ("brightnes=0.1", "unknown effect 'brightnes'; did you mean 'brightness'"),
        ("zzzz", "unknown effect 'zzzz'; known are brightness, "),
        ("cut", r"cut is written cut=start\[,stop\]; 'cut' has 0 arguments"),
        ("reverse=1", r"reverse is written reverse; 'reverse=1' has 1 argument$"),
        ("crop=1,2,3,4,5", "crop is written crop=x,y,height,width; .* has 5 arguments"),
        ("hue=blue", "hue is written hue=degrees; 'blue' is not a number"),
        ("gamma=nan", "'nan' is not a number"),
        ("crop=1,2.5,3,4", "'2.5' is not a whole number"),
        ("concatenate=", "a file name is missing"),
        ("brightness=2", r"brightness: amount must be -1\.\.1, got 2"),
        ("speed=0", r"speed: factor must be 0\.01\.\.100"),
        ("resize=10,10.5", "is not a whole number"),
        ("resize=100000,100000", "resize: .* too large"),
        ("set_fps=0", "set_fps: fps must be"),
    ],
)
def test_mistakes_are_one_sentence(chain, match):
    with pytest.raises(ValueError, match=match) as caught:
        apply_effects(noise(), chain)
    assert "\n" not in str(caught.value)


def test_a_chain_is_judged_before_anything_is_done():
    def load(path):
        raise AssertionError("a file was read")

    with pytest.raises(ValueError, match="unknown effect"):
        apply_effects(noise(), "concatenate=a.mp4;revers", load=load)
    with pytest.raises(VideoError, match="does not exist"):
        apply_effects(noise(), "overlay=nowhere.png")
    assert [call.arguments for call in parse_effects("cut=1;overlay=a.png,3")] == [(1.0,), ("a.png", 3)]


def test_help_and_documentation_name_every_effect():
    lines = effect_help().split("\n")
    assert len(lines) == len(EFFECTS)
    text = (Path(__file__).parents[2] / "docs" / "effects.md").read_text()
    for line, name in zip(lines, EFFECTS):
        assert line.startswith(effect_usage(name)) and len(line.split()) > 3
        assert f"`{effect_usage(name)}`" in text, name
    for chain in re.findall(r'apply_effects\(\w+, "(.+?)"\)', text):
        assert parse_effects(chain)
