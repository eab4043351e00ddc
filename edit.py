"""Edit a video.

    python edit.py --task=edit --input=in.mp4 --out=out.mp4 \\
        --source_prompt="a red circle moving right" --prompt="a blue square moving right"
    python edit.py --task=inpaint --input=in.mp4 --mask=box:4,6,12,10 --prompt="an empty grey background" --out=out.mp4
    python edit.py --task=restore --restore=superres --factor=4 --input=small.mp4 --out=large.mp4
    python edit.py --task=interpolate --factor=4 --stride=4 --input=in.mp4 --out=slow.mp4 --then="saturation=1.3"
    python edit.py --task=extend --num_frames=96 --input=in.mp4 --out=long.mp4 \\
        --prompt_at="0:a red circle moving right" --prompt_at="48:a red circle moving left"

Tasks: edit, inpaint, outpaint, camera, restore, interpolate, extend, join, loop, from_ends, harmonise, stylize,
anomaly, and none, which only applies the effects of --then. The output has the size, rate and sound of the input.
Masks: an image or video (white = change), box:X,Y,W,H, box:FRAME:X,Y,W,H;FRAME:X,Y,W,H, colour:#RRGGBB,DISTANCE, and !
before any for all but that. The suffix of --out decides the format: .mp4 .webm .gif .png (contact sheet) or none.
"""

from __future__ import annotations

import sys

from absl import flags

from vdiff_jax.command import run_script
from vdiff_jax.model_flags import open_model, working_size

TASKS = "edit inpaint outpaint camera restore interpolate extend join loop from_ends harmonise stylize anomaly none"
_TASK = flags.DEFINE_enum("task", "edit", TASKS.split(), "What to do.")
_INPUT = flags.DEFINE_string("input", None, "The video to edit.", required=True)
_OUT = flags.DEFINE_string("out", "out.mp4", "Output file; its suffix decides the format.")
_SHEET = flags.DEFINE_string("sheet", "", "Also write a contact sheet (.png), input above output.")
_PROMPT = flags.DEFINE_string("prompt", "", "What the result shall show.")
_SOURCE = flags.DEFINE_string("source_prompt", "", "What the input shows (edit).")
_NEGATIVE = flags.DEFINE_string("negative_prompt", None, "What to move away from (edit, inpaint).")
_PROMPT_AT = flags.DEFINE_multi_string("prompt_at", None, "FRAME:PROMPT, in force from there on (extend); repeat it.")
_METHOD = flags.DEFINE_string("method", None, "edit: flow, inversion, ddpm, sdedit. restore: posterior, fast.")
_STRENGTH = flags.DEFINE_float("strength", None, "0..1, how much may change (edit, harmonise, stylize).")
_STRUCTURE = flags.DEFINE_enum("structure", None, ["luminance", "lowpass"], "Hold on to this of the input (edit).")
_MASK = flags.DEFINE_string("mask", None, "What to change (edit, inpaint, restore); see above.")
_GROW = flags.DEFINE_integer("mask_grow", 0, "Pixels by which the mask is widened.", lower_bound=0)
_RESTORE = flags.DEFINE_string("restore", "denoise", "denoise salt_pepper deblur superres colorize unblock fill.")
_NOISE = flags.DEFINE_float("noise_std", None, "Noise of the input in 0..1 (restore); default: estimated.")
_FACTOR = flags.DEFINE_integer("factor", None, "Of interpolate (frames) and superres (size).", lower_bound=2)
_BLUR = flags.DEFINE_float("blur", None, "Pixels at the model's size (restore deblur).")
_BLOCK = flags.DEFINE_integer("block", None, "Pixels at the model's size (restore unblock).", lower_bound=2)
_CANDIDATES = flags.DEFINE_integer("n_candidates", None, "Draws of a restoration, of which the best is taken.")
_MEAN_OF = flags.DEFINE_integer("mean_of", None, "Restorations that are averaged.")
_NUM_FRAMES = flags.DEFINE_integer("num_frames", None, "Of extend and from_ends (all), join and loop (new ones).")
_SECOND = flags.DEFINE_string("second", None, "The other video (join).")
_STYLE = flags.DEFINE_string("style", None, "The style image (stylize).")
_SIDES = flags.DEFINE_list("sides", None, "Pixels left,top,right,bottom (outpaint).")
_PAN = flags.DEFINE_list("pan", None, "Pixels right,down over the clip (camera).")
_ZOOM = flags.DEFINE_float("zoom", None, "How much closer at the end than at the beginning (camera).")
_STEPS = flags.DEFINE_integer("steps", None, "Denoising steps.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", None, "Guidance; 1 is off.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed.")
_WINDOW = flags.DEFINE_integer("window", None, "Frames the model sees at a time.", lower_bound=2)
_STRIDE = flags.DEFINE_float("stride", 1.0, "Time between the input's frames in native frame intervals.")
_START = flags.DEFINE_integer("start", 0, "First frame of the input.", lower_bound=0)
_LENGTH = flags.DEFINE_integer("length", None, "Frames of the input to read; default: all.", lower_bound=1)
_THEN = flags.DEFINE_string("then", "", "Effects on the result, as brightness=0.1;reverse; see docs/effects.md.")


def main(_: list[str]) -> int:
    from vdiff_jax.data.effects import apply_effects, parse_effects
    from vdiff_jax.data.masks import make_mask
    from vdiff_jax.data.video_io import check_writable, read_video, save_image
    from vdiff_jax.edit_command import before_and_after, run_task

    for path in (_OUT.value, _SHEET.value):
        if path:
            check_writable(path)  # before any work is spent
    parse_effects(_THEN.value)
    size = working_size()
    clip = read_video(_INPUT.value, start=_START.value, num_frames=_LENGTH.value, sound=True)
    mask = make_mask(_MASK.value, clip.frames, _GROW.value) if _MASK.value else None
    result = clip
    if _TASK.value != "none":
        editor = open_model().editor(clip, size=size, window=_WINDOW.value, stride=_STRIDE.value)
        print(f"{_TASK.value}: {clip.num_frames} frames (the first run compiles first)", file=sys.stderr)
        result = run_task(editor, _TASK.value, flags.FLAGS.flag_values_dict(), mask)
    result = apply_effects(result, _THEN.value) if _THEN.value else result
    result.save(_OUT.value)
    print(_OUT.value)
    if _SHEET.value:
        save_image(_SHEET.value, before_and_after(clip, result))
        print(_SHEET.value)
    return 0


if __name__ == "__main__":
    run_script(main)
