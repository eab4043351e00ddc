"""Bring a model of diffusers here, and back.

    python convert.py --from=text-to-video-ms-1.7b --to=modelscope              # weights and settings in our own format
    python convert.py --from=modelscope --to=for_diffusers --layout=diffusers   # a pipeline that diffusers loads
    python convert.py --from=stable-diffusion-v1-5 --motion_adapter=animatediff-motion-adapter-v1-5-3 --to=animated
    python convert.py --from=text-to-video-ms-1.7b --dry_run                    # every tensor's name and place, memory

--from may be whatever `vdiff_jax.load` takes, a name on the hub among them. Converting is never needed to use a model:
all scripts take folders of diffusers as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import flags

from vdiff_jax.command import run_script

_FROM = flags.DEFINE_string("from", None, "Pipeline folder of diffusers, saved folder, run folder or hub name.")
_TO = flags.DEFINE_string("to", None, "Folder to write; it must not hold anything yet.")
_LAYOUT = flags.DEFINE_enum("layout", "vdiff_jax", ["vdiff_jax", "diffusers"], "How to write it.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of the weights in the new files.")
_VARIANT = flags.DEFINE_string("variant", None, "Which weights to read where there are several, as fp16.")
_ADAPTER = flags.DEFINE_string("motion_adapter", None, "AnimateDiff motion adapter for an image model: folder or file.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Only print what goes where and how much memory it takes.")


def main(_: list[str]) -> int:
    from vdiff_jax.interop import plan
    from vdiff_jax.pipeline import load
    from vdiff_jax.progress import ProgressTimer

    source = flags.FLAGS["from"].value
    if not source:
        raise ValueError("--from is missing: say what to convert")
    options: dict[str, Any] = {"variant": _VARIANT.value, "motion_adapter": _ADAPTER.value}
    options = {name: value for name, value in options.items() if value is not None}
    if _DRY_RUN.value:
        plan.show(plan.read(source, **options), sys.stdout)
        return 0
    if not _TO.value:
        raise ValueError("--to is missing: say which folder to write, or ask for --dry_run")
    target = Path(_TO.value)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--to={target} is there already: choose a new folder, or empty it")
    print(f"reading {source}", file=sys.stderr)
    if plan.is_public(source):
        timer, total = ProgressTimer("read", unit="tensors"), len(plan.read(source, **options).tensors)
        done = iter(range(1, total + 1))
        options["on_tensor"] = lambda _: timer(next(done), total)
    model = load(source, **options)
    print(f"writing {target}", file=sys.stderr)
    with plan.whole_folder(target) as folder:
        model.save_pretrained(folder, _DTYPE.value, _LAYOUT.value)
    print(target)
    return 0


if __name__ == "__main__":
    run_script(main)
