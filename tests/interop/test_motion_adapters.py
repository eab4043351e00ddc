"""Motion adapters: apart or together with their image network, by diffusers' names or AnimateDiff's own."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from golden.pipeline_cases import write_pipeline
from golden.seeded_weights import seeded_weights
from golden.unet_cases import CASES
from safetensors.numpy import load_file, save_file

import vdiff_jax as vd
from vdiff_jax.interop.motion import inflated, load_animated, save_motion_adapter, split_motion
from vdiff_jax.interop.unets import load_unet
from vdiff_jax.models.unet import VideoUNet
from vdiff_jax.parallel import path_name

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def animated(tmp_path_factory):
    """A pipeline folder whose unet has its motion modules in it, beside the adapter they came from."""
    return write_pipeline("animatediff", tmp_path_factory.mktemp("animated") / "pipeline")


@pytest.fixture(scope="module")
def image(animated, tmp_path_factory):
    """The folder of the image network under it."""
    folder = tmp_path_factory.mktemp("image")
    weights = load_file(animated / "unet" / WEIGHTS)
    save_file({name: value for name, value in weights.items() if "motion_modules" not in name}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(CASES["image"]))
    return folder


def flat(params):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def assert_same(first, second):
    first, second = flat(first), flat(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], name)


def original_names(weights, positions=32):
    """An adapter's tensors as AnimateDiff's own files name them."""
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"(motion_modules\.\d+)\.", r"\1.temporal_transformer.", name)
        name = re.sub(r"\.attn([12])\.", lambda match: f".attention_blocks.{int(match[1]) - 1}.", name)
        name = re.sub(r"(transformer_blocks\.\d+)\.norm([12])\.", lambda m: f"{m[1]}.norms.{int(m[2]) - 1}.", name)
        renamed[name.replace(".norm3.", ".ff_norm.")] = value
        if name.endswith(".attention_blocks.0.to_q.weight"):
            table = name.replace("to_q.weight", "pos_encoder.pe")
            renamed[table] = np.zeros((1, positions, value.shape[1]), np.float32)
    return renamed


def test_an_image_network_and_an_adapter_make_the_network_that_holds_both(animated, image):
    whole, params = load_unet(animated / "unet")
    made, together = load_animated(image, animated / "motion_adapter")
    assert made.config == whole.config and made.config.motion_norm == "video"
    assert_same(together, params)


def test_an_image_pipeline_and_an_adapter_make_a_video_model(animated, image, tmp_path):
    """With the betas of the adapter, which are not those of the image model."""
    folder = tmp_path / "image"
    shutil.copytree(animated, folder, ignore=shutil.ignore_patterns("motion_adapter", "unet"))
    shutil.copytree(image, folder / "unet")
    for name, change in (
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}),
    ):
        written = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(written | change))
    with pytest.warns(UserWarning, match="trained with linear betas, so the image model's 'scaled_linear' are left"):
        model = vd.load(folder, motion_adapter=animated / "motion_adapter")
    pipeline = vd.load(animated)
    assert model.schedule == pipeline.schedule and model.unet_config == pipeline.unet_config
    assert_same(model.params["unet"], pipeline.params["unet"])
    assert vd.load(folder).unet_config.family == "image"


def test_a_network_with_modules_of_its_own_keeps_them(animated, tmp_path):
    """The adapter beside it is where they came from; a tensor that the network lacks is not taken from there."""
    folder = tmp_path / "pipeline"
    shutil.copytree(animated, folder)
    weights = load_file(folder / "unet" / WEIGHTS)
    name = "down_blocks.0.motion_modules.0.proj_in.bias"
    save_file({**weights, name: weights[name] + 1}, folder / "unet" / WEIGHTS)
    made, before = (flat(vd.load(f).params["unet"])["down.0.temporal.proj_in.bias"] for f in (folder, animated))
    np.testing.assert_array_equal(made, before + 1)
    given = vd.load(folder, motion_adapter=folder / "motion_adapter").params["unet"]
    np.testing.assert_array_equal(flat(given)["down.0.temporal.proj_in.bias"], before)
    save_file({key: value for key, value in weights.items() if key != name}, folder / "unet" / WEIGHTS)
    with pytest.raises(ValueError, match=rf"missing {name} \(32,\)"):
        vd.load(folder)


def test_an_adapter_is_saved_as_it_came(animated, tmp_path):
    component, params = load_unet(animated / "unet")
    save_motion_adapter(tmp_path, component, params)
    before, after = load_file(animated / "motion_adapter" / WEIGHTS), load_file(tmp_path / WEIGHTS)
    after = {name: value for name, value in after.items() if not name.endswith(".pos_embed.pe")}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    settings = json.loads((animated / "motion_adapter" / "config.json").read_text())
    again = json.loads((tmp_path / "config.json").read_text())
    assert all(again[name] == value for name, value in settings.items() if not name.startswith("_d"))


@pytest.mark.parametrize(("positions", "resnet_norm"), [(24, "video"), (32, "frame")])
def test_files_of_animatediff_itself_are_read_with_the_norms_of_its_code(
    animated, image, tmp_path, positions, resnet_norm
):
    renamed = original_names(load_file(animated / "motion_adapter" / WEIGHTS), positions)
    save_file(renamed, tmp_path / "mm.safetensors")
    # its modules have eight heads, here a head of 4 channels
    component, params = load_animated(image, tmp_path / "mm.safetensors")
    config = component.config
    assert (config.motion_norm, config.resnet_norm, config.motion_positions) == ("frame", resnet_norm, positions)
    assert not config.motion_mid and config.motion_heads == 8
    assert nnx.eval_shape(lambda: VideoUNet(config)).norm_out.scope == resnet_norm  # the last one too
    assert_same(params, load_unet(animated / "unet")[1])
    with pytest.raises(ValueError, match="diffusers computes the norms of motion modules over the clip only"):
        vd.load(animated, motion_adapter=tmp_path / "mm.safetensors").save_pretrained(tmp_path / "saved")


def test_an_inflated_image_network_keeps_its_weights_and_starts_without_motion(image):
    component, params = load_unet(image)
    larger, inflated_params = inflated(component, params, motion_heads=2, motion_positions=8)
    still, moving = split_motion(inflated_params)
    assert_same(still, params)
    last = {name: value for name, value in flat(moving).items() if ".proj_out." in name and "feedforward" not in name}
    assert larger.config.family == "animatediff" and len(last) == 2 * 7
    assert all(not value.any() for value in last.values())
    with pytest.raises(ValueError, match="of family 'animatediff' is no image network"):
        inflated(larger, inflated_params)


def test_an_adapter_that_is_not_there_is_not_passed_over(animated, image, tmp_path):
    for folder in (image, animated / "unet"):
        with pytest.raises(FileNotFoundError, match="no motion adapter"):
            load_animated(folder, tmp_path / "nothing")
    half = tmp_path / "half"
    shutil.copytree(animated, half, ignore=shutil.ignore_patterns("motion_adapter", "unet"))
    shutil.copytree(image, half / "unet")
    with pytest.raises(FileNotFoundError, match="no motion adapter"):
        vd.load(half)


def test_fresh_modules_are_made_in_the_type_asked_for(image):
    component, params = load_animated(image, None, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert component.config.family == "animatediff"


def test_more_frames_than_positions_are_refused(animated):
    with pytest.raises(ValueError, match="9 frames are more than the 8 that this motion module has positions for"):
        vd.load(animated).generate("a red circle", num_frames=9, size=(8, 12), steps=1)


def test_what_does_not_fit_is_named(animated, image, tmp_path):
    save_file(seeded_weights({"conv.weight": (2, 2)}), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no motion modules of AnimateDiff"):
        load_animated(image, tmp_path / "other.safetensors")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_text(json.dumps({"conv_in_channels": 9}))
    with pytest.raises(ValueError, match="conv_in_channels=9: only None is built"):
        load_animated(image, wrong)
    pipeline = write_pipeline("modelscope", tmp_path / "modelscope")
    with pytest.raises(ValueError, match="needs a UNet2DConditionModel or a UNetMotionModel"):
        load_animated(pipeline / "unet", animated / "motion_adapter")
