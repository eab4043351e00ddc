"""The effects by name, and chains of them as one line of text: `apply_effects(clip, "brightness=0.1;reverse")`.

    chain   = effect ";" effect ";" ...
    effect  = name, or name "=" argument "," argument ...

Arguments are numbers or file names, in the order of the function's own arguments; those at the end that have a default
may be left out. Names, arguments and help come from the signatures and docstrings of `effects_pixels` and
`effects_time`: a new effect is one decorated function and its name in `EFFECTS`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any

import numpy as np

from vdiff_jax.data.effects_pixels import (
    BT709_LUMA,
    brightness,
    contrast,
    crop,
    gamma,
    grayscale,
    hue,
    invert,
    lens_blur,
    noted,
    resize,
    saturation,
    to_unit,
)
from vdiff_jax.data.effects_time import concatenate, crossfade, cut, fade, overlay, reverse, set_fps, speed
from vdiff_jax.data.video_io import Clip, read_video

__all__ = [
    "EFFECTS",
    "EffectCall",
    "apply_effects",
    "brightness",
    "concatenate",
    "contrast",
    "crop",
    "crossfade",
    "cut",
    "effect_help",
    "effect_usage",
    "fade",
    "gamma",
    "grayscale",
    "hue",
    "invert",
    "lens_blur",
    "overlay",
    "parse_effects",
    "resize",
    "reverse",
    "saturation",
    "set_fps",
    "speed",
]

EFFECTS: dict[str, Callable[..., Clip]] = {
    function.__name__: function
    for function in (
        *(brightness, contrast, gamma, saturation, hue, grayscale, invert, lens_blur, resize, crop),
        *(speed, reverse, cut, set_fps, fade, concatenate, crossfade, overlay),
    )
}


@dataclasses.dataclass(frozen=True)
class EffectCall:
    """One effect of a chain. arguments: numbers, and file names still to be loaded. text: as it was written."""

    name: str
    arguments: tuple[float | int | str, ...]
    text: str


def _read_with_sound(path: str) -> Clip:
    return read_video(path, sound=True)


def apply_effects(clip: Clip, chain: str, load: Callable[[str], Clip] = _read_with_sound) -> Clip:
    """The clip after all effects of a chain such as `"brightness=0.1;cut=0.5,2;overlay=logo.png,4,4,0.5"`.

    load: reads the files a chain names; unless given, `read_video` with sound. A mask file is read as its luma, one
    image for all frames or a clip of as many.
    The texts of the effects are added to `metadata["effects"]`; joined by ";" they are a chain again.
    Raises ValueError (one sentence) for a mistake in the chain, before any effect is applied, and for values an effect
    does not take; VideoError for files that cannot be read.
    """
    for call in parse_effects(chain):
        function, kinds = EFFECTS[call.name], _kinds(call.name, len(call.arguments))
        values = [_loaded(value, kind, load) for value, kind in zip(call.arguments, kinds)]
        result = function([clip, *values]) if _takes_several(function) else function(clip, *values)
        clip = noted(result, clip, call.text)
    return clip


def parse_effects(chain: str) -> list[EffectCall]:
    """The effects of a chain, in order; reads no file, so a chain can be judged before any work is spent.

    Empty pieces (as after a last ";") are skipped. Raises ValueError for an unknown name, a wrong number of arguments
    and for text where a number belongs.
    """
    return [_parse(piece.strip()) for piece in chain.split(";") if piece.strip()]


def effect_usage(name: str) -> str:
    """How an effect is written in a chain: `cut=start[,stop]`."""
    function = EFFECTS[name]
    if _takes_several(function):
        return f"{name}=file[,file...]"
    parameters = _parameters(function)
    shown = {float: "{}", int: "{}", Clip: "file", np.ndarray: "{}_file"}
    words = [shown[kind].format(p.name) for p, kind in zip(parameters, _kinds(name, len(parameters)))]
    required = sum(p.default is p.empty for p in parameters)
    optional = "".join(f"[,{word}" for word in words[required:]) + "]" * (len(words) - required)
    return name + "=" * bool(words) + ",".join(words[:required]) + optional


def effect_help() -> str:
    """One line for each effect: how it is written, and what it does."""
    usages = {name: effect_usage(name) for name in EFFECTS}
    width = max(map(len, usages.values()))
    return "\n".join(f"{usage:<{width}}  {effect_summary(name)}" for name, usage in usages.items())


def effect_summary(name: str) -> str:
    """What an effect does: the first line of its docstring."""
    return (inspect.getdoc(EFFECTS[name]) or "").split("\n")[0]


# ---- reading a chain --------------------------------------------------------------------------------------------


def _parse(text: str) -> EffectCall:
    name, equals, rest = (part.strip() for part in text.partition("="))
    if name not in EFFECTS:
        near = difflib.get_close_matches(name, EFFECTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(EFFECTS)}"
        raise ValueError(f"unknown effect {name!r}; {hint}")
    words = [word.strip() for word in rest.split(",")] if equals else []
    parameters = _parameters(EFFECTS[name])
    least = sum(p.default is p.empty for p in parameters)
    if len(words) < least or (len(words) > len(parameters) and not _takes_several(EFFECTS[name])):
        found = f"{len(words)} argument" + "s" * (len(words) != 1)
        raise ValueError(f"{name} is written {effect_usage(name)}; {text!r} has {found}")
    values = [_value(name, word, kind) for word, kind in zip(words, _kinds(name, len(words)))]
    return EffectCall(name, tuple(values), text)


def _value(name: str, word: str, kind: type) -> float | int | str:
    if kind in (Clip, np.ndarray):
        if word:
            return word
        raise ValueError(f"{name} is written {effect_usage(name)}; a file name is missing")
    try:
        value = kind(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        wanted = "whole number" if kind is int else "number"
        raise ValueError(f"{name} is written {effect_usage(name)}; {word!r} is not a {wanted}")
    return value


def _loaded(value: Any, kind: type, load: Callable[[str], Clip]) -> Any:
    if kind is Clip:
        return load(value)
    if kind is not np.ndarray:
        return value
    luma = np.clip(to_unit(load(value).frames) @ BT709_LUMA, 0, 1)
    return luma[0] if len(luma) == 1 else luma


def _takes_several(function: Callable[..., Clip]) -> bool:
    """Whether the function takes a list of clips: the clip of the chain first, then all files."""
    return "clips" in inspect.signature(function).parameters


def _parameters(function: Callable[..., Clip]) -> list[inspect.Parameter]:
    """What a chain writes behind the name: all parameters but the clip itself."""
    parameters = list(inspect.signature(function).parameters.values())
    return parameters if _takes_several(function) else parameters[1:]


def _kinds(name: str, count: int) -> list[type]:
    """float, int, Clip (a file) or numpy.ndarray (a mask file) for each of `count` arguments."""
    function = EFFECTS[name]
    if _takes_several(function):
        return [Clip] * count
    hints = typing.get_type_hints(function)
    return [_kind(hints[p.name]) for p in _parameters(function)[:count]]


def _kind(hint: Any) -> type:
    """The type of an annotation without its `| None`."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return options[0] if options else hint
