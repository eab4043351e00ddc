"""Sound that travels with a clip: `Sound` in memory, `read_sound` from a file, `encode_sound` for the writer.

Samples are f32 [n c] in -1..1, mono or stereo. Every change of time is plain resampling with a windowed-sinc low-pass
filter (nothing above the new half rate folds back); every fade is a straight line in amplitude.

The clock is that of the picture: time 0 is the first frame, so a part of a clip and its sound are cut at one time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vdiff_jax.data.video_decode import Limits

AAC_RATES = (22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)  # slower ones pad the end by 50 ms and more
OPUS_RATE = 48_000
_MAX_RATE = 768_000
_CLOCK_SLACK_S = 0.02  # containers round time stamps; only a larger step is a gap in the sound
_SEEK_FROM_S = 4.0
_PREROLL_S = 1.0  # decoders need some packets before the first sample is right


@dataclasses.dataclass(frozen=True, eq=False)
class Sound:
    """samples: f32 [n c] in -1..1, c = 1 (mono) or 2 (stereo), n may be 0. rate: samples per second.

    Raises ValueError for another dtype, shape, range or rate. All methods return a new Sound.
    """

    samples: np.ndarray
    rate: int

    def __post_init__(self):
        samples = self.samples
        if not isinstance(samples, np.ndarray) or samples.dtype != np.float32 or samples.ndim != 2:
            found = f"{getattr(samples, 'dtype', type(samples).__name__)} of shape {np.shape(samples)}"
            raise ValueError(f"samples must be a numpy float32 array [samples channels], got {found}")
        if samples.shape[1] not in (1, 2):
            raise ValueError(f"a sound has 1 or 2 channels, got {samples.shape[1]}; mix them down first")
        if not (isinstance(self.rate, int) and 1 <= self.rate <= _MAX_RATE):
            raise ValueError(f"rate must be a whole number of samples per second, 1..{_MAX_RATE}, got {self.rate!r}")
        if samples.size and not np.abs(samples).max() <= 1.0:  # NaN fails, too
            raise ValueError("samples must lie in -1..1; scale or clip them first")

    @property
    def num_channels(self) -> int:
        return self.samples.shape[1]

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.rate

    def cut(self, start_s: float, stop_s: float | None = None) -> Sound:
        """The part from `start_s` to `stop_s` (None = the end), to the nearest sample; what is not there is left out.

        Raises ValueError unless 0 <= start_s <= stop_s.
        """
        if not 0 <= start_s <= (start_s if stop_s is None else stop_s):
            raise ValueError(f"a cut needs 0 <= start <= stop, got start={start_s} and stop={stop_s}")
        stop = None if stop_s is None else round(stop_s * self.rate)
        return Sound(self.samples[round(start_s * self.rate) : stop], self.rate)

    def fit(self, duration_s: float) -> Sound:
        """Exactly `duration_s` long, to the nearest sample: the end is cut off, or filled with silence."""
        wanted = round(duration_s * self.rate)
        missing = max(0, wanted - len(self.samples))
        return Sound(np.pad(self.samples[:wanted], ((0, missing), (0, 0))), self.rate)

    def reverse(self) -> Sound:
        """Last sample first."""
        return Sound(np.ascontiguousarray(self.samples[::-1]), self.rate)

    def change_speed(self, factor: float) -> Sound:
        """Played `factor` (0.01..100) times as fast, like a tape: 2 is half as long and an octave higher.

        This is plain resampling, so the pitch changes with the speed.
        """
        if not 0.01 <= factor <= 100:
            raise ValueError(f"a speed must be 0.01..100, got {factor}")
        ratio = Fraction(factor).limit_denominator(1000)
        return Sound(_resample(self.samples, ratio.denominator, ratio.numerator), self.rate)

    def resample(self, rate: int) -> Sound:
        """The same sound at `rate` samples per second; duration and pitch stay."""
        return Sound(_resample(self.samples, rate, self.rate), rate)

    def with_channels(self, num_channels: int) -> Sound:
        """Mono to stereo copies the channel, stereo to mono is the mean of both."""
        if num_channels == self.num_channels:
            return self
        samples = self.samples.mean(1, keepdims=True) if num_channels == 1 else np.repeat(self.samples, num_channels, 1)
        return Sound(samples, self.rate)

    def fade(self, in_s: float, out_s: float) -> Sound:
        """Rise from silence in the first `in_s` seconds, fall to silence in the last `out_s`; 0 = no fade there."""
        times = (np.arange(len(self.samples), dtype=np.float64) + 0.5) / self.rate
        gain = np.ones_like(times)
        if in_s > 0:
            gain *= np.clip(times / in_s, 0, 1)
        if out_s > 0:
            gain *= np.clip(times[::-1] / out_s, 0, 1)
        return Sound(self.samples * gain[:, None].astype(np.float32), self.rate)


def _resample(samples: np.ndarray, up: int, down: int) -> np.ndarray:
    """Band-limited change of the number of samples by `up / down`; peaks that overshoot are clipped to -1..1."""
    if up == down or not len(samples):
        return samples
    from scipy.signal import resample_poly

    return np.clip(resample_poly(samples, up, down, axis=0), -1.0, 1.0).astype(np.float32)


def concatenate_sounds(parts: Sequence[tuple[Sound | None, float]], overlap_s: float = 0.0) -> Sound | None:
    """One sound out of several: parts (sound, duration in seconds), where None is silence of that duration.

    Every part is cut or filled to its duration, so that the parts stay where their pictures are. The result has the
    rate of the first part that has a sound, and two channels if any part has; None if all parts are silent.
    overlap_s: neighbours share this time, one falling while the other rises in a straight line.
    Raises ValueError if a part is shorter than the overlap.
    """
    sounds = [sound for sound, _ in parts if sound is not None]
    if any(duration < overlap_s for _, duration in parts):
        raise ValueError(f"an overlap of {overlap_s} s is longer than one of the sounds")
    if not sounds:
        return None
    rate, channels = sounds[0].rate, max(sound.num_channels for sound in sounds)
    starts = np.cumsum([0.0] + [duration - overlap_s for _, duration in parts])
    begins = [round(start * rate) for start in starts]  # rounded once each, so that errors do not add up
    ends = [round((start + duration) * rate) for start, (_, duration) in zip(starts, parts)]
    mixed = np.zeros((ends[-1], channels), np.float32)
    for i, (sound, _) in enumerate(parts):
        if sound is None:
            continue
        length = ends[i] - begins[i]
        samples = sound.resample(rate).with_channels(channels).fit(length / rate).samples
        rising = _ramp(ends[i - 1] - begins[i]) if i else np.zeros(0, np.float32)
        falling = _ramp(ends[i] - begins[i + 1])[::-1] if i + 1 < len(parts) else np.zeros(0, np.float32)
        gain = np.ones(length, np.float32)
        gain[: len(rising)] *= rising
        gain[length - len(falling) :] *= falling
        mixed[begins[i] : ends[i]] += samples * gain[:, None]
    return Sound(np.clip(mixed, -1.0, 1.0), rate)


def _ramp(length: int) -> np.ndarray:
    """f32 [length] rising from 0 to 1; the ramp and its mirror image add up to 1."""
    return ((np.arange(length) + 0.5) / max(length, 1)).astype(np.float32)


# ---- files ------------------------------------------------------------------------------------------------------


def read_sound(
    path: str | os.PathLike, start_s: float = 0.0, duration_s: float | None = None, limits: Limits | None = None
) -> Sound | None:
    """The sound of a file, from `start_s` on, at most `duration_s` seconds (None = to its end); more than two channels
    are mixed down to stereo.

    Times count from the first frame of the picture; sound that begins later is preceded by silence. Returns None for
    a file without an audio stream, for images and folders, and where the asked part holds no sound.
    Raises VideoError for a missing, foreign or damaged file, and for sound longer than `limits.max_duration_s` or
    larger than `limits.max_bytes`.
    """
    import av

    from vdiff_jax.data.video_decode import Limits, VideoError, check_path, is_image, open_container, too_large

    place, limits = check_path(path), limits or Limits()
    if not (0 <= start_s < float("inf") and (duration_s is None or 0 < duration_s < float("inf"))):
        raise VideoError(f"cannot read {path}: need start_s >= 0 and duration_s > 0, got {start_s} and {duration_s}")
    if place.is_dir() or is_image(place):
        return None
    with open_container(place) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        try:
            samples, rate = _decode(container, stream, start_s, duration_s, limits)
        except OverflowError as error:
            raise VideoError(too_large(path, f"its sound is {error}")) from None
        except (av.FFmpegError, ValueError, AttributeError) as error:  # PyAV answers ValueError to a changing format
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoError(f"the sound of {path} is damaged ({reason}); make or copy the file again") from error
    return Sound(np.clip(np.nan_to_num(samples), -1.0, 1.0), rate) if len(samples) else None


def _decode(
    container: Any, stream: Any, start_s: float, duration_s: float | None, limits: Limits
) -> tuple[np.ndarray, int]:
    """(f32 [n c], rate) of the part; OverflowError, with the reason, where it exceeds the limits."""
    import av

    rate, channels = stream.codec_context.sample_rate, min(2, stream.codec_context.channels)
    if not 1 <= rate <= _MAX_RATE or channels < 1:
        raise ValueError(f"the header says {rate} samples per second and {channels} channels")
    most = min(limits.max_duration_s * rate, limits.max_bytes / (4 * channels))
    told_s = (float(stream.duration * stream.time_base) if stream.duration else 0.0) - start_s
    wanted = None if duration_s is None else round(duration_s * rate)
    if (told_s * rate if wanted is None else wanted) > most + _CLOCK_SLACK_S * rate:
        asked_s = told_s if duration_s is None else duration_s
        raise OverflowError(f"{asked_s:.0f} s long, {most / rate:.0f} s are allowed")
    clock = container.streams.video[0] if container.streams.video else stream
    origin = float((clock.start_time or 0) * clock.time_base) + start_s
    if start_s >= _SEEK_FROM_S:
        container.seek(int((origin - _PREROLL_S) / stream.time_base), stream=stream, backward=True)
    to_float = av.AudioResampler(format="fltp", layout="mono" if channels == 1 else "stereo", rate=rate)
    parts: list[np.ndarray] = []
    count, position = 0, None  # samples held; where the next one belongs, counted from start_s
    for frame in container.decode(stream):
        at = position or 0 if frame.time is None else round((frame.time - origin) * rate)
        if position is None or abs(at - position) > _CLOCK_SLACK_S * rate:
            position = at
        for block in to_float.resample(frame):
            samples = block.to_ndarray().T[max(0, count - position) :]
            position += block.samples
            if len(samples):
                gap = position - len(samples) - count
                if wanted is not None and count + gap >= wanted:
                    break
                if count + gap > most:
                    raise OverflowError(f"more than {most / rate:.0f} s long")
                parts += [np.zeros((gap, channels), np.float32), samples]
                count += gap + len(samples)
        if wanted is not None and position >= wanted:
            break
    return np.concatenate([np.zeros((0, channels), np.float32), *parts])[:wanted], rate


def add_sound(container: Any, sound: Sound, kind: str) -> list[Any]:
    """Add an audio stream to an open output and return its packets, in order, for the writer to mux with the picture.

    kind: "mp4" = AAC, at the sound's rate or the next higher one AAC has; "webm" = Opus at 48 kHz.
    """
    import av

    rate = OPUS_RATE if kind == "webm" else next((r for r in AAC_RATES if r >= sound.rate), AAC_RATES[-1])
    sound = sound.resample(rate)
    layout = "mono" if sound.num_channels == 1 else "stereo"
    stream: Any = container.add_stream({"mp4": "aac", "webm": "libopus"}[kind], rate=rate, layout=layout)
    stream.bit_rate = sound.num_channels * min(96_000, 4 * rate)
    packets = []
    for start in range(0, len(sound.samples), rate):  # a second at a time
        block = np.ascontiguousarray(sound.samples[start : start + rate].T)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
        frame.rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        packets += stream.encode(frame)
    return packets + stream.encode()
