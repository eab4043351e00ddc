"""Captions say the truth in words of the vocabulary, and parse back to it."""

import numpy as np
import pytest

from vdiff_jax.data import shapes

FULL = shapes.full_world(64)
SMALL = shapes.small_world(32)
UNSAID = {"texture": "plain", "weather": "clear", "camera": "static"}


def draw(world, n, split="train"):
    return shapes.draw_records(shapes.split_rng(split, 5), world, split, n)


@pytest.mark.parametrize("world", [SMALL, FULL], ids=["small", "full"])
def test_the_canonical_caption_states_every_attribute(world):
    records = draw(world, 400)
    for index, text in enumerate(shapes.captions(records)):
        truth = shapes.attributes(records, index)
        assert UNSAID | shapes.parse_caption(text) == truth, text


@pytest.mark.parametrize("world", [SMALL, FULL], ids=["small", "full"])
def test_paraphrases_state_nothing_wrong_and_vary(world):
    records = draw(world, 400)
    rng = np.random.default_rng(0)
    different = 0
    for _ in range(3):
        for index, text in enumerate(shapes.captions(records, rng)):
            truth, stated = shapes.attributes(records, index), shapes.parse_caption(text)
            assert len(stated["objects"]) == len(truth["objects"]), text
            for said, item in zip(stated["objects"], truth["objects"]):
                assert said.items() <= item.items(), text
                assert {"colour", "shape", "motion"} <= said.keys() and ("direction" in item) == ("direction" in said)
            assert all(truth[key] == stated[key] for key in stated if key != "objects"), text
            assert UNSAID | {key: stated.get(key, UNSAID[key]) for key in UNSAID} == {
                key: truth[key] for key in UNSAID
            }, text  # what is not the default is always said
            different += text != shapes.captions(shapes.select(records, slice(index, index + 1)))[0]
    assert different > 400


@pytest.mark.parametrize("world", [SMALL, FULL], ids=["small", "full"])
def test_the_vocabulary_is_exactly_the_words_in_use(world):
    rng = np.random.default_rng(1)
    texts = shapes.captions(draw(world, 6000), rng) + shapes.captions(draw(world, 10, "count"), rng)
    words = {word for text in texts for word in text.split()}
    assert shapes.vocabulary(world) == sorted(words)
    assert len(words) < 80


def test_free_prompts_parse():
    assert shapes.parse_caption("a red circle moving right") == {
        "objects": [{"colour": "red", "shape": "circle", "motion": "moving", "direction": "right"}]
    }
    both = shapes.parse_caption("a small red circle standing still and a blue square spinning, on a grey background.")
    assert both["objects"] == [
        {"size": "small", "colour": "red", "shape": "circle", "motion": "still"},
        {"colour": "blue", "shape": "square", "motion": "spinning"},
    ]
    assert both["background"] == "grey"
    hit = shapes.parse_caption("a red circle hitting the blue square and a small blue square standing still")
    assert hit["objects"][0]["target"] == "blue square" and len(hit["objects"]) == 2
    assert shapes.parse_caption("an empty dark background") == {"objects": [], "background": "dark"}
    assert shapes.parse_caption("a red circle while the camera pans up")["camera"] == "up"
    assert "direction" not in shapes.parse_caption("a red circle while the camera pans up")["objects"][0]
    with pytest.raises(ValueError, match="'elephant'"):
        shapes.parse_caption("a red elephant moving right")


def test_a_caption_written_from_parsed_words_is_the_canonical_one():
    for text in shapes.captions(draw(FULL, 100)):
        assert shapes.caption(shapes.parse_caption(text)) == text


def test_articles_fit_the_word_that_follows():
    world = shapes.small_world(32, colours=("orange",), shapes=("star",))
    texts = shapes.captions(draw(world, 60), np.random.default_rng(0))
    assert any("an orange star" in text for text in texts)
    assert not any("a orange" in text or "an small" in text for text in texts)


def test_a_derangement_moves_every_caption_onto_another_one():
    rng = np.random.default_rng(0)
    texts = list("aaabbcdde")
    for _ in range(20):
        wrong = shapes.derange(texts, rng)
        assert sorted(wrong) == texts and all(a != b for a, b in zip(texts, wrong))
    assert sorted(shapes.derange(list("aabb"), rng)) == list("aabb")
    with pytest.raises(ValueError, match="'a'"):
        shapes.derange(list("aaab"), rng)
