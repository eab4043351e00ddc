"""Recipes: a complete locked tree, and every mistake named."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from vdiff_jax.components import KINDS, make_config
from vdiff_jax.recipe import NETWORKS, DataConfig, TrainConfig, data_config, default_recipe, diffusion_config, section
from vdiff_jax.training.loop import LoopConfig
from vdiff_jax.training.optimizer import OptimizerConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_the_default_tree_holds_every_setting(stage):
    recipe = default_recipe(stage)
    assert recipe.stage == stage
    assert data_config(recipe) == DataConfig()
    for name in NETWORKS:
        assert make_config(KINDS[name][0], recipe.model[name].to_dict(), name) == KINDS[name][0]()
    assert section(recipe, "optimizer", OptimizerConfig) == OptimizerConfig()
    diffusion, mixture = diffusion_config(recipe)
    assert diffusion.prediction == "v" and abs(mixture.text_to_video + mixture.known_frames - 0.65) < 0.1


def test_an_unknown_stage_or_key_is_refused():
    with pytest.raises(ValueError, match=r"config.stage='diffuse': choose one of autoencoder, diffusion"):
        default_recipe("diffuse")
    recipe = default_recipe()
    with pytest.raises((AttributeError, KeyError), match=r"(?s)num_step.*Did you mean.*num_steps"):
        recipe.train.num_step = 3
    with pytest.raises((AttributeError, KeyError)):
        recipe.trian = 3
    recipe.diffusion.schedule_settings.shift = 3.0  # free: its keys depend on the schedule's name
    with pytest.raises(ValueError, match=r"data\.batchsize is not a setting; did you mean 'batch_size'"):
        make_config(DataConfig, {"batchsize": 3}, "data")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(source="vimeo"), r"data\.source='vimeo': choose one of shapes, folder, tfds, synthetic"),
        (dict(num_frames=0), r"data\.num_frames=0: it must be at least 1"),
        (dict(batch_size=-4), r"data\.batch_size=-4: it must be at least 1"),
        (dict(strides=(1, 2)), r"data\.strides and data\.stride_weights need the same length"),
        (dict(source="folder"), r"data\.source='folder' needs data\.folder"),
    ],
)
def test_values_that_cannot_work_are_named(change, message):
    recipe = default_recipe()
    recipe.data.update(change)
    with pytest.raises(ValueError, match=message):
        data_config(recipe)


def test_the_loop_gets_its_part_of_the_train_section():
    train = TrainConfig(num_steps=7, log_steps=3, max_minutes=2.0, ema_decay=0.5)
    loop = train.loop()
    assert type(loop) is LoopConfig
    assert dataclasses.asdict(loop) == {
        name: getattr(train, name) for name in (field.name for field in dataclasses.fields(LoopConfig))
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_passes_its_checks(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = module.get_config()
    if recipe.data.source in ("folder", "tfds"):
        recipe.data.folder = recipe.data.folder or "given"
    data_config(recipe)
    diffusion_config(recipe)
    for name, config_class in (("optimizer", OptimizerConfig), ("train", TrainConfig)):
        section(recipe, name, config_class)
    for name in NETWORKS:
        make_config(KINDS[name][0], recipe.model[name].to_dict(), name)
    assert module.__doc__ and "python train.py --config=configs/" in module.__doc__
