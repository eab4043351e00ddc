"""The UNet's contracts: what may depend on what, and what every option must leave unchanged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.components import make_component
from vdiff_jax.models.embeddings import PromptLayout, pool_text
from vdiff_jax.models.functional import functional, parameter_count
from vdiff_jax.models.unet import LinearPath, VideoUNet, nearest_known
from vdiff_jax.models.unet_config import UNetConfig
from vdiff_jax.types import Conditioning

SMALL = UNetConfig(
    latent_channels=2, channels=(8, 16), attention=(False, True), text_features=6, embedding_features=16, head_dim=8,
    norm_groups=4,
)  # fmt: skip
BATCH, FRAMES = 2, 3


# what silences everything that carries something from one frame to another
TEMPORAL = ("temporal_conv.conv", "temporal.proj_out", "embedding.time", "layout.prompt")


@functools.cache
def network(config=SMALL):
    init, apply = functional(lambda: VideoUNet(config))
    abstract = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.2, abstract)
    return params, jax.jit(apply)


def inputs(num_frames=FRAMES, batch=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(batch, num_frames, 4, 4, 2)).astype(np.float32)
    logsnr = rng.uniform(-5, 5, size=(batch, num_frames)).astype(np.float32)
    mask = np.zeros((batch, num_frames, 4, 4, 1), np.float32)
    context = np.full((batch, num_frames), 10.0, np.float32)
    text = rng.normal(size=(batch, 5, 6)).astype(np.float32)
    text_mask = np.arange(5)[None] < np.array([[3], [5]])[:batch]
    times = np.broadcast_to(np.arange(num_frames, dtype=np.float32), (batch, num_frames))
    return [z, logsnr, mask, context, Conditioning(text, text_mask, times)]


def test_a_fresh_network_predicts_zero_and_presets_have_their_size():
    init, _ = functional(lambda: VideoUNet(SMALL))
    _, apply = network()
    assert not apply(jax.jit(init)(jax.random.key(0)), *inputs()).any()
    for name, size in {"1M": 1e6, "3M": 3e6, "10M": 1e7, "100M": 1e8, "500M": 5e8, "1B": 1e9}.items():
        config = UNetConfig.native(name)
        abstract = jax.eval_shape(functional(lambda c=config: VideoUNet(c))[0], jax.random.key(0))
        assert 0.7 * size < parameter_count(abstract) < 1.4 * size, name


def test_batch_rows_do_not_see_each_other():
    params, apply = network()
    both = apply(params, *inputs())
    other = inputs()
    other[0] = other[0].copy()
    other[0][1] += 1.0
    changed = apply(params, *other)
    np.testing.assert_allclose(changed[0], both[0], atol=1e-5)
    assert np.abs(changed[1] - both[1]).max() > 1e-2


@pytest.mark.parametrize("part", ["frame", "level", "text", "times", "mask", "context"])
def test_every_input_matters_and_padding_does_not(part):
    params, apply = network()
    base = inputs()
    base[2] = base[2].copy()
    base[2][:, 0, :2] = 1.0
    before = np.asarray(apply(params, *base))
    z, logsnr, mask, context, cond = (jax.tree.map(np.array, value) for value in base)
    text, text_mask, times = cond.text, cond.text_mask, cond.times
    if part == "frame":  # an unchanged frame must notice a changed neighbour
        z[:, 2] += 1.0
    elif part == "level":
        logsnr[:, 1] += 2.0
    elif part == "text":
        text[:, 0] += 1.0
    elif part == "times":
        times[:, 1] += 0.4
    elif part == "mask":
        mask[:, 0, 2:] = 1.0
    else:
        context[:, 0] = 3.0
    after = np.asarray(apply(params, z, logsnr, mask, context, Conditioning(text, text_mask, times)))
    assert np.abs(after[:, 0] - before[:, 0]).max() > 1e-4
    padded = text.copy()
    padded[0, 3:] += 100.0  # behind the text mask
    same = apply(params, z, logsnr, mask, context, Conditioning(padded, text_mask, times))
    np.testing.assert_allclose(same, after, atol=1e-4)


def test_the_layout_is_a_product_of_prompt_time_and_place():
    """Its triple difference over prompt, time and place is not zero, as it would be for any sum of pairs."""
    init, apply = functional(lambda: PromptLayout(SMALL))
    params = jax.jit(init)(jax.random.key(0))
    text, times = np.ones((2, 1, 6), np.float32), np.array([[-2.0, 0.0, 2.0]] * 2, np.float32)
    text[1] = -1.0
    layout = np.asarray(apply(params, Conditioning(text, None, times), (2, 3, 4, 8, 1)))
    assert layout.shape == (2, 3, 4, 8, SMALL.layout_features)
    difference = np.diff(np.diff(np.diff(layout[:, [0, 2]][..., [0, -1], :], axis=0), axis=1), axis=3)
    assert (np.abs(difference).max((0, 1, 2, 3)) > 1e-3).all()
    later = apply(params, Conditioning(text, None, times + 9.0), (2, 3, 4, 8, 1))
    np.testing.assert_allclose(later, layout, atol=1e-4)
    assert not apply(params, Conditioning(None, None, times), (2, 3, 4, 8, 1)).any()


def test_the_nearest_known_token_is_found_at_its_own_place():
    times = np.array([[0.0, 1.0, 2.0, 5.0, 6.0]], np.float32)
    tokens = np.arange(1.0, 6.0, dtype=np.float32)[None, :, None, None, None] * np.ones((1, 5, 1, 3, 2), np.float32)
    mask = np.zeros((1, 5, 1, 3, 1), np.float32)
    mask[0, [0, 4], 0, 0] = 1  # first place: known at times 0 and 6
    mask[0, [0, 2], 0, 1] = 1  # second place: known at times 0 and 2, equally far from time 1
    found = np.asarray(nearest_known(tokens, mask, times))[0, :, 0]
    np.testing.assert_array_equal(found[:, 0, :2], np.array([1, 1, 1, 5, 5])[:, None] * np.ones(2))
    np.testing.assert_allclose(found[:, 0, 2], [1, 1 / 2, 1 / 3, 1 / 2, 1], rtol=1e-6)
    np.testing.assert_array_equal(found[:, 1, 0], [1, 1, 3, 3, 3])
    np.testing.assert_allclose(found[:, 1, 2], [1, 1 / 2, 1, 1 / 4, 1 / 5], rtol=1e-6)
    np.testing.assert_array_equal(found[:, 2], 0)  # nothing is known there


@pytest.mark.parametrize("shown", [True, False])
def test_only_nearest_known_carries_a_frame_past_silent_temporal_branches(shown):
    params, apply = network(dataclasses.replace(SMALL, nearest_known=shown))
    params = without_time(params)
    z, logsnr, mask, context, cond = inputs()
    mask = mask.copy()
    mask[:, 0] = 1.0
    before = np.asarray(apply(params, z, logsnr, mask, context, cond))
    for change in ("tokens", "level"):
        other, level = z.copy(), context.copy()
        if change == "tokens":
            other[:, 0] += 1.0
        else:
            level[:, 0] -= 5.0
        after = np.asarray(apply(params, other, logsnr, mask, level, cond))
        assert (np.abs(after[:, 2] - before[:, 2]).max() > 1e-3) == shown, change


def test_the_linear_path_is_linear_in_what_is_shown_and_set_by_the_frame():
    config = dataclasses.replace(SMALL, nearest_known=True, linear_path=True)
    init, apply = functional(lambda: LinearPath(config))
    zero = jax.jit(init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(2, 3, 16)).astype(np.float32)
    z = rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    near = rng.normal(size=(2, 3, 4, 4, 4)).astype(np.float32)
    assert not np.asarray(apply(zero, embedding, z, near)).any()
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), zero)
    one = np.asarray(apply(params, embedding, z, near))
    scaled = near * np.array([2, 2, 1, 1], np.float32)  # values doubled, level and nearness as they were
    np.testing.assert_allclose(apply(params, embedding, 2 * z, scaled), 2 * one, rtol=1e-4, atol=1e-4)
    # Two unknown frames of equal content differ by their embedding alone.
    same = np.broadcast_to(z[:, :1], z.shape), np.broadcast_to(near[:, :1], near.shape)
    out = np.asarray(apply(params, embedding, *same))
    assert np.abs(out[:, 0] - out[:, 1]).max() > 1e-2
    # One place, one channel: nothing else reaches it.
    moved = z.copy()
    moved[0, 1, 2, 3, 0] += 1.0
    changed = np.abs(np.asarray(apply(params, embedding, moved, near)) - one) > 1e-6
    assert changed.sum() == 1 and changed[0, 1, 2, 3, 0]
    # Level and nearness scale both terms: with them at zero the plain terms are left.
    plain = np.asarray(apply(params, embedding, z, near * np.array([1, 1, 0, 0], np.float32)))
    for kept in (2, 3):
        part = np.asarray(apply(params, embedding, z, near * (np.arange(4) == kept))) - np.asarray(
            apply(params, embedding, z, 0 * near)
        )
        assert np.abs(part).max() > 1e-2  # of z
    assert np.abs(one - plain).max() > 1e-2


def test_a_network_with_every_option_starts_silent_and_hears_its_linear_path():
    config = dataclasses.replace(SMALL, nearest_known=True, linear_path=True)
    init, apply = map(jax.jit, functional(lambda: VideoUNet(config)))
    params = init(jax.random.key(0))
    z, logsnr, mask, context, cond = inputs()
    mask = mask.copy()
    mask[:, 0] = 1.0
    assert not np.asarray(apply(params, z, logsnr, mask, context, cond)).any()
    bias = np.zeros(12, np.float32)
    bias[6:8] = -1.0  # the fourth term: minus the nearest known token, the answer in v where nothing else is known
    params["linear_path"]["coefficients"]["bias"] = bias
    out = np.asarray(apply(params, z, logsnr, mask, context, cond))
    np.testing.assert_allclose(out, -np.broadcast_to(z[:, :1], z.shape), atol=1e-6)


def test_one_word_weighs_the_same_in_short_and_long_prompts():
    """A prompt of n independent words pools to the same scale for every n, so a word is 1/sqrt(n) of it."""
    rng = np.random.default_rng(0)
    for words in (4, 64):
        text = rng.normal(size=(500, 80, 8)).astype(np.float32)
        mask = np.broadcast_to(np.arange(80) < words, (500, 80))
        assert np.std(pool_text(jnp.asarray(text), jnp.asarray(mask))) == pytest.approx(1.0, rel=0.05)


def test_coordinates_are_optional_and_tell_places_apart():
    """Far from the border a convolution cannot know where it is; with coordinates the same content differs by place."""
    _, logsnr, _, context, cond = inputs()
    zeros = np.zeros((2, FRAMES, 32, 32, 2), np.float32)
    big = [zeros, logsnr, zeros[..., :1], context]
    flat = UNetConfig(**{**SMALL.__dict__, "channels": (8,), "attention": (False,)})
    for config, differs in (
        (flat, True),
        (UNetConfig(**{**flat.__dict__, "coordinates": False, "layout_features": 0}), False),
    ):
        params, apply = network(config)
        out = np.asarray(apply(params, *big, cond))
        assert (np.abs(out[:, :, 15, 15] - out[:, :, 16, 16]).max() > 1e-3) == differs


def test_shifting_time_changes_nothing_stretching_does():
    params, apply = network()
    base = inputs()
    out = [
        np.asarray(apply(params, *base[:4], Conditioning(base[4].text, base[4].text_mask, times.astype(np.float32))))
        for times in (base[4].times, base[4].times + 37.0, base[4].times * 2.0)
    ]
    np.testing.assert_allclose(out[0], out[1], atol=1e-3)
    assert np.abs(out[0] - out[2]).max() > 1e-2


def without_time(params):
    def silence(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return np.zeros_like(leaf) if any(part in name for part in TEMPORAL) else leaf

    return jax.tree_util.tree_map_with_path(silence, params)


def test_fresh_temporal_branches_leave_an_image_model():
    """With the temporal output layers at zero, each frame is what it would be alone."""
    params, apply = network()
    image = without_time(params)
    z, logsnr, mask, context, cond = inputs()
    together = np.asarray(apply(image, z, logsnr, mask, context, cond))
    one = [value[:, 1:2] for value in (z, logsnr, mask, context)]
    alone = apply(image, *one, Conditioning(cond.text, cond.text_mask, cond.times[:, 1:2]))
    np.testing.assert_allclose(together[:, 1:2], alone, atol=2e-4)


def test_wholly_known_frames_take_their_context_level():
    params, apply = network()
    z, logsnr, mask, context, cond = inputs()
    mask = mask.copy()
    mask[:, 0] = 1.0
    other = logsnr.copy()
    other[:, 0] = -9.0
    np.testing.assert_allclose(
        apply(params, z, logsnr, mask, context, cond), apply(params, z, other, mask, context, cond), atol=1e-6
    )


@functools.cache
def loss_and_gradient(remat):
    """Of a network with one level, which has each kind of block."""
    params, apply = network(dataclasses.replace(SMALL, channels=(8,), attention=(True,), remat=remat))

    def loss(params):
        return jnp.mean(jnp.square(apply(params, *inputs(num_frames=2))))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("remat", ["blocks", "dots"])
def test_remat_changes_neither_output_nor_gradient(remat):
    (a, grad_a), (b, grad_b) = loss_and_gradient("none"), loss_and_gradient(remat)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4), grad_a, grad_b)


def test_bfloat16_compute_stays_close():
    params, apply = network()
    _, half = network(UNetConfig(**{**SMALL.__dict__, "dtype": "bfloat16"}))
    full, low = (np.asarray(f(params, *inputs())) for f in (apply, half))
    assert low.dtype == np.float32
    assert 0 < np.abs(full - low).mean() < 0.05 * np.abs(full).mean()


def test_bad_settings_are_refused_in_a_sentence():
    params, apply = network()
    args = inputs()
    args[0] = args[0][:, :, :3]
    args[2] = args[2][:, :, :3]
    with pytest.raises(ValueError, match="need multiples of 2"):
        apply(params, *args)
    with pytest.raises(ValueError, match="one True or False per level"):
        UNetConfig(channels=(8, 8, 8), attention=(True, True))
    with pytest.raises(ValueError, match="remat"):
        UNetConfig(remat="everything")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model.unet.chanels is not a setting; did you mean 'channels'"):
        make_component("unet", dict(chanels=(8,)))
    with pytest.raises(ValueError, match="choose one of 1M"):
        UNetConfig.native("7T")
