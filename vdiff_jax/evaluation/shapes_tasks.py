"""What a model of the shapes world can do, measured from pixels against the true scenes.

    alignment      text-to-video: the share of prompts whose every attribute the reader finds in the generated clip
    prediction     2 to 4 clean frames are known, the next ones generated; compared with the true continuation
    interpolation  every 4th frame is known, those between generated; compared with the true ones
    codec          the autoencoder alone: encode, decode, compare

An unreadable clip is wrong for every attribute. Beside each figure stand its controls: the same generated clips scored
against prompts of other clips (chance), and the reader on true clips, whole and through the autoencoder (the ceiling).
Clip i of a split depends on (seed, split, i) only, not on the batch size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.data.shapes import (
    SPLITS,
    Records,
    ShapesWorld,
    attributes,
    captions,
    derange,
    draw_records,
    render,
    select,
    split_rng,
    tracks,
)
from vdiff_jax.data.shapes_world import MOTIONS
from vdiff_jax.evaluation.metrics import psnr, ssim
from vdiff_jax.evaluation.shapes_reader import Reading, read_batch
from vdiff_jax.evaluation.shapes_scores import count_objects_per_frame, score
from vdiff_jax.types import Array, Known

if TYPE_CHECKING:
    from vdiff_jax.pipeline import VideoDiffusion

CONTEXT_FRAMES = (2, 3, 4)
NEXT_FRAMES = 4
KEYFRAME_STRIDE = 4
NEAR_PIXELS = 1.5


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How to evaluate.

    num_frames: frames of the clips of alignment. sampling: `steps`, `guidance_scale`, `sampler`, as `generate` takes
    them. progress(done, total) is called after every batch.
    """

    model: VideoDiffusion
    world: ShapesWorld
    num_clips: int = 500
    batch_size: int = 20
    seed: int = 0
    num_frames: int = 16
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    progress: Callable[[int, int], None] = lambda done, total: None

    def batches(self, count: int) -> Iterator[np.ndarray]:
        """Clip numbers in batches of one size; the last is filled up by repeating, which `gather` cuts off again."""
        for start in range(0, count, self.batch_size):
            yield np.minimum(np.arange(start, start + self.batch_size), count - 1)
            self.progress(min(start + self.batch_size, count), count)

    def keys(self, split: str, index: np.ndarray) -> Array:
        root = jax.random.fold_in(jax.random.key(self.seed), SPLITS.index(split))
        return jax.vmap(lambda number: jax.random.fold_in(root, number))(jnp.asarray(index))

    def video(self, records: Records, index: np.ndarray, num_frames: int) -> np.ndarray:
        """True clips f32 [b f h w 3]."""
        times = np.tile(np.arange(num_frames, dtype=np.float32), (len(index), 1))
        return np.asarray(_render(select(records, index), times, world=self.world))


_render = jax.jit(render, static_argnames="world")


def gather(parts: Sequence[Any], count: int) -> list[Any]:
    """The items of all batches, without the filling of the last."""
    return [item for part in parts for item in part][:count]


# Text-to-video ---------------------------------------------------------------------------------------------------


def alignment(ev: Evaluation, split: str) -> dict[str, Any]:
    """Attribute accuracy of generated clips on a split, with its controls.

    Prompts are complete captions. Returns {"n", "model", "wrong_prompt", "codec", "clean"}, the last four as
    `accuracy`.
    """
    records = draw_records(split_rng(split, ev.seed), ev.world, split, ev.num_clips)
    prompts = captions(records)
    truth = [attributes(records, index) for index in range(ev.num_clips)]
    by_prompt = dict(zip(prompts, truth))
    read: dict[str, list[list[Reading]]] = {"model": [], "codec": [], "clean": []}
    for index in ev.batches(ev.num_clips):
        latents = ev.model.generate_latents(
            [prompts[number] for number in index],
            keys=ev.keys(split, index),
            num_frames=ev.num_frames,
            size=ev.world.size,
            **ev.sampling,
        )
        video = ev.video(records, index, ev.num_frames)
        clips = {"model": ev.model.decode(latents), "codec": ev.model.decode(ev.model.encode(video)), "clean": video}
        for name, clip in clips.items():
            read[name].append(read_batch(clip[: len(set(index))], ev.world))
    readings = {name: gather(parts, ev.num_clips) for name, parts in read.items()}
    wrong = [by_prompt[prompt] for prompt in derange(prompts, split_rng(split, ev.seed, 1))]
    return {
        "n": ev.num_clips,
        "model": accuracy([score(*pair) for pair in zip(readings["model"], truth)]),
        "wrong_prompt": accuracy([score(*pair) for pair in zip(readings["model"], wrong)]),
        "codec": accuracy([score(*pair) for pair in zip(readings["codec"], truth)]),
        "clean": accuracy([score(*pair) for pair in zip(readings["clean"], truth)]),
    }


def accuracy(scores: Sequence[dict[str, bool]]) -> dict[str, dict[str, float]]:
    """Per attribute {"value": share of right clips, "se": its binomial standard error, "n": clips that state it}."""
    keys = dict.fromkeys(key for row in scores for key in row)
    return {key: share([row[key] for row in scores if key in row]) for key in keys}


def share(values: Sequence[bool] | np.ndarray) -> dict[str, float]:
    """{"value": p, "se": sqrt(p (1 - p) / n), "n": n} of a list of truths."""
    p, n = float(np.mean(values)), len(values)
    return {"value": p, "se": math.sqrt(p * (1 - p) / n), "n": n}


def average(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """{"value": mean, "se": standard error of the mean, "n": n}, over finite values; NaN without any."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    spread = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {"value": float(values.mean()) if len(values) else math.nan, "se": spread, "n": len(values)}


# Known frames ----------------------------------------------------------------------------------------------------


def moving_scenes(ev: Evaluation, count: int, stream: int) -> Records:
    """`count` scenes of "iid" with one object that moves straight: elsewhere repeating a frame is no baseline."""
    found: list[Records] = []
    have = 0
    for attempt in range(200):
        drawn = draw_records(split_rng("iid", ev.seed, stream, attempt), ev.world, "iid", 4 * count + 16)
        moving = (drawn["count"] == 1) & (drawn["motion"][:, 0] == MOTIONS.index("moving"))
        found.append(select(drawn, np.flatnonzero(moving)))
        have += int(moving.sum())
        if have >= count:
            break
    else:
        raise ValueError("this world has no moving single objects: prediction and interpolation need them")
    return {name: np.concatenate([part[name] for part in found])[:count] for name in found[0]}


def fill_frames(ev: Evaluation, records: Records, known: np.ndarray, prompted: bool) -> Iterator[tuple]:
    """Generates the frames `known` [n f] bool does not give; yields per batch
    (index, truth, generated, truth through the autoencoder), clips f32 [b f h w 3]."""
    num_frames = known.shape[1]
    prompts = captions(records)
    settings = {name: value for name, value in ev.sampling.items() if name != "guidance_scale"}
    for index in ev.batches(len(known)):
        video = ev.video(records, index, num_frames)
        latents = ev.model.encode(video)
        mask = jnp.broadcast_to(jnp.asarray(known[index], jnp.float32)[..., None, None, None], (*latents.shape[:-1], 1))
        filled = ev.model.complete(
            Known(latents, mask, jnp.full(mask.shape[:2], 10.0)),
            [prompts[number] for number in index] if prompted else None,
            keys=ev.keys("iid", index),
            guidance_scale=1.0,
            **settings,
        )
        real = len(set(index))
        generated, codec = (ev.model.decode(values)[:real] / 127.5 - 1.0 for values in (filled, latents))
        yield index[:real], video[:real], generated, codec


def prediction(ev: Evaluation, prompted: bool = False) -> dict[str, Any]:
    """The next 4 frames after 2, 3 or 4 known ones (a third of the clips each), without guidance.

    Returns "psnr" (dB, the 4 generated frames), "psnr_repeat" (the last known frame shown again), "gain" (their
    difference), "error_px" (centre of the object against its true track 4 frames on, where one is seen), "near" (share
    of clips in which it is seen within 1.5 pixels), "near_by_context", the same per number of known frames, and
    "psnr_codec", "error_px_codec" and "near_codec" of the true clips through the autoencoder: the best that any
    network could do in these latents.
    """
    records = moving_scenes(ev, ev.num_clips, stream=2)
    context = np.asarray(CONTEXT_FRAMES)[np.arange(ev.num_clips) % len(CONTEXT_FRAMES)]
    num_frames = max(CONTEXT_FRAMES) + NEXT_FRAMES
    times = np.tile(np.arange(num_frames, dtype=np.float32), (ev.num_clips, 1))
    true_track = np.asarray(tracks(records, jnp.asarray(times), ev.world))[:, :, 0]
    ours, repeat, through, error, error_codec = [], [], [], [], []
    for index, video, output, codec in fill_frames(
        ev, records, np.arange(num_frames)[None] < context[:, None], prompted
    ):
        readings = zip(read_batch(output, ev.world), read_batch(codec, ev.world))
        for number, truth, clip, coded, (reading, reading_codec) in zip(index, video, output, codec, readings):
            first = context[number]
            frames = slice(first, first + NEXT_FRAMES)
            ours.append(psnr(clip[frames], truth[frames]))
            through.append(psnr(coded[frames], truth[frames]))
            repeat.append(psnr(np.broadcast_to(truth[first - 1], truth[frames].shape), truth[frames]))
            last = int(first) + NEXT_FRAMES - 1
            error.append(_distance(reading, last, true_track[number, last]))
            error_codec.append(_distance(reading_codec, last, true_track[number, last]))
    near = np.asarray(error) <= NEAR_PIXELS
    return {
        "n": ev.num_clips,
        "prompted": prompted,
        "psnr": average(ours),
        "psnr_repeat": average(repeat),
        "gain": average(np.subtract(ours, repeat)),
        "error_px": average(error),
        "near": share(near),
        "near_by_context": {str(k): share(near[context == k]) for k in CONTEXT_FRAMES if (context == k).any()},
        "psnr_codec": average(through),
        "error_px_codec": average(error_codec),
        "near_codec": share(np.asarray(error_codec) <= NEAR_PIXELS),
    }


def _distance(reading: Reading, frame: int, truth: np.ndarray) -> float:
    """Pixels between the nearest object in a frame and the truth; infinite where none is seen."""
    places = [item.track[frame] for item in reading.objects]
    distances = [math.hypot(*(place - truth)) for place in places if np.isfinite(place).all()]
    return min(distances, default=math.inf)


def interpolation(ev: Evaluation, prompted: bool = False) -> dict[str, Any]:
    """Every 4th frame is known, first and last among them; the frames between are generated, without guidance.

    Returns "psnr" (dB, generated frames), "psnr_blend" (linear blending of the known neighbours), "gain", "one_object"
    (share of clips with exactly one object in every generated frame), and the same of the blend (cross-fades show two),
    of the true clips and of the true clips through the autoencoder ("psnr_codec", "one_object_codec").
    """
    num_frames = (ev.num_frames - 1) // KEYFRAME_STRIDE * KEYFRAME_STRIDE + 1
    if num_frames <= KEYFRAME_STRIDE:
        raise ValueError(f"interpolation needs clips of more than {KEYFRAME_STRIDE} frames, got {ev.num_frames}")
    records = moving_scenes(ev, ev.num_clips, stream=3)
    known = np.arange(num_frames) % KEYFRAME_STRIDE == 0
    middle = ~known
    ours, blended, through = [], [], []
    names = ("one_object", "one_object_blend", "one_object_true", "one_object_codec")
    one: dict[str, list[bool]] = {name: [] for name in names}
    for _, video, output, codec in fill_frames(ev, records, np.tile(known, (ev.num_clips, 1)), prompted):
        for truth, clip, blend, coded in zip(video, output, blend_frames(video), codec):
            ours.append(psnr(clip[middle], truth[middle]))
            through.append(psnr(coded[middle], truth[middle]))
            blended.append(psnr(blend[middle], truth[middle]))
            for name, frames in zip(one, (clip, blend, truth, coded)):
                one[name].append(bool((count_objects_per_frame(frames, ev.world)[middle] == 1).all()))
    return {
        "n": ev.num_clips,
        "prompted": prompted,
        "psnr": average(ours),
        "psnr_blend": average(blended),
        "gain": average(np.subtract(ours, blended)),
        "psnr_codec": average(through),
        **{name: share(values) for name, values in one.items()},
    }


def blend_frames(video: np.ndarray) -> np.ndarray:
    """`video [b f h w c]` with the frames between keyframes replaced by the linear blend of the two around them."""
    frames = np.arange(video.shape[1])
    before = frames // KEYFRAME_STRIDE * KEYFRAME_STRIDE
    after = np.minimum(before + KEYFRAME_STRIDE, len(frames) - 1)
    weight = ((frames - before) / KEYFRAME_STRIDE).astype(video.dtype)[None, :, None, None, None]
    return (1 - weight) * video[:, before] + weight * video[:, after]


def codec(ev: Evaluation) -> dict[str, Any]:
    """decode(encode(x)) against x on true clips of "iid": "psnr" in dB and "ssim", means over clips."""
    records = draw_records(split_rng("iid", ev.seed), ev.world, "iid", ev.num_clips)
    values = []
    for index in ev.batches(ev.num_clips):
        video = ev.video(records, index, ev.num_frames)
        output = ev.model.decode(ev.model.encode(video)) / 127.5 - 1.0
        values += [(psnr(ours, truth), ssim(ours, truth)) for ours, truth in zip(output, video)][: len(set(index))]
    return {
        "n": ev.num_clips,
        "psnr": average([row[0] for row in values]),
        "ssim": average([row[1] for row in values]),
    }
