"""A model as functions on latents: networks, prompts and sampler, compiled once for all programs.

`LatentModel` knows no files and no clips of its own; `pipeline.VideoDiffusion` adds them.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.components import Component
from vdiff_jax.data.tokenizer import Tokenizer
from vdiff_jax.data.transforms import to_uint8, to_video
from vdiff_jax.data.video_io import Clip
from vdiff_jax.diffusion.schedule import Schedule, make_schedule
from vdiff_jax.image_input import ImageInput, without_image
from vdiff_jax.models.functional import parameter_count
from vdiff_jax.models.unet_config import UNetConfig
from vdiff_jax.parallel import context_size, split_clips, spread
from vdiff_jax.sampling.clipping import ClipEstimate
from vdiff_jax.sampling.guidance import Guidance, make_denoise_fn
from vdiff_jax.sampling.job import nothing_known, text_to_video_job
from vdiff_jax.sampling.samplers import Sampler, make_sampler, sample
from vdiff_jax.sampling.timesteps import make_timestep_denoise_fn
from vdiff_jax.settings import SamplingOptions, Settings
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


@dataclasses.dataclass(frozen=True, repr=False)
class LatentModel:
    """Components by name, their parameters, the tokenizer and the settings.

    components: any of "autoencoder", "text_encoder", "image_encoder", "unet"; methods say which they need.
    image: the picture that an image-to-video network animates, see `VideoDiffusion.with_image`.
    """

    components: dict[str, Component]
    params: dict[str, Params]
    tokenizer: Tokenizer | None
    settings: Settings
    image: ImageInput | None = None

    def __repr__(self) -> str:
        sizes = {name: parameter_count(params) / 1e6 for name, params in self.params.items()}
        parts = ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items())
        frames, size = self.settings.num_frames, self.settings.size
        size = "x".join(map(str, size)) if isinstance(size, tuple) else f"{size}x{size}"
        return f"{type(self).__name__}({parts}; {frames} frames of {size})"

    def encode(self, video: Clip | np.ndarray | Array) -> Latents:
        """A clip, `frames u8 [f h w 3]`, or `video f32 [b f h w 3]` in [-1, 1] -> final latents `[b f h/k w/k c]`.

        Raises ValueError if height or width is not a multiple of the autoencoder's factor.
        """
        return self._encode(self.params["autoencoder"], _as_video(video))

    def decode(self, latents: Latents) -> np.ndarray:
        """Final latents `[b f h w c]` -> frames u8 `[b f h*k w*k 3]`; one frame at a time in memory, or a chunk of
        `settings.decode_chunk_frames` where the decoder mixes frames."""
        return to_uint8(np.asarray(self._decode(self.params["autoencoder"], jnp.asarray(latents))))

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """Prompts -> (features `[b n d]`, mask `[b n]`). Warns, and says what was cut, where one is too long."""
        if self.tokenizer is None or "text_encoder" not in self.components:
            raise ValueError("this model has no text encoder: it takes no prompts")
        tokens, mask = (
            jnp.asarray(value) for value in self.tokenizer.encode(list(prompts), self.settings.context_length)
        )
        return self._encode_text(self.params["text_encoder"], tokens, mask), mask

    def generate_latents(
        self,
        prompts: Sequence[str],
        *,
        keys: Array,
        num_frames: int | None = None,
        size: int | tuple[int, int] | None = None,
        stride: float = 1.0,
        noise: Array | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Latents:
        """As `generate`, but final latents `[b f h w c]`; `keys [b]`, one per clip; `noise` as in `complete`."""
        num_frames = self.settings.num_frames if num_frames is None else num_frames
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames}: it must be at least 1")
        channels = self._unet().config.latent_channels
        return self.complete(
            nothing_known((len(prompts), num_frames, *self.latent_size(size), channels)),
            prompts,
            keys=keys,
            times=stride * jnp.arange(num_frames, dtype=jnp.float32),
            noise=noise,
            **sampling,
        )

    def complete(
        self,
        known: Known,
        prompts: Sequence[str] | None = None,
        *,
        keys: Array,
        times: Array | None = None,
        noise: Array | None = None,
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
            noise: unit noise `[b f h w c]` to start from, None = drawn from the keys.
        Returns:
            Final latents `[b f h w c]`, equal to `known.latents` where they are known.
        Raises:
            ValueError: no steps, an unknown sampler, or a model without a network to sample from.

        The other arguments are those of `SamplingOptions`.
        """
        self._unet()
        keys = spread(keys)
        cond = self.condition(prompts, times, known.latents.shape)
        steps = self.steps(steps)
        job = text_to_video_job(keys, known.latents.shape, self.schedule, steps, cond, self.settings.noise)
        job = dataclasses.replace(job, known=known)
        if noise is not None:
            job = dataclasses.replace(job, z=self.schedule.start_std(steps) * jnp.asarray(noise, job.z.dtype))
        wrappers = self.guidance(cond, negative_prompt, guidance_scale, guidance_interval, guidance_rescale)
        # Said only where it is not the default: otherwise this is the program that the editing tasks compiled.
        finish = {} if self.schedule.finish else {"finish": False}
        return self.run(sample, job, self.sampler(sampler, eta), keys, wrappers=wrappers, **finish)

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
        uncond = without_image(uncond)
        first = self.settings.first_guidance_scale
        if first is not None:
            scale = jnp.broadcast_to(jnp.linspace(first, scale, cond.times.shape[1])[None], cond.times.shape)
        low, high = (-np.inf, np.inf) if guidance_interval is None else guidance_interval
        bounds = jnp.float32(low), jnp.float32(high)
        rescale = jnp.float32(guidance_rescale) if guidance_rescale > 0 else None
        return (Guidance(uncond, jnp.float32(scale), *bounds, rescale),)

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

    @property
    def unet_config(self) -> UNetConfig:
        """Shape of the network. Raises ValueError if there is none."""
        return self._unet().config

    @property
    def needs_image(self) -> bool:
        """Whether nothing can be sampled until the model is given a picture (`with_image`)."""
        return "unet" in self.components and self.unet_config.family in ("svd", "i2vgen") and self.image is None

    @functools.cached_property
    def schedule(self) -> Schedule:
        return make_schedule(self.settings.schedule, **self.settings.schedule_settings)

    def condition(self, prompts: Sequence[str] | None, times: Array | None, shape: tuple[int, ...]) -> Conditioning:
        """What the network is told: prompts, one per clip (None = empty ones), and time stamps `[f]` or `[b f]`
        (None = 0, 1, 2, ...). shape: `(b, f, ...)` of the latents."""
        times = jnp.arange(shape[1], dtype=jnp.float32) if times is None else jnp.asarray(times, jnp.float32)
        times = jnp.broadcast_to(times if times.ndim == 2 else times[None], shape[:2])
        if self.needs_image:
            raise ValueError("this model animates a picture: use animate, or with_image before other verbs")
        if "text_encoder" not in self.components:
            if prompts is not None and any(prompts):
                warnings.warn("this model has no text encoder: prompts are ignored", stacklevel=3)
            cond = Conditioning(None, None, times)
        else:
            text, mask = self.encode_prompts([""] * shape[0] if prompts is None else prompts)
            cond = Conditioning(text, None if self.settings.attend_padding else mask, times)
        return cond if self.image is None else self.image.condition(cond, shape[2:4])

    def _share_compiled(self) -> None:
        """Make the functions that are compiled on first use, so that copies of this model have the same ones."""
        made = {"unet": ["_run"], "autoencoder": ["_encode", "_decode"], "text_encoder": ["_encode_text"]}
        for part in made.keys() & self.components.keys():
            for name in made[part]:
                getattr(self, name)

    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        unet, kind, limit = self.components["unet"], self.settings.prediction, self.settings.clip_x0
        schedule = self.schedule

        def run(program, static, params, args, wrappers):
            if unet.config.reads_timesteps:
                denoise_fn = make_timestep_denoise_fn(unet.apply, params["unet"], kind, schedule)
            else:
                denoise_fn = make_denoise_fn(unet.apply, params["unet"], kind)
            decode_fn = None
            if "autoencoder" in params:
                decode_fn = functools.partial(self._decode_traced, params["autoencoder"])
            for wrapper in wrappers if limit is None else (*wrappers, ClipEstimate(limit)):
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
        return jax.jit(self._decode_traced)

    @functools.cached_property
    def _decode_traced(self) -> Callable[[Params, Latents], Video]:
        """`(params, latents) -> video`, to be called inside a jit."""
        component = self.components["autoencoder"]
        if component.config.decodes_frames_alone:
            return split_clips(functools.partial(_decode_frames, component.apply), frames_alone=True)
        return functools.partial(_decode_chunks, component.apply, self.settings.decode_chunk_frames)

    def latent_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Height and width of the latents of a clip of `size` pixels, the model's own for None.

        Raises ValueError for a size that is not a multiple of `size_multiple`.
        """
        size = self.settings.size if size is None else size
        height, width = (size, size) if isinstance(size, int) else size
        multiple = self.size_multiple
        if height % multiple or width % multiple or min(height, width) < multiple:
            raise ValueError(f"size {height}x{width} does not fit this model: use multiples of {multiple}")
        factor = self.components["autoencoder"].config.factor
        return height // factor, width // factor

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return self.components["autoencoder"].config.factor * 2 ** (len(self._unet().config.channels) - 1)


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


def _decode_chunks(apply: Callable[..., Video], chunk: int, params: Params, latents: Latents) -> Video:
    """The same for a decoder that mixes frames, `chunk` of them at a time (0 = all): each sees only its own."""
    length = chunk or latents.shape[1]
    length += -length % context_size()  # a chunk is split over devices as the clip is
    parts = [latents[:, first : first + length] for first in range(0, latents.shape[1], length)]
    return jnp.concatenate([apply(params, part, method="decode") for part in parts], axis=1)


def _as_video(video: Clip | np.ndarray | Array) -> Array:
    frames = video.frames if isinstance(video, Clip) else video
    if frames.dtype == np.uint8:
        frames = to_video(np.asarray(frames))
    return jnp.asarray(frames if frames.ndim == 5 else frames[None], jnp.float32)
