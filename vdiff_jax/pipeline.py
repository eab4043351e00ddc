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
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax import __version__
from vdiff_jax.components import Component, make_component, make_config
from vdiff_jax.data.tokenizer import Tokenizer
from vdiff_jax.data.transforms import to_uint8, to_video
from vdiff_jax.data.video_io import Clip
from vdiff_jax.diffusion.schedule import make_schedule
from vdiff_jax.interop import lora as lora_files
from vdiff_jax.interop import pretrained
from vdiff_jax.lora_model import apply_lora
from vdiff_jax.models.lora import Lora
from vdiff_jax.sampling.guidance import Guidance, make_denoise_fn
from vdiff_jax.sampling.job import nothing_known, text_to_video_job
from vdiff_jax.sampling.samplers import Sampler, make_sampler, sample
from vdiff_jax.types import (
    Array,
    Conditioning,
    DenoiseFn,
    DenoiserWrapper,
    Known,
    Latents,
    LogSNR,
    Params,
    Video,
)
from vdiff_jax.verbs import EditingVerbs

ASSETS = Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a saved model knows beside its weights: native size and rate, the process it learned, sampling defaults.

    autoencoder_std: root mean square of decode(encode(video)) - video in -1..1; restoration adds it to the noise.
    """

    size: int = 32
    fps: float = 8.0
    num_frames: int = 16
    prediction: str = "v"
    schedule: str = "cosine"
    schedule_settings: dict[str, float] = dataclasses.field(default_factory=dict)
    noise: str = "gaussian"
    sampler: str = "dpmpp_2m"
    steps: int = 25
    guidance_scale: float = 3.0
    context_length: int = 24
    autoencoder_std: float = 0.02


class SamplingOptions(TypedDict, total=False):
    """How to walk from noise to a clip; what is left out or None is the model's own default.

    negative_prompt: what guidance moves away from.
    steps: denoising steps. sampler: a name in `sampling.SAMPLERS`; eta: its noise, 0..1, None = the sampler's.
    guidance_scale: 1 = off. guidance_interval: log-SNR range in which it acts. guidance_rescale: 0..1, pulls the
        guided estimate's standard deviation back to the conditional one (Lin et al. 2024).
    """

    negative_prompt: str
    steps: int | None
    sampler: str | None
    eta: float | None
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float


@dataclasses.dataclass(frozen=True)
class VideoDiffusion(EditingVerbs):
    """A model: components by name, their parameters, the tokenizer and the settings.

    components: any of "autoencoder", "text_encoder", "unet"; methods say which they need.
    """

    components: dict[str, Component]
    params: dict[str, Params]
    tokenizer: Tokenizer | None
    settings: Settings

    def encode(self, video: Clip | np.ndarray | Array) -> Latents:
        """A clip, `frames u8 [f h w 3]`, or `video f32 [b f h w 3]` in [-1, 1] -> final latents `[b f h/k w/k c]`.

        Raises ValueError if height or width is not a multiple of the autoencoder's factor.
        """
        return self._encode(self.params["autoencoder"], _as_video(video))

    def decode(self, latents: Latents) -> np.ndarray:
        """Final latents `[b f h w c]` -> frames u8 `[b f h*k w*k 3]`; one frame at a time in memory."""
        return to_uint8(np.asarray(self._decode(self.params["autoencoder"], jnp.asarray(latents))))

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """Prompts -> (features `[b n d]`, mask `[b n]`). Warns, and says what was cut, where one is too long."""
        if self.tokenizer is None or "text_encoder" not in self.components:
            raise ValueError("this model has no text encoder: it takes no prompts")
        tokens, mask = (
            jnp.asarray(value) for value in self.tokenizer.encode(list(prompts), self.settings.context_length)
        )
        return self._encode_text(self.params["text_encoder"], tokens, mask), mask

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

    def generate_latents(
        self,
        prompts: Sequence[str],
        *,
        keys: Array,
        num_frames: int | None = None,
        size: int | tuple[int, int] | None = None,
        stride: float = 1.0,
        **sampling: Unpack[SamplingOptions],
    ) -> Latents:
        """As `generate`, but final latents `[b f h w c]`; `keys [b]`, one per clip."""
        num_frames = self.settings.num_frames if num_frames is None else num_frames
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames}: it must be at least 1")
        channels = self._unet().config.latent_channels
        return self.complete(
            nothing_known((len(prompts), num_frames, *self.latent_size(size), channels)),
            prompts,
            keys=keys,
            times=stride * jnp.arange(num_frames, dtype=jnp.float32),
            **sampling,
        )

    def complete(
        self,
        known: Known,
        prompts: Sequence[str] | None = None,
        *,
        keys: Array,
        times: Array | None = None,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        eta: float | None = None,
    ) -> Latents:
        """Generate what is not known: prediction, interpolation, holes; with nothing known, text-to-video.

        Args:
            known: context latents `[b f h w c]` and mask, see `sampling.known_frames`.
            prompts: one per clip; None stands for empty ones.
            keys: `[b]`, one per clip. times: time stamps `[f]` or `[b f]`, default 0, 1, 2, ...
        Returns:
            Final latents `[b f h w c]`, equal to `known.latents` where they are known.
        Raises:
            ValueError: no steps, an unknown sampler, or a model without a network to sample from.

        The other arguments are those of `SamplingOptions`.
        """
        self._unet()
        cond = self.condition(prompts, times, known.latents.shape)
        job = text_to_video_job(keys, known.latents.shape, self.schedule, self.steps(steps), cond, self.settings.noise)
        job = dataclasses.replace(job, known=known)
        wrappers = self.guidance(cond, negative_prompt, guidance_scale, guidance_interval, guidance_rescale)
        return self.run(sample, job, self.sampler(sampler, eta), keys, wrappers=wrappers)

    def steps(self, steps: int | None) -> int:
        """The number of denoising steps, the model's own for None. Raises ValueError below 1."""
        steps = self.settings.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps={steps}: it must be at least 1")
        return steps

    def sampler(self, name: str | None = None, eta: float | None = None) -> Sampler:
        """A sampler by name, the model's own for None, with the noise the model was trained on."""
        return make_sampler(name or self.settings.sampler, eta, noise_kind=self.settings.noise)

    def guidance(
        self,
        cond: Conditioning,
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
    ) -> tuple[Guidance, ...]:
        """Classifier-free guidance away from `negative_prompt` as wrappers for `run`; empty where it is off."""
        scale = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        if cond.text is None or scale == 1.0:
            return ()
        uncond = self.condition([negative_prompt] * len(cond.text), cond.times, cond.times.shape)
        low, high = (-np.inf, np.inf) if guidance_interval is None else guidance_interval
        numbers = [jnp.float32(value) for value in (scale, low, high)]
        return (Guidance(uncond, *numbers, jnp.float32(guidance_rescale) if guidance_rescale > 0 else None),)

    def run(
        self, program: Callable[..., Any], *args: Any, wrappers: tuple[DenoiserWrapper, ...] = (), **static: Any
    ) -> Any:
        """`program(denoise_fn, *args, **static)`, compiled once for all arguments of the same shapes.

        program: a function of a module (`sampling.sample`, `sampling.ddpm_inversion`, ...), not made anew for the call.
        wrappers: applied to the network's denoiser in turn, the last one outermost.
        static: hashable settings that choose what is compiled.
        """
        self._unet()
        params = {name: self.params[name] for name in ("unet", "autoencoder") if name in self.params}
        return self._run(program, tuple(sorted(static.items())), params, args, wrappers)

    def estimate(
        self, z: Latents, logsnr: LogSNR, prompts: Sequence[str] | None = None, *, times: Array | None = None
    ) -> Latents:
        """The network's clean estimate E[x0 | z, prompt] `[b f h w c]`, without guidance.

        z: noisy latents on the variance-preserving scale, `alpha x0 + sigma eps`. logsnr: their level, `[b f]`.
        prompts, times: as in `complete`.
        """
        cond = self.condition(prompts, times, z.shape)
        return self.run(estimate, z, logsnr, nothing_known(z.shape), cond)

    def _unet(self) -> Component:
        if "unet" not in self.components:
            parts = ", ".join(sorted(self.components))
            raise ValueError(f"this model holds {parts} and no unet to sample from: give one of the diffusion stage")
        return self.components["unet"]

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

    @functools.cached_property
    def schedule(self) -> Any:
        return make_schedule(self.settings.schedule, **self.settings.schedule_settings)

    def condition(self, prompts: Sequence[str] | None, times: Array | None, shape: tuple[int, ...]) -> Conditioning:
        """What the network is told: prompts, one per clip (None = empty ones), and time stamps `[f]` or `[b f]`
        (None = 0, 1, 2, ...). shape: `(b, f, ...)` of the latents."""
        times = jnp.arange(shape[1], dtype=jnp.float32) if times is None else jnp.asarray(times, jnp.float32)
        times = jnp.broadcast_to(times if times.ndim == 2 else times[None], shape[:2])
        if "text_encoder" not in self.components:
            if prompts is not None and any(prompts):
                warnings.warn("this model has no text encoder: prompts are ignored", stacklevel=3)
            return Conditioning(None, None, times)
        return Conditioning(*self.encode_prompts([""] * shape[0] if prompts is None else prompts), times)

    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        unet, kind = self.components["unet"], self.settings.prediction
        decode = self.components["autoencoder"].apply if "autoencoder" in self.components else None

        def run(program, static, params, args, wrappers):
            denoise_fn = make_denoise_fn(unet.apply, params["unet"], kind)
            decode_fn = None if decode is None else functools.partial(_decode_frames, decode, params["autoencoder"])
            for wrapper in wrappers:
                denoise_fn = wrapper.wrap(denoise_fn, decode_fn)
            return program(denoise_fn, *args, **dict(static))

        return jax.jit(run, static_argnums=(0, 1))

    @functools.cached_property
    def _encode(self) -> Callable[..., Array]:
        return jax.jit(functools.partial(self.components["autoencoder"].apply, method="encode"))

    @functools.cached_property
    def _encode_text(self) -> Callable[..., Array]:
        return jax.jit(self.components["text_encoder"].apply)

    @functools.cached_property
    def _decode(self) -> Callable[..., Array]:
        return jax.jit(functools.partial(_decode_frames, self.components["autoencoder"].apply))

    def latent_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Height and width of the latents of a clip of `size` pixels, the model's own for None.

        Raises ValueError for a size that is not a multiple of `size_multiple`.
        """
        height, width = (size, size) if isinstance(size, int) else size or (self.settings.size, self.settings.size)
        multiple = self.size_multiple
        if height % multiple or width % multiple or min(height, width) < multiple:
            raise ValueError(f"size {height}x{width} does not fit this model: use multiples of {multiple}")
        factor = self.components["autoencoder"].config.factor
        return height // factor, width // factor

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return self.components["autoencoder"].config.factor * 2 ** (len(self._unet().config.channels) - 1)

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


def estimate(denoise_fn: DenoiseFn, z: Latents, logsnr: LogSNR, known: Known, cond: Any) -> Latents:
    """One call of a denoiser, as a program of `VideoDiffusion.run`."""
    return denoise_fn(z, logsnr, known, cond, next_logsnr=logsnr, keys=jax.random.split(jax.random.key(0), len(z)))


def _decode_frames(apply: Callable[..., Video], params: Params, latents: Latents) -> Video:
    """Final latents `[b f h w c]` -> video `[b f H W 3]`, one frame at a time.

    The decoder works frame by frame, so a map over frames is exact and bounds the memory, also of its gradient.
    """
    frames = jnp.moveaxis(latents, 1, 0)[:, :, None]
    decode = jax.checkpoint(lambda frame: apply(params, frame, method="decode"))
    return jnp.moveaxis(jax.lax.map(decode, frames)[:, :, 0], 0, 1)


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


def _as_video(video: Clip | np.ndarray | Array) -> Array:
    frames = video.frames if isinstance(video, Clip) else video
    if frames.dtype == np.uint8:
        frames = to_video(np.asarray(frames))
    return jnp.asarray(frames if frames.ndim == 5 else frames[None], jnp.float32)


def _seed_keys(seed: int, first: int, count: int) -> Array:
    root = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(first + jnp.arange(count))
