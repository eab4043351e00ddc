"""Sound against what is known of tones and clicks: length, frequency and place, in memory and through real files."""

import av
import numpy as np
import pytest

from vdiff_jax.data.sound import Sound, concatenate_sounds, read_sound
from vdiff_jax.data.video_io import Clip, Limits, VideoError, read_video
from vdiff_jax.data.video_write import write_video


def tone(hertz, seconds, rate=16_000, channels=1):
    times = np.arange(round(seconds * rate)) / rate
    wave = (0.5 * np.sin(2 * np.pi * hertz * times)).astype(np.float32)
    return Sound(np.repeat(wave[:, None], channels, axis=1), rate)


def click(at_s, seconds, rate=44_100):
    """Silence with a 10 ms burst that begins at `at_s`."""
    samples = np.zeros((round(seconds * rate), 1), np.float32)
    samples[round(at_s * rate) : round((at_s + 0.01) * rate)] = 0.9
    return Sound(samples, rate)


def onset(sound):
    return float(np.argmax(np.abs(sound.samples[:, 0]) > 0.3)) / sound.rate


def frequency(sound):
    """Hertz of the strongest line of the spectrum."""
    wave = sound.samples[:, 0] * np.hanning(len(sound.samples))
    return np.abs(np.fft.rfft(wave)).argmax() / sound.duration_s


def frames(num_frames, size=16):
    levels = (40 + 3 * np.arange(num_frames) % 150).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels[:, None, None, None], (num_frames, size, size, 3)))


# ---- in memory --------------------------------------------------------------------------------------------------


def test_cut_fit_and_reverse_move_samples_and_nothing_else():
    sound = tone(440, 1.0, channels=2)
    np.testing.assert_array_equal(sound.cut(0.25, 0.5).samples, sound.samples[4000:8000])
    np.testing.assert_array_equal(sound.cut(0.75, 9.0).samples, sound.samples[12000:])
    assert sound.cut(2.0).duration_s == 0
    longer = sound.fit(1.5)
    assert longer.samples.shape == (24000, 2) and not longer.samples[16000:].any()
    np.testing.assert_array_equal(longer.fit(1.0).samples, sound.samples)
    np.testing.assert_array_equal(sound.reverse().samples, sound.samples[::-1])


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 2.0, 3.7])
def test_speed_shortens_and_raises_the_pitch(factor):
    sound = tone(600, 2.0).change_speed(factor)
    assert sound.rate == 16_000 and sound.duration_s == pytest.approx(2.0 / factor, abs=1e-3)
    assert frequency(sound) == pytest.approx(600 * factor, rel=2e-3)


def test_speed_lets_nothing_fold_back():
    """Twice as fast, 6 kHz would be 12 kHz, beyond the half rate of 8 kHz: it is silent, not a wrong tone."""
    fast = tone(6000, 1.0).change_speed(2.0).samples[500:-500]
    assert np.abs(fast).max() < 1e-2


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_another_rate_is_the_same_sound(rate):
    sound = tone(440, 1.0).resample(rate)
    inner = slice(rate // 20, -rate // 20)
    assert sound.rate == rate
    np.testing.assert_allclose(sound.samples[inner], tone(440, 1.0, rate).samples[inner], atol=2e-3)


def test_channels():
    stereo = Sound(np.array([[0.5, -0.5], [1.0, 0.0]], np.float32), 8000)
    assert stereo.with_channels(1).samples.tolist() == [[0.0], [0.5]]
    assert stereo.with_channels(1).with_channels(2).samples.tolist() == [[0.0, 0.0], [0.5, 0.5]]


def test_fades_are_straight_lines():
    constant = Sound(np.full((1000, 1), 0.8, np.float32), 1000)
    faded = constant.fade(0.2, 0.4).samples[:, 0]
    assert faded[[100, 500, 800]] == pytest.approx([0.4, 0.8, 0.4], abs=5e-3)
    assert faded[0] < 0.01 and faded[-1] < 0.01
    np.testing.assert_array_equal(constant.fade(0, 0).samples, constant.samples)


def test_concatenation_keeps_every_part_at_its_time():
    joined = concatenate_sounds([(tone(400, 0.9), 1.0), (None, 0.5), (tone(800, 3.0, 48_000, 2), 2.0)])
    assert joined is not None and (joined.rate, joined.num_channels, joined.duration_s) == (16_000, 2, 3.5)
    assert frequency(joined.cut(0, 0.9)) == pytest.approx(400, abs=2)
    assert not joined.cut(0.9, 1.5).samples[1:].any()
    assert frequency(joined.cut(1.5)) == pytest.approx(800, abs=2)
    assert concatenate_sounds([(None, 1.0), (None, 2.0)]) is None


def test_many_parts_do_not_drift():
    third = concatenate_sounds([(tone(100, 1.0, 1000), 1 / 3)] * 30)
    assert third is not None and len(third.samples) == 10_000


def test_an_overlap_mixes_in_a_straight_line():
    plus, minus = (Sound(np.full((1000, 1), level, np.float32), 1000) for level in (0.8, -0.4))
    joined = concatenate_sounds([(plus, 1.0), (minus, 1.0)], overlap_s=0.5)
    assert joined is not None and len(joined.samples) == 1500
    expected = np.concatenate([np.full(500, 0.8), 0.8 - 1.2 * (np.arange(500) + 0.5) / 500, np.full(500, -0.4)])
    np.testing.assert_allclose(joined.samples[:, 0], expected, atol=1e-6)
    with pytest.raises(ValueError, match="longer than one"):
        concatenate_sounds([(plus, 1.0), (minus, 1.0)], overlap_s=1.5)


@pytest.mark.parametrize(
    ("samples", "rate", "match"),
    [
        (np.zeros((4, 1)), 8000, "float32"),
        (np.zeros(4, np.float32), 8000, r"\(4,\)"),
        (np.zeros((4, 6), np.float32), 8000, "1 or 2 channels"),
        (np.full((4, 1), 1.5, np.float32), 8000, r"-1\.\.1"),
        (np.full((4, 1), np.nan, np.float32), 8000, r"-1\.\.1"),
        (np.zeros((4, 1), np.float32), 0, "rate"),
    ],
)
def test_what_is_no_sound_is_refused(samples, rate, match):
    with pytest.raises(ValueError, match=match):
        Sound(samples, rate)


def test_wrong_times_and_speeds_are_refused():
    for wrong in (lambda s: s.cut(-1.0), lambda s: s.cut(1.0, 0.5), lambda s: s.change_speed(0.0)):
        with pytest.raises(ValueError, match=r"start|speed"):
            wrong(tone(440, 1.0))


# ---- through files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2)])
def test_round_trip(tmp_path, suffix, rate, channels):
    clip = Clip(frames(20), 10.0, {"seed": 1}, tone(440, 2.0, rate, channels))
    path = clip.save(tmp_path / f"a{suffix}")
    back, whole = read_video(path, sound=True), read_sound(path)
    assert back.sound is not None and whole is not None
    assert back.metadata == {"seed": 1} and back.num_frames == 20 and back.fps == pytest.approx(10.0)
    for sound in (back.sound, whole):
        assert sound.duration_s == pytest.approx(2.0, abs=0.05) and sound.num_channels == channels
        assert frequency(sound.cut(0.1, 1.9)) == pytest.approx(440, abs=1.0)
        assert np.sqrt(np.mean(sound.cut(0.1, 1.9).samples ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
    assert clip.save(tmp_path / f"b{suffix}").read_bytes() == path.read_bytes()
    assert read_video(path).sound is None  # only where it was asked for


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_sound_stays_with_its_frames(tmp_path, suffix):
    path = Clip(frames(75), 10.0, sound=click(6.0, 7.5)).save(tmp_path / f"a{suffix}")
    resampled = {"fps": 5.0, "start": 25, "stride": 2, "num_frames": 5}
    requests = [({}, 6.0), ({"start": 20}, 4.0), ({"start": 55}, 0.5), (resampled, 1.0)]
    for request, at in requests:
        part = read_video(path, sound=True, **request)
        assert part.sound is not None and onset(part.sound) == pytest.approx(at, abs=2e-3), request
        assert part.sound.duration_s == pytest.approx(part.duration_s, abs=0.05)
    before = read_video(path, num_frames=10, start=5, sound=True)
    assert before.sound is not None and before.sound.duration_s == pytest.approx(1.0, abs=1e-3)
    assert np.abs(before.sound.samples).max() < 0.05


def test_sound_is_cut_where_the_frames_end(tmp_path):
    path = Clip(frames(5), 10.0, sound=tone(440, 4.0, 44_100)).save(tmp_path / "a.mp4")
    sound = read_sound(path)
    assert sound is not None and sound.duration_s == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_sound_changes_nothing_in_the_picture(tmp_path, suffix):
    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(video=0)]

    silent = write_video(frames(8), 8.0, {}, tmp_path / f"a{suffix}")
    heard = Clip(frames(8), 8.0, sound=tone(440, 1.0)).save(tmp_path / f"b{suffix}")
    assert packets(silent) == packets(heard)
    assert Clip(frames(8), 8.0).save(tmp_path / f"c{suffix}").read_bytes() == silent.read_bytes()
    with av.open(str(silent)) as container:
        assert not container.streams.audio
    assert read_video(silent, sound=True).sound is None


def test_pictures_and_folders_have_no_place_for_sound(tmp_path):
    clip = Clip(frames(3), 10.0, sound=tone(440, 0.3))
    for name in ("a.gif", "a.png", "folder"):
        path = clip.save(tmp_path / name)
        assert read_sound(path) is None and read_video(path, sound=True).sound is None


def test_many_channels_are_mixed_down_and_late_sound_is_late(tmp_path):
    """A file of another make: 5.1 channels, sound that begins 0.5 s after the picture."""
    path, rate = tmp_path / "a.mkv", 48_000
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 16
        stream = container.add_stream("flac", rate=rate, layout="5.1")
        for image in frames(20):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(picture.encode())
        wave = (20_000 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.repeat(wave, 6)[None], format="s16", layout="5.1")
        frame.rate, frame.pts = rate, rate // 2
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    sound = read_sound(path)
    assert sound is not None and sound.num_channels == 2 and sound.duration_s == pytest.approx(1.5, abs=0.05)
    assert onset(sound) == pytest.approx(0.5, abs=2e-3)
    assert frequency(sound.cut(0.6, 1.4)) == pytest.approx(300, abs=1.5)


def test_a_gap_in_the_sound_is_silence_of_its_length(tmp_path):
    """Blocks at 0 s and 0.4 s, and one at 1 s: what follows the gap is at its own time."""
    path, rate = tmp_path / "a.mkv", 8_000
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 16
        stream = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for image in frames(15):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(picture.encode())
        for at_s, level in ((0.0, 8192), (0.4, 16384), (1.0, -8192)):
            block = np.full((1, rate * 2 // 5), level, np.int16)
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.rate, frame.pts = rate, round(at_s * rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    sound = read_sound(path)
    expected = np.repeat(np.array([0.25, 0.5, 0.0, -0.25], np.float32), [3200, 3200, 1600, 3200])
    assert sound is not None and sound.rate == rate
    np.testing.assert_array_equal(sound.samples[:, 0], expected)
    part = read_sound(path, 0.3, 0.8)
    assert part is not None
    np.testing.assert_array_equal(part.samples[:, 0], expected[2400:8800])
    assert read_sound(path, 0.85, 0.1) is None and read_sound(path, 1.45) is None


def test_limits_and_damage_are_one_sentence(tmp_path):
    path = Clip(frames(30), 10.0, sound=tone(440, 3.0, 44_100)).save(tmp_path / "a.mp4")
    for limits in (Limits(max_duration_s=1.0), Limits(max_bytes=100_000)):
        with pytest.raises(VideoError, match="too large: its sound") as caught:
            read_sound(path, limits=limits)
        assert "\n" not in str(caught.value)
    short = read_sound(path, 1.0, 0.5, Limits(max_duration_s=1.0))
    assert short is not None and short.duration_s == 0.5
    with pytest.raises(VideoError, match="does not exist"):
        read_sound(tmp_path / "missing.mp4")
    with pytest.raises(VideoError, match="start_s"):
        read_sound(path, start_s=-1.0)
    path.write_bytes(path.read_bytes()[:-3000])  # the end of the sound is missing
    with pytest.raises(VideoError, match=r"the sound of .* is damaged") as caught:
        read_video(path, sound=True)
    assert "\n" not in str(caught.value)
