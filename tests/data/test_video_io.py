"""Clips through real files: every suffix there and back, selections, limits, and one sentence for each bad file."""

import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from vdiff_jax.data.transforms import centre_crop_resize
from vdiff_jax.data.video_io import (
    Clip,
    Limits,
    VideoError,
    check_writable,
    contact_sheet,
    probe,
    read_video,
    save_image,
)

METADATA = {"prompt": 'a r\u00f8d "ball"; 1 = 2', "seed": 7, "notes": ["x" * 400]}


def moving(num_frames=12, h=48, w=64):
    """Smooth moving colours, kind to chroma subsampling; every frame differs from every other."""
    t, y, x = np.mgrid[0:num_frames, 0:h, 0:w].astype(np.float64)
    waves = [np.sin((x + 2 * t) / 9), np.cos((y - 3 * t) / 11), np.sin((x + y) / 25 + t / 5)]
    return (127.5 + 110 * np.stack(waves, -1)).astype(np.uint8)


def counting(num_frames):
    """Frame i is grey level 10 + 6 i: which frame was read can be told from its mean."""
    return np.broadcast_to(
        (10 + 6 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None], (num_frames, 32, 32, 3)
    )


def numbers(clip):
    return np.round((clip.frames.mean((1, 2, 3)) - 10) / 6).astype(int).tolist()


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def one_sentence(caught):
    text = str(caught.value)
    return "\n" not in text and len(text) < 400


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return Clip(np.ascontiguousarray(counting(40)), 10.0).save(tmp_path_factory.mktemp("counted") / "c.mp4")


@pytest.mark.parametrize(("name", "least"), [("a.mp4", 33), ("a.webm", 33), ("a.gif", 23), ("folder", None)])
def test_round_trip(tmp_path, name, least):
    frames = moving()
    frames[5] = frames[4]  # a repeated frame stays a frame
    path = Clip(frames, 12.0, METADATA).save(tmp_path / "new" / name)
    info, clip = probe(path), read_video(path)
    assert clip.frames.shape == frames.shape and clip.metadata == METADATA == info.metadata
    assert clip.fps == pytest.approx(12.0, rel=5e-3) == info.fps
    assert (info.num_frames, info.height, info.width) == (12, 48, 64)
    if least is None:
        np.testing.assert_array_equal(clip.frames, frames)
    else:
        assert psnr(clip.frames, frames) > least
        assert np.abs((clip.frames.astype(float) - frames).mean((0, 1, 2))).max() < 2.5  # no colour cast
    assert [p.name for p in path.parent.iterdir()] == [name]  # nothing temporary is left


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_are_padded_and_noted(tmp_path, suffix):
    frames = moving(4, 33, 47)
    clip = read_video(Clip(frames, 8.0, {"seed": 1}).save(tmp_path / f"odd{suffix}"))
    assert clip.frames.shape == (4, 34, 48, 3) and clip.metadata == {"seed": 1, "padded_from": [33, 47]}
    assert psnr(clip.frames[:, :33, :47], frames) > 30


def test_the_file_says_bt709(tmp_path):
    with av.open(str(Clip(moving(2), 8.0).save(tmp_path / "a.mp4"))) as container:
        assert container.streams.video[0].codec_context.colorspace == 1


def test_png_is_a_contact_sheet(tmp_path):
    frames = moving(5, 8, 10)
    path = Clip(frames, 8.0, METADATA).save(tmp_path / "sheet.png")
    clip = read_video(path)
    assert clip.num_frames == 1 and clip.metadata == METADATA
    sheet = clip.frames[0]
    np.testing.assert_array_equal(sheet, contact_sheet(frames))
    assert sheet.shape == (2 * 8 + 2, 3 * 10 + 2 * 2, 3)
    np.testing.assert_array_equal(sheet[10:18, 12:22], frames[4])
    assert (sheet[8:10] == 255).all() and (sheet[10:, 24:] == 255).all()


def test_contact_sheet_of_several_clips():
    clips = [moving(6, 8, 10), moving(3, 8, 10)[::-1]]
    sheet = contact_sheet(clips, columns=3, gap=1)
    assert sheet.shape == (17, 32, 3)
    np.testing.assert_array_equal(sheet[:8, 22:], clips[0][5])
    np.testing.assert_array_equal(sheet[9:, 11:21], clips[1][1])
    with pytest.raises(VideoError, match="one size"):
        contact_sheet([moving(2, 8, 8), moving(2, 8, 10)])


def test_a_folder_is_replaced_only_if_it_is_a_clip(tmp_path):
    Clip(moving(6), 8.0).save(tmp_path / "clip")
    Clip(moving(3), 4.0).save(tmp_path / "clip")
    assert read_video(tmp_path / "clip").num_frames == 3 and [p.name for p in tmp_path.iterdir()] == ["clip"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(VideoError, match="holds other things") as caught:
        Clip(moving(3), 4.0).save(tmp_path / "home")
    assert one_sentence(caught) and (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_start_stride_and_count(counted):
    assert numbers(read_video(counted)) == list(range(40))
    clip = read_video(counted, num_frames=5, start=3, stride=4)
    assert numbers(clip) == [3, 7, 11, 15, 19] and clip.fps == 2.5
    assert numbers(read_video(counted, start=30, stride=5)) == [30, 35]


@pytest.mark.parametrize(("fps", "expected"), [(5.0, list(range(0, 40, 2))), (20.0, [i // 2 for i in range(80)])])
def test_resampling_in_time(counted, fps, expected):
    clip = read_video(counted, fps=fps)
    assert numbers(clip) == expected and clip.fps == fps
    part = read_video(counted, fps=fps, start=4, stride=2, num_frames=3)
    assert numbers(part) == expected[4:9:2] and part.fps == fps / 2


def test_resampling_follows_the_clock_of_a_variable_rate(tmp_path):
    path = tmp_path / "variable.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.codec_context.time_base = Fraction(1, 10)
        for image, pts in zip(counting(4), (0, 1, 5, 6)):  # frame 1 stands for 0.4 s
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert numbers(read_video(path, fps=10.0, num_frames=7)) == [0, 1, 1, 1, 1, 2, 3]


def test_seeking_equals_decoding(tmp_path):
    levels = (40 + np.arange(560) % 150).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (560, 16, 16, 3))
    path = Clip(np.ascontiguousarray(frames), 25.0).save(tmp_path / "long.mp4")
    whole = read_video(path).frames
    for start in (250, 333, 555):
        np.testing.assert_array_equal(read_video(path, start=start, num_frames=5).frames, whole[start : start + 5])
    slow = read_video(path, fps=5.0).frames
    np.testing.assert_array_equal(slow, whole[::5])
    np.testing.assert_array_equal(read_video(path, fps=5.0, start=61, num_frames=20, stride=2).frames, slow[61:100:2])


def test_size_is_a_centre_crop(tmp_path):
    path = Clip(moving(2, 48, 80), 8.0).save(tmp_path / "frames")
    whole = read_video(path).frames
    assert read_video(path, size=48).frames.tolist() == whole[:, :, 16:64].tolist()
    small = read_video(path, size=(16, 24)).frames
    np.testing.assert_array_equal(small, centre_crop_resize(whole, (16, 24)))
    assert small.shape == (2, 16, 24, 3)


def test_animated_images_are_composited_over_white(tmp_path):
    images = [Image.new("RGBA", (16, 16), (200, 0, 0, a)) for a in (255, 0, 128)]
    for name in ("a.webp", "a.apng"):
        kind = {"a.webp": {"lossless": True}, "a.apng": {"format": "PNG"}}[name]
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=50, **kind)
        clip = read_video(tmp_path / name)
        assert clip.fps == pytest.approx(20.0) and clip.num_frames == 3
        np.testing.assert_allclose(clip.frames[:, 0, 0, 1].astype(int), [0, 255, 127], atol=1)


def test_numbered_frames_of_others_in_natural_order(tmp_path):
    for i, image in enumerate(counting(12)):
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / f"{i}.png")
    clip = read_video(tmp_path)
    assert numbers(clip) == list(range(12)) and clip.fps == 8.0


def test_content_not_name_decides(tmp_path):
    path = Clip(moving(3), 8.0).save(tmp_path / "a.gif").rename(tmp_path / "upload")
    assert read_video(path).num_frames == 3


# ---- bad input --------------------------------------------------------------------------------------------------


def png_header(width, height):
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\x00" * 64)]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_bad_files_are_one_sentence_each(tmp_path):
    (tmp_path / "text.mp4").write_text("this is a letter\n" * 50)
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n")
    whole = Clip(moving(12), 12.0).save(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:300])
    (tmp_path / "script.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")  # would read another file
    (tmp_path / "cut.gif").write_bytes(Clip(moving(3), 8.0).save(tmp_path / "a.gif").read_bytes()[:40])
    (tmp_path / "bomb.png").write_bytes(png_header(100_000, 100_000))
    (tmp_path / "big.png").write_bytes(png_header(8000, 8000))
    expected = {
        "missing.mp4": "does not exist",
        "text.mp4": "is not a video",
        "zero.mp4": "is empty",
        "empty_folder": "folder without images",
        "list.m3u8": "is not a video",
        "script.mp4": "is not a video",
        "cut.mp4": "cut off|is not a video",
        "cut.gif": "damaged image|is damaged|is not a video",
        "bomb.png": "too large",
        "big.png": "too large: frames of 8000 x 8000",
    }
    for name, match in expected.items():
        with pytest.raises(VideoError, match=match) as caught:
            read_video(tmp_path / name)
        assert one_sentence(caught) and name in str(caught.value), name


def test_a_declared_size_is_refused_before_decoding(tmp_path):
    """An avi whose header declares 100000 x 100000 but whose picture is tiny."""
    path = tmp_path / "liar.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for image in moving(3, 32, 32):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    size = struct.pack("<ii", 32, 32)
    assert data.count(size) >= 2
    path.write_bytes(data.replace(size, struct.pack("<ii", 100_000, 100_000)))
    with pytest.raises(VideoError, match=r"too large|not a video") as caught:
        read_video(path, num_frames=1, limits=Limits(max_pixels=1000))
    assert one_sentence(caught)


def test_no_picture_stream_and_no_frames(tmp_path):
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        read_video(sound)
    nothing = tmp_path / "nothing.mkv"
    with av.open(str(nothing), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        container.start_encoding()
    with pytest.raises(VideoError, match=r"holds no frames|is not a video") as caught:
        read_video(nothing)
    assert one_sentence(caught)


def test_damage_in_the_middle_never_passes_as_the_whole_clip(tmp_path):
    path = Clip(np.random.default_rng(0).integers(0, 255, (24, 64, 64, 3), np.uint8), 12.0).save(tmp_path / "a.webm")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(VideoError, match=r"damaged|too short"):
        read_video(path, num_frames=24)


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(max_pixels=500), "32 x 32"),
        (Limits(max_frames=20), "frames exceed 20"),
        (Limits(max_duration_s=2), "exceed 2 s"),
        (Limits(max_bytes=50_000), "exceed 50000 bytes"),
    ],
)
def test_limits_from_the_header(counted, limits, match):
    with pytest.raises(VideoError, match=match) as caught:
        read_video(counted, limits=limits)
    assert one_sentence(caught)
    if limits.max_pixels > 500:  # a part that costs little is fine
        assert read_video(counted, num_frames=2, limits=limits).num_frames == 2


def test_limits_hold_while_decoding_when_the_header_is_silent(tmp_path):
    path = tmp_path / "live.mkv"
    with open(path, "wb") as file:
        with av.open(_OneWay(file), "w", format="matroska") as container:  # cannot seek back to write a duration
            stream = container.add_stream("mpeg4", rate=8)
            stream.width = stream.height = 32
            for image in moving(30, 32, 32):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    assert probe(path).num_frames == 0
    assert read_video(path).num_frames == 30
    for limits in (Limits(max_frames=10), Limits(max_duration_s=1), Limits(max_bytes=40_000)):
        with pytest.raises(VideoError, match="too large: more than"):
            read_video(path, limits=limits)


class _OneWay:
    """A file that can only be appended to, like a pipe."""

    def __init__(self, file):
        self.write = file.write


def test_too_short_and_wrong_requests(counted):
    with pytest.raises(VideoError, match=r"too short: 50 from frame 0 at stride 1 asked, 40 found"):
        read_video(counted, num_frames=50)
    with pytest.raises(VideoError, match=r"too short"):
        read_video(counted, start=40)
    with pytest.raises(VideoError, match="stride=0"):
        read_video(counted, stride=0)


def test_wrong_clips_and_places(tmp_path):
    with pytest.raises(VideoError, match="uint8"):
        Clip(np.zeros((2, 8, 8, 3), np.float32), 8.0)
    with pytest.raises(VideoError, match="not empty"):
        Clip(np.zeros((0, 8, 8, 3), np.uint8), 8.0)
    with pytest.raises(VideoError, match="fps"):
        Clip(moving(1), 0.0)
    (tmp_path / "file").write_text("x")
    for name, match in (("a.xyz", "'.xyz'"), ("file/a.mp4", "cannot write"), ("file/b.gif", "cannot write")):
        with pytest.raises(VideoError, match=match) as caught:
            Clip(moving(2), 8.0).save(tmp_path / name)
        assert one_sentence(caught)
    with pytest.raises(VideoError, match="50 frames per second"):
        Clip(moving(2), 120.0).save(tmp_path / "fast.gif")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = Clip(moving(3), 8.0).save(tmp_path / "a.mp4")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        Clip(moving(2), 8.0, {"key": object()}).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_places_are_judged_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    for name in ("new/folder/a.mp4", "a.gif", "clip", "file.png"):
        check_writable(tmp_path / name)
    for name in ("a.xyz", "file/a.mp4", "home"):
        with pytest.raises(VideoError, match="cannot write"):
            check_writable(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home"]


def test_images(tmp_path):
    image = moving(1)[0]
    clip = read_video(save_image(tmp_path / "a.png", image, {"seed": 3}))
    np.testing.assert_array_equal(clip.frames[0], image)
    assert clip.metadata == {"seed": 3}
    with pytest.raises(VideoError, match=r"written as \.png"):
        save_image(tmp_path / "a.jpg", image)
