"""What a model is told once, and what a call may change."""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a saved model knows beside its weights: native size and rate, the process it learned, sampling defaults.

    size: pixels a side, or (height, width).
    autoencoder_std: root mean square of decode(encode(video)) - video in -1..1; restoration adds it to the noise.
    clip_x0: clean estimates are cut to -clip_x0..clip_x0, None = not at all.
    attend_padding: networks of public checkpoints read the padding of a prompt too.
    first_guidance_scale: guidance rises evenly from this at the first frame to `guidance_scale` at the last (Stable
        Video Diffusion), None = the same for all.
    decode_chunk_frames: how many frames a decoder that mixes frames is given at once, 0 = all.
    """

    size: int | tuple[int, int] = 32
    fps: float = 8.0
    num_frames: int = 16
    prediction: str = "v"
    schedule: str = "cosine"
    schedule_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    noise: str = "gaussian"
    sampler: str = "dpmpp_2m"
    steps: int = 25
    guidance_scale: float = 3.0
    context_length: int = 24
    autoencoder_std: float = 0.02
    clip_x0: float | None = None
    attend_padding: bool = False
    first_guidance_scale: float | None = None
    decode_chunk_frames: int = 0


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
