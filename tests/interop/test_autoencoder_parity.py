"""The autoencoders of Stable Diffusion and Stable Video Diffusion compute here what they compute in diffusers.

Always against golden files (tests/golden/make_autoencoder_golden.py), and live where torch and diffusers are installed.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_autoencoder_golden import CASES, build, inputs, results
from golden.norms import norms_by_their_name
from golden.seeded_weights import seeded_weights
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from vdiff_jax.components import make_component
from vdiff_jax.interop.autoencoders import (
    autoencoder_json,
    autoencoder_rules,
    autoencoder_settings,
    load_autoencoder,
    save_autoencoder,
)
from vdiff_jax.interop.weights import bind
from vdiff_jax.models.autoencoder import (
    AutoencoderConfig,
    VideoAutoencoder,
    latents_from_moments,
    raw_from_final,
    sample_moments,
)
from vdiff_jax.models.coders import Decoder, MidBlock
from vdiff_jax.models.functional import functional

GOLDEN = Path(__file__).parent.parent / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(params=sorted(CASES), scope="module")
def golden(request, tmp_path_factory):
    """Folder as diffusers would have saved it, what it says of itself, and its results."""
    arrays = dict(np.load(GOLDEN / f"{request.param}.npz"))
    about = json.loads(str(arrays.pop("about")))
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, about["config"], seeded_weights(about["keys"]))
    return folder, about, arrays


def write_folder(folder, config, tensors):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compare(component, params, given, expected):
    """Largest relative error of every result; the gradients' names and layouts are translated by the rule table."""
    config: AutoencoderConfig = component.config
    temporal = not config.decodes_frames_alone
    features = config.channels[-1]
    _, encoder_mid = functional(lambda: MidBlock(features, config))
    _, decoder_mid = functional(lambda: MidBlock(features, config, temporal=temporal))
    _, decoder = functional(lambda: Decoder(config))
    last = len(config.channels) - 1

    def mid_product(mid, x):
        y = decoder_mid(mid, x)
        return jnp.sum(y * given["direction"]), y

    grad = jax.jit(jax.grad(mid_product, argnums=(0, 1), has_aux=True))
    (grads, grad_input), mid = grad(params["decoder"]["mid"], given["mid_input"])
    ours = {
        "moments": jax.jit(lambda p, x: component.apply(p, x, method="encode_moments"))(params, given["video"]),
        "decoded": jax.jit(lambda p, x: component.apply(p, x, method="decode_raw"))(params, given["latents"]),
        "encoder_mid": jax.jit(encoder_mid)(params["encoder"]["mid"], given["mid_input"]),
        "up": jax.jit(lambda p, x: decoder(p, x, last, method="up"))(params["decoder"], given["up_input"]),
        "decoder_mid": mid,
        "grad_input": grad_input,
    }
    for binding in bind(autoencoder_rules(config), component.abstract):
        name = f"grad_{binding.theirs.removeprefix('decoder.mid_block.')}"
        if name in expected and binding.ours.startswith("decoder.mid."):
            leaf = grads
            for part in binding.ours.removeprefix("decoder.mid.").split("."):
                leaf = leaf[int(part) if part.isdigit() else part]
            ours[name] = binding.leaf.save(np.asarray(leaf))
    assert ours.keys() == expected.keys()
    return {name: relative_error(ours[name], expected[name]) for name in expected}


def check(errors):
    for name, error in errors.items():
        assert error <= (1e-4 if name in ("moments", "decoded") else 1e-5), f"{name}: {error:.1e} in {errors}"


def test_blocks_and_the_whole_equal_diffusers(golden):
    folder, about, expected = golden
    component, params = load_autoencoder(folder)
    check(compare(component, params, inputs(about["config"], size=(3, 5)), expected))


def test_a_folder_comes_back_to_the_bit(golden, tmp_path):
    folder, about, _ = golden
    component, params = load_autoencoder(folder)
    save_autoencoder(tmp_path / "saved", component, params)
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert before.keys() == after.keys() == about["keys"].keys()
    for name, value in before.items():
        assert after[name].dtype == np.float32
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == about["config"]
    save_autoencoder(tmp_path / "half", component, params, dtype="float16")
    assert load_file(tmp_path / "half" / WEIGHTS)["quant_conv.weight"].dtype == np.float16


def test_final_latents_are_the_mean_times_the_factor(golden):
    folder, about, expected = golden
    component, params = load_autoencoder(folder)
    video = inputs(about["config"], size=(3, 5))["video"]
    latents = jax.jit(lambda p, x: component.apply(p, x, method="encode"))(params, video)
    mode = expected["moments"][..., : component.config.latent_channels]
    assert relative_error(latents, mode * about["config"]["scaling_factor"]) <= 1e-4
    np.testing.assert_array_equal(sample_moments(expected["moments"]), mode)  # what conditioning on a picture takes


def test_old_attention_names_are_understood(golden, tmp_path):
    folder, about, _ = golden
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(folder / WEIGHTS).items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        tensors[name] = value
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    write_folder(tmp_path, about["config"], tensors)
    jax.tree.map(np.testing.assert_array_equal, load_autoencoder(tmp_path)[1], load_autoencoder(folder)[1])


def test_parameters_are_born_sharded(golden):
    folder, _, _ = golden
    mesh = jax.make_mesh((8,), ("fsdp",))
    abstract = load_autoencoder(folder)[0].abstract
    over_last = jax.tree.map(
        lambda leaf: NamedSharding(
            mesh, PartitionSpec(*(None,) * (leaf.ndim - 1), None if leaf.shape[-1] % 8 else "fsdp")
        ),
        abstract,
    )
    _, sharded = load_autoencoder(folder, shardings=over_last)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == over_last
    jax.tree.map(np.testing.assert_array_equal, sharded, load_autoencoder(folder)[1])


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(golden, tmp_path):
    folder, about, _ = golden
    tensors = load_file(folder / WEIGHTS)
    bias = tensors.pop("encoder.mid_block.resnets.1.conv2.bias")
    write_folder(tmp_path, about["config"], {**tensors, "loss.logvar": bias})
    missing = r"missing encoder\.mid_block\.resnets\.1\.conv2\.bias \(64,\).*unexpected loss\.logvar \(64,\)"
    with pytest.raises(ValueError, match=missing):
        load_autoencoder(tmp_path)


def test_float16_computes_in_float32_where_the_checkpoint_says_so(golden):
    folder, about, expected = golden
    component, params = load_autoencoder(folder, dtype="float16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float16"}
    assert component.config.compute_dtype == "float32"
    assert AutoencoderConfig(dtype="float16").compute_dtype == "float16"
    latents = inputs(about["config"], size=(3, 5))["latents"]
    video = jax.jit(lambda p, x: component.apply(p, x, method="decode_raw"))(params, latents)
    assert video.dtype == jnp.float32 and relative_error(video, expected["decoded"]) < 5e-3


# Configurations ---------------------------------------------------------------------------------------------------

STABLE_DIFFUSION = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


STABLE_VIDEO_DIFFUSION = {
    name: STABLE_DIFFUSION[name]
    for name in STABLE_DIFFUSION.keys() - {"_diffusers_version", "act_fn", "norm_num_groups", "up_block_types"}
} | {"_class_name": "AutoencoderKLTemporalDecoder", "force_upcast": True, "scaling_factor": 0.18215}


def component_of(config_json, **changes):
    return make_component("autoencoder", {**autoencoder_settings(config_json), **changes})


def test_public_configurations_are_written_as_they_were_read():
    written = autoencoder_json(component_of(STABLE_DIFFUSION))
    assert {k: v for k, v in STABLE_DIFFUSION.items() if k != "_diffusers_version"}.items() <= written.items()
    assert written["scaling_factor"] == 0.18215 and written["force_upcast"] is True
    assert autoencoder_json(component_of(STABLE_VIDEO_DIFFUSION)) == STABLE_VIDEO_DIFFUSION
    changed = {
        **written,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "force_upcast": False,
        "sample_size": [96, 64],
    }
    component = component_of(changed)
    assert autoencoder_json(component) == changed
    assert not {"quant_conv", "post_quant_conv"} & component.abstract.keys()
    assert component.config.factor == 8


def test_statistics_per_channel_are_part_of_the_final_latents():
    mean, std = [0.5, -1.0, 0.0, 2.0], [4.0, 5.0, 6.0, 8.0]
    config = component_of({**STABLE_DIFFUSION, "latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}).config
    moments = np.random.default_rng(0).normal(size=(1, 1, 2, 2, 8)).astype(np.float32)
    final = latents_from_moments(moments, config)
    np.testing.assert_allclose(final, (moments[..., :4] - np.float32(mean)) / np.float32(std) * 0.5, rtol=1e-6)
    np.testing.assert_allclose(raw_from_final(final, config), moments[..., :4], atol=1e-5)
    written = autoencoder_json(component_of({**STABLE_DIFFUSION, "latents_mean": mean, "latents_std": std}))
    again = component_of(written).config
    np.testing.assert_allclose(again.latent_std, np.array(std) / 0.18215, rtol=1e-12)
    assert again.latent_mean == tuple(mean)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "VQModel"}, "_class_name='VQModel' is not supported: use AutoencoderKL or"),
        ({"act_fn": "gelu"}, "act_fn='gelu' cannot be built, only 'silu' can"),
        ({"in_channels": 4}, "in_channels=4 cannot be built, only 3 can"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 3}, "down_block_types="),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types="),
        ({"spatial_compression": 16}, "spatial_compression=16 is not a field"),
        ({"latents_mean": [0.0] * 4}, "latents_mean and latents_std must be given together"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "latents_mean has 3 values for 4 latent channels"),
        ({"shift_factor": 0.1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "exclude each other"),
        ({"scaling_factor": None}, "scaling_factor=None must be a number above 0"),
        ({**STABLE_VIDEO_DIFFUSION, "layers_per_block": 1}, "layers_per_block=1 cannot be built"),
        ({**STABLE_VIDEO_DIFFUSION, "norm_num_groups": 16}, "norm_num_groups=16 is not a field"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        autoencoder_settings(changes if "sample_size" in changes else {**STABLE_DIFFUSION, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 2}, "autoencoder.patch_size=2 cannot be saved as AutoencoderKL, only 1"),
        (
            {"decoder": "temporal"},
            "autoencoder.use_post_quant_conv=True cannot be saved as AutoencoderKLTemporalDecoder",
        ),
        (
            {"decoder": "temporal", "use_post_quant_conv": False, "latent_mean": (0.0, 0.0, 0.0, 1.0)},
            "latent_mean and latent_std must be one factor",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        autoencoder_json(component_of(STABLE_DIFFUSION, **changes))


# Live against torch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(32, 64), (64, 96, 128)])
@pytest.mark.parametrize("case", sorted(CASES))
def test_live_against_diffusers(case, widths, tmp_path):
    """A folder that diffusers saves, at another size and number of frames, and the folder we save, loaded there."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    module = build(case, block_out_channels=widths)
    module.save_pretrained(tmp_path / "theirs")
    component, params = load_autoencoder(tmp_path / "theirs")
    given = inputs(dict(module.config), batch=1, num_frames=5, size=(4, 6))
    check(compare(component, params, given, results(module, given)))

    save_autoencoder(tmp_path / "ours", component, params)
    again, info = type(module).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in module.config.items() if k[0] != "_"
    }
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_every_norm_has_the_epsilon_and_groups_of_diffusers(golden):
    """The temporal decoder has two epsilons, which differ by too little for outputs to tell."""
    folder, about, _ = golden
    component, _ = load_autoencoder(folder)
    bindings = bind(autoencoder_rules(component.config), component.abstract)
    assert norms_by_their_name(lambda: VideoAutoencoder(component.config), bindings) == about["norms"]
