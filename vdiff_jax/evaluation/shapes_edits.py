"""Edits of shapes clips, judged from pixels against the true scene after the edit.

    text_edit    one attribute changed by prompt: is it changed, are the others kept, does the object go its old way, is
                 everything around it as it was
    inpainting   the object removed, and an object added where the mask leaves room for one
    slow_motion  every 4th frame given, the frames between made by `Editor.interpolate`, against the true ones
    loops        transitions and loops made by the editor: seams against ordinary frame differences
    long_clips   clips of many windows: is it still the same object in the last one

Clip i depends on (seed, i) only. An unreadable clip is wrong in everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from vdiff_jax import tasks
from vdiff_jax.data.shapes import Records, attributes, captions, masks, select, split_rng, tracks
from vdiff_jax.data.shapes_world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES
from vdiff_jax.data.transforms import to_uint8
from vdiff_jax.data.video_io import Clip
from vdiff_jax.editing.inpaint import fill_hole, known_outside, paste
from vdiff_jax.evaluation.metrics import psnr
from vdiff_jax.evaluation.shapes_reader import Reading, read_batch
from vdiff_jax.evaluation.shapes_scores import count_objects_per_frame, psnr_outside, score, track_rmse
from vdiff_jax.evaluation.shapes_tasks import (
    KEYFRAME_STRIDE,
    NEAR_PIXELS,
    Evaluation,
    accuracy,
    average,
    blend_frames,
    moving_scenes,
    share,
)
from vdiff_jax.rollout import RollOut, roll_out
from vdiff_jax.types import Array

WORDS = {"colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}
"""The attributes that a text edit changes; a change of motion would not keep the track."""
LARGEST_PSNR = 60.0  # dB; equal pixels would otherwise make every mean infinite


def edited_scenes(ev: Evaluation) -> tuple[Records, Records, list[str]]:
    """(scenes, the same with one attribute changed, which): moving single objects, attributes in turn."""
    records = moving_scenes(ev, ev.num_clips, stream=5)
    edited = {name: value.copy() for name, value in records.items()}
    rng = split_rng("iid", ev.seed, 6)
    names = [tuple(WORDS)[number % len(WORDS)] for number in range(ev.num_clips)]
    for number, name in enumerate(names):
        row = edited[name] if name == "background" else edited[name][:, 0]
        allowed = [WORDS[name].index(value) for value in getattr(ev.world, name + "s")]
        row[number] = rng.choice([index for index in allowed if index != row[number]])
    return records, edited, names


def object_masks(ev: Evaluation, records: Records, index: np.ndarray) -> np.ndarray:
    """True coverage of the objects, `[b f h w]`."""
    times = np.tile(np.arange(ev.num_frames, dtype=np.float32), (len(index), 1))
    return np.asarray(_masks(select(records, index), times, world=ev.world)).max(axis=-1)


_masks = jax.jit(masks, static_argnames="world")


def text_edit(ev: Evaluation, options: tasks.EditOptions) -> dict[str, Any]:
    """One attribute changed by prompt, with the true captions of before and after.

    Returns shares of clips: "changed" (the attribute reads as asked), "kept" (all others read as before), "both",
    "near" (root mean squared distance of the track to the true one within 1.5 pixels), and "psnr_outside" (dB to the
    true edited clip, outside the old and the new object by 2 pixels), with "changed" per attribute, and the same for
    true edited clips through the autoencoder ("both_codec", "psnr_outside_codec").
    """
    records, edited, names = edited_scenes(ev)
    old, new = captions(records), captions(edited)
    times = np.tile(np.arange(ev.num_frames, dtype=np.float32), (ev.num_clips, 1))
    true_track = np.asarray(tracks(edited, jnp.asarray(times), ev.world))[:, :, 0]
    rows: list[dict[str, Any]] = []
    for index in ev.batches(ev.num_clips):
        source, truth = ev.video(records, index, ev.num_frames), ev.video(edited, index, ev.num_frames)
        around = np.maximum(object_masks(ev, records, index), object_masks(ev, edited, index))
        latents = tasks.edit_by_prompt(
            ev.model,
            ev.model.encode(source),
            [new[number] for number in index],
            [old[number] for number in index],
            options,
            keys=ev.keys("iid", index),
        )
        output, codec = ev.model.decode(latents), ev.model.decode(ev.model.encode(truth))
        readings = zip(read_batch(output, ev.world), read_batch(codec, ev.world))
        for k, (reading, reading_codec) in enumerate(readings):
            number = index[k]
            goal = attributes(edited, number)
            rows.append(
                _judge(reading, goal, names[number], true_track[number])
                | {"both_codec": _judge(reading_codec, goal, names[number], true_track[number])["both"]}
                | {"psnr_outside": _outside(output[k], truth[k], around[k])}
                | {"psnr_outside_codec": _outside(codec[k], truth[k], around[k])}
            )
    rows = rows[: ev.num_clips]
    figures: dict[str, Any] = {"n": ev.num_clips}
    for name in ("changed", "kept", "both", "near", "both_codec"):
        figures[name] = share([row[name] for row in rows])
    for name in ("psnr_outside", "psnr_outside_codec"):
        figures[name] = average([row[name] for row in rows])
    by_name = {key: [row["changed"] for row, name in zip(rows, names) if name == key] for key in WORDS}
    figures["changed_by_attribute"] = {key: share(values) for key, values in by_name.items() if values}
    return figures


def _judge(reading: Reading, goal: Any, name: str, true_track: np.ndarray) -> dict[str, bool]:
    found = score(reading, goal)
    kept = all(value for key, value in found.items() if key not in (name, "all"))
    error = track_rmse(reading.objects[0].track, true_track) if reading.objects else np.inf
    return {"changed": found[name], "kept": kept, "both": found[name] and kept, "near": bool(error <= NEAR_PIXELS)}


def _outside(frames: np.ndarray, truth: np.ndarray, around: np.ndarray) -> float:
    return min(psnr_outside(frames / 127.5 - 1.0, truth, around), LARGEST_PSNR)


def inversion(ev: Evaluation) -> dict[str, Any]:
    """Inversion and the way back with the same prompt, without guidance: PSNR in dB to the input of "inversion" (the
    deterministic plan) and "ddpm" (the tape) at their default strength, and of the autoencoder alone ("codec")."""
    records = moving_scenes(ev, ev.num_clips, stream=5)
    prompts = captions(records)
    found: dict[str, list[float]] = {"inversion": [], "ddpm": [], "codec": []}
    for index in ev.batches(ev.num_clips):
        video = ev.video(records, index, ev.num_frames)
        latents = ev.model.encode(video)
        texts = [prompts[number] for number in index]
        results = {"codec": latents}
        for method in ("inversion", "ddpm"):
            options = tasks.EditOptions(method, guidance_scale=1.0)
            results[method] = tasks.edit_by_prompt(ev.model, latents, texts, texts, options, keys=ev.keys("iid", index))
        for name, values in results.items():
            clips = ev.model.decode(values) / 127.5 - 1.0
            found[name] += [psnr(clip, truth) for clip, truth in zip(clips, video)][: len(set(index))]
    return {"n": ev.num_clips, **{name: average(values) for name, values in found.items()}}


def inpainting(ev: Evaluation) -> dict[str, Any]:
    """Removal and addition by mask.

    "gone": the mask is the object, widened by a pixel, in every frame; the prompt is the empty scene; no object is left
    in any frame. "added": into an empty scene, the mask is the box around the path with half an object's width of room;
    the prompt is a whole new caption, and a clip is right if everything it says is read from the pixels, and per
    attribute. "exact": no pixel outside the mask has changed, in either.
    """
    records = moving_scenes(ev, ev.num_clips, stream=7)
    prompts, exact, gone, added = captions(records), [], [], []
    empty = [f"an empty {BACKGROUNDS[value]} background" for value in records["background"]]
    for index in ev.batches(ev.num_clips):
        objects = object_masks(ev, records, index) > 0.01
        tight = np.asarray(ndimage.maximum_filter(objects, size=(1, 1, 3, 3)))
        video = ev.video(records, index, ev.num_frames)
        clear = _empty_scenes(ev, records, index)
        real = len(set(index))
        for source, mask, texts in (
            (video, tight, [empty[number] for number in index]),
            (clear, _path_boxes(objects, ev.world.size // 5), [prompts[number] for number in index]),
        ):
            known = known_outside(ev.model.encode(fill_hole(source, mask)), mask)
            settings = {name: value for name, value in ev.sampling.items()}
            made = ev.model.decode(ev.model.complete(known, texts, keys=ev.keys("iid", index), **settings))
            before = to_uint8(source)
            frames = np.stack([paste(*clip) for clip in zip(before, made, mask)])[:real]
            exact += [bool((a == b)[~m].all()) for a, b, m in zip(frames, before, mask)]
            if source is video:
                gone += [int(count_objects_per_frame(clip, ev.world).max()) == 0 for clip in frames]
            else:
                goals = [attributes(records, number) for number in index]
                added += [score(reading, goal) for reading, goal in zip(read_batch(frames, ev.world), goals)]
    return {"n": ev.num_clips, "gone": share(gone), "added": accuracy(added), "exact": share(exact)}


def _empty_scenes(ev: Evaluation, records: Records, index: np.ndarray) -> np.ndarray:
    """The scenes without their object, f32 `[b f h w 3]`."""
    bare = select(records, index)
    bare["position"] = np.full_like(bare["position"], 10.0)  # far outside of the picture
    bare["velocity"] = np.zeros_like(bare["velocity"])
    return ev.video(bare, np.arange(len(index)), ev.num_frames)


def _path_boxes(objects: np.ndarray, room: int) -> np.ndarray:
    """For every clip one box around all places of the object, `room` pixels wider on each side; bool `[b f h w]`."""
    boxes = np.zeros_like(objects)
    for clip, box in zip(np.asarray(objects.any(axis=1)), boxes):
        rows, columns = np.flatnonzero(clip.any(axis=1)), np.flatnonzero(clip.any(axis=0))
        box[:, max(0, rows[0] - room) : rows[-1] + room + 1, max(0, columns[0] - room) : columns[-1] + room + 1] = True
    return boxes


def slow_motion(ev: Evaluation, prompted: bool = True) -> dict[str, Any]:
    """`Editor.interpolate` by 4 of clips that show every 4th frame, against the true frames between: "psnr" in dB,
    "psnr_blend" of the linear blend, "gain"."""
    num_frames = (ev.num_frames - 1) // KEYFRAME_STRIDE * KEYFRAME_STRIDE + 1
    records = moving_scenes(ev, ev.num_clips, stream=8)
    prompts = captions(records)
    ours, blend = [], []
    middle = np.arange(num_frames) % KEYFRAME_STRIDE != 0
    for index in ev.batches(ev.num_clips):
        video = ev.video(records, index, num_frames)
        for number, truth in list(zip(index, video))[: len(set(index))]:
            given = Clip(to_uint8(truth[::KEYFRAME_STRIDE]), ev.model.settings.fps / KEYFRAME_STRIDE)
            editor = ev.model.editor(given, stride=float(KEYFRAME_STRIDE))
            slow = editor.interpolate(KEYFRAME_STRIDE, prompts[number] if prompted else "", seed=int(number))
            ours.append(psnr(slow.frames[middle] / 127.5 - 1.0, truth[middle]))
            blend.append(psnr(blend_frames(truth[None])[0][middle], truth[middle]))
    gain = average(np.subtract(ours, blend))
    return {"n": ev.num_clips, "psnr": average(ours), "psnr_blend": average(blend), "gain": gain}


def loops(ev: Evaluation) -> dict[str, Any]:
    """Transitions and loops of the editor on the first and last 5 frames of true clips, 6 frames between.

    "join_psnr": dB of the frames made against the true ones between; "join_seam" and "loop_seam": largest difference
    (root mean square, in 0..1) between two neighbouring frames across the seams, over the mean one within the clip; 1 =
    no larger. "given": share of clips in which the given frames are bit-equal.
    """
    records = moving_scenes(ev, ev.num_clips, stream=9)
    prompts = captions(records)
    figures: dict[str, list[float]] = {name: [] for name in ("join_psnr", "join_seam", "loop_seam", "given")}
    for index in ev.batches(ev.num_clips):
        video = ev.video(records, index, 16)
        for number, truth in list(zip(index, to_uint8(video)))[: len(set(index))]:
            head, tail = Clip(truth[:5], 8.0), Clip(truth[11:], 8.0)
            joined = ev.model.editor(head).join(tail, 6, prompts[number], seed=int(number)).frames
            steps = _frame_steps(truth)
            figures["join_psnr"].append(psnr(joined[5:11] / 127.5 - 1.0, truth[5:11] / 127.5 - 1.0))
            figures["join_seam"].append(float(_frame_steps(joined)[[4, 10]].max() / steps.mean()))
            figures["given"].append(float((joined[:5] == truth[:5]).all() and (joined[11:] == truth[11:]).all()))
            looped = ev.model.editor(Clip(truth[:9], 8.0)).loop(7, "", seed=int(number)).frames
            seams = _frame_steps(np.concatenate([looped, looped[:1]]))[[8, len(looped) - 1]]
            figures["loop_seam"].append(float(seams.max() / _frame_steps(truth[:9]).mean()))
    return {"n": ev.num_clips, **{name: average(values) for name, values in figures.items()}}


def _frame_steps(frames: np.ndarray) -> np.ndarray:
    """Root mean squared difference of neighbouring frames in 0..1, `[f-1]`."""
    unit = frames.astype(np.float64) / 255.0
    return np.sqrt(np.square(np.diff(unit, axis=0)).mean(axis=(1, 2, 3)))


def long_clips(
    ev: Evaluation, num_frames: int, options: RollOut | None = None, told_once: bool = False
) -> dict[str, Any]:
    """Text to clips of `num_frames`, half of objects that stand still, half that go to and fro by prompts over time.

    told_once: only the first window has a prompt, and all objects stand still: what they are, and that they do not
    move, must be carried by the context and the anchor alone.
    "same": share of clips whose last window reads with the colour, shape and background of the prompt; "one_object":
    share with exactly one object in every frame; "luminance" and "saturation": mean absolute difference between the
    last window and the first, in 0..1; "steady": share of clips where both are within .03.
    """
    options = options or RollOut(window=ev.model.settings.num_frames)
    records = moving_scenes(ev, ev.num_clips, stream=10)
    rows: list[dict[str, float]] = []
    for index in ev.batches(ev.num_clips):
        goals = [attributes(records, number) for number in index]

        def told(done: int, goals: Any = goals) -> list[str]:
            turn = (done // options.new_frames) % 2
            return [_to_and_fro(goal, turn, still=told_once or k % 2 == 0) for k, goal in enumerate(goals)]

        def prompts_at(done: int, told: Callable[[int], list[str]] = told) -> list[str] | None:
            return None if told_once else told(done)

        def keys_at(number: int, index: np.ndarray = index) -> Array:
            return jax.vmap(lambda key: jax.random.fold_in(key, number))(ev.keys("iid", index))

        sampling: dict[str, Any] = dict(ev.sampling)
        first = ev.model.generate_latents(
            told(0), keys=keys_at(0), num_frames=options.window, size=ev.world.size, **sampling
        )
        parts = [ev.model.decode(first)]
        sampling |= {"guidance_scale": 1.0} if told_once else {}
        new = roll_out(
            ev.model, first, num_frames - options.window, prompts_at, options,
            keys_at=lambda number: keys_at(number + 1), **sampling,
        )  # fmt: skip
        parts += [ev.model.decode(part) for part in new]
        for clip, goal in list(zip(np.concatenate(parts, axis=1), goals))[: len(set(index))]:
            rows.append(_judge_long(ev, clip, goal, options))
    shares = {name: share([bool(row[name]) for row in rows]) for name in ("same", "one_object", "steady")}
    return {
        "n": ev.num_clips,
        "num_frames": num_frames,
        **shares,
        **{name: average([row[name] for row in rows]) for name in ("luminance", "saturation")},
    }


def _to_and_fro(goal: Any, turn: int, still: bool) -> str:
    item = goal["objects"][0]
    direction = DIRECTIONS[(DIRECTIONS.index(item["direction"]) + 4 * turn) % len(DIRECTIONS)]
    verb = "standing still" if still else f"moving {direction}"
    return f"a {item['colour']} {item['shape']} {verb} on a {goal['background']} background"


def _judge_long(ev: Evaluation, clip: np.ndarray, goal: Any, options: RollOut) -> dict[str, float]:
    last = clip[-options.new_frames :]
    reading = read_batch(last[None], ev.world)[0]
    wanted = goal["objects"][0]
    same = reading.readable and len(reading.objects) == 1 and reading.background == goal["background"]
    same = same and all(getattr(reading.objects[0], key) == wanted[key] for key in ("colour", "shape"))
    unit = clip.astype(np.float64) / 255.0
    luminance = unit.mean(axis=(1, 2, 3))
    saturation = (unit.max(axis=-1) - unit.min(axis=-1)).mean(axis=(1, 2))
    first = slice(0, options.new_frames)
    drift = {
        name: abs(float(values[-options.new_frames :].mean() - values[first].mean()))
        for name, values in (("luminance", luminance), ("saturation", saturation))
    }
    counts = count_objects_per_frame(clip, ev.world)
    return {"same": same, "one_object": bool((counts == 1).all()), "steady": max(drift.values()) <= 0.03, **drift}
