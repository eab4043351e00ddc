"""Masks from text: boxes by counting pixels, files by pictures made here, and one sentence for each mistake."""

import numpy as np
import pytest
from PIL import Image

from vdiff_jax.data.masks import box_mask, colour_mask, grow_mask, make_mask, read_mask
from vdiff_jax.data.video_io import Clip, VideoError

SHAPE = (5, 12, 16)
FRAMES = np.zeros((*SHAPE, 3), np.uint8)


def rectangle(rows, columns, shape=SHAPE):
    mask = np.zeros(shape, np.float32)
    mask[:, rows, columns] = 1
    return mask


def test_a_box_is_its_pixels_in_every_frame():
    mask = make_mask("box:4,6,3,2", FRAMES)
    assert mask.dtype == np.float32 and mask.shape == SHAPE
    np.testing.assert_array_equal(mask, rectangle(slice(6, 8), slice(4, 7)))
    np.testing.assert_array_equal(make_mask(" box: 4, 6 ,3,2 ", FRAMES), mask)


def test_a_box_covers_every_pixel_it_touches_and_may_leave_the_frame():
    # From 4.5 to 6.1 it touches the cells 4, 5 and 6; what lies outside the frame is cut off.
    np.testing.assert_array_equal(make_mask("box:4.5,0,1.6,1", FRAMES), rectangle(slice(0, 1), slice(4, 7)))
    np.testing.assert_array_equal(make_mask("box:-3,10,5,99", FRAMES), rectangle(slice(10, 12), slice(0, 2)))


def test_key_frames_are_joined_by_straight_lines_and_held_outside():
    # x goes from 2 at frame 1 to 8 at frame 3: 5 at frame 2; the height from 2 to 4, so 3.
    mask = make_mask("box:3:8,1,2,4;1:2,1,2,2", FRAMES)
    for frame, (x, height) in enumerate([(2, 2), (2, 2), (5, 3), (8, 4), (8, 4)]):
        np.testing.assert_array_equal(mask[frame], rectangle(slice(1, 1 + height), slice(x, x + 2))[0])
    np.testing.assert_array_equal(mask, box_mask({1: (2, 1, 2, 2), 3: (8, 1, 2, 4)}, SHAPE))


def test_a_colour_covers_what_is_near_it():
    frames = FRAMES.copy()
    frames[:, 2:4, 3:6] = (242, 115, 115)  # #f27373
    frames[:, 8, 8] = (242, 115, 76)  # 39 / 255 = 0.153 away
    near, far = rectangle(slice(2, 4), slice(3, 6)), rectangle(slice(8, 9), slice(8, 9))
    np.testing.assert_array_equal(make_mask("colour:#f27373,0.1", frames), near)
    np.testing.assert_array_equal(make_mask("colour:F27373,0.16", frames), near + far)
    np.testing.assert_array_equal(make_mask("colour:#f27373", frames), near)  # 0.15 by default
    np.testing.assert_array_equal(colour_mask(frames, (242 / 255, 115 / 255, 76 / 255), 0.01), far)


def test_an_exclamation_mark_turns_the_mask_over_before_it_grows():
    box = rectangle(slice(6, 8), slice(4, 7))
    np.testing.assert_array_equal(make_mask("!box:4,6,3,2", FRAMES), 1 - box)
    np.testing.assert_array_equal(make_mask("! box:4,6,3,2", FRAMES), 1 - box)
    # What is kept, 5 x 7 pixels, loses a pixel on every side when its surroundings grow.
    kept = rectangle(slice(3, 6), slice(5, 10))
    np.testing.assert_array_equal(make_mask("!box:4,2,7,5", FRAMES, grow=1), 1 - kept)


def test_growing_widens_all_sides_in_space_and_not_in_time():
    box = np.zeros(SHAPE, np.float32)
    box[2, 6:8, 4:7] = 1
    grown = np.zeros(SHAPE, np.float32)
    grown[2, 4:10, 2:9] = 1
    np.testing.assert_array_equal(grow_mask(box, 2), grown)
    np.testing.assert_array_equal(grow_mask(box, 0), box)
    np.testing.assert_array_equal(
        make_mask("box:4,6,3,2", FRAMES, grow=2), rectangle(slice(4, 10), slice(2, 9))
    )  # fmt: skip


def test_one_image_stands_for_all_frames_and_is_scaled(tmp_path):
    # A mask of twice and of half the size: every pixel of the clip reads the pixel that lies over its middle.
    small = np.zeros((6, 8), np.uint8)
    small[1:3, 2:5] = 255
    expected = rectangle(slice(2, 6), slice(4, 10))
    for name, image in (("small.png", small), ("large.png", small.repeat(4, 0).repeat(4, 1))):
        Image.fromarray(image).save(tmp_path / name)
        np.testing.assert_array_equal(make_mask(str(tmp_path / name), FRAMES), expected)
    np.testing.assert_array_equal(make_mask(f"!{tmp_path}/small.png", FRAMES), 1 - expected)
    Image.fromarray(np.full((12, 16), 51, np.uint8)).save(tmp_path / "grey.png")
    np.testing.assert_allclose(read_mask(tmp_path / "grey.png", SHAPE), 0.2, atol=1e-6)


def test_a_video_mask_moves_and_its_longer_end_is_left_out(tmp_path):
    moving = np.zeros((7, 12, 16, 3), np.uint8)
    for frame in range(7):
        moving[frame, 2:8, 2 * frame : 2 * frame + 4] = 255
    Clip(moving, 8.0).save(tmp_path / "frames")
    np.testing.assert_array_equal(make_mask(str(tmp_path / "frames"), FRAMES), (moving[:5, ..., 0] > 0).astype(float))
    Clip(moving.repeat(4, 1).repeat(4, 2), 8.0).save(tmp_path / "mask.mp4", crf=0)
    read = make_mask(str(tmp_path / "mask.mp4"), FRAMES)
    assert ((read > 0.5) == (moving[:5, ..., 0] > 0)).all()  # lossy, but on the right side


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("box:1,2,3", "no box in '1,2,3'"),
        ("box:", "no box in ''"),
        ("box", "no box in ''"),
        ("box:1,2,three,4", "no box in '1,2,three,4'"),
        ("box:0.5:1,2,3,4", "no box in '0.5:1,2,3,4'"),
        ("box:0:1,2,3,4;", "no box in ''"),
        ("box:1,2,0,4", "a box without area in '1,2,0,4'"),
        ("box:1,2,3,4;5,6,7,8", "two boxes for frame 0"),
        ("box:40,40,5,5", "covers nothing of the clip"),
        ("box:nan,1,5,5", "covers nothing of the clip"),
        ("!box:0,0,16,12", "covers nothing of the clip"),
        ("colour:#f2737,0.1", "is no colour"),
        ("colour:#gg7373", "is no colour"),
        ("colour:#f27373,near", "is no colour"),
        ("colour:#ffffff,0.1", "covers nothing of the clip"),
    ],
)
def test_mistakes_are_told_in_one_sentence_with_the_forms(spec, said):
    with pytest.raises(ValueError, match="give a file, box:X,Y,W,H") as error:
        make_mask(spec, FRAMES)
    text = str(error.value)
    assert said in text and repr(spec) in text and "\n" not in text


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(VideoError, match="nowhere"):
        make_mask(str(tmp_path / "nowhere.png"), FRAMES)
    Clip(np.full((3, 12, 16, 3), 255, np.uint8), 8.0).save(tmp_path / "short")
    with pytest.raises(ValueError, match="has 3 frames, the clip 5: give one or as many"):
        make_mask(str(tmp_path / "short"), FRAMES)
