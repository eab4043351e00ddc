"""Parameter trees taken apart by the names of their leaves, and put together again."""

import jax
import numpy as np

from vdiff_jax.trees import joined, split

TREE = {
    "unet": {"mid": {"temporal": {"kernel": np.ones(2), "bias": np.zeros(2)}, "kernel": np.arange(3)}},
    "text_encoder": {"kernel": np.arange(4)},
}


def test_chosen_leaves_and_the_others_keep_their_place_and_leave_no_empty_branch():
    asked = []
    chosen, others = split(TREE, lambda path: asked.append(path) or ".temporal." in path)
    assert chosen == {"unet": {"mid": {"temporal": TREE["unet"]["mid"]["temporal"]}}}
    rest = {"unet": {"mid": {"kernel": TREE["unet"]["mid"]["kernel"]}}, "text_encoder": TREE["text_encoder"]}
    assert jax.tree.structure(others) == jax.tree.structure(rest)
    assert set(asked) == {
        "unet.mid.temporal.kernel", "unet.mid.temporal.bias", "unet.mid.kernel", "text_encoder.kernel",
    }  # fmt: skip
    assert split(TREE, lambda path: False)[0] == {} and split(TREE, lambda path: True)[1] == {}


def test_what_was_taken_apart_is_joined_again():
    for part in (".temporal.", "kernel", "nothing"):
        chosen, others = split(TREE, lambda path, part=part: part in path)
        for whole in (joined(chosen, others), joined(others, chosen)):
            assert jax.tree.structure(whole) == jax.tree.structure(TREE)
            assert jax.tree.all(jax.tree.map(lambda a, b: a is b, whole, TREE))


def test_splitting_and_joining_change_none_of_the_trees_they_are_given():
    first, second = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert joined(first, second) == {"a": {"b": 1, "c": 2}}
    assert (first, second) == ({"a": {"b": 1}}, {"a": {"c": 2}})
