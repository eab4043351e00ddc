"""The training mixture: what of a clip is known, and at which level every frame is.

One network serves every task because it is trained on the patterns that the tasks show it:

    row               known                                              level of the unknown frames
    text_to_video     nothing                                            one for all
    known_frames      a prefix, both ends, every n-th, random frames ... one for all      (prediction, interpolation)
    hole              all but a tube, moving box, half-plane or brush    one for all      (removal, outpainting)
    ramp              0 to 2 head frames                                 linear over frames         (streaming)
    independent       nothing                                            one for each      (Diffusion Forcing)

Known tokens are shown clean in half of the clips, else with noise at a level the network is told, which is what
generated context looks like. A clip may open with an anchor, a known frame from far before: it holds the identity
of things in long videos. The loss counts unknown tokens only, and at least one token is always unknown.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.diffusion.loss import stratified_u
from vdiff_jax.diffusion.schedule import Schedule
from vdiff_jax.types import Array

ROWS = ("text_to_video", "known_frames", "hole", "ramp", "independent")
NUM_ROWS = len(ROWS)

# One categorical draw chooses among these; each belongs to a row.
_CHOICES = ("text_to_video", "prefix", "both_ends", "first_only", "every_nth", "random_frames", "suffix", *ROWS[2:])
_ROW_OF_CHOICE = (0, 1, 1, 1, 1, 1, 1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Probabilities of the training mixture.

    text_to_video .. independent: of the rows, sum 1.
    prefix .. suffix: of the kinds within the row known_frames, sum 1.
    anchor: share of the prefix clips that open with an anchor; the loader cuts them, see `anchor_probability`.
    clean_context: share of clips whose known tokens are clean (level context_logsnr_max); the others show them at a
        uniform level in context_logsnr_min..context_logsnr_max.
    hole_with_ends: share of the holes whose first and last frames are known entirely.
    rising_ramp: share of the ramps with later frames cleaner; the others have later frames noisier.
    """

    text_to_video: float = 0.35
    known_frames: float = 0.30
    hole: float = 0.15
    ramp: float = 0.10
    independent: float = 0.10
    prefix: float = 0.40
    both_ends: float = 0.20
    first_only: float = 0.10
    every_nth: float = 0.10
    random_frames: float = 0.15
    suffix: float = 0.05
    anchor: float = 0.5
    clean_context: float = 0.5
    context_logsnr_min: float = 3.0
    context_logsnr_max: float = 10.0
    hole_with_ends: float = 1 / 3
    rising_ramp: float = 0.2

    def __post_init__(self):
        rows = sum(getattr(self, row) for row in ROWS)
        kinds = sum(getattr(self, kind) for kind in _CHOICES[1:7])
        for name, total in (("rows", rows), ("known-frame kinds", kinds)):
            if abs(total - 1) > 1e-6:
                raise ValueError(f"the probabilities of the mixture's {name} sum to {total:.6g}; make them sum to 1.")

    def anchor_probability(self) -> float:
        """Share of all clips that open with an anchor: what the loader must deliver."""
        return self.known_frames * self.prefix * self.anchor


class Pattern(NamedTuple):
    """What one clip (or a batch, with a leading axis) shows: what is known, and the levels.

    row: i32, index into ROWS. mask: `[f h w 1]` f32, 1 = known. logsnr: `[f]`, level of the unknown tokens.
    context_logsnr: `[f]`, level of the known tokens.
    """

    row: Array
    mask: Array
    logsnr: Array
    context_logsnr: Array


def draw_batch(
    key: Array,
    mixture: Mixture,
    schedule: Schedule,
    batch: int,
    num_frames: int,
    height: int,
    width: int,
    anchor: Array | None = None,
    length: Array | None = None,
) -> Pattern:
    """Patterns of a batch, levels stratified over it; see `draw`. anchor: `[b]` bool, length: `[b]` i32, or None."""
    u_key, clips_key = jax.random.split(key)
    u = stratified_u(u_key, batch)
    keys = jax.random.split(clips_key, batch)

    def one(key: Array, u: Array, anchor: Array | None, length: Array | None) -> Pattern:
        return draw(key, mixture, schedule, num_frames, height, width, u, anchor, length)

    optional = [None if value is None else 0 for value in (anchor, length)]
    return jax.vmap(one, in_axes=(0, 0, *optional))(keys, u, anchor, length)


def draw(
    key: Array,
    mixture: Mixture,
    schedule: Schedule,
    num_frames: int,
    height: int,
    width: int,
    u: Array,
    anchor: Array | None = None,
    length: Array | None = None,
) -> Pattern:
    """The pattern of one clip.

    Args:
        u: scalar in [0, 1], the schedule's coordinate of the clip's level.
        anchor: bool, True where the loader put an anchor at frame 0; the clip is then a known prefix. Clips without
            are drawn so that the mixture as a whole keeps its probabilities. None: the loader knows no anchors.
        length: i32, how many of the frames are real; the pattern is one of that many, and of the frames beyond it
            nothing is known. None: all are.
    """
    if num_frames == 1:
        return Pattern(
            row=jnp.zeros((), jnp.int32),
            mask=jnp.zeros((1, height, width, 1)),
            logsnr=schedule.logsnr(u)[None],
            context_logsnr=jnp.full((1,), mixture.context_logsnr_max),
        )
    choice_key, frames_key, hole_key, ramp_key, level_key, context_key = jax.random.split(key, 6)
    count = num_frames if length is None else length
    choice = _draw_choice(choice_key, mixture, anchor)
    choice = jnp.where(count == 1, 0, choice)  # an image, however many frames follow it
    row = jnp.asarray(_ROW_OF_CHOICE)[choice]

    index = jnp.arange(num_frames)
    frames = _known_frames(frames_key, mixture, num_frames, choice, anchor, count)
    hole = _hole(hole_key, mixture, num_frames, height, width, count)
    mask = jnp.where(row == ROWS.index("hole"), hole, frames[:, None, None])
    # However small the clip, something must be left to learn from.
    everything = jnp.all(mask | (index >= count)[:, None, None])
    left_out = (index >= count) | (everything & (index == count - 1))
    mask = jnp.where(left_out[:, None, None], False, mask)

    level = schedule.logsnr(u)
    independent = schedule.logsnr(jax.random.uniform(level_key, (num_frames,)))
    logsnr = jnp.where(row == ROWS.index("independent"), independent, level)
    logsnr = jnp.where(row == ROWS.index("ramp"), _ramp(ramp_key, mixture, schedule, num_frames, level, count), logsnr)
    return Pattern(
        row=row.astype(jnp.int32),
        mask=mask.astype(jnp.float32)[..., None],
        logsnr=logsnr,
        context_logsnr=jnp.full((num_frames,), 1.0) * _context_logsnr(context_key, mixture),
    )


def _draw_choice(key: Array, mixture: Mixture, anchor: Array | None) -> Array:
    """Index into _CHOICES."""
    prefix = mixture.prefix if anchor is None else mixture.prefix * (1 - mixture.anchor)
    frame_kinds = np.array([prefix] + [getattr(mixture, kind) for kind in _CHOICES[2:7]]) * mixture.known_frames
    probabilities = np.array(
        [mixture.text_to_video, *frame_kinds, mixture.hole, mixture.ramp, mixture.independent], np.float32
    )
    with np.errstate(divide="ignore"):
        choice = jax.random.categorical(key, jnp.asarray(np.log(probabilities)))
    return choice if anchor is None else jnp.where(anchor, _CHOICES.index("prefix"), choice)


def _context_logsnr(key: Array, mixture: Mixture) -> Array:
    clean_key, level_key = jax.random.split(key)
    noisy = jax.random.uniform(level_key, minval=mixture.context_logsnr_min, maxval=mixture.context_logsnr_max)
    return jnp.where(jax.random.bernoulli(clean_key, mixture.clean_context), mixture.context_logsnr_max, noisy)


def _draw_integer(value: Array, low: int, high: int | Array) -> Array:
    """A uniform number in [0, 1) turned into an integer in low..high, both included."""
    return low + jnp.floor(value * (high - low + 1)).astype(jnp.int32)


def _known_frames(
    key: Array, mixture: Mixture, num_frames: int, choice: Array, anchor: Array | None, count: int | Array
) -> Array:
    """`[f]` bool, which of the first `count` frames are known entirely; all False for rows without such frames."""
    index = jnp.arange(num_frames)
    value = jax.random.uniform(key, (num_frames + 5,))
    longest = jnp.maximum(1, count - 2)
    ends = jnp.clip((count - 1) // 2, 1, 2)

    prefix = _draw_integer(value[0], 1, longest)
    if anchor is not None:  # the anchor stands before a prefix of its own
        prefix = jnp.where(anchor, jnp.minimum(prefix + 1, count - 1), prefix)
    head, tail = _draw_integer(value[1], 1, ends), _draw_integer(value[2], 1, ends)
    every = jnp.where(value[3] < 0.5, 2, 4)
    density = 0.1 + 0.5 * value[4]
    ramp_head = jnp.minimum(_draw_integer(value[0], 0, 2), count - 1)

    kinds = {
        "prefix": index < prefix,
        "both_ends": (index < head) | (index >= count - tail),
        "first_only": index < 1,
        "every_nth": index % every == 0,
        "random_frames": value[5:] < density,
        "suffix": index >= count - prefix,
        "ramp": index < ramp_head,
    }
    nothing = jnp.zeros((num_frames,), bool)
    return jnp.stack([kinds.get(name, nothing) for name in _CHOICES])[choice]


def _ramp(key: Array, mixture: Mixture, schedule: Schedule, num_frames: int, level: Array, count: int | Array) -> Array:
    """`[f]` levels, linear over frames through `level` at a random one of `count`; the whole range takes 2..count."""
    value = jax.random.uniform(key, (3,))
    low, high = schedule.logsnr_min, schedule.logsnr_max
    slope = (high - low) / (2 + jnp.maximum(count - 2, 0) * value[0])
    slope = jnp.where(value[1] < mixture.rising_ramp, slope, -slope)
    centre = value[2] * (count - 1)
    return jnp.clip(level + slope * (jnp.arange(num_frames) - centre), low, high)


def _hole(key: Array, mixture: Mixture, num_frames: int, height: int, width: int, count: int | Array) -> Array:
    """`[f h w]` bool, known everywhere but in a hole of random kind, in motion over the first `count` frames.

    Every hole holds at least one token.
    """
    value = jax.random.uniform(key, (40,))
    size = jnp.array([height, width], jnp.float32)
    y = jnp.arange(height, dtype=jnp.float32)[None, :, None]
    x = jnp.arange(width, dtype=jnp.float32)[None, None, :]
    index = jnp.arange(num_frames)
    time = (index / jnp.maximum(count - 1, 1) - 0.5)[:, None, None]

    # Tube and moving box: half extents .1 to .4 of the grid, at least half a token so that one centre is inside.
    start = value[0:2] * (size - 1)
    half = jnp.maximum((0.1 + 0.3 * value[2:4]) * size, 0.5)
    tube = (jnp.abs(y - start[0]) <= half[0]) & (jnp.abs(x - start[1]) <= half[1])
    tube = jnp.broadcast_to(tube, (num_frames, height, width))
    travel = (value[4:6] - 0.5) * size
    moving_y = jnp.clip(start[0] + travel[0] * time, 0, height - 1)
    moving_x = jnp.clip(start[1] + travel[1] * time, 0, width - 1)
    box = (jnp.abs(y - moving_y) <= half[0]) & (jnp.abs(x - moving_x) <= half[1])

    angle = 2 * jnp.pi * value[6]
    beyond = jnp.cos(angle) * (y - start[0]) + jnp.sin(angle) * (x - start[1])
    half_plane = jnp.broadcast_to(beyond >= 0, (num_frames, height, width))

    brush = _brush(value[10:], time[:, :, 0], height, width)
    kind = _draw_integer(value[7], 0, 3)
    hole = jnp.stack([tube, box, half_plane, brush])[kind]
    at_end = ((index == 0) | (index == count - 1))[:, None, None]
    with_ends = (value[8] < mixture.hole_with_ends) & (count > 2)
    return ~hole | (with_ends & at_end)


def _brush(value: Array, time: Array, height: int, width: int) -> Array:
    """`[f h w]` bool, a union of five drifting discs; value: `[30]` uniform; time: `[f 1]`, -1/2 .. 1/2."""
    centre_y, centre_x, drift_y, drift_x, radius, _ = jnp.split(value, 6)
    path_y = jnp.clip(centre_y[None] * (height - 1) + (drift_y[None] - 0.5) * height * time, 0, height - 1)
    path_x = jnp.clip(centre_x[None] * (width - 1) + (drift_x[None] - 0.5) * width * time, 0, width - 1)
    radius = jnp.maximum((0.05 + 0.15 * radius) * min(height, width), 0.75)  # .75 > sqrt(1/2): one centre is inside
    y = jnp.arange(height, dtype=jnp.float32)[None, :, None, None]
    x = jnp.arange(width, dtype=jnp.float32)[None, None, :, None]
    away = jnp.square(y - path_y[:, None, None]) + jnp.square(x - path_x[:, None, None])
    return jnp.any(away <= jnp.square(radius)[None, None, None], axis=-1)
