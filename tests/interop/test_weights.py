"""Rule tables both ways, and the files they read: sharded, half precision, pickled, cut short, of another model."""

import json
import pickle
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vdiff_jax.interop.weight_files import open_weights, refuse_pickle
from vdiff_jax.interop.weights import bind, load_params, nested, save_weights

RNG = np.random.default_rng(0)
RULES = [
    ("mixer", "mixer", "tensor"),
    ("embed", "embed", "embedding"),
    *nested(
        "blocks.0",
        "layers.0",
        [
            ("fc", "dense", "dense"),
            ("ln", "norm", "norm"),
            ("conv", "conv", "conv"),
            ("skip", "skip", "conv1x1"),
            ("time", "time", "temporal_conv"),
            ("absent", "absent", "dense"),  # tables may name what this network lacks
        ],
    ),
]
SHAPES = {  # theirs: (its shape, ours, its shape)
    "mixer": ((1,), "mixer", (1,)),
    "embed.weight": ((5, 4), "embed", (5, 4)),
    "blocks.0.fc.weight": ((2, 3), "layers.0.dense.kernel", (3, 2)),
    "blocks.0.fc.bias": ((2,), "layers.0.dense.bias", (2,)),
    "blocks.0.ln.weight": ((3,), "layers.0.norm.scale", (3,)),
    "blocks.0.ln.bias": ((3,), "layers.0.norm.bias", (3,)),
    "blocks.0.conv.weight": ((2, 4, 3, 5), "layers.0.conv.kernel", (3, 5, 4, 2)),
    "blocks.0.skip.weight": ((2, 3, 1, 1), "layers.0.skip.kernel", (3, 2)),
    "blocks.0.time.weight": ((2, 4, 3, 1, 1), "layers.0.time.kernel", (3, 4, 2)),
}
TENSORS = {name: RNG.normal(size=shape).astype(np.float32) for name, (shape, _, _) in SHAPES.items()}


def tree(leaf_of) -> dict:
    out: dict = {}
    for theirs, (_, ours, shape) in SHAPES.items():
        *parents, last = [int(part) if part.isdigit() else part for part in ours.split(".")]
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf_of(theirs, shape)
    return out


ABSTRACT = tree(lambda _, shape: jax.ShapeDtypeStruct(shape, np.float32))


def saved(folder, tensors=None, name="model.safetensors"):
    save_file(TENSORS if tensors is None else tensors, folder / name)
    return folder


def load(folder, **settings):
    return load_params(open_weights(folder), RULES, ABSTRACT, **settings)


def assert_whole(params, exact=True):
    """Every tensor of `TENSORS` at its place, in our layout."""
    layers = params["layers"][0]
    expected = {
        "mixer": (params["mixer"], TENSORS["mixer"]),
        "embedding": (params["embed"], TENSORS["embed.weight"]),
        "dense": (layers["dense"]["kernel"], TENSORS["blocks.0.fc.weight"].T),
        "bias": (layers["dense"]["bias"], TENSORS["blocks.0.fc.bias"]),
        "norm": (layers["norm"]["scale"], TENSORS["blocks.0.ln.weight"]),
        "conv": (layers["conv"]["kernel"], TENSORS["blocks.0.conv.weight"].transpose(2, 3, 1, 0)),
        "conv1x1": (layers["skip"]["kernel"], TENSORS["blocks.0.skip.weight"][:, :, 0, 0].T),
        "temporal": (layers["time"]["kernel"], TENSORS["blocks.0.time.weight"][..., 0, 0].transpose(2, 1, 0)),
    }
    for name, (ours, theirs) in expected.items():
        np.testing.assert_allclose(ours, theirs, rtol=0 if exact else 2**-8, err_msg=name)


def test_every_kind_is_laid_out_there_and_back(tmp_path):
    params = load(saved(tmp_path))
    assert jax.tree.structure(params) == jax.tree.structure(ABSTRACT)
    assert_whole(params)
    out = tmp_path / "out"
    out.mkdir()
    path = save_weights(out, params, RULES, stem="model")
    assert [p.name for p in out.iterdir()] == ["model.safetensors"] == [path.name]
    again = load_file(path)
    assert again.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(again[name], value)
    assert open_weights(out).metadata["format"] == "pt"  # as the other libraries want it


def test_shards_and_their_index(tmp_path):
    params = load(saved(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    index = save_weights(out, params, RULES, stem="model", max_shard_bytes=100)
    assert index.name == "model.safetensors.index.json"
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert json.loads(index.read_text())["metadata"]["total_size"] == sum(v.nbytes for v in TENSORS.values())
    assert_whole(load(out))
    text = json.loads(index.read_text())
    text["weight_map"]["stray"] = files[0].name
    index.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"index\.json and its files disagree about stray"):
        open_weights(out)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-\d+\.safetensors is missing, which .*index\.json"):
        open_weights(out)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is not an index of weights"):
        open_weights(out)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path, dtype):
    half = {name: value.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))) for name, value in TENSORS.items()}
    params = load(saved(tmp_path, half))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    assert_whole(params, exact=False)
    kept = load(tmp_path, dtype=dtype)
    assert all(str(leaf.dtype) == dtype for leaf in jax.tree.leaves(kept))
    out = tmp_path / "out"
    out.mkdir()
    again = load_file(save_weights(out, kept, RULES, dtype=dtype))
    for name, value in half.items():
        assert again[name].dtype == value.dtype and again[name].tobytes() == value.tobytes(), name
    with pytest.raises(ValueError, match="dtype 'float8' is unknown: use float32, float16 or bfloat16"):
        load(tmp_path, dtype="float8")


def test_names_of_files_and_variants(tmp_path):
    for stem in ("diffusion_pytorch_model", "model"):
        folder = tmp_path / stem
        folder.mkdir()
        saved(folder, name=f"{stem}.fp16.safetensors")
        assert open_weights(folder).source.name == f"{stem}.fp16.safetensors"  # the only one there is
        saved(folder, name=f"{stem}.safetensors")
        assert open_weights(folder).source.name == f"{stem}.safetensors"
        assert open_weights(folder, "fp16").source.name == f"{stem}.fp16.safetensors"
        with pytest.raises(FileNotFoundError, match=r"bf16\.safetensors; safetensors files there: .*fp16"):
            open_weights(folder, "bf16")
    with pytest.raises(FileNotFoundError, match="no weights to read"):
        open_weights(tmp_path / "nowhere")


@pytest.mark.parametrize("index", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"])
def test_shards_of_a_variant(tmp_path, index):
    save_weights(tmp_path, load(saved(tmp_path)), RULES, stem="model", max_shard_bytes=100)
    assert not (tmp_path / "model.safetensors").exists()  # what an earlier save left would be read in its place
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / index)
    assert_whole(load_params(open_weights(tmp_path, "fp16"), RULES, ABSTRACT))


def test_a_pickle_is_refused_by_its_bytes(tmp_path):
    for protocol in (2, 3, 4, 5):
        (tmp_path / "model.safetensors").write_bytes(pickle.dumps(TENSORS, protocol))
        with pytest.raises(ValueError, match=r"model\.safetensors is a pickle, which can run code"):
            open_weights(tmp_path)
    with zipfile.ZipFile(tmp_path / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(TENSORS))
    with pytest.raises(ValueError, match="convert it once"):
        open_weights(tmp_path / "model.safetensors")
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(TENSORS))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        open_weights(folder)


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path):
    path = tmp_path / "model.safetensors"
    for padding in range(400, 700, 8):  # a header of 0x0280 bytes begins as a pickle of protocol 2 does
        save_file({"a": np.ones(2, np.float32)}, path, metadata={"note": "x" * padding})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError("no such header was made")
    refuse_pickle(path)
    assert dict(open_weights(path)) == {"a": (2,)}


def test_a_file_that_is_cut_short(tmp_path):
    whole = (saved(tmp_path) / "model.safetensors").read_bytes()
    for size in (len(whole) - 5, 100, 4, 0):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
            open_weights(tmp_path)


def test_everything_that_does_not_fit_is_listed_with_both_shapes(tmp_path):
    tensors = dict(TENSORS, stray=TENSORS["mixer"])
    tensors["blocks.0.fc.weight"] = np.ascontiguousarray(tensors["blocks.0.fc.weight"].T)
    del tensors["blocks.0.skip.weight"]
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the model") as error:
        load(saved(tmp_path, tensors))
    for problem in (
        "unexpected stray (1,)",
        "blocks.0.fc.weight is (3, 2), expected (2, 3) for layers.0.dense.kernel",
        "missing blocks.0.skip.weight (2, 3, 1, 1) for layers.0.skip.kernel (3, 2)",
    ):
        assert problem in str(error.value)
    assert_whole(load(saved(tmp_path, dict(TENSORS, stray=TENSORS["mixer"])), ignore=("str.y",)))
    with pytest.raises(ValueError, match="unexpected stray"):
        load(tmp_path, ignore=("tray",))  # a pattern is for the whole key


def test_older_names(tmp_path):
    older = {name.replace(".fc.", ".query."): value for name, value in TENSORS.items()}
    with pytest.raises(ValueError, match=r"unexpected blocks\.0\.query\.bias"):
        load(saved(tmp_path, older))
    renames = ((r"\.query\.", ".fc."),)
    assert_whole(load(tmp_path, renames=renames))
    saved(tmp_path, older | TENSORS)
    with pytest.raises(ValueError, match=r"blocks\.0\.\w+\.bias and blocks\.0\.\w+\.bias are both blocks\.0\.fc\.bias"):
        load(tmp_path, renames=renames)


def test_each_tensor_goes_to_its_devices(tmp_path):
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def sharding(_, shape):
        axes = ["fsdp" if size % 2 == 0 else None for size in shape]
        first = axes.index("fsdp") if "fsdp" in axes else None
        spec = [("fsdp" if index == first else None) for index in range(len(shape))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    shardings, done = tree(sharding), []
    params = load(saved(tmp_path), shardings=shardings, dtype="float32", on_tensor=done.append)
    assert_whole(params)
    assert sorted(done) == sorted(ours for _, ours, _ in SHAPES.values())
    jax.tree.map(lambda leaf, wanted: None if leaf.sharding == wanted else pytest.fail(str(leaf)), params, shardings)
    assert params["layers"][0]["dense"]["kernel"].addressable_shards[0].data.shape == (3, 1)


def test_a_table_that_names_a_parameter_twice_or_never_is_wrong():
    for rules in ([*RULES, ("other", "mixer", "tensor")], RULES[1:]):
        with pytest.raises(ValueError, match="the rule table names these parameters not exactly once: mixer"):
            bind(rules, ABSTRACT)


def test_a_tensor_changed_in_place_is_found_in_files_of_ours(tmp_path):
    """A transposed square matrix has the right name and shape: only a checksum tells."""
    square = {"layer": {"kernel": np.arange(9, dtype=np.float32).reshape(3, 3)}}
    path = save_weights(tmp_path, square, [("layer", "layer", "dense")])
    with safe_open(path, "numpy") as file:
        metadata, tensor = file.metadata(), file.get_tensor("layer.weight")
    save_file({"layer.weight": np.ascontiguousarray(tensor.T)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"layer\.weight is not the tensor that was saved: its checksum is"):
        load_params(open_weights(tmp_path), [("layer", "layer", "dense")], jax.eval_shape(lambda: square))
