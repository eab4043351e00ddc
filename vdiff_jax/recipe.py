"""The whole tree of settings with its defaults, and the checks a recipe must pass.

A recipe in `configs/` starts from `default_recipe(stage)` and changes what it needs; because the tree is complete and
locked, an unknown key fails in the recipe and on the command line alike, with the nearest known key.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from vdiff_jax.components import KINDS, make_config
from vdiff_jax.data.buckets import parse_buckets
from vdiff_jax.diffusion.patterns import Mixture
from vdiff_jax.models.lora import DEFAULT_TARGETS
from vdiff_jax.training.autoencoder_loss import AutoencoderLossConfig
from vdiff_jax.training.loop import LoopConfig
from vdiff_jax.training.optimizer import OptimizerConfig

STAGES = ("autoencoder", "diffusion")
NETWORKS = ("autoencoder", "text_encoder", "unet")  # those that a recipe can shape and train
SOURCES = ("shapes", "folder", "tfds", "synthetic")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where clips come from.

    source: "shapes" (rendered on the device), "folder" (video files and captions), "tfds" or "synthetic".
    folder: the folder of videos, of a TFDS builder, or empty. split: "train" by default.
    size: pixels per side, or (height, width) of a folder's clips. num_frames: frames in a training window.
    native_fps: the rate at which time stamps count one per frame. batch_size: clips per step over all devices.
    strides, stride_weights: distance between the frames of a window, in native frames, and how often.
    context_length: tokens of a prompt; longer ones are cut.
    world, world_frames, world_overrides: which shapes world, its native clip length, and changed fields.
    num_scenes, scenes_seed: with num_scenes above 0, the shapes world is so many clips, always the same for a seed,
        each with its one caption, as if they were files; 0 = new scenes without end.
    captions_key, video_key: features of a TFDS dataset.
    num_workers: processes that decode; 0 uses threads. latent_cache: folder of encoded clips, or empty.
    buckets: shapes of batches for a folder of mixed clips and images, `(frames, height, width)` each, or with an own
        batch size as fourth; empty = all are num_frames of size. See `data.buckets`.

    With `model.init_from`, a size, num_frames, native_fps or context_length of 0 is that model's own.
    """

    source: str = "shapes"
    folder: str = ""
    split: str = "train"
    size: int | tuple[int, int] = 32
    num_frames: int = 8
    native_fps: float = 8.0
    batch_size: int = 32
    strides: tuple[int, ...] = (1, 2, 4)
    stride_weights: tuple[float, ...] = (0.7, 0.2, 0.1)
    context_length: int = 24
    world: str = "small"
    world_frames: int = 16
    world_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_scenes: int = 0
    scenes_seed: int = 0
    video_key: str = "video"
    captions_key: str = "caption"
    num_workers: int = 0
    latent_cache: str = ""
    buckets: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """What the network learns.

    schedule, schedule_settings: see `diffusion.schedule`. prediction: "eps", "x0", "v" or "velocity".
    weighting, weighting_settings: see `diffusion.loss`. noise: see `diffusion.noise`.
    channel_weighting: "equal", or "pixels": each latent channel counts by how much the decoded pixels move with it, so
        that the loss is in proportion to an error in pixels. For latents whose channels differ much in that.
    prompt_dropout: share of clips whose prompt is replaced by the empty one, so that guidance is trained.
    context_prompt_dropout: the same for clips of which something is known: to go on, fill in and repair is often asked
        without any words.
    log_bins: number of log-SNR bins in which the loss is logged.

    With `model.init_from`, an empty schedule, prediction or noise is that model's own, and an empty weighting is the
    plain squared error of what its network predicts.
    """

    schedule: str = "cosine"
    schedule_settings: dict[str, float] = dataclasses.field(default_factory=dict)
    prediction: str = "v"
    weighting: str = "sigmoid"
    weighting_settings: dict[str, float] = dataclasses.field(default_factory=dict)
    channel_weighting: str = "equal"
    noise: str = "gaussian"
    prompt_dropout: float = 0.1
    context_prompt_dropout: float = 0.3
    log_bins: int = 8


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Personalisation: only a low-rank update of the model `model.init_from` is trained, see `models.lora`.

    rank: of the update; 0 = off, all weights are trained. alpha: the update counts `alpha / rank` times.
    targets: regular expressions on dotted paths such as `unet.mid.res.film.kernel`.
    new_words: words to be learned that the model's tokenizer lacks; "orange=yellow" starts from another word's
        embedding, "orange" alone from the mean of all.
    prior_share: share of each batch that shows what the model was trained on, so that the rest is not forgotten.
    prior: where that comes from: fields of the data section that differ, as `dict(source="folder", folder="old")`;
        `split` is "train" again, `num_scenes` and `latent_cache` are empty, unless given.
    shift: pixels by which a window of the new clips is moved at random, all frames alike, its edges repeated: few clips
        show things in few places.
    """

    rank: int = 0
    alpha: float = 4.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    new_words: tuple[str, ...] = ()
    prior_share: float = 0.0
    prior: dict[str, Any] = dataclasses.field(default_factory=dict)
    shift: int = 0


@dataclasses.dataclass(frozen=True)
class PictureConfig:
    """What an image-to-video network (Stable Video Diffusion) is told of a clip's first frame while it is trained.

    motion_bucket: 0..255, how much moves in the clips. noise_mean, noise_std: of the logarithm of the deviation of the
    noise on the picture's pixels, normal. dropout: share of clips that lose the picture's embedding, as many that lose
    its latents, and as many that lose both, so that guidance is trained.
    """

    motion_bucket: float = 127.0
    noise_mean: float = -3.0
    noise_std: float = 0.5
    dropout: float = 0.1

    def __post_init__(self):
        if not 0 <= 3 * self.dropout <= 1:
            raise ValueError(f"picture.dropout={self.dropout}: three times as much must lie in 0..1")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Previews while training, and the defaults of the saved model.

    With `model.init_from`, an empty sampler, and steps, guidance_scale or num_frames of 0, are that model's own.
    """

    prompts: tuple[str, ...] = ()
    sampler: str = "dpmpp_2m"
    steps: int = 25
    guidance_scale: float = 3.0
    num_frames: int = 16
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The loop, and: ema_decay; accumulation_steps, parts a batch is cut into; keep_checkpoints, newest ones kept.

    memory_limit_gb: what a step may take on each device; 0 = what there is.
    spike_sigmas: an update whose loss or gradient norm stands so many standard deviations above the mean of the last
        128 steps is refused; 0 = off, 6 is usual.
    keep_every_steps: checkpoints of steps divisible by it are never removed; 0 = off.
    partial_restore: go on from a checkpoint of another config with the arrays that fit; the others start anew.
    """

    num_steps: int = 1000
    ema_decay: float = 0.999
    accumulation_steps: int = 1
    memory_limit_gb: float = 0.0
    spike_sigmas: float = 0.0
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    partial_restore: bool = False

    def __post_init__(self):
        if self.spike_sigmas < 0 or self.heartbeat_s < 0:
            raise ValueError(
                f"train.spike_sigmas={self.spike_sigmas} and train.heartbeat_s={self.heartbeat_s} must be at least 0"
            )
        if self.rewind_on_spikes and not self.spike_sigmas:
            raise ValueError(f"train.rewind_on_spikes={self.rewind_on_spikes} needs train.spike_sigmas, for example 6")

    def loop(self) -> LoopConfig:
        return LoopConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(LoopConfig)})


Recipe: TypeAlias = Any
"""An ml_collections.ConfigDict; its attributes are known at run time only."""


def default_recipe(stage: str = "diffusion") -> Recipe:
    """Every setting with its default, locked.

    model.autoencoder_from: a run folder, saved folder or bundled name whose autoencoder is used (diffusion stage).
    model.init_from: the same for a starting point of all weights, or a pipeline of diffusers, a folder or a name on the
        hub; empty = from scratch. `init_from` is another name of this setting.
    model.trainable: regular expressions on dotted paths such as `unet.mid.temporal.proj_in.kernel`: only parameters in
        whose path one is found are trained. Empty = all, but of AnimateDiff and of image models the motion modules.
    model.text: "joint" (small encoder trained with the UNet), "minilm" (pretrained sentence encoder, frozen) or "none".
        The encoder of a pipeline of diffusers stays, frozen, and this is empty.
    """
    check_stage(stage)
    recipe: Recipe = ConfigDict()
    recipe.stage = stage
    recipe.seed = 0
    recipe.model = ConfigDict({name: dataclasses.asdict(KINDS[name][0]()) for name in NETWORKS})
    recipe.model.autoencoder_from = ""
    recipe.model.init_from = ""
    recipe.init_from = recipe.model.get_ref("init_from")
    recipe.model.trainable = ()
    recipe.model.text = "joint"
    recipe.data = ConfigDict(dataclasses.asdict(DataConfig()))
    recipe.diffusion = ConfigDict(dataclasses.asdict(DiffusionConfig()))
    recipe.diffusion.mixture = ConfigDict(dataclasses.asdict(Mixture()))
    recipe.lora = ConfigDict(dataclasses.asdict(LoraConfig()))
    recipe.loss = ConfigDict(dataclasses.asdict(AutoencoderLossConfig()))
    recipe.optimizer = ConfigDict(dataclasses.asdict(OptimizerConfig()))
    recipe.train = ConfigDict(dataclasses.asdict(TrainConfig()))
    recipe.picture = ConfigDict(dataclasses.asdict(PictureConfig()))
    recipe.sample = ConfigDict(dataclasses.asdict(SampleConfig()))
    recipe.parallel = ConfigDict(dict(data=-1, fsdp=1, context=1))
    recipe.lock()
    free: Recipe
    for free in (
        recipe.data.world_overrides,
        recipe.diffusion.schedule_settings,
        recipe.diffusion.weighting_settings,
        recipe.lora.prior,
    ):
        free.unlock()  # checked where they are used, their keys depend on a name
    return recipe


def finetune_recipe() -> Recipe:
    """The diffusion stage from another model, which gives everything that the recipe does not set."""
    recipe = default_recipe("diffusion")
    recipe.model.text = ""
    recipe.data.update(size=0, num_frames=0, native_fps=0.0, context_length=0)
    recipe.diffusion.update(schedule="", prediction="", noise="", weighting="")
    recipe.sample.update(sampler="", steps=0, guidance_scale=0.0, num_frames=0)
    return recipe


def check_stage(stage: str) -> None:
    """Raises ValueError for a name that is not in `STAGES`."""
    if stage not in STAGES:
        raise ValueError(f"config.stage={stage!r}: choose one of {', '.join(STAGES)}")


def data_config(recipe: Recipe) -> DataConfig:
    """Raises ValueError for a value that cannot work. With `model.init_from`, 0 may stand for that model's own."""
    return checked_data(
        make_config(DataConfig, recipe.data.to_dict(), "data"), may_be_open=bool(recipe.model.init_from)
    )


def checked_data(config: DataConfig, *, may_be_open: bool = False) -> DataConfig:
    """The same, if it can work. Raises ValueError for a value that cannot."""
    if config.source not in SOURCES:
        raise ValueError(f"data.source={config.source!r}: choose one of {', '.join(SOURCES)}")
    sides = (config.size,) if isinstance(config.size, int) else config.size
    if len(sides) > 1 and config.source == "shapes":
        raise ValueError(f"data.size={config.size}: the shapes world is square, give one number")
    values = {"size": min(sides), **{name: getattr(config, name) for name in ("num_frames", "context_length")}}
    for name, value in values.items():
        if value < (0 if may_be_open else 1):
            raise ValueError(f"data.{name}={getattr(config, name)}: it must be at least 1")
    if config.batch_size < 1:
        raise ValueError(f"data.batch_size={config.batch_size}: it must be at least 1")
    if config.native_fps < 0 or (config.native_fps == 0 and not may_be_open):
        raise ValueError(f"data.native_fps={config.native_fps}: it must be above 0")
    if len(config.strides) != len(config.stride_weights):
        raise ValueError("data.strides and data.stride_weights need the same length")
    if config.num_scenes < 0 or (config.num_scenes and config.source != "shapes"):
        raise ValueError(f"data.num_scenes={config.num_scenes}: 0, or above 0 with data.source='shapes'")
    if config.buckets and (config.source != "folder" or config.latent_cache):
        raise ValueError("data.buckets works with data.source='folder' and without data.latent_cache: leave one out")
    parse_buckets(config.buckets, config.batch_size)
    if config.source in ("folder", "tfds") and not config.folder:
        raise ValueError(f"data.source={config.source!r} needs data.folder")
    return config


def diffusion_config(recipe: Recipe) -> tuple[DiffusionConfig, Mixture]:
    settings = recipe.diffusion.to_dict()
    mixture = make_config(Mixture, settings.pop("mixture"), "diffusion.mixture")
    return make_config(DiffusionConfig, settings, "diffusion"), mixture


def lora_config(recipe: Recipe) -> LoraConfig:
    """Raises ValueError for a value that cannot work."""
    config: LoraConfig = section(recipe, "lora", LoraConfig)
    if config.rank < 0:
        raise ValueError(f"lora.rank={config.rank}: 0 trains all weights, above 0 an update of that rank")
    if not config.alpha > 0:
        raise ValueError(f"lora.alpha={config.alpha}: it must be above 0")
    if not 0 <= config.prior_share < 1:
        raise ValueError(f"lora.prior_share={config.prior_share}: it must be at least 0 and below 1")
    if config.prior_share and recipe.data.buckets:
        raise ValueError(f"lora.prior_share={config.prior_share}: both parts are one batch; leave data.buckets empty")
    if config.prior_share and not config.prior:
        raise ValueError(
            f"lora.prior_share={config.prior_share} needs lora.prior: the fields of the data section that lead to what "
            "the model was trained on"
        )
    if config.shift < 0 or (config.shift and recipe.data.latent_cache):
        raise ValueError(f"lora.shift={config.shift}: 0, or above 0 without data.latent_cache, as it moves pixels")
    if config.rank and recipe.stage != "diffusion":
        raise ValueError(f"lora.rank={config.rank} works in the diffusion stage only: config.stage={recipe.stage!r}")
    if config.rank and not recipe.model.init_from:
        raise ValueError(f"lora.rank={config.rank} needs model.init_from: the model to personalise")
    return config


def section(recipe: Recipe, name: str, config_class: type) -> Any:
    """`recipe.<name>` as a frozen dataclass."""
    return make_config(config_class, recipe[name].to_dict(), name)
