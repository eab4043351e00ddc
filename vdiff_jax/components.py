"""The parts of a model by name: configuration, `init` and `apply` of each network.

A model is at most three components: `autoencoder`, `text_encoder`, `unet`. A configuration is a plain dict of the
fields of the component's dataclass, as it stands in a recipe or in `config.json`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vdiff_jax.models.autoencoder import AutoencoderConfig, VideoAutoencoder
from vdiff_jax.models.functional import functional
from vdiff_jax.models.image_encoder import ImageEncoder, ImageEncoderConfig
from vdiff_jax.models.t5_encoder import T5Encoder, T5EncoderConfig
from vdiff_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from vdiff_jax.models.unet import VideoUNet
from vdiff_jax.models.unet_config import UNetConfig
from vdiff_jax.parallel import split_clips
from vdiff_jax.types import Array, Params

KINDS: dict[str, tuple[type, type]] = {
    "autoencoder": (AutoencoderConfig, VideoAutoencoder),
    "text_encoder": (TextEncoderConfig, TextEncoder),
    "image_encoder": (ImageEncoderConfig, ImageEncoder),
    "unet": (UNetConfig, VideoUNet),
}
OTHERS: dict[tuple[str, str], tuple[type, type]] = {("text_encoder", "t5"): (T5EncoderConfig, T5Encoder)}
"""Another network in a part's place, by the `architecture` among its settings."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Component:
    """A network: its name, configuration, and the pure functions `init(key)` and `apply(params, ...)`."""

    name: str
    config: Any
    init: Callable[[Array], Params]
    apply: Callable[..., Any]

    @property
    def abstract(self) -> Params:
        """Parameter shapes, no memory spent."""
        return _shapes(self.init)

    def config_dict(self) -> dict[str, Any]:
        settings = {n: list(v) if isinstance(v, tuple) else v for n, v in dataclasses.asdict(self.config).items()}
        other = [kind for (_, kind), (config_class, _) in OTHERS.items() if isinstance(self.config, config_class)]
        return settings | ({"architecture": other[0]} if other else {})


def make_component(name: str, settings: Mapping[str, Any]) -> Component:
    """Build the component `name` from its settings.

    Raises ValueError for an unknown setting, naming the nearest one, or an unknown dtype.
    """
    settings = dict(settings)
    architecture = settings.pop("architecture", None)
    if architecture is not None and (name, architecture) not in OTHERS:
        raise ValueError(f"model.{name}.architecture={architecture!r} is unknown: leave it out, or choose t5")
    config_class, module_class = KINDS[name] if architecture is None else OTHERS[name, architecture]
    config = make_config(config_class, settings, f"model.{name}")
    if config.dtype not in DTYPES:
        raise ValueError(f"model.{name}.dtype={config.dtype!r}: choose one of {', '.join(DTYPES)}")
    return Component(name, config, *_functions(module_class, config))


@functools.lru_cache(maxsize=64)
def _functions(module_class: type, config: Any) -> tuple[Callable[[Array], Params], Callable[..., Any]]:
    """`functional` of a network, the same objects for the same configuration: a large one takes a second to build."""
    init, apply = functional(lambda: module_class(config))
    if module_class is VideoAutoencoder:
        return init, _split_autoencoder(apply, config)
    return init, split_clips(apply) if module_class is VideoUNet else apply


def _split_autoencoder(apply: Callable[..., Any], config: AutoencoderConfig) -> Callable[..., Any]:
    mixing, alone = split_clips(apply), split_clips(apply, frames_alone=True)

    def call(*args: Any, method: str, **options: Any) -> Any:
        mixes_frames = method.startswith("decode") and not config.decodes_frames_alone
        return (mixing if mixes_frames else alone)(*args, method=method, **options)

    return call


@functools.lru_cache(maxsize=64)
def _shapes(init: Callable[[Array], Params]) -> Params:
    return jax.eval_shape(init, jax.random.key(0))


def make_config(config_class: type, settings: Mapping[str, Any], where: str) -> Any:
    """A frozen config dataclass from a mapping; lists become tuples, unknown keys are refused with a suggestion."""
    known = {field.name for field in dataclasses.fields(config_class)}
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
            raise ValueError(f"{where}.{key} is not a setting{hint}")
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
