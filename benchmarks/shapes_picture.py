"""Draw the picture of the README: one row of frames per prompt, from a model of the shapes world.

python benchmarks/shapes_picture.py shapes docs/shapes_samples.png
"""

import sys

import numpy as np

import vdiff_jax as vd
from vdiff_jax.command import use_compile_cache
from vdiff_jax.data.video_io import contact_sheet, save_image

PROMPTS = (
    "a red circle moving right on a black background",
    "a blue square moving down on a grey background",
    "a yellow triangle moving up-left on a dark background",
    "a green cross moving left on a grey background",
    "a cyan ring moving up-right on a black background",
    "a magenta square standing still on a dark background",
)


def main(model: str, path: str) -> None:
    use_compile_cache()
    clips = vd.load(model).generate(PROMPTS, seed=0)
    frames = np.stack([clip.frames[::2] for clip in clips])
    sheet = contact_sheet(frames.reshape(-1, *frames.shape[2:]), columns=frames.shape[1])
    save_image(path, sheet.repeat(3, axis=0).repeat(3, axis=1))


if __name__ == "__main__":
    main(*sys.argv[1:3])
