"""Whole pipelines of diffusers: a folder with model_index.json to the parts of a model, and back.

    TextToVideoSDPipeline, VideoToVideoSDPipeline   ModelScope, ZeroScope
    AnimateDiffPipeline and its video-to-video      SD 1.x with a motion adapter
    StableVideoDiffusionPipeline                    one picture to a clip
    I2VGenXLPipeline                                picture and prompt to a clip
    StableDiffusionPipeline                         an image model, on every frame by itself, or to be inflated

The parts are `(components, params, tokenizer, settings)`; `pipeline.load` makes a model of them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vdiff_jax.components import Component, make_component, make_config
from vdiff_jax.data.tokenizer import Tokenizer
from vdiff_jax.interop import hub
from vdiff_jax.interop.autoencoders import load_autoencoder, save_autoencoder
from vdiff_jax.interop.motion import load_animated, save_motion_adapter
from vdiff_jax.interop.pretrained import load_json, save_json
from vdiff_jax.interop.schedulers import process_settings, scheduler_json
from vdiff_jax.interop.tokenizer import load_tokenizer, save_tokenizer
from vdiff_jax.interop.transformers import (
    load_image_encoder,
    load_text_encoder,
    save_image_encoder,
    save_text_encoder,
)
from vdiff_jax.interop.unets import load_unet, save_unet
from vdiff_jax.interop.weights import Binding, Reading
from vdiff_jax.models.clip_pixels import CLIP_MEAN, CLIP_STD
from vdiff_jax.settings import Settings
from vdiff_jax.types import Params

INDEX = "model_index.json"
OURS = "vdiff_jax.json"
"""Beside model_index.json in pipelines that we write: settings that diffusers leaves to the caller."""
_CALLERS = (
    *("size", "fps", "num_frames", "steps", "guidance_scale", "first_guidance_scale", "noise"),
    *("decode_chunk_frames", "autoencoder_std"),
)
I2VGEN_SIZE = (704, 1280)
SVD_SAMPLE_SIZE, SVD_SIZE = 96, (576, 1024)
"""Stable Video Diffusion's files name a square of 768 pixels; what it was trained on is this."""


class Family(NamedTuple):
    """How a family's pipeline is written, and what it samples with where its files do not say.

    sample_size: side of the latents.
    """

    pipeline: str
    sample_size: int
    defaults: dict[str, Any]


FAMILIES: dict[str, Family] = {
    "modelscope": Family("TextToVideoSDPipeline", 32, dict(num_frames=16, steps=50, guidance_scale=9.0)),
    "animatediff": Family("AnimateDiffPipeline", 64, dict(num_frames=16, steps=50, guidance_scale=7.5)),
    "image": Family("StableDiffusionPipeline", 64, dict(num_frames=1, steps=50, guidance_scale=7.5)),
    "svd": Family(
        "StableVideoDiffusionPipeline", 96, dict(steps=25, guidance_scale=3.0, first_guidance_scale=1.0, fps=7.0)
    ),
    "i2vgen": Family("I2VGenXLPipeline", 0, dict(num_frames=16, steps=50, guidance_scale=9.0, fps=16.0)),
}
PIPELINES = {family.pipeline: name for name, family in FAMILIES.items()} | {
    "VideoToVideoSDPipeline": "modelscope",
    "AnimateDiffVideoToVideoPipeline": "animatediff",
    "StableDiffusionImg2ImgPipeline": "image",
}
"""Class in model_index.json -> family; classes that differ only in what they do with the same parts are one."""


class Parts(NamedTuple):
    """What a model is made of."""

    components: dict[str, Component]
    params: dict[str, Params]
    tokenizer: Tokenizer | None
    settings: Settings


def is_pipeline(folder: str | Path) -> bool:
    return (Path(folder) / INDEX).is_file()


def load_pipeline(
    folder: str | Path,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    motion_adapter: str | Path | None = None,
    shardings: Any = None,
    on_tensor: Callable[[str], None] | None = None,
    plan: dict[str, list[Binding]] | None = None,
    **unet: Any,
) -> Parts:
    """A pipeline folder -> the parts of a model.

    Args:
        dtype: of parameters and computation: "float32" (None), "bfloat16" or "float16".
        variant: "fp16" and the like where the weights' file names have it.
        motion_adapter: folder or file of an AnimateDiff motion adapter, which turns a `StableDiffusionPipeline` into a
            video model, or replaces the one of an `AnimateDiffPipeline`.
        shardings: from the shapes of parameters to a tree of shardings: every tensor goes to its devices as it is read.
        on_tensor: called with the name of each tensor that is done.
        plan: a dry run: no weight is read, parameters are shapes, and the mapping of every part is put here.
        unet: fields of `UNetConfig` that files do not decide: `motion_norm`, `remat`, ...
    Raises:
        ValueError: a pipeline that is not built, or a part that does not fit, by name.
        FileNotFoundError: a part that is missing.
    """
    folder = Path(folder)
    index = load_json(folder / INDEX)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{folder / INDEX} has _class_name={name!r}: the pipelines built are {', '.join(PIPELINES)}")
    family = PIPELINES[name]

    def reading(part: str) -> Reading:
        into = None if plan is None else plan.setdefault(part, [])
        return Reading(shardings=shardings, on_tensor=on_tensor, plan=into)

    how: dict[str, Any] = dict(dtype=dtype, variant=variant)
    networks: dict[str, tuple[Component, Params]] = {}
    animated_image = family == "image" and motion_adapter is not None
    if family == "animatediff" or animated_image:
        adapter = motion_adapter
        if adapter is None and load_json(folder / "unet" / "config.json").get("_class_name") == "UNet2DConditionModel":
            adapter = folder / "motion_adapter"  # beside a UNetMotionModel it is where that one's modules came from
        networks["unet"] = load_animated(folder / "unet", adapter, reading=reading("unet"), **how, **unet)
        family = "animatediff"
    else:
        networks["unet"] = load_unet(folder / "unet", reading=reading("unet"), **how, **unet)
    _check_family(folder, name, family, networks["unet"][0])
    for part, (place, loader) in _PLACES.items():
        # Image encoders of the others read pictures as prompts (IP-Adapter), which is not built.
        if _present(index, place) and not (part == "image_encoder" and family not in ("svd", "i2vgen")):
            networks[part] = loader(folder / place, **how, **reading(part))
    if "autoencoder" not in networks:
        raise ValueError(f"{folder / INDEX} names no vae: a pipeline without an autoencoder cannot be used")
    if family == "i2vgen" and "text_encoder" in networks:  # its pipeline reads the last layer but one
        text, values = networks["text_encoder"]
        networks["text_encoder"] = make_component("text_encoder", text.config_dict() | {"skip_last": 1}), values
    tokenizer = load_tokenizer(folder / "tokenizer") if _present(index, "tokenizer") else None
    components = {part: component for part, (component, _) in networks.items()}
    params = {part: values for part, (_, values) in networks.items()}
    settings = _settings(folder, family, components, tokenizer)
    return Parts(components, params, tokenizer, _with_linear_betas(settings) if animated_image else settings)


def _with_linear_betas(settings: Settings) -> Settings:
    """For an image model that is given a motion adapter: adapters were trained with other betas than their images."""
    betas = settings.schedule_settings.get("betas")
    if settings.schedule != "discrete" or betas == "linear":
        return settings
    warnings.warn(
        f"motion adapters of AnimateDiff were trained with linear betas, so the image model's {betas!r} are left aside",
        stacklevel=4,
    )
    return dataclasses.replace(settings, schedule_settings={**settings.schedule_settings, "betas": "linear"})


_PLACES: dict[str, tuple[str, Callable[..., tuple[Component, Params]]]] = {
    "autoencoder": ("vae", load_autoencoder),
    "text_encoder": ("text_encoder", load_text_encoder),
    "image_encoder": ("image_encoder", load_image_encoder),
}
"""Our parts, beside the UNet: their folder and what loads it."""


def _present(index: Mapping[str, Any], name: str) -> bool:
    """Whether the pipeline has the part: an entry names its library and class, both null for one left out."""
    entry = index.get(name)
    return isinstance(entry, (list, tuple)) and len(entry) == 2 and entry[1] is not None


def _check_family(folder: Path, pipeline: str, family: str, unet: Component) -> None:
    if unet.config.family != family:
        raise ValueError(f"{folder} is a {pipeline} whose unet is of family {unet.config.family!r}, not {family!r}")


def _settings(folder: Path, family: str, components: Mapping[str, Component], tokenizer: Tokenizer | None) -> Settings:
    settings = {
        **FAMILIES[family].defaults,
        **process_settings(load_json(folder / "scheduler" / "scheduler_config.json")),
    }
    config = load_json(folder / "unet" / "config.json")
    if family == "svd":
        settings.setdefault("num_frames", config.get("num_frames") or 25)
    size, factor = config.get("sample_size"), components["autoencoder"].config.factor
    size = FAMILIES[family].sample_size if size is None else size
    if family == "svd" and size == SVD_SAMPLE_SIZE:
        settings["size"] = SVD_SIZE
    elif isinstance(size, int):
        settings["size"] = size * factor
    elif size is not None:
        settings["size"] = (size[0] * factor, size[1] * factor)
    if family == "i2vgen":  # whatever its files say
        settings["size"] = I2VGEN_SIZE
    context = tokenizer.max_length if tokenizer is not None else None
    # What a public network is not trained to leave out, it reads: padding, and every frame in the same way.
    settings = {"fps": 8.0, **settings, "attend_padding": True, "context_length": context or 77}
    kept = load_json(folder / OURS) if (folder / OURS).is_file() else {}
    return make_config(Settings, settings | kept, str(folder / OURS))


# Writing ----------------------------------------------------------------------------------------------------------


def forget(folder: Path) -> None:
    """Make a folder no pipeline; its other files stay."""
    for name in (INDEX, OURS):
        (folder / name).unlink(missing_ok=True)


def download(name: str, **options: Any) -> Path:
    """A pipeline on the hub, with what is read of it only, see `hub.download`."""
    places = [place for place, _ in _PLACES.values()]
    return hub.download(name, parts=["unet", "motion_adapter", "scheduler", "tokenizer", *places], **options)


def save_pipeline(folder: str | Path, parts: Parts, dtype: str = "float32") -> None:
    """Write a pipeline folder that diffusers loads, model_index.json last.

    Raises ValueError for a network of our own, and for settings that no public scheduler has.
    """
    folder = Path(folder)
    components, params, tokenizer, settings = parts
    family = components["unet"].config.family
    if family not in FAMILIES:
        raise ValueError(f"a UNet of family {family!r} belongs to no pipeline of diffusers")
    scheduler = scheduler_json(settings)
    index: dict[str, Any] = {
        "_class_name": FAMILIES[family].pipeline,
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    forget(folder)  # until all is written, so that no mixture of two models can be loaded
    save_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    unet = components["unet"]
    save_unet(folder / "unet", unet, params["unet"], dtype, extra=_unet_extra(settings, components))
    index["unet"] = ["diffusers", load_json(folder / "unet" / "config.json")["_class_name"]]
    if family == "animatediff":
        save_motion_adapter(folder / "motion_adapter", unet, params["unet"], dtype)
        index["motion_adapter"] = ["diffusers", "MotionAdapter"]
    save_autoencoder(folder / "vae", components["autoencoder"], params["autoencoder"], dtype)
    index["vae"] = ["diffusers", load_json(folder / "vae" / "config.json")["_class_name"]]
    for part, save in (("text_encoder", save_text_encoder), ("image_encoder", save_image_encoder)):
        if part in components:
            save(folder / part, components[part], params[part], dtype)
            index[part] = ["transformers", load_json(folder / part / "config.json")["architectures"][0]]
    if tokenizer is not None:
        save_tokenizer(folder / "tokenizer", tokenizer)
        index["tokenizer"] = [
            "transformers",
            load_json(folder / "tokenizer" / "tokenizer_config.json")["tokenizer_class"],
        ]
    if "image_encoder" in components:
        save_json_in(
            folder / "feature_extractor", "preprocessor_config.json", _preprocessor(components["image_encoder"])
        )
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    for name in _absent(family):
        index.setdefault(name, [None, None])
    if family == "image":
        index["requires_safety_checker"] = False
    save_json(folder / OURS, {name: getattr(settings, name) for name in _CALLERS})
    save_json(folder / INDEX, index)


def _absent(family: str) -> tuple[str, ...]:
    """Optional parts that the pipeline's class expects to be named even where there is none."""
    if family == "animatediff":
        return ("feature_extractor", "image_encoder")
    return ("feature_extractor", "image_encoder", "safety_checker") if family == "image" else ()


def _unet_extra(settings: Settings, components: Mapping[str, Component]) -> dict[str, Any]:
    factor = components["autoencoder"].config.factor
    size = settings.size if isinstance(settings.size, int) else list(settings.size)
    sample: Any = size // factor if isinstance(size, int) else [side // factor for side in size]
    if components["unet"].config.family != "svd":
        return {"sample_size": sample}
    # Its pipeline takes one number for both sides.
    sample = SVD_SAMPLE_SIZE if tuple(np.atleast_1d(size)) == SVD_SIZE else sample
    return {"sample_size": sample if isinstance(sample, int) else sample[0], "num_frames": settings.num_frames}


def save_json_in(folder: Path, name: str, value: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / name, value)


def _preprocessor(image_encoder: Component) -> dict[str, Any]:
    size = image_encoder.config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": size, "width": size},
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
