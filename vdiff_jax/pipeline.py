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
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax import __version__
from vdiff_jax.components import make_component, make_config
from vdiff_jax.data.tokenizer import Tokenizer
from vdiff_jax.data.video_io import Clip
from vdiff_jax.interop import lora as lora_files
from vdiff_jax.interop import pretrained
from vdiff_jax.latent_model import LatentModel, SamplingOptions, Settings, estimate
from vdiff_jax.lora_model import apply_lora
from vdiff_jax.models.lora import Lora
from vdiff_jax.types import (
    Array,
    Params,
)
from vdiff_jax.verbs import EditingVerbs

__all__ = ["ASSETS", "SamplingOptions", "Settings", "VideoDiffusion", "estimate", "load"]

ASSETS = Path(__file__).parent / "assets"


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

    def with_params(self, params: dict[str, Params]) -> VideoDiffusion:
        """The same model with some components' parameters replaced; compiled functions are shared, not made again."""
        other = copy.copy(self)
        other.__dict__.update(params={**self.params, **params})
        for name in ("digest", "_lora_base"):  # they belong to the weights
            other.__dict__.pop(name, None)
        return other

    def with_lora(self, lora: str | Path | Lora, scale: float = 1.0) -> VideoDiffusion:
        """The model with a low-rank update merged in, `scale` times, and the words it brings; may be given several
        in a row. Compiled functions are shared.

        lora: a file or run folder of `train.py`, or what `interop.lora.load_lora` read. Warns if it was made for
        another base model. Raises FileNotFoundError, or ValueError if the update does not fit or a word is known.
        """
        lora = lora if isinstance(lora, Lora) else lora_files.load_lora(lora)
        base = self.__dict__.get("_lora_base") or {name: self.component_digest(name) for name in self.components}
        components, params, tokenizer = apply_lora((self.components, self.params, self.tokenizer), lora, scale, base)
        other = self.with_params(params)
        other.__dict__.update(components=components, tokenizer=tokenizer, _lora_base=base)
        return other

    def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write the model folder: safetensors per component, config.json, tokenizer.json. See `interop.pretrained`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
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
        pieces = [json.dumps(self.components[name].config_dict(), sort_keys=True).encode()]
        for key, value in sorted(pretrained.flatten(self.params[name]).items()):
            pieces += [key.encode(), np.ascontiguousarray(value).tobytes()]
        return _digest(*pieces)

    def provenance(self, **used: Any) -> dict[str, Any]:
        """What every produced file tells of its making; None values are left out."""
        used = {name: value for name, value in used.items() if value is not None}
        if "guidance_interval" in used:  # json knows no infinity; the same form as the flag of sample.py
            used["guidance_interval"] = ",".join(f"{level:g}" for level in used["guidance_interval"])
        made_by = {"made_by": f"vdiff_jax {__version__}", "note": "AI-generated", "model": self.digest}
        return {**made_by, **used}


def load(name: str | Path) -> VideoDiffusion:
    """A model by bundled name ("shapes"), run folder (of train.py) or saved folder. One that holds a low-rank update
    is loaded with the model it updates.

    Raises FileNotFoundError if there is no such model, ValueError if its files do not fit together.
    """
    folder = _find(name)
    config = pretrained.load_json(folder / "config.json")
    if config.get("format") == lora_files.FORMAT:
        return _load_personal(folder, config)
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
    return VideoDiffusion(components, jax.tree.map(jnp.asarray, params), tokenizer, settings)


def _load_personal(folder: Path, config: dict[str, Any]) -> VideoDiffusion:
    """A folder with an update only, and the name of the model it updates."""
    try:
        base = load(config["base"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds a low-rank update of the model {config['base']!r}, which is not there: give it back its "
            "place, or load it from where it is and use with_lora"
        ) from error
    settings = make_config(Settings, config["settings"], "settings")
    return dataclasses.replace(base, settings=settings).with_lora(folder / lora_files.FILE_NAME)


def _find(name: str | Path) -> Path:
    candidates = [Path(name), Path(name) / "model", ASSETS / str(name)]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    bundled = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
    raise FileNotFoundError(
        f"no model {str(name)!r}: give a run folder, a saved folder, or a bundled name ({', '.join(bundled) or 'none'})"
    )


def _digest(*pieces: bytes) -> str:
    return hashlib.sha256(b"".join(pieces)).hexdigest()[:16]


def _seed_keys(seed: int, first: int, count: int) -> Array:
    root = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(first + jnp.arange(count))
