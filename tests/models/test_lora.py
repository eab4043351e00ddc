"""Low-rank updates against the factored product, in exact rank, and at the identity they start from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vdiff_jax.models.functional import functional, parameter_count
from vdiff_jax.models.layers import Dense, FrameConv, TemporalConv
from vdiff_jax.models.lora import init_lora, lora_targets, merge, misfits, unmerge

RANK, SCALE = 2, 0.7
SHAPES = {"dense": (6, 5), "frame": (3, 3, 6, 5), "temporal": (3, 6, 5)}


class Small(nnx.Module):
    """One of each kind of kernel."""

    def __init__(self):
        self.dense = Dense(6, 5)
        self.frame = FrameConv(6, 5)
        self.temporal = TemporalConv(6, 5)

    def __call__(self, x, which: str):
        return getattr(self, which)(x)


INIT, APPLY = functional(Small)


@pytest.fixture(scope="module")
def network():
    """Parameters, an update of rank 2 of all three kernels with both factors random, and an input [b f h w c]."""
    params = INIT(jax.random.key(0))
    lora = init_lora(jax.random.key(1), params, RANK, lora_targets(params, [r"kernel$"]))
    rng = np.random.default_rng(2)
    for branch in lora.values():
        branch["kernel"]["b"] = jnp.asarray(rng.normal(size=(RANK, 5)), jnp.float32)
    return params, lora, jnp.asarray(rng.normal(size=(2, 4, 5, 3, 6)), jnp.float32)


@pytest.mark.parametrize("which", ["dense", "frame", "temporal"])
def test_a_merged_kernel_acts_as_the_kernel_plus_its_two_factors(network, which):
    """The second way: the layer as it is, plus the layer with kernel A and then the matrix B."""
    params, lora, x = network
    a, b = lora[which]["kernel"]["a"], lora[which]["kernel"]["b"]
    wide_kernel = jnp.pad(a.reshape(*SHAPES[which][:-1], RANK), [(0, 0)] * (len(SHAPES[which]) - 1) + [(0, 5 - RANK)])
    through_a = APPLY({**params, which: {"kernel": wide_kernel, "bias": jnp.zeros(5)}}, x, which)[..., :RANK]
    expected = APPLY(params, x, which) + SCALE * jnp.einsum("bfhwr,ro->bfhwo", through_a, b)
    merged = APPLY(merge(params, lora, SCALE), x, which)
    np.testing.assert_allclose(merged, expected, atol=1e-5)
    assert np.abs(merged - APPLY(params, x, which)).max() > 0.1


def test_a_fresh_update_changes_no_bit_and_unmerging_restores(network):
    params, lora, x = network
    fresh = init_lora(jax.random.key(3), params, RANK, lora_targets(params, [r"kernel$"]))
    for which in SHAPES:
        np.testing.assert_array_equal(APPLY(merge(params, fresh, 5.0), x, which), APPLY(params, x, which))
    restored = unmerge(merge(params, lora, SCALE), lora, SCALE)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6), restored, params)


def test_the_change_has_the_rank_it_should_and_grows_with_the_scale(network):
    params, lora, _ = network
    once, twice = (merge(params, lora, scale) for scale in (SCALE, 2 * SCALE))
    for which, shape in SHAPES.items():
        change = np.asarray(once[which]["kernel"] - params[which]["kernel"]).reshape(-1, shape[-1])
        assert np.linalg.matrix_rank(change, tol=1e-4) == RANK
        np.testing.assert_allclose(
            2 * change, (twice[which]["kernel"] - params[which]["kernel"]).reshape(-1, shape[-1]), atol=1e-5
        )
        assert once[which]["bias"] is params[which]["bias"]  # not copied


def test_factors_start_as_random_times_zero():
    params = {"wide": {"kernel": jnp.ones((40, 50, 30)), "bias": jnp.ones(30)}, "other": {"kernel": jnp.ones((4, 3))}}
    lora = init_lora(jax.random.key(0), params, 8, ["wide.kernel"])
    assert lora.keys() == {"wide"} and parameter_count(lora) == 8 * (2000 + 30)
    a = np.asarray(lora["wide"]["kernel"]["a"])
    assert abs(a.mean()) < 4 / np.sqrt(2000 * a.size)  # standard error of the mean, four times
    assert a.var() == pytest.approx(1 / 2000, rel=0.05)
    assert not np.any(lora["wide"]["kernel"]["b"])
    another = init_lora(jax.random.key(1), params, 8, ["wide.kernel"])
    assert np.abs(a - another["wide"]["kernel"]["a"]).max() > 0.01


def test_gradients_are_those_of_the_factors_and_the_base_gets_none(network):
    """Of sum(x W' g): with respect to B it is scale A^T x^T g, with respect to A it is scale x^T g B^T."""
    params, lora, _ = network
    rng = np.random.default_rng(5)
    x, g = (jnp.asarray(rng.normal(size=(7, size)), jnp.float32) for size in (6, 5))
    only = {"dense": lora["dense"]}

    def value(lora, params):
        return jnp.sum(APPLY(merge(params, lora, SCALE), x, "dense") * g)

    # A step trains what it differentiates: the factors. The base is no argument of the gradient.
    grads = jax.grad(value)(only, params)
    assert jax.tree.structure(grads) == jax.tree.structure(only)
    a, b = lora["dense"]["kernel"]["a"], lora["dense"]["kernel"]["b"]
    np.testing.assert_allclose(grads["dense"]["kernel"]["b"], SCALE * a.T @ x.T @ g, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["dense"]["kernel"]["a"], SCALE * x.T @ g @ b.T, rtol=1e-4, atol=1e-5)


def test_targets_are_chosen_by_pattern(model):
    params = {name: model.params[name] for name in ("unet", "text_encoder")}
    chosen = lora_targets(params)
    attention = [path for path in chosen if ".to_" in path]
    # Per block of the UNet: spatial self and cross, temporal self; four blocks (one down, one middle, two up); one
    # layer of text; four kernels each. Films: residual and temporal of each block, and the last block.
    assert len(attention) == 4 * (4 * 3 + 1)
    assert sum(path.endswith("film.kernel") for path in chosen) == 2 * 4 + 1
    assert {"unet.embedding.time.kernel", "unet.embedding.text.kernel"} < set(chosen)
    assert lora_targets(params, [r"conv_in", r"conv_(in|out)"]) == ("unet.conv_in.kernel", "unet.conv_out.kernel")


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        ([r"\.to_q\.", r"\.to_x\."], r"'\\\\.to_x\\\\.' is found in no kernel"),
        ([r"norm.*scale"], "is found in no kernel"),
        ([r"to_(q"], "is not a regular expression"),
        ([], "no targets"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(model, patterns, sentence):
    with pytest.raises(ValueError, match=sentence):
        lora_targets(model.params, patterns)


def test_an_update_of_another_network_is_refused_by_name(network):
    params, lora, _ = network
    assert misfits(params, lora) == []
    elsewhere = {"gate": lora["dense"], "frame": {"kernel": lora["temporal"]["kernel"]}}
    with pytest.raises(ValueError, match=r"unexpected gate; frame\.kernel has factors \(18, 2\) and \(2, 5\)"):
        merge(params, elsewhere)
    with pytest.raises(ValueError, match=r"dense\.kernel needs the factors a and b, it has a"):
        merge(params, {"dense": {"kernel": {"a": lora["dense"]["kernel"]["a"]}}})
    with pytest.raises(ValueError, match="rank=0: it must be at least 1"):
        init_lora(jax.random.key(0), params, 0, ["dense.kernel"])
    with pytest.raises(ValueError, match=r"the parameters have no gate\.kernel"):
        init_lora(jax.random.key(0), params, 1, ["gate.kernel"])
