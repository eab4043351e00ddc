"""Captions of shape scenes: attribute record -> English, and back.

Grammar (words are separated by single spaces; there is no punctuation):

    OBJECT ["and" OBJECT ...] "on a" [BACKGROUND] ["textured"] "background" [WEATHER] [CAMERA]      or
    "on a" BACKGROUND ["textured"] "background" OBJECT ...                                          or
    "an empty" BACKGROUND ["textured"] "background" ...
    OBJECT  = ["a"] [SIZE] COLOUR SHAPE VERB
    VERB    = "moving" DIRECTION [SPEED] | "standing still" | "bouncing" DIRECTION | "spinning" | "growing"
              | "shrinking" | "hitting the" COLOUR SHAPE, each with one paraphrase
    WEATHER = "in the snow" | "in the rain" | "at night"          CAMERA = "while the camera pans" DIRECTION

A caption never lies, but a paraphrase may leave things out. What is absent for being the default (plain, clear,
static) stays unsaid in every caption.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vdiff_jax.data.shapes_world import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    WEATHERS,
    Records,
    ShapesWorld,
)

Attributes = dict[str, Any]
"""What a scene shows: "objects" (a list of dicts with colour, shape, size, motion, direction, speed, target where they
apply), "background", "texture", "weather", "camera", all as words. Parsed captions hold only what they state."""

VERBS = {
    "moving": ("moving", "gliding"),
    "still": ("standing still", "at rest"),
    "bouncing": ("bouncing", "rebounding"),
    "spinning": ("spinning", "rotating"),
    "growing": ("growing", "expanding"),
    "shrinking": ("shrinking", "contracting"),
    "colliding": ("hitting the", "bumping into the"),
}
SPEED_WORDS = {"slow": "slowly", "fast": "fast"}
WEATHER_WORDS = {"clear": "", "snow": "in the snow", "rain": "in the rain", "night": "at night"}


def attributes(records: Records, index: int) -> Attributes:
    """The words for scene `index` of a batch of records; only the attributes that apply to it."""
    row = {name: np.asarray(value)[index] for name, value in records.items()}
    objects = []
    for i in range(int(row["count"])):
        item = {
            "colour": COLOURS[row["colour"][i]],
            "shape": SHAPES[row["shape"][i]],
            "size": SIZES[row["size"][i]],
            "motion": MOTIONS[row["motion"][i]],
        }
        if item["motion"] in ("growing", "shrinking"):  # the size is not one of the words any more
            del item["size"]
        if row["direction"][i] >= 0:
            item["direction"] = DIRECTIONS[row["direction"][i]]
        if row["speed"][i] >= 0:
            item["speed"] = SPEEDS[row["speed"][i]]
        if row["target"][i] >= 0:
            j = row["target"][i]
            item["target"] = f"{COLOURS[row['colour'][j]]} {SHAPES[row['shape'][j]]}"
        objects.append(item)
    return {
        "objects": objects,
        "background": BACKGROUNDS[row["background"]],
        "texture": TEXTURES[row["texture"]],
        "weather": WEATHERS[row["weather"]],
        "camera": CAMERAS[row["camera"]],
    }


def captions(records: Records, rng: np.random.Generator | None = None) -> list[str]:
    """One caption per scene: complete and canonical without `rng`, a random paraphrase with it."""
    return [caption(attributes(records, index), rng) for index in range(len(records["count"]))]


def caption(scene: Attributes, rng: np.random.Generator | None = None) -> str:
    """The caption of one scene's attributes; attributes it lacks are left out."""

    def chance(probability: float) -> bool:
        return rng is not None and rng.random() < probability

    back = " ".join(_background_words(scene, drop=chance(0.15)))
    if scene["objects"]:
        with_article = not chance(0.15)
        what = " and ".join(_object_phrase(item, chance, with_article) for item in scene["objects"])
        if chance(0.15) and back:
            words = ["on a", back, what]
        else:
            words = [what, "on a " + back if back else ""]
    else:
        words = ["an empty", back or f"{scene.get('background', '')} background"]
    words.append(WEATHER_WORDS[scene.get("weather", "clear")])
    camera = scene.get("camera", "static")
    words.append("" if camera == "static" else f"while the camera pans {camera}")
    return " ".join(" ".join(words).split())


def _background_words(scene: Attributes, drop: bool) -> list[str]:
    textured = scene.get("texture") == "textured"
    if ("background" not in scene or drop) and not textured:
        return []
    return [scene.get("background", ""), "textured" if textured else "", "background"]


def _object_phrase(item: dict[str, str], chance: Any, with_article: bool) -> str:
    words = [] if chance(0.3) or "size" not in item else [item["size"]]
    words += [item["colour"]] if "colour" in item else []
    words += [item.get("shape", "object")]
    if with_article:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    motion = item.get("motion")
    if motion is None:
        return " ".join(words)
    verb = VERBS[motion][1 if chance(0.25) else 0]
    speed = "" if chance(0.3) or "speed" not in item else SPEED_WORDS[item["speed"]]
    tail = [verb, item.get("direction", ""), speed, item.get("target", "")]
    if speed == "slowly" and chance(0.3):
        tail = [speed, verb, item.get("direction", "")]
    return " ".join([*words, *tail])


def parse_caption(text: str) -> Attributes:
    """What a caption or a free prompt of the same grammar states: a dict like `attributes` with only the stated keys.

    Raises ValueError naming the first word that the grammar does not know.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    scene: Attributes = {"objects": []}
    item: dict[str, str] = {}
    known = _known_words()
    i = 0
    while i < len(words):
        word = words[i]
        if word not in known:
            raise ValueError(f"The word {word!r} in the prompt {text!r} is not in the vocabulary of the shapes world.")
        if word == "camera":
            scene["camera"] = words[-1] if words[-1] in CAMERAS else "static"
            break
        if item.get("motion") == "colliding" and "target" not in item and word in COLOURS:
            item["target"] = " ".join(words[i : i + 2])
            i += 2
            continue
        if word in SIZES or word in COLOURS or word in SHAPES or word == "object":
            if "shape" in item:  # the noun ends an object's description; a new one begins here
                item = {}
            if not item:
                scene["objects"].append(item)
            item["size" if word in SIZES else "colour" if word in COLOURS else "shape"] = word
        else:
            _parse_other(word, item, scene)
        i += 1
    for item in scene["objects"]:
        if item.get("shape") == "object":
            del item["shape"]
    return scene


def _parse_other(word: str, item: dict[str, str], scene: Attributes) -> None:
    for motion, verbs in VERBS.items():
        if word in " ".join(verbs).split() and word not in ("at", "the", "into"):
            item["motion"] = motion
    for speed, name in SPEED_WORDS.items():
        if word == name:
            item["speed"] = speed
    if word in DIRECTIONS:
        item["direction"] = word
    elif word in BACKGROUNDS:
        scene["background"] = word
    elif word in TEXTURES:
        scene["texture"] = word
    elif word in WEATHERS:
        scene["weather"] = word


_GLUE = "a an and on the in at object background empty while camera pans"


def _known_words() -> set[str]:
    phrases = [*(v for pair in VERBS.values() for v in pair), *WEATHER_WORDS.values(), *SPEED_WORDS.values(), _GLUE]
    phrases += [*COLOURS, *SHAPES, *SIZES, *BACKGROUNDS, *TEXTURES, *WEATHERS, *DIRECTIONS, *CAMERAS]
    return {word for phrase in phrases for word in phrase.split()}


def vocabulary(world: ShapesWorld) -> list[str]:
    """All words that captions of this world can hold, sorted."""
    phrases = [*world.colours, *world.shapes, *world.sizes, *world.backgrounds, "a an and on background empty"]
    phrases += [verb for motion in world.motions for verb in VERBS[motion]]
    phrases += [WEATHER_WORDS[weather] for weather in world.weathers]
    if {"moving", "bouncing"} & set(world.motions):
        phrases += DIRECTIONS
    if "moving" in world.motions:
        phrases += [SPEED_WORDS[speed] for speed in world.speeds]
    if "textured" in world.textures:
        phrases.append("textured")
    if set(world.cameras) - {"static"}:
        phrases += ["while the camera pans", *(camera for camera in world.cameras if camera != "static")]
    return sorted({word for phrase in phrases for word in phrase.split()})


def derange(items: list[str], rng: np.random.Generator) -> list[str]:
    """A permutation of `items` in which no position keeps an equal item: the wrong-prompt control of an evaluation.

    Raises ValueError where none exists, because one item fills more than half of the list.
    """
    values, counts = np.unique(np.array(items, dtype=object).astype(str), return_counts=True)
    if not items or 2 * counts.max() > len(items):
        raise ValueError(f"No derangement exists: {values[counts.argmax()] if items else 'nothing'!r} is too frequent.")
    # Grouped by value (in random order), a shift by the largest group moves every item onto another value.
    rank = {value: place for place, value in enumerate(rng.permutation(values))}
    order = sorted(rng.permutation(len(items)).tolist(), key=lambda index: rank[items[index]])
    result = list(items)
    for place, index in enumerate(order):
        result[index] = items[order[(place + counts.max()) % len(items)]]
    return result
