"""Make a video from a prompt.

    python sample.py --model=shapes --prompt="a red circle moving right" --out=out.mp4
    python sample.py --model=runs/mine --prompt="a dog runs" --out=out.webm --num_samples=4 --seed=7
    python sample.py --model=shapes --lora=runs/shapes_lora --prompt="a red star moving up" --out=star.gif
    python sample.py --model=text-to-video-ms-1.7b --prompt="a panda eats bamboo" --out=panda.mp4
    python sample.py --model=stable-video-diffusion-img2vid --image=cat.png --dtype=bfloat16 --out=cat.mp4
    python sample.py --model=shapes --num_frames=160 --prompt="a red circle standing still" --out=long.mp4
    python sample.py --num_frames=48 --prompt_at="0:a red ring moving left" --prompt_at="24:a red ring moving right"

The suffix of --out decides the format: .mp4, .webm, .gif, .png (contact sheet) or none (a folder of frames). With
several samples, files are numbered. A contact sheet is written beside a video with --sheet=sheet.png. Clips of more
than twice the model's own length, and those with --prompt_at, are made window by window (--window), at constant memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import flags

from vdiff_jax.command import prompts_over_time, run_script
from vdiff_jax.model_flags import open_model, working_size

_PROMPT = flags.DEFINE_string("prompt", "", "What to show.")
_IMAGE = flags.DEFINE_string("image", None, "The picture that an image-to-video model animates.")
_MOTION = flags.DEFINE_float("motion_bucket", 127.0, "0..255, how much shall move (--image, Stable Video Diffusion).")
_AUGMENT = flags.DEFINE_float("noise_augmentation", 0.02, "0..1, how far the clip may leave --image behind (same).")
_NEGATIVE = flags.DEFINE_string("negative_prompt", "", "What to move away from.")
_PROMPT_AT = flags.DEFINE_multi_string("prompt_at", [], "FRAME:PROMPT, in force from there on; repeat it.")
_WINDOW = flags.DEFINE_integer("window", None, "Frames of a window of long clips; default: the model's own.")
_OUT = flags.DEFINE_string("out", "out.mp4", "Output file; its suffix decides the format.")
_SHEET = flags.DEFINE_string("sheet", "", "Also write a contact sheet (.png) here.")
_NUM_FRAMES = flags.DEFINE_integer("num_frames", None, "Frames of the clip; default: as the model was trained.")
_STEPS = flags.DEFINE_integer("steps", None, "Denoising steps.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", None, "Guidance; 1 is off.")
_RESCALE = flags.DEFINE_float("guidance_rescale", 0.0, "0..1, keeps guided contrast near the unguided one.")
_INTERVAL = flags.DEFINE_list("guidance_interval", None, "Log-SNR range in which guidance acts, as low,high.")
_SAMPLER = flags.DEFINE_string(
    "sampler", None, "ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, euler, euler_ancestral, euler_edm or unipc."
)
_ETA = flags.DEFINE_float("eta", None, "Noise of the sampler, 0 (deterministic) to 1; default: the sampler's own.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed; sample i depends on (seed, i) only.")
_FIRST = flags.DEFINE_integer("first_index", 0, "Number of the first sample: makes sample 3 of 8 again alone.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "How many clips.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 4, "Clips made at a time.", lower_bound=1)
_STRIDE = flags.DEFINE_float("stride", 1.0, "Time between frames in native intervals; below 1 is slow motion.")
_FPS = flags.DEFINE_float("fps", None, "Frames per second of the file.")


def main(_: list[str]) -> int:
    from vdiff_jax.data.video_io import check_writable, contact_sheet, read_video, save_image
    from vdiff_jax.progress import ProgressTimer
    from vdiff_jax.rollout import RollOut

    out = Path(_OUT.value)
    check_writable(out)  # before any work is spent
    if _SHEET.value:
        check_writable(_SHEET.value)
    interval = _guidance_interval(_INTERVAL.value)
    prompts, size = prompts_over_time(_PROMPT_AT.value), working_size()
    picture = read_video(_IMAGE.value, num_frames=1) if _IMAGE.value else None
    model = open_model()
    if picture is not None:
        told: dict[str, Any] = dict(fps=_FPS.value, motion_bucket=_MOTION.value, noise_augmentation=_AUGMENT.value)
        model = model.with_image(picture, size=size, seed=_SEED.value, **told)
    steps = _STEPS.value or model.settings.steps
    print(f"sampling {_NUM_SAMPLES.value} clip(s), {steps} steps (the first run compiles first)", file=sys.stderr)
    count, progress, shown = _NUM_SAMPLES.value, ProgressTimer("sampled"), []
    sampling: dict[str, Any] = dict(
        negative_prompt=_NEGATIVE.value,
        steps=_STEPS.value,
        guidance_scale=_GUIDANCE.value,
        guidance_interval=interval,
        guidance_rescale=_RESCALE.value,
        sampler=_SAMPLER.value,
        eta=_ETA.value,
    )
    form: dict[str, Any] = dict(size=size, seed=_SEED.value, fps=_FPS.value, stride=_STRIDE.value)
    num_frames = _NUM_FRAMES.value or model.settings.num_frames
    long = bool(prompts) or num_frames > 2 * model.settings.num_frames
    batch = 1 if long else _BATCH.value
    for start in range(0, count, batch):
        first = _FIRST.value + start
        if long:
            options = RollOut(window=_WINDOW.value or model.settings.num_frames)
            timer = ProgressTimer(f"clip {first}", unit="frames")
            clip = model.generate_long(
                prompts or _PROMPT.value, num_frames, index=first, options=options, progress=timer, **form, **sampling
            )
            clips = [clip]
        else:
            texts = [_PROMPT.value] * min(batch, count - start)
            clips = model.generate(texts, num_frames=_NUM_FRAMES.value, first_index=first, **form, **sampling)
        for index, clip in enumerate(clips, start=_FIRST.value + start):  # at once: an interruption loses one batch
            path = out if count == 1 else out.with_name(f"{out.stem}_{index}{out.suffix}")
            clip.save(path)
            print(path)
        shown += [clip.frames for clip in clips] if _SHEET.value else []
        progress(min(start + batch, count), count)
    if _SHEET.value:
        sheet = contact_sheet(shown, columns=shown[0].shape[0])
        save_image(_SHEET.value, sheet)
        print(_SHEET.value)
    return 0


def _guidance_interval(values: list[str] | None) -> tuple[float, float] | None:
    if values is None:
        return None
    try:
        low, high = (float(value) for value in values)
    except ValueError as error:
        raise ValueError(f"--guidance_interval={','.join(values)}: give two numbers, low,high") from error
    return low, high


if __name__ == "__main__":
    run_script(main)
