"""`VideoDiffusion`: where prompt, networks, sampler and pixels meet.

model = vdiff_jax.load("shapes")
clip = model.generate("a red circle moving right", num_frames=16, steps=25, guidance_scale=4.0, seed=0)
clip.save("out.mp4")
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax import __version__
from vdiff_jax.components import make_component, make_config
from vdiff_jax.data.tokenizer import Tokenizer
from vdiff_jax.data.video_io import Clip
from vdiff_jax.image_input import read_image
from vdiff_jax.interop import hub, pipelines, pretrained
from vdiff_jax.interop import lora as lora_files
from vdiff_jax.latent_model import LatentModel, SamplingOptions, Settings, estimate
from vdiff_jax.lora_model import apply_lora
from vdiff_jax.models.lora import Lora
from vdiff_jax.parallel import path_name, to_host, where_to_load
from vdiff_jax.types import (
    Array,
    Params,
)
from vdiff_jax.verbs import EditingVerbs

__all__ = ["ASSETS", "SamplingOptions", "Settings", "VideoDiffusion", "estimate", "load"]

ASSETS = Path(__file__).parent / "assets"
Picture: TypeAlias = np.ndarray | Clip


@dataclasses.dataclass(frozen=True, repr=False)
class VideoDiffusion(EditingVerbs, LatentModel):
    """A model, see `LatentModel`, with its clips and files: generate, edit (`EditingVerbs`), save, load."""

    @overload
    def generate(self, prompt: str = ..., **settings: Any) -> Clip: ...
    @overload
    def generate(self, prompt: Sequence[str], **settings: Any) -> list[Clip]: ...
    def generate(  # pyright: ignore[reportInconsistentOverload]
        self,
        prompt: str | Sequence[str] = "",
        *,
        num_frames: int | None = None,
        size: int | tuple[int, int] | None = None,
        seed: int = 0,
        first_index: int = 0,
        fps: float | None = None,
        stride: float = 1.0,
        **sampling: Unpack[SamplingOptions],
    ) -> Clip | list[Clip]:
        """Text to video: one clip per prompt (a Clip for a str, a list for a sequence).

        Args:
            prompt: what to show; the empty prompt asks for anything.
            num_frames, size: of the clip; size in pixels, one number or (height, width), a multiple of the
                autoencoder's factor and the UNet's levels. Defaults: as trained.
            seed, first_index: clip i of the list depends on (seed, first_index + i) only, so any clip of a long list
                can be made again alone.
            fps: of the clip as a file; default: what shows the motion at its native speed.
            stride: distance between frames in native frame intervals; below 1 is slow motion.
            sampling: `negative_prompt, steps, sampler, eta, guidance_scale, guidance_interval, guidance_rescale`, see
                `SamplingOptions`.

        Changing prompt, seed, guidance_scale (between values other than 1), eta or stride recompiles nothing.

        Raises:
            ValueError: num_frames, steps, stride or size that cannot be, or a model without a network to sample from.
        """
        if not stride > 0:
            raise ValueError(f"stride={stride}: it must be above 0")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        latents = self.generate_latents(
            prompts,
            keys=_seed_keys(seed, first_index, len(prompts)),
            num_frames=num_frames,
            size=size,
            stride=stride,
            **sampling,
        )
        frames = self.decode(latents)
        rate = fps or self.settings.fps / stride
        defaults = {name: getattr(self.settings, name) for name in ("steps", "sampler", "guidance_scale")}
        given = {name: value for name, value in sampling.items() if value is not None}
        used = {**defaults, "seed": seed, "num_frames": len(frames[0]), **given}
        clips = [
            Clip(clip, rate, self.provenance(prompt=text, **used, index=index))
            for index, (clip, text) in enumerate(zip(frames, prompts), start=first_index)
        ]
        return clips[0] if isinstance(prompt, str) else clips

    def animate(self, image: Picture, prompt: str = "", *, seed: int = 0, **options: Any) -> Clip:
        """Picture to video with a network made for it (Stable Video Diffusion, I2VGen-XL).

        Args:
            image: u8 `[h w 3]`, or a clip whose first frame counts; brought to the size of the clip to come.
            prompt: read by networks that have a text encoder.
            options: `fps, motion_bucket, noise_augmentation` as in `with_image`; the others are those of `generate`.
        Raises:
            ValueError: as `generate`, and for a model that animates no picture.
        """
        told = {name: options.pop(name) for name in ("motion_bucket", "noise_augmentation") if name in options}
        if options.get("fps") is not None:
            told["fps"] = options["fps"]
        model = self.with_image(image, size=options.get("size"), seed=seed, **told)
        return model.generate(prompt, seed=seed, **options)

    def with_image(
        self,
        image: Picture,
        *,
        size: int | tuple[int, int] | None = None,
        fps: float | None = None,
        motion_bucket: float = 127.0,
        noise_augmentation: float = 0.02,
        seed: int = 0,
        noise: Array | None = None,
    ) -> VideoDiffusion:
        """The model with the picture it animates: then `generate` and the editing verbs work with it.

        Args:
            image: u8 `[h w 3]`, or a clip whose first frame counts. size: of the clips to come, as in `generate`.
            fps: rate that the network is told, default the model's. motion_bucket: 0..255, how much shall move.
            noise_augmentation: deviation of noise on the picture, 0..1; more lets the clip leave it further behind.
            noise: that noise in unit variance, `[1 H W 3]`; None draws it from the seed.
        Raises:
            ValueError: the model animates no picture, or the picture is none.
        """
        frame = image.frames[0] if isinstance(image, Clip) else np.asarray(image)
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"the picture is {frame.dtype} of shape {frame.shape}: give uint8 [height width 3]")
        height, width = (side * self.components["autoencoder"].config.factor for side in self.latent_size(size))
        if noise is None:
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), (1, height, width, 3))
        read = read_image(
            self,
            frame[None],
            size=(height, width),
            fps=self.settings.fps if fps is None else fps,
            motion_bucket=motion_bucket,
            noise_augmentation=noise_augmentation,
            noise=noise,
        )
        self._share_compiled()
        digest = self.digest  # of weights, not of pictures: not to be worked out again for each
        other = copy.copy(self)
        other.__dict__.update(image=read, digest=digest)
        return other

    def with_params(self, params: dict[str, Params]) -> VideoDiffusion:
        """The same model with some components' parameters replaced; compiled functions are shared, not made again."""
        self._share_compiled()
        other = copy.copy(self)
        other.__dict__.update(params={**self.params, **params})
        for name in ("digest", "_lora_base"):  # they belong to the weights
            other.__dict__.pop(name, None)
        return other

    def with_lora(self, lora: str | Path | Lora, scale: float = 1.0) -> VideoDiffusion:
        """The model with a low-rank update merged in, `scale` times, and the words it brings; may be given several
        in a row. Compiled functions are shared.

        lora: a file or run folder of `train.py`; for a public network also a file, a folder or a name on the hub in the
            format of diffusers, peft, kohya or AnimateDiff; or what `interop.lora.open_lora` read.
        Warns if it was made for another base model. Raises FileNotFoundError, or ValueError if the update does not fit
        or a word is known.
        """
        lora = lora if isinstance(lora, Lora) else lora_files.open_lora(lora, self.components)
        base = self.__dict__.get("_lora_base") or {name: self.component_digest(name) for name in self.components}
        components, params, tokenizer = apply_lora((self.components, self.params, self.tokenizer), lora, scale, base)
        other = self.with_params(params)
        other.__dict__.update(components=components, tokenizer=tokenizer, _lora_base=base)
        return other

    def save_pretrained(self, folder: str | Path, dtype: str = "float32", layout: str | None = None) -> None:
        """Write the model as a folder.

        layout: "vdiff_jax" (safetensors per component, config.json, tokenizer.json), "diffusers" (a pipeline that
            diffusers loads), or None: diffusers' where the network is one of its own.
        Raises ValueError for a network or settings that diffusers does not have.
        """
        folder = Path(folder)
        if layout not in (None, "vdiff_jax", "diffusers"):
            raise ValueError(f"layout={layout!r}: choose 'vdiff_jax' or 'diffusers'")
        public = "unet" in self.components and self.unet_config.reads_timesteps
        if layout == "diffusers" or (layout is None and public):
            self._unet()
            parts = pipelines.Parts(self.components, self.params, self.tokenizer, self.settings)
            pipelines.save_pipeline(folder, parts, dtype)
            return
        folder.mkdir(parents=True, exist_ok=True)
        pipelines.forget(folder)  # a pipeline that was there would be loaded in this model's place
        for name in self.components:
            pretrained.save_tensors(folder / f"{name}.safetensors", self.params[name], dtype)
        if self.tokenizer is not None:
            self.tokenizer.save(folder / "tokenizer.json")
        pretrained.save_json(
            folder / "config.json",
            {
                "format": pretrained.FORMAT,
                "components": {name: part.config_dict() for name, part in self.components.items()},
                "settings": dataclasses.asdict(self.settings),
            },
        )

    @functools.cached_property
    def digest(self) -> str:
        """Short sha256 of configuration and weights."""
        parts = [self.component_digest(name) for name in sorted(self.components)]
        return _digest(json.dumps([dataclasses.asdict(self.settings), parts], sort_keys=True).encode())

    def component_digest(self, name: str) -> str:
        """Short sha256 of one component's configuration and weights; latent caches are tied to the autoencoder's."""
        digest = hashlib.sha256(json.dumps(self.components[name].config_dict(), sort_keys=True).encode())
        leaves = jax.tree_util.tree_leaves_with_path(self.params[name])
        for key, leaf in sorted((path_name(path), leaf) for path, leaf in leaves):  # on the host one by one
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(to_host(leaf)).tobytes())
        return digest.hexdigest()[:16]

    def provenance(self, **used: Any) -> dict[str, Any]:
        """What every produced file tells of its making; None values are left out."""
        used = {name: value for name, value in used.items() if value is not None}
        if "guidance_interval" in used:  # json knows no infinity; the same form as the flag of sample.py
            used["guidance_interval"] = ",".join(f"{level:g}" for level in used["guidance_interval"])
        made_by = {"made_by": f"vdiff_jax {__version__}", "note": "AI-generated", "model": self.digest}
        return {**made_by, **used}


def load(name: str | Path, **options: Any) -> VideoDiffusion:
    """A model by bundled name ("shapes"), run folder (of train.py), saved folder, diffusers pipeline folder, or the
    name of one on the Hugging Face hub ("owner/name"; needs the extra `hub`). A folder that holds a low-rank update is
    loaded with the model it updates.

    options: `shardings`, from the shapes of a part's parameters to a tree of shardings, by default over the mesh in use
        (`jax.set_mesh`), split by its axis `fsdp`; for pipelines of diffusers only
        `dtype, variant, motion_adapter, ...`, see `interop.pipelines.load_pipeline`; `revision` and `cache_dir` for the
        hub, see `interop.hub.download`.

    Raises FileNotFoundError if there is no such model, ValueError if its files do not fit together.
    """
    folder = _find(name, options)
    if pipelines.is_pipeline(folder):
        return VideoDiffusion(*pipelines.load_pipeline(folder, **{"shardings": where_to_load, **options}))
    shardings = options.pop("shardings", None if jax.sharding.get_mesh().empty else where_to_load)
    if options:
        raise ValueError(f"{folder} is no pipeline of diffusers: it takes no {', '.join(sorted(options))}")
    config = pretrained.load_json(folder / "config.json")
    if config.get("format") == lora_files.FORMAT:
        return _load_personal(folder, config, shardings)
    if config.get("format") != pretrained.FORMAT:
        raise ValueError(
            f"{folder / 'config.json'} has format {config.get('format')!r}, expected {pretrained.FORMAT!r}"
        )
    components = {part: make_component(part, settings) for part, settings in config["components"].items()}
    params = {
        part: pretrained.load_tensors(folder / f"{part}.safetensors", component.abstract)
        for part, component in components.items()
    }
    tokenizer = Tokenizer.load(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None
    settings = make_config(Settings, config["settings"], "settings")
    params = {
        part: jax.tree.map(jnp.asarray, values) if shardings is None else jax.device_put(values, shardings(values))
        for part, values in params.items()
    }
    return VideoDiffusion(components, params, tokenizer, settings)


def _load_personal(folder: Path, config: dict[str, Any], shardings: Any) -> VideoDiffusion:
    """A folder with an update only, and the name of the model it updates."""
    try:
        base = load(config["base"], **({} if shardings is None else {"shardings": shardings}))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds a low-rank update of the model {config['base']!r}, which is not there: give it back its "
            "place, or load it from where it is and use with_lora"
        ) from error
    settings = make_config(Settings, config["settings"], "settings")
    return dataclasses.replace(base, settings=settings).with_lora(folder / lora_files.FILE_NAME)


def _find(name: str | Path, options: dict[str, Any]) -> Path:
    """The folder of a model; takes what is for the hub out of `options`."""
    wanted = {field: options.pop(field) for field in ("revision", "cache_dir") if field in options}
    candidates = [Path(name), Path(name) / "model", ASSETS / str(name)]
    for folder in candidates:
        if (folder / "config.json").is_file() or pipelines.is_pipeline(folder):
            return folder
    if hub.is_hub_name(name):
        return pipelines.download(str(name), variant=options.get("variant"), **wanted)
    bundled = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
    raise FileNotFoundError(
        f"no model {str(name)!r}: give a run folder, a saved folder, a diffusers pipeline, a name on the hub "
        f"(owner/name), or a bundled name ({', '.join(bundled) or 'none'})"
    )


def _digest(*pieces: bytes) -> str:
    return hashlib.sha256(b"".join(pieces)).hexdigest()[:16]


def _seed_keys(seed: int, first: int, count: int) -> Array:
    root = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(first + jnp.arange(count))
