"""Edits of a clip through a model of toy size: what comes back, what stays bit for bit, and what costs nothing twice.

The clip has another size, length and rate than the model, so every edit is resized and walked in windows of 3 frames.
"""

import json

import numpy as np
import pytest

from vdiff_jax import tasks
from vdiff_jax.data.sound import Sound
from vdiff_jax.data.transforms import resize_frames
from vdiff_jax.data.video_io import Clip
from vdiff_jax.editor import Editor
from vdiff_jax.rollout import RollOut

COUNT, HEIGHT, WIDTH = 5, 20, 24
QUICK = dict(steps=2, guidance_scale=1.0)
RED, BLUE = "a red circle moving right", "a blue square moving down"


def make_clip(num_frames=COUNT, height=HEIGHT, width=WIDTH, fps=10.0, seed=0):
    """Smooth moving colours with a little fine detail, and a sound of its length."""
    rng = np.random.default_rng(seed)
    t, y, x = np.mgrid[0:num_frames, 0:height, 0:width].astype(np.float64)
    waves = [np.sin((x + 2 * t + seed) / 5), np.cos((y - t) / 4), np.sin((x + y) / 9 + t / 3)]
    frames = 127.5 + 90 * np.stack(waves, -1) + rng.normal(size=(num_frames, height, width, 3)) * 8
    sound = Sound(rng.uniform(-1, 1, (round(800 * num_frames / fps), 2)).astype(np.float32), 800)
    return Clip(np.clip(frames, 0, 255).astype(np.uint8), fps, {"title": "waves"}, sound)


CLIP = make_clip()
MASK = np.zeros((COUNT, HEIGHT, WIDTH), np.float32)
MASK[:, 6:14, 8:17] = 1
INSIDE = MASK > 0.5


@pytest.fixture(scope="module")
def editor(model):
    return Editor(model, CLIP)


@pytest.fixture(scope="module")
def recoloured(editor):
    return editor.edit(BLUE, RED, **QUICK)


def furthest(one, two):
    return int(np.abs(one.astype(int) - two).max())


# What comes back -------------------------------------------------------------------------------------------------


def test_an_edit_gives_back_size_length_rate_sound_and_what_was_done(editor, recoloured):
    assert recoloured.frames.shape == CLIP.frames.shape and recoloured.frames.dtype == np.uint8
    assert recoloured.fps == CLIP.fps and recoloured.sound is CLIP.sound
    told = json.loads(json.dumps(recoloured.metadata))
    assert told["title"] == "waves" and told["note"] == "AI-generated" and told["model"] == editor.model.digest
    (edit,) = told["edits"]
    assert edit["task"] == "edit" and edit["prompt"] == BLUE and edit["source_prompt"] == RED and edit["steps"] == 2
    assert furthest(recoloured.frames, CLIP.frames) > 3
    # An edit of an edit lists both; numbers that JSON has no word for are written as text.
    again = Editor(editor.model, recoloured).inpaint(MASK, guidance_interval=(-np.inf, 2.0), **QUICK)
    both = json.loads(json.dumps(again.metadata, allow_nan=False))["edits"]
    assert [edit["task"] for edit in both] == ["edit", "inpaint"] and both[1]["guidance_interval"] == "-inf,2"
    assert len(recoloured.metadata["edits"]) == 1 and "edits" not in CLIP.metadata


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (16, 16), (9, 40)])
def test_an_edit_that_changes_nothing_gives_back_the_input(model, size):
    # The network's weights are random and its autoencoder loses nearly all; the detail kept makes up for it.
    clip = make_clip(height=size[0], width=size[1])
    session = Editor(model, clip)
    assert furthest(session.edit(RED, RED, **QUICK).frames, clip.frames) <= 2
    lossy = session.edit(RED, RED, keep_detail=False, **QUICK).frames
    assert furthest(lossy, resize_frames(session.reconstruction, *size)) <= 2 and furthest(lossy, clip.frames) > 50


def test_the_same_edit_again_is_bit_equal_and_others_compile_nothing(editor, recoloured):
    compiled = editor.model._run._cache_size()
    np.testing.assert_array_equal(editor.edit(BLUE, RED, **QUICK).frames, recoloured.frames)
    np.testing.assert_array_equal(Editor(editor.model, CLIP).edit(BLUE, RED, **QUICK).frames, recoloured.frames)
    other = editor.edit("up", RED, seed=3, strength=0.9, **QUICK)
    masked = editor.edit(BLUE, RED, mask=MASK, **QUICK)
    long = Editor(editor.model, make_clip(8, 14, 30), stride=2.0).edit(BLUE, RED, **QUICK)
    assert long.frames.shape == (8, 14, 30, 3)
    assert editor.model._run._cache_size() == compiled
    assert furthest(other.frames, recoloured.frames) > 3 and furthest(masked.frames, recoloured.frames) > 3


def test_an_inversion_is_made_once_and_leads_back(model):
    session = Editor(model, CLIP)
    first = session.edit(BLUE, RED, method="ddpm", **QUICK)
    kept = dict(session._inverted)
    assert len(kept) == 3  # one per window
    second = session.edit("up", RED, method="ddpm", **QUICK)
    assert session._inverted.keys() == kept.keys() and all(session._inverted[name] is kept[name] for name in kept)
    fresh = Editor(model, CLIP)
    np.testing.assert_array_equal(fresh.edit("up", RED, method="ddpm", **QUICK).frames, second.frames)
    session.edit(BLUE, "down", method="ddpm", **QUICK)
    assert len(session._inverted) == 6  # another source is another inversion
    # Under a mask another inversion is made: one, though what it loses is told and it is edited.
    kept = set(session._inverted)
    session.edit(BLUE, RED, mask=MASK, method="ddpm", **QUICK)
    assert len(set(session._inverted) - kept) == 3
    # A tape leads back exactly: what is lost is the autoencoder's.
    lost = (session.reconstruction.astype(float) - session.frames) / 127.5
    psnr = 10 * np.log10(4 / np.mean(np.square(lost)))
    assert abs(first.metadata["edits"][-1]["reconstruction_psnr"] - psnr) < 0.05


def test_a_structure_is_a_measurement_of_the_clip_as_it_is(editor, monkeypatch):
    held = []
    edit_by_prompt = tasks.edit_by_prompt

    def seen(*args, wrappers, **options):
        held.append(wrappers)
        return edit_by_prompt(*args, wrappers=wrappers, **options)

    monkeypatch.setattr(tasks, "edit_by_prompt", seen)
    free = editor.edit(BLUE, RED, **QUICK)
    assert held == [(), (), ()]
    options = QUICK | {"steps": 1}
    tied = editor.edit(BLUE, RED, structure="luminance", structure_std=0.05, **options)
    assert tied.metadata["edits"][-1]["structure"] == "luminance" and (tied.frames != free.frames).any()
    luma = (editor.frames / 127.5 - 1) @ np.array([0.2126, 0.7152, 0.0722])
    for start, (structure,) in zip((0, 1, 2), held[3:], strict=True):  # windows of 3 of 5 frames
        np.testing.assert_allclose(structure.observed[0, ..., 0], luma[start : start + 3], atol=1e-5)
        assert structure.noise_std == np.float32(0.05)


# Masks -----------------------------------------------------------------------------------------------------------


def test_outside_of_a_mask_every_pixel_is_the_input_s(editor):
    made = {
        "inpaint": editor.inpaint(MASK, RED, **QUICK),
        "edit": editor.edit(BLUE, RED, mask=MASK, **QUICK),
    }
    for task, clip in made.items():
        np.testing.assert_array_equal(clip.frames[~INSIDE], CLIP.frames[~INSIDE])
        assert (clip.frames[INSIDE] != CLIP.frames[INSIDE]).mean() > 0.3, task
        assert clip.sound is CLIP.sound and clip.fps == CLIP.fps
    assert (editor.inpaint(MASK, RED, seed=1, **QUICK).frames != made["inpaint"].frames).any()


def test_what_lay_under_the_mask_has_no_part_in_the_result(editor):
    # The clip is resized for the model, which looks beyond the pixel, and pasted with a soft edge.
    frames = CLIP.frames.copy()
    frames[INSIDE] = 255 - frames[INSIDE]
    other = Editor(editor.model, Clip(frames, CLIP.fps))
    np.testing.assert_array_equal(other.inpaint(MASK, RED, **QUICK).frames, editor.inpaint(MASK, RED, **QUICK).frames)
    np.testing.assert_array_equal(other.hole_filled(MASK), editor.hole_filled(MASK))
    np.testing.assert_array_equal(editor.hole_filled(MASK)[~INSIDE], CLIP.frames[~INSIDE])


def test_a_mask_at_the_model_s_size_covers_all_that_a_covered_pixel_touches(model):
    mask = (np.random.default_rng(4).random((2, HEIGHT, 7)) < 0.05).astype(np.float32)
    small = Editor(model, Clip(np.zeros((*mask.shape, 3), np.uint8), 8.0)).small_mask(mask)
    expected = np.zeros((2, 16, 16))
    for frame, row, column in np.argwhere(mask):  # in units of a cell, the pixel reaches from a to b
        (top, bottom), (left, right) = ((i * 16 / n, (i + 1) * 16 / n) for i, n in ((row, HEIGHT), (column, 7)))
        for y in range(16):
            for x in range(16):
                if top < y + 1 - 1e-9 and bottom > y + 1e-9 and left < x + 1 - 1e-9 and right > x + 1e-9:
                    expected[frame, y, x] = 1
    np.testing.assert_array_equal(small, expected)


def test_a_wider_picture_keeps_its_middle(editor):
    wide = editor.outpaint(left=1, bottom=1, prompt=RED, **QUICK)
    assert wide.frames.shape == (COUNT, HEIGHT + 1, WIDTH + 1, 3)
    np.testing.assert_array_equal(wide.frames[:, :-1, 1:], CLIP.frames)
    assert [edit["task"] for edit in wide.metadata["edits"]] == ["outpaint", "inpaint"]


def test_a_camera_that_pans_makes_only_what_comes_into_view(editor):
    moved = editor.move_camera(pan=(8, 0), prompt=RED, **QUICK)  # 2 pixels a frame
    for frame in range(COUNT):
        np.testing.assert_array_equal(
            moved.frames[frame, :, : WIDTH - 2 * frame], CLIP.frames[frame, :, 2 * frame :]
        )  # fmt: skip
    assert moved.sound is CLIP.sound and [edit["task"] for edit in moved.metadata["edits"]] == [
        "move_camera",
        "inpaint",
    ]
    closer = editor.move_camera(zoom=2.0)  # shows nothing new, so no model is asked
    assert closer.metadata["edits"] == [{"task": "move_camera", "pan": [0.0, 0.0], "zoom": 2.0}]
    np.testing.assert_array_equal(closer.frames[0], CLIP.frames[0])


# Time ------------------------------------------------------------------------------------------------------------


def test_what_stands_still_is_as_sharp_in_new_frames_as_in_given_ones(editor):
    like = np.array([0, 1, 1, 4, 2])
    made = editor.finish(editor.reconstruction[like], {"task": "test"}, keep_detail=True, source=like)
    assert furthest(made.frames, CLIP.frames[like]) <= 2
    bare = editor.finish(editor.reconstruction[like], {"task": "test"})
    assert furthest(bare.frames, CLIP.frames[like]) > 50


@pytest.mark.parametrize("num_frames", [2, 5])
def test_slow_motion_keeps_the_given_frames_bit_for_bit(model, num_frames):
    clip = make_clip(num_frames)
    slow = Editor(model, clip).interpolate(2, **QUICK)
    assert slow.num_frames == 2 * num_frames - 1 and slow.fps == clip.fps
    np.testing.assert_array_equal(slow.frames[::2], clip.frames)
    assert all((slow.frames[i] != slow.frames[i - 1]).any() for i in range(1, slow.num_frames))
    assert slow.sound is not None and abs(slow.sound.duration_s - 2 * clip.duration_s) < 0.01
    assert slow.metadata["edits"][-1]["steps"] == 2


def test_a_transition_lies_between_two_clips_of_any_size(editor):
    other = make_clip(4, 10, 30, fps=20.0, seed=1)
    joined = editor.join(other, 1, context=1, **QUICK)
    assert joined.frames.shape == (COUNT + 1 + 2, HEIGHT, WIDTH, 3) and joined.fps == CLIP.fps
    np.testing.assert_array_equal(joined.frames[:COUNT], CLIP.frames)
    np.testing.assert_array_equal(joined.frames[-2:], resize_frames(other.frames[::2], HEIGHT, WIDTH))
    assert joined.sound is not None and abs(joined.sound.duration_s - joined.duration_s) < 0.01
    quiet = joined.sound.cut(COUNT / CLIP.fps, (COUNT + 1) / CLIP.fps).samples
    assert not quiet[2:-2].any() and joined.sound.samples.any()
    assert [edit["task"] for edit in joined.metadata["edits"]] == ["join"]


def test_a_loop_leads_from_the_end_to_the_beginning(editor):
    loop = editor.loop(1, context=1, **QUICK)
    assert loop.num_frames == COUNT + 1
    np.testing.assert_array_equal(loop.frames[:COUNT], CLIP.frames)
    # The same given frames on either side as a clip that is joined with itself.
    np.testing.assert_array_equal(editor.join(CLIP, 1, context=1, **QUICK).frames[COUNT], loop.frames[-1])


def test_a_clip_is_made_from_its_ends(model, editor):
    both = editor.from_ends(3, **QUICK)
    np.testing.assert_array_equal(both.frames[[0, 2]], CLIP.frames[[0, -1]])
    first = editor.from_ends(3, last=False, **QUICK)
    np.testing.assert_array_equal(first.frames[0], CLIP.frames[0])
    assert both.num_frames == first.num_frames == 3 and (first.frames[2] != CLIP.frames[-1]).mean() > 0.5
    with pytest.raises(ValueError, match="2 known frames leave no new one in a window of 2"):
        Editor(model, CLIP, window=2, overlap=0).from_ends(4, **QUICK)
    alone = Editor(model, Clip(CLIP.frames[:1], CLIP.fps)).from_ends(3, **QUICK)
    np.testing.assert_array_equal(alone.frames, first.frames)  # one frame: there is no last one


def test_what_lies_between_ends_far_apart_is_made_coarse_to_fine(model, monkeypatch):
    asked = []
    complete = type(model).complete

    def seen(self, known, *args, times, **options):
        asked.append((np.asarray(known.mask[0, :, 0, 0, 0]), np.asarray(known.logsnr[0]), np.asarray(times)))
        return complete(self, known, *args, times=times, **options)

    monkeypatch.setattr(type(model), "complete", seen)
    joined = Editor(model, CLIP, overlap=1).join(CLIP, 5, context=1, **QUICK)
    assert joined.num_frames == 2 * COUNT + 5
    np.testing.assert_array_equal(joined.frames[:COUNT], CLIP.frames)
    # Of frames 0 to 6 with the ends given: 3, then 1 or 2 in each half, then windows of 3 that share one frame.
    assert [mask.tolist() for mask, _, _ in asked] == [[1, 0, 1], [1, 0, 1], [1, 0, 1], [1, 1, 0], [1, 0, 1]]
    assert [times.tolist() for _, _, times in asked] == [[0, 3, 6], [0, 1, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2]]
    clean, context = asked[0][1][0], asked[1][1][2]
    assert asked[0][1].tolist()[::2] == [clean, clean] and asked[1][1][0] == clean > context
    assert all((joined.frames[COUNT + i] != joined.frames[COUNT + i - 1]).any() for i in range(6))


def test_the_future_goes_on_from_the_clip_with_the_prompt_of_its_frame(editor):
    options = RollOut(window=3, context=1, statistics=0.0)
    one = editor.extend(9, RED, options=options, **QUICK)
    assert one.frames.shape == (9, HEIGHT, WIDTH, 3) and one.sound is CLIP.sound
    np.testing.assert_array_equal(one.frames[:COUNT], CLIP.frames)
    assert all((one.frames[i] != one.frames[i - 1]).any() for i in range(COUNT, 9))
    both = editor.extend(9, {0: RED, 7: BLUE}, options=options, **QUICK)
    np.testing.assert_array_equal(both.frames[:7], one.frames[:7])
    assert all((both.frames[i] != one.frames[i]).any() for i in (7, 8))
    np.testing.assert_array_equal(editor.extend(7, {0: RED, 7: BLUE}, **QUICK).frames, both.frames[:7])
    assert json.loads(json.dumps(both.metadata))["edits"][-1]["prompt"] == {"0": RED, "7": BLUE}
    assert editor.extend(6, **QUICK).num_frames == 6


def test_all_of_this_is_one_compiled_program(editor):
    editor.inpaint(MASK, RED, **QUICK)
    compiled = editor.model._run._cache_size()
    editor.interpolate(2, **QUICK)
    editor.loop(1, context=1, **QUICK)
    editor.from_ends(3, **QUICK)
    editor.extend(8, RED, **QUICK)
    editor.harmonise(prompt=RED, steps=2)
    editor.restore("denoise", RED, method="fast", steps=2)
    assert editor.model._run._cache_size() == compiled


# Mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("the mask has shape", lambda e: e.inpaint(MASK[:, :-1])),
    ("the mask has shape", lambda e: e.edit(BLUE, RED, mask=MASK[:2])),
    ("feather=-1", lambda e: e.inpaint(MASK, feather=-1, **QUICK)),
    ("edit method 'flip' is unknown", lambda e: e.edit(BLUE, RED, method="flip")),
    ("strength=0", lambda e: e.edit(BLUE, RED, strength=0)),
    ("steps=0", lambda e: e.edit(BLUE, RED, steps=0)),
    ("the latents have shape (1, 4,", lambda e: e.harmonise(e.latents[:, 1:])),
    ("structure='edges' is unknown", lambda e: e.edit(BLUE, RED, structure="edges")),
    ("outpaint by", lambda e: e.outpaint()),
    ("zoom=0", lambda e: e.move_camera(zoom=0)),
    ("factor=1 of 5 frame", lambda e: e.interpolate(1)),
    ("num_frames=0: a transition", lambda e: e.join(CLIP, 0)),
    ("context=0", lambda e: e.loop(1, context=0)),
    ("num_frames=2: beside 2", lambda e: e.from_ends(2)),
    ("num_frames=5: the clip has 5 already", lambda e: e.extend(5)),
    ("empty mapping", lambda e: e.extend(6, {})),
    ("a context of 6 is asked", lambda e: e.extend(6, options=RollOut(window=9, context=6))),
    ("stride=0", lambda e: Editor(e.model, CLIP, stride=0)),
    ("window=0", lambda e: Editor(e.model, CLIP, window=0)),
    ("overlap=-1", lambda e: Editor(e.model, CLIP, overlap=-1)),
    ("size 7x7 does not fit", lambda e: Editor(e.model, CLIP, size=7)),
]


@pytest.mark.parametrize(("said", "call"), MISTAKES, ids=[f"{i}: {said}" for i, (said, _) in enumerate(MISTAKES)])
def test_mistakes_are_told_in_one_sentence(editor, said, call):
    with pytest.raises(ValueError) as error:
        call(editor)
    text = str(error.value)
    assert said in text and "\n" not in text and len(text) < 250
