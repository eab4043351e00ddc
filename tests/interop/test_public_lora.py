"""Low-rank updates of diffusers, peft, kohya and AnimateDiff act here as they do there, under all their names.

Golden file: tests/golden/make_lora_golden.py. With peft installed (the extra `oracle`) diffusers loads what we save.
"""

import dataclasses
import functools
import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import lora_cases
from golden.pipeline_cases import write_pipeline
from golden.seeded_weights import seeded_tensor
from golden.unet_cases import CASES as UNETS
from safetensors.numpy import save_file

import vdiff_jax as vd
from vdiff_jax.components import make_component
from vdiff_jax.interop.lora import load_lora, open_lora, save_lora
from vdiff_jax.interop.lora_names import Layer, layers_by_name
from vdiff_jax.interop.public_lora import METADATA, load_public_lora, save_public_lora
from vdiff_jax.interop.unets import unet_settings
from vdiff_jax.models.lora import Lora, init_lora, lora_targets, merge
from vdiff_jax.types import Conditioning

GOLDEN = Path(__file__).parent.parent / "golden" / "lora.npz"
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
MOTION = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_out.0"
RANK, ALPHA = 3, 1.7


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return vd.load(write_pipeline("animatediff", tmp_path_factory.mktemp("lora") / "animatediff"))


@functools.cache
def _compiled(component):
    return jax.jit(component.apply)


def outputs(model):
    values = lora_cases.unet_inputs()
    shape = values["z"].shape
    times = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.float32)[None], shape[:2])
    cond = Conditioning(jnp.asarray(values["text"]), None, times)
    nothing = jnp.zeros((*shape[:4], 1)), jnp.full(shape[:2], 10.0)
    unet, text_encoder = model.components["unet"], model.components["text_encoder"]
    apply = _compiled(unet)
    prediction = apply(model.params["unet"], jnp.asarray(values["z"]), jnp.full(shape[:2], 741.0), *nothing, cond)
    tokens = lora_cases.TOKENS.astype(np.int32)
    states = text_encoder.apply(model.params["text_encoder"], tokens, np.ones(tokens.shape, bool))
    return dict(prediction=prediction, states=states)


def close(ours, theirs, limit=1e-4):
    for name, value in ours.items():
        assert np.abs(value - theirs[name]).max() <= limit * np.abs(theirs[name]).max(), name


def write(folder, tensors, **metadata):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "x.safetensors", metadata=metadata)
    return folder / "x.safetensors"


def pair(name="query", inner=(64,), out=64, rank=RANK):
    """down, up of a layer, in torch's layouts."""
    window = (1,) * (len(inner) - 1)
    return seeded_tensor(f"{name}/a", (rank, *inner)), seeded_tensor(f"{name}/b", (out, rank, *window))


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("case", lora_cases.CASES)
def test_outputs_equal_those_of_diffusers(base, tmp_path, case):
    golden = np.load(GOLDEN)
    model = base.with_lora(write(tmp_path, lora_cases.tensors(case)), scale=lora_cases.SCALE)
    ours = outputs(model)
    close(ours, {name: golden[f"{case}/{name}"] for name in ours})
    changed = np.abs(ours["prediction"] - golden["none/prediction"]).max()
    assert changed > 0.5  # the update is no small thing


def test_merged_kernels_of_every_form_are_the_same_bits(base, tmp_path):
    """One update of a query and of a motion module's output, alpha 1.7, under all the names it may have."""
    (down, up), (down2, up2) = pair(), pair("motion", (32,), 32)
    alpha = np.array(ALPHA, np.float32)

    def file(ends, query=QUERY, motion=MOTION, alphas=True):
        names = {query + ends[0]: down, query + ends[1]: up, motion + ends[0]: down2, motion + ends[1]: up2}
        return names | ({f"{query}.alpha": alpha, f"{motion}.alpha": alpha} if alphas else {})

    peft, older = (".lora_A.weight", ".lora_B.weight"), ("_lora.down.weight", "_lora.up.weight")
    kohya = (".lora_down.weight", ".lora_up.weight")
    flat = f"lora_unet_{QUERY.replace('.', '_')}", f"lora_unet_{MOTION.replace('.', '_')}"
    ldm = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", flat[1]
    processors = QUERY.replace(".to_q", ".processor.to_q"), MOTION.replace(".to_out.0", ".processor.to_out")
    original = "module." + MOTION.replace("0.transformer", "0.temporal_transformer.transformer", 1).replace(
        "attn1.to_out.0", "attention_blocks.0.processor.to_out"
    )
    assert original.startswith("module.down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.att")
    settings = {"unet.r": RANK, "unet.lora_alpha": float(alpha), "text_encoder.lora_alpha": 9.0}
    patterned = {"r": RANK, "lora_alpha": 50, "alpha_pattern": {"attn1.to_q": float(alpha), MOTION: float(alpha)}}
    files = {
        "peft": (file(peft), {}),
        "unet.": (file(peft, f"unet.{QUERY}", f"unet.{MOTION}"), {}),
        "peft alone": (file((".lora_A.default.weight", ".lora_B.default.weight"), "base_model.model." + QUERY), {}),
        "older": (file((".lora.down.weight", ".lora.up.weight")), {}),
        "processors": (file(older, *processors), {}),
        "AnimateDiff": (file(older, processors[0], original), {}),
        "kohya": (file(kohya, *flat), {}),
        "kohya with original names": (file(kohya, *ldm), {}),
        "alpha in metadata": (file(peft, alphas=False), {METADATA: json.dumps(settings)}),
        "alpha by pattern": (file(peft, alphas=False), {METADATA: json.dumps(patterned)}),
    }
    merged = {}
    for name, (tensors, metadata) in files.items():
        (tmp_path / name).mkdir()
        merged[name] = base.with_lora(write(tmp_path / name, tensors, **metadata)).params["unet"]
        same(merged[name], merged["peft"])
    kernel, before = (tree["mid"]["spatial"]["layers"][0]["attn1"]["to_q"]["kernel"] for tree in
                      (merged["peft"], base.params["unet"]))  # fmt: skip
    np.testing.assert_allclose(kernel, before + (ALPHA / RANK * up @ down).T, atol=1e-6)
    plain = base.with_lora(write(tmp_path, file(peft, alphas=False))).params["unet"]
    assert np.abs(plain["mid"]["spatial"]["layers"][0]["attn1"]["to_q"]["kernel"] - kernel).max() > 0.01


def test_a_peft_folder_tells_its_alpha_beside_the_file(base, tmp_path):
    down, up = pair()
    tensors = {f"base_model.model.{QUERY}.lora_{name}.weight": value for name, value in zip("AB", (down, up))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    b = open_lora(tmp_path, base.components).factors["unet"]["mid"]["spatial"]["layers"][0]["attn1"]["to_q"]["kernel"][
        "b"
    ]
    np.testing.assert_allclose(b, up.T * 6 / np.sqrt(RANK), rtol=1e-6)


KERNELS = {
    "conv_in": ("input_blocks_0_0", (4, 3, 3), 32),
    "conv_out": ("out_2", (32, 3, 3), 4),
    "embedding.time_out": ("time_embed_2", (128,), 128),
    "down.0.res.conv1": ("input_blocks_1_0_in_layers_2", (32, 3, 3), 32),
    "down.0.spatial.proj_in": ("input_blocks_1_1_proj_in", (32, 1, 1), 32),
    "downsamplers.0.conv": ("input_blocks_2_0_op", (32, 3, 3), 32),
    "down.1.res.shortcut": ("input_blocks_3_0_skip_connection", (32, 1, 1), 64),
    "mid_out.res.time": ("middle_block_2_emb_layers_1", (128,), 64),
    "up.1.res.conv2": ("output_blocks_1_0_out_layers_3", (64, 3, 3), 64),
    "upsamplers.0.conv": ("output_blocks_1_1_conv", (64, 3, 3), 64),
}
"""Our layer -> its name in kohya's files that use the names of latent diffusion's own code, inputs, outputs."""


def test_convolutions_and_the_names_of_the_original_code(base, tmp_path):
    tensors = {}
    for name, (theirs, inner, out) in KERNELS.items():
        down, up = pair(name, inner, out)
        tensors |= {f"lora_unet_{theirs}.lora_down.weight": down, f"lora_unet_{theirs}.lora_up.weight": up}
    merged = base.with_lora(write(tmp_path, tensors)).params["unet"]
    for name, (_, inner, out) in KERNELS.items():
        down, up = pair(name, inner, out)
        delta = np.tensordot(up.reshape(out, RANK), down, axes=1)  # [out in k k]
        delta = delta.transpose(2, 3, 1, 0) if delta.ndim == 4 else delta.T
        before, after = base.params["unet"], merged
        for key in (int(part) if part.isdigit() else part for part in name.split(".")):
            before, after = before[key], after[key]
        expected = before["kernel"] + delta.reshape(before["kernel"].shape)
        np.testing.assert_allclose(after["kernel"], expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("down_blocks.1.attentions.0.proj_in", "input_blocks_4_1_proj_in"),
        ("down_blocks.2.resnets.1.conv2", "input_blocks_8_0_out_layers_3"),
        ("up_blocks.1.attentions.2.proj_out", "output_blocks_5_1_proj_out"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_1_conv"),
        ("mid_block.attentions.0.proj_in", "middle_block_1_proj_in"),
    ],
)
def test_blocks_of_stable_diffusion_are_counted_as_its_own_code_does(name, theirs):
    layers = [Layer("unet", other, None) for other in {name, "up_blocks.1.attentions.2.proj_out"}]
    assert layers_by_name(layers, 2)[f"lora_unet_{theirs}"].name == name


def test_three_factors_are_two(base, tmp_path):
    name = "lora_unet_up_blocks_0_resnets_1_conv2"
    down, up = seeded_tensor("d", (RANK, 64, 1, 1)), seeded_tensor("u", (64, RANK, 1, 1))
    mid = seeded_tensor("m", (RANK, RANK, 3, 3))
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": np.array(2.0)}
    lora = load_public_lora(write(tmp_path, {f"{name}.{end}": x for end, x in tensors.items()}), base.components)
    branch = lora.factors["unet"]["up"][1]["res"]["conv2"]["kernel"]
    delta = np.einsum("op,pqhw,qi->hwio", up[:, :, 0, 0], mid, down[:, :, 0, 0]) * 2 / RANK
    np.testing.assert_allclose((branch["a"] @ branch["b"]).reshape(3, 3, 64, 64), delta, atol=1e-6)


def test_several_updates_in_a_row_add_up(base, tmp_path):
    files = []
    for case in ("older", "motion"):
        (tmp_path / case).mkdir()
        files.append(write(tmp_path / case, lora_cases.tensors(case)))
    both = base.with_lora(files[0], 0.5).with_lora(files[1], 2.0).with_lora(files[0], -0.5)
    once = base.with_lora(files[1], 2.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), both.params["unet"], once.params["unet"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(base, tmp_path, dtype):
    lora = load_public_lora(write(tmp_path, lora_cases.tensors("older")), base.components)
    half = load_public_lora(save_public_lora(tmp_path / dtype, lora, base.components, dtype), base.components)
    leaves = jax.tree.leaves(half.factors)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-3, atol=1e-6), half.factors, lora.factors)


def trained(model, rank=2, alpha=1.0):
    """An update as training makes them."""
    params = {name: model.params[name] for name in ("unet", "text_encoder")}
    patterns = (
        r"\.to_(q|out)\.kernel$",
        r"res\.conv1\.kernel$",
        r"spatial\.proj_in\.kernel",
        r"layers\.0\.proj_in\.kernel$",
    )
    factors = init_lora(jax.random.key(0), params, rank, lora_targets(params, patterns))
    factors = jax.tree_util.tree_map_with_path(
        lambda path, x: 0.1 * jax.random.normal(jax.random.key(1), x.shape) if path[-1].key == "b" else x, factors
    )
    return Lora(factors, rank, alpha)


def test_ours_goes_there_and_back(base, tmp_path):
    lora = trained(base)
    path = save_public_lora(tmp_path / "folder", lora, base.components)
    assert path == tmp_path / "folder" / "pytorch_lora_weights.safetensors"
    back = open_lora(tmp_path / "folder", base.components)
    same(base.with_lora(back).params, base.with_lora(lora).params)
    # Of one rank for all, it also fits our own format.
    save_lora(tmp_path / "own.safetensors", back)
    same(open_lora(tmp_path / "own.safetensors", base.components).factors, back.factors)


@pytest.mark.parametrize("case", UNETS)
def test_every_kernel_of_every_public_family_goes_there_and_back(tmp_path, case):
    component = make_component("unet", unet_settings(UNETS[case]))
    kernels = lora_targets({"unet": component.abstract}, ["kernel$"])
    factors = init_lora(jax.random.key(0), {"unet": component.abstract}, 1, kernels)
    factors = jax.tree.map(lambda leaf: leaf + 0.5, factors)
    components = {"unet": component}
    back = load_public_lora(save_public_lora(tmp_path, Lora(factors, 1, 1.0), components), components)
    same(back.factors, factors)


def test_ranks_that_differ_are_padded_where_a_file_has_one(base, tmp_path):
    lora = load_public_lora(write(tmp_path, lora_cases.tensors("peft")), base.components)
    ranks = {leaf.shape[0] for path, leaf in jax.tree_util.tree_leaves_with_path(lora.factors) if path[-1].key == "b"}
    assert ranks == {2, 4} and lora.rank == lora.alpha == 4
    with pytest.raises(ValueError, match=r"ranks \[2, 4\], our format has one: use save_public_lora"):
        save_lora(tmp_path / "own.safetensors", lora)
    back = load_public_lora(save_public_lora(tmp_path / "f", lora, base.components), base.components)
    merged, expected = (merge(base.params["unet"], update.factors["unet"]) for update in (back, lora))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, expected)


def refused(base, folder, tensors, sentence, **metadata):
    with pytest.raises(ValueError, match=sentence):
        base.with_lora(write(folder, tensors, **metadata))


def test_files_that_do_not_fit_are_refused_by_name(base, tmp_path):
    down, up = pair()
    good = {f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up}
    stray = {"down_blocks.9.attentions.0.proj_in.lora_A.weight": down, "unet.gate": up}
    refused(
        base,
        tmp_path,
        {**good, **stray},
        r"unexpected down_blocks\.9\..*lora_A\.weight \(3, 64\); unexpected unet\.gate",
    )
    refused(base, tmp_path, {f"{QUERY}.lora_A.weight": down}, r"to_q\.lora_A\.weight has no partner, the up factor")
    refused(base, tmp_path, {f"{QUERY}.lora_B.weight": up}, r"to_q\.lora_B\.weight has no partner, the down factor")
    wrong = {f"{QUERY}.lora_A.weight": down[:, :24], f"{QUERY}.lora_B.weight": up}
    refused(
        base, tmp_path, wrong, r"lora_A\.weight is \(3, 24\), expected \(3, 64\) for the kernel \(64, 64\) of mid_block"
    )
    wrong = {f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up[:, :2]}
    refused(base, tmp_path, wrong, r"lora_B\.weight is \(64, 2\), expected \(64, 3\)")
    twice = {**good, f"unet.{QUERY}.lora_A.weight": down}
    refused(base, tmp_path, twice, r"are both of unet\.mid_block")
    refused(base, tmp_path, {**good, f"{QUERY}.alpha": np.ones(3)}, r"the alpha of mid_block.* is \(3,\), expected one")
    refused(base, tmp_path, {"conv_in.weight": down}, "holds no low-rank update: no key ends in lora_A.weight")
    refused(base, tmp_path, good, "its metadata lora_adapter_metadata is not json", **{METADATA: "{"})


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w2", "LoKr"),
        ("lora_B.bias", "LoRA with biases"),
        ("diff_b", "difference of whole tensors"),
    ],
)
def test_other_kinds_of_updates_are_refused(base, tmp_path, end, kind):
    down, up = pair()
    tensors = {f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up, f"{QUERY}.{end}": up[:, :1]}
    refused(base, tmp_path, tensors, rf"holds a {kind} \({QUERY}\.{end}\): only products of two factors")


def test_what_is_no_safetensors_file_and_networks_that_are_not_public(base, model, tmp_path):
    (tmp_path / "motion.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(ValueError, match=r"motion\.ckpt is a pickle, which can run code"):
        base.with_lora(tmp_path / "motion.ckpt")
    with pytest.raises(FileNotFoundError, match="is no file of a low-rank update"):
        base.with_lora(tmp_path / "nothing.safetensors")
    down, up = pair()
    file = write(tmp_path, {f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up})
    with pytest.raises(ValueError, match="is of family 'native', for which there are no others"):
        model.with_lora(file)
    with pytest.raises(ValueError, match="holds no update"):
        load_lora(file)
    lora = trained(base)
    with pytest.raises(ValueError, match="brings the new words rex, for which diffusers' format has no place"):
        save_public_lora(tmp_path, dataclasses.replace(lora, new_words=("rex",)), base.components)
    with pytest.raises(ValueError, match="family 'native', which diffusers does not have"):
        save_public_lora(tmp_path, lora, model.components)
    with pytest.raises(ValueError, match="the update is empty"):
        save_public_lora(tmp_path, dataclasses.replace(lora, factors={}), base.components)
    stray = {"unet": {"gate": {"kernel": {"a": np.ones((4, 2)), "b": np.ones((2, 4))}}}}
    with pytest.raises(ValueError, match=r"changes unet\.gate\.kernel, which this model's public layout does not have"):
        save_public_lora(tmp_path, dataclasses.replace(lora, factors=stray), base.components)


def test_a_name_on_the_hub_is_fetched(base, tmp_path, monkeypatch):
    write(tmp_path, lora_cases.tensors("motion"))
    monkeypatch.setattr("vdiff_jax.interop.hub.download", {"someone/zoom-out": tmp_path}.__getitem__)
    lora = open_lora("someone/zoom-out", base.components)
    same(lora.factors, open_lora(tmp_path, base.components).factors)


def test_live(base, tmp_path):
    """Our update in diffusers, and theirs with other numbers here."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from golden import make_lora_golden as maker

    lora = trained(base, rank=3, alpha=7.0)
    file = save_public_lora(tmp_path / "ours.safetensors", lora, base.components)
    close(outputs(base.with_lora(lora, 0.6)), maker.outputs(maker.with_update(file, 0.6)))
    tensors = {f"unet.{key}": value[..., ::-1] for key, value in lora_cases.tensors("motion").items()}
    file = write(tmp_path, tensors, format="pt")
    close(outputs(base.with_lora(file, -1.5)), maker.outputs(maker.with_update(file, -1.5)))
    pipeline = maker.make("animatediff")
    pipeline.unet.add_adapter(maker.peft.LoraConfig(r=2, lora_alpha=5, target_modules=["to_k", "conv2"]), "golden")
    for name, value in pipeline.unet.named_parameters():
        if "lora_" in name:
            value.data.copy_(maker.torch.from_numpy(seeded_tensor(name, tuple(value.shape))))
    pipeline.unet.save_lora_adapter(tmp_path / "theirs", adapter_name="golden")
    close(outputs(base.with_lora(tmp_path / "theirs")), maker.outputs(pipeline))
