"""Public UNets give what diffusers gives: block by block, as a whole, and in their gradients.

Golden files: tests/golden/make_unet_golden.py. With torch and diffusers installed (the extra `oracle`) the same is
compared live, with other weights, widths and sizes.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.norms import norms_by_their_name
from golden.seeded_weights import seeded_tensor
from golden.unet_cases import CASES, STRIDES, block_names, inputs, widened

from vdiff_jax.components import make_component
from vdiff_jax.interop.unet_rules import motion_buffers, unet_rules
from vdiff_jax.interop.unets import unet_json, unet_settings
from vdiff_jax.interop.weights import bind
from vdiff_jax.models.space_time import SpaceTimeBlock
from vdiff_jax.models.unet import VideoUNet
from vdiff_jax.models.unet_config import UNetConfig
from vdiff_jax.parallel import path_name
from vdiff_jax.types import Conditioning

AS_IN_USE = {"xla_cpu_use_fusion_emitters": True} if "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"] else {}
"""The order of sums: in a mixing factor's gradient nearly all cancels, and the other order is just beyond the bound."""
GOLDEN = Path(__file__).parent.parent / "golden"


def ours(case, seed=0):
    """Component, parameters, and the bindings that tell their names."""
    component = make_component("unet", unet_settings(case))
    bindings = bind(unet_rules(component.config), component.abstract)
    flat = {b.ours: b.leaf.load(seeded_tensor(b.theirs, b.their_shape, seed)) for b in bindings}
    params = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(flat[path_name(path)]), component.abstract)
    return component, params, bindings


def conditioning(values):
    batch, frames = values["z"].shape[:2]
    times = jnp.broadcast_to(jnp.arange(frames, dtype=jnp.float32)[None], (batch, frames))
    extra = {
        name: jnp.asarray(values[name]) for name in ("image_latents", "image_embedding", "added") if name in values
    }
    return Conditioning(jnp.asarray(values["text"]), None, times, **extra)


def predict(component, params, values):
    shape = values["z"].shape
    timestep = jnp.full(shape[:2], values["timestep"], jnp.float32)
    nothing = jnp.zeros((*shape[:4], 1)), jnp.full(shape[:2], 10.0)
    return component.apply(params, jnp.asarray(values["z"]), timestep, *nothing, conditioning(values))


def traced(component, values, names):
    """A function of the parameters: prediction, and the output of every block by diffusers' name for its end."""

    def run(params):
        outputs = []
        call = SpaceTimeBlock.__call__

        def recording(block, x, embedding, cond):
            outputs.append(call(block, x, embedding, cond))
            return outputs[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SpaceTimeBlock, "__call__", recording)
            prediction = predict(component, params, values)
        return prediction, dict(zip(names, outputs, strict=True))

    return run


def error(value, expected, least=0.0):
    assert value.shape == expected.shape
    return np.abs(value - expected).max() / max(np.abs(expected).max(), least)


def compare(case, values, expected, thin, seed=0):
    """Blocks to 1e-5, the prediction to 1e-4 (it is nearer), gradients of the middle to 5e-4.

    Errors are the largest difference over the largest number of a tensor; gradients of single numbers, a mixing factor
    say, are sums over all tokens in which much cancels, and some are 0: of temporal attention over a single frame.
    """
    component, params, bindings = ours(case, seed)
    run = traced(component, values, block_names(case))

    def loss(middle, params):
        prediction, blocks = run({**params, **middle})
        return jnp.sum(prediction * values["cotangent"]), (prediction, blocks)

    middle = {name: params[name] for name in ("mid", "mid_out")}
    gradients, (prediction, blocks) = jax.jit(jax.grad(loss, has_aux=True), compiler_options=AS_IN_USE)(middle, params)
    assert error(np.asarray(prediction), expected["prediction"]) <= 1e-4
    for name, block in blocks.items():
        assert error(thin(f"block/{name}", np.asarray(block)), expected[f"block/{name}"]) <= 1e-5, name
    flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    compared, least = 0, 1e-3 * max(np.abs(v).max() for name, v in expected.items() if name.startswith("gradient/"))
    for binding in bindings:
        name = f"gradient/{binding.theirs}"
        if name in expected:
            gradient = binding.leaf.save(np.asarray(flat[binding.ours]))
            assert error(thin(name, gradient), expected[name], least) <= 5e-4, name
            compared += 1
    assert compared > 15 and len(blocks) == len(block_names(case))


def thinned(name, value):
    kind = name.partition("/")[0]
    return value if value.ndim == 1 else value.reshape(-1)[:: STRIDES[f"{kind}s"]]


@functools.cache
def golden(family):
    return dict(np.load(GOLDEN / f"unet_{family}.npz"))


@pytest.mark.parametrize("family", CASES)
def test_blocks_prediction_and_gradients_equal_those_of_diffusers(family):
    compare(CASES[family], inputs(CASES[family]), golden(family), thinned)


@pytest.mark.parametrize("family", CASES)
def test_every_tensor_of_the_checkpoint_has_its_place(family):
    component, _, bindings = ours(CASES[family])
    names = {binding.theirs: list(binding.their_shape) for binding in bindings}
    buffers = {name: list(value.shape) for name, value in motion_buffers(component.config).items()}
    assert names | buffers == json.loads(str(golden(family)["shapes"]))
    assert make_component("unet", unet_settings(unet_json(component.config))).config == component.config


@pytest.mark.parametrize("family", CASES)
def test_every_norm_has_the_epsilon_and_groups_of_diffusers(family):
    """They differ from place to place within one network, by too little for the outputs above to tell."""
    component, _, bindings = ours(CASES[family])
    assert norms_by_their_name(lambda: VideoUNet(component.config), bindings) == json.loads(
        str(golden(family)["norms"])
    )


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("channels", [[32, 64], [64, 96, 128]], ids=["tiny", "medium"])
def test_live(family, channels):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from golden.make_unet_golden import oracle

    case = widened(CASES[family], channels)
    sizes = dict(batch=2, frames=5, height=8, width=12) if len(channels) == 3 else dict(frames=1, height=6, width=2)
    values = inputs(case, **sizes)
    compare(case, values, oracle(case, values, seed=1), lambda name, value: value, seed=1)


def test_a_size_that_diffusers_does_not_build_is_not_written_for_it():
    config = ours(CASES["modelscope"])[0].config
    with pytest.raises(ValueError, match=r"unet\.embedding_features=96 is not what diffusers builds"):
        unet_json(dataclasses.replace(config, embedding_features=96))
    with pytest.raises(ValueError, match="family 'native' has no counterpart in diffusers"):
        unet_json(UNetConfig())


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("modelscope", dict(act_fn="gelu"), "act_fn='gelu': only 'silu' is built"),
        ("modelscope", dict(mystery=1), "mystery=1, which is not known of UNet3DConditionModel"),
        ("image", dict(down_block_types=["DownBlock2D", "AttnDownBlock2D"]), "down_block_types="),
        ("image", dict(layers_per_block=[1, 2]), r"layers_per_block=\[1, 2\]: only one number for all levels"),
        ("image", dict(class_embed_type="timestep"), "class_embed_type='timestep': only None is built"),
        ("svd", dict(_class_name="UNetKandinsky"), "_class_name='UNetKandinsky': choose a UNet of"),
        ("svd", dict(projection_class_embeddings_input_dim=50), "input_dim=50, no multiple of 16"),
    ],
)
def test_what_is_not_built_is_refused_by_name(family, change, message):
    with pytest.raises(ValueError, match=message):
        unet_settings(CASES[family] | change)
