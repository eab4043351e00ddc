"""What a resumed run says of changed settings."""

from vdiff_jax.recipe import default_recipe
from vdiff_jax.training.config_changes import changed_settings, describe_changes


def recipe(**changes):
    config = default_recipe("diffusion")
    config.update_from_flattened_dict(changes)
    return config.to_dict()


def test_the_same_settings_are_no_change():
    assert changed_settings(recipe(), recipe()) == {}
    assert changed_settings({"a": (1, 2)}, {"a": [1, 2]}) == {}  # as JSON has them


def test_changes_are_named_and_told_apart():
    new = recipe(
        **{
            "optimizer.learning_rate": 0.5,
            "data.size": 48,
            "train.num_steps": 77,
            "train.log_steps": 3,
            "train.keep_checkpoints": 9,
            "sample.steps": 2,
            "parallel.fsdp": 4,
        }
    )
    serious, mild = describe_changes(recipe(), new)
    old = recipe()["optimizer"]["learning_rate"]
    assert serious == f"data.size 32 -> 48, optimizer.learning_rate {old} -> 0.5"
    assert mild == "parallel.fsdp 1 -> 4, train.num_steps 1000 -> 77"


def test_settings_of_one_version_only_are_a_notice():
    old = recipe()
    del old["train"]["ema_decay"]
    assert describe_changes(old, recipe()) == (None, "train.ema_decay absent -> 0.999")
    assert describe_changes({}, {}) == (None, None)
