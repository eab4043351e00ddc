"""The picture that an image-to-video network animates: from pixels to what the network reads.

Two public families do so. Stable Video Diffusion (Blattmann et al. 2023) reads the picture's latents on every frame,
its CLIP embedding in the place of a prompt, and three numbers. I2VGen-XL (Zhang et al. 2023) reads the latents on the
first frame and the frames' places on the others, the embedding beside a prompt, and the rate.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from vdiff_jax.data.transforms import resize_frames, to_video
from vdiff_jax.models.autoencoder import latents_from_moments, sample_moments
from vdiff_jax.models.clip_pixels import clip_pixels, normalize_pixels
from vdiff_jax.types import Array, Conditioning

if TYPE_CHECKING:
    from vdiff_jax.latent_model import LatentModel

FAMILIES = ("svd", "i2vgen")


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """What a network knows of its picture(s): latents `[n h w c]`, embedding `[n d]`, added `[n k]`; n = 1 or a batch.

    family: "svd" or "i2vgen".
    """

    family: str
    latents: Array
    embedding: Array
    added: Array

    def condition(self, cond: Conditioning, size: tuple[int, ...] = ()) -> Conditioning:
        """The conditioning of a batch with the picture in it. cond: its text is a prompt, or None for "svd".

        size: height and width of the clip's latents, if they are to be compared with the picture's.
        Raises ValueError for another size, or another number of pictures than clips.
        """
        read = self.latents.shape[1:3]
        if size and tuple(size) != read:
            raise ValueError(
                f"the picture was read for latents of {read[0]}x{read[1]}, the clip has {size[0]}x{size[1]}: give the "
                "same size to with_image and to what is done with the model"
            )
        batch, num_frames = cond.times.shape
        count = len(self.latents)
        if count not in (1, batch):
            raise ValueError(f"{count} pictures for {batch} clips: give one, or one for each")
        latents, embedding, added = (
            jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (self.latents, self.embedding, self.added)
        )
        latents = jnp.broadcast_to(latents[:, None], (batch, num_frames, *latents.shape[1:]))
        if self.family == "svd":
            return dataclasses.replace(cond, text=embedding[:, None], image_latents=latents, added=added)
        place = jnp.arange(num_frames, dtype=jnp.float32) / max(num_frames - 1, 1)
        later = (jnp.arange(num_frames) > 0)[None, :, None, None, None]
        latents = jnp.where(later, place[None, :, None, None, None], latents)
        return dataclasses.replace(cond, image_latents=latents, image_embedding=embedding, added=added)


def without_image(cond: Conditioning) -> Conditioning:
    """The conditioning that guidance moves away from: no picture as each family was trained without one."""
    if cond.image_embedding is not None:  # I2VGen-XL keeps the latents
        return dataclasses.replace(cond, image_embedding=jnp.zeros_like(cond.image_embedding))
    if cond.image_latents is None or cond.text is None:
        return cond
    return dataclasses.replace(cond, text=jnp.zeros_like(cond.text), image_latents=jnp.zeros_like(cond.image_latents))


def read_image(
    model: LatentModel,
    images: np.ndarray,
    *,
    size: tuple[int, int],
    fps: float,
    motion_bucket: float,
    noise_augmentation: float,
    noise: Array,
) -> ImageInput:
    """Pictures u8 `[n h w 3]` as the model's network reads them: latents are the mean of the autoencoder's posterior,
    from which I2VGen-XL's own pipeline draws.

    Args:
        size: height and width in pixels of the clip to come; pictures are stretched ("svd") or cropped to it.
        fps: rate that the network is told. motion_bucket: 0..255, how much shall move (Stable Video Diffusion).
        noise_augmentation: deviation of the noise added to the pixels, on the scale -1..1 (Stable Video Diffusion);
            more lets the clip leave the picture further behind. noise: that noise in unit variance, `[n H W 3]`.
    Raises:
        ValueError: the model is no image-to-video model or lacks an encoder.
    """
    family = model.unet_config.family
    if family not in FAMILIES:
        raise ValueError("this model animates no picture: it is told prompts and frames (extend continues a frame)")
    for name in ("image_encoder", "autoencoder"):
        if name not in model.components:
            raise ValueError(f"this model has no {name}: it cannot read a picture")
    autoencoder, encoder = model.components["autoencoder"], model.components["image_encoder"]
    params = model.params["autoencoder"]
    if family == "svd":
        embedded = clip_pixels(jnp.asarray(to_video(images)), encoder.config.image_size)
        video = jnp.asarray(to_video(resize_frames(images, *size))) + noise_augmentation * noise
    else:
        crop = encoder.config.image_size
        square = crop_middle(images, size[1], size[1])
        embedded = normalize_pixels(jnp.asarray(to_video(_resized(square, crop, crop))))
        video = jnp.asarray(to_video(crop_middle(images, *size)))
    moments = jax.jit(autoencoder.apply, static_argnames="method")(params, video[:, None], method="encode_moments")
    if family == "svd":  # the network was trained on the mode in raw scale
        latents = sample_moments(moments)[:, 0]
        added = [fps - 1.0, motion_bucket, noise_augmentation]
    else:
        latents = latents_from_moments(moments, autoencoder.config)[:, 0]
        added = [fps]
    embedding = jax.jit(encoder.apply)(model.params["image_encoder"], embedded)
    return ImageInput(
        family, latents, embedding, jnp.broadcast_to(jnp.asarray(added, jnp.float32), (len(images), len(added)))
    )


def crop_middle(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """u8 `[n h w 3] -> [n height width 3]`: shrunk by area until one side fits, then the middle of the other.

    I2VGen-XL's own pipeline loses a row or column of some sizes to a rounding error and shows a black one; not here.
    """
    from PIL import Image

    scale = min(images.shape[2] / width, images.shape[1] / height)
    full = max(round(images.shape[1] // scale), height), max(round(images.shape[2] // scale), width)
    top, left = (full[0] - height) // 2, (full[1] - width) // 2
    box = Image.Resampling.BOX
    shrunk = np.stack([np.asarray(Image.fromarray(image).resize(full[::-1], box)) for image in images])
    return shrunk[:, top : top + height, left : left + width]


def _resized(images: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    bilinear = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height), bilinear)) for image in images])
