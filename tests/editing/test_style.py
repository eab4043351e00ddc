"""Style transfer: statistics against closed forms, shared attention against plain loops, known tokens, identities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_video import GaussianVideo

from vdiff_jax.diffusion.process import add_noise
from vdiff_jax.diffusion.schedule import LinearLogSNR
from vdiff_jax.editing.style import (
    Composition,
    SharedAttention,
    StatisticsGuidance,
    between,
    statistics,
    transport,
)
from vdiff_jax.editing.text_edit import FLOW_SAMPLER, FlowEdit, flow_job
from vdiff_jax.models.attention import dot_product_attention, share_attention
from vdiff_jax.pipeline import estimate
from vdiff_jax.sampling import job as jobs
from vdiff_jax.sampling.samplers import SAMPLERS, sample
from vdiff_jax.stylize import stylize_latents
from vdiff_jax.types import Known

G, B = GaussianVideo((3, 4, 4, 2)), 5
SCHEDULE = LinearLogSNR(-10.0, 10.0)
KEYS = jax.random.split(jax.random.key(0), B)
statistics_of, between_of = jax.jit(statistics), jax.jit(between)
transport_of = jax.jit(transport, static_argnames="joint")
MIX = np.array([[1.5, 0.6], [0.0, 0.5]])


def styles(batch=B, seed=7):
    """Clips of white noise mixed over the channels, off centre: another mean and covariance in every row."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((batch, *G.shape)) @ MIX * rng.uniform(0.6, 1.6, (batch, 1, 1, 1, 1))
    return jnp.asarray(mixed + rng.uniform(-2, 2, (batch, 1, 1, 1, 2)), jnp.float32)


def moments(latents):
    rows = np.asarray(latents, np.float64).reshape(len(latents), -1, latents.shape[-1])
    return rows.mean(1), np.stack([np.cov(row.T, bias=True) for row in rows])


def flow(guidance, clips, cond, known=None, start=-2.0):
    known = jobs.nothing_known(clips.shape) if known is None else known
    plan = jobs.uniform_plan(SCHEDULE, 12, *clips.shape[:2], start=float(SCHEDULE.u(jnp.asarray(start))))
    edit = FlowEdit(clips, cond, Composition((guidance,)))
    return run_flow(edit, flow_job(clips, plan, known, cond))


@jax.jit
def run_flow(edit, job):
    return sample(edit.wrap(G.denoise_fn), job, FLOW_SAMPLER, KEYS)


@functools.cache
def source():
    root = np.linalg.cholesky(G.covariance).T
    return G.rows(np.random.default_rng(3).standard_normal((B, G.size)) @ root).astype(jnp.float32)


# Statistics ------------------------------------------------------------------------------------------------------


def test_a_guided_sample_has_the_mean_and_deviation_of_the_style():
    style, cond = styles(), jnp.zeros((B, *G.shape))
    goal_mean, goal = moments(style)

    @jax.jit
    def draw(guidance):
        job = jobs.text_to_video_job(KEYS, (B, *G.shape), SCHEDULE, 16, cond)
        return sample(guidance.wrap(G.denoise_fn), job, SAMPLERS["dpmpp_2m"], KEYS)

    for joint in (True, False):
        mean, covariance = moments(draw(StatisticsGuidance(statistics_of(style), joint=joint)))
        deviation, wanted = (np.sqrt(np.diagonal(m, axis1=1, axis2=2)) for m in (covariance, goal))
        np.testing.assert_allclose(deviation, wanted, rtol=0.05)
        assert (np.abs(mean - goal_mean) < 0.05 * wanted).all()
        off = np.abs(covariance - goal)[:, 0, 1] / np.prod(wanted, axis=1)  # error of the correlation
        assert off.max() < 0.05 if joint else off.max() > 0.2
    off = draw(StatisticsGuidance(statistics_of(style), 0.0))
    np.testing.assert_allclose(off, draw(StatisticsGuidance(statistics_of(styles(seed=8)), 0.0)), atol=1e-4)


def test_a_styled_clip_keeps_its_content():
    """Every channel of the result is what the closed-form map makes of the source, up to what the prior adds."""
    style, cond = styles(), jnp.zeros((B, *G.shape))
    made = np.asarray(flow(StatisticsGuidance(statistics_of(style)), source(), cond))
    mean, covariance = moments(made)
    goal_mean, goal = moments(style)
    np.testing.assert_allclose(np.diagonal(covariance, axis1=1, axis2=2), np.diagonal(goal, axis1=1, axis2=2), rtol=0.1)
    np.testing.assert_allclose(mean, goal_mean, atol=0.1)
    own_mean, own = moments(source())
    for row in range(B):  # the map by eigenvalues of A^-1 B: T = A^-1 (A B)^1/2
        values, vectors = np.linalg.eig(own[row] @ goal[row])
        root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
        expected = (np.asarray(source()[row]) - own_mean[row]) @ np.linalg.solve(own[row], root).T + goal_mean[row]
        for channel in range(2):
            match = np.corrcoef(made[row, ..., channel].ravel(), expected[..., channel].ravel())[0, 1]
            assert match > 0.9, (row, channel, match)


def test_half_way_between_lies_half_way_along_the_map():
    clip, style = styles(seed=1), styles(seed=2) @ jnp.asarray(MIX.T, jnp.float32)
    own, goal = statistics_of(clip), statistics_of(style)
    t = transport_of(own, goal)
    moved = jnp.einsum("bfhwc,bcd->bfhwd", clip - own.mean[:, None, None, None], t) + goal.mean[:, None, None, None]
    for amount in (0.0, 0.5, 1.0):
        expected = moments(clip + amount * (moved - clip))
        found = between_of(own, goal, amount)
        np.testing.assert_allclose(found.mean, expected[0], atol=1e-4)
        np.testing.assert_allclose(found.covariance, expected[1], atol=1e-3, rtol=1e-3)


def test_transport_is_symmetric_positive_and_reaches_the_covariance():
    a, b = statistics_of(styles(seed=1)), statistics_of(styles(seed=2) @ jnp.asarray(MIX.T, jnp.float32))
    t = np.asarray(transport_of(a, b), np.float64)
    np.testing.assert_allclose(t, np.swapaxes(t, 1, 2), atol=1e-4)
    assert (np.linalg.eigvalsh(t) > 0).all()
    np.testing.assert_allclose(t @ np.asarray(a.covariance) @ t, b.covariance, rtol=0.02, atol=0.02)
    scale = np.asarray(transport_of(a, b, joint=False))
    expected = np.sqrt(np.diagonal(b.covariance, axis1=1, axis2=2) / np.diagonal(a.covariance, axis1=1, axis2=2))
    np.testing.assert_allclose(np.diagonal(scale, axis1=1, axis2=2), expected, rtol=0.01)
    np.testing.assert_allclose(transport_of(a, a), np.tile(np.eye(2), (B, 1, 1)), atol=1e-4)


def test_a_flat_style_blows_nothing_up_and_layout_moves_low_pass_only():
    cond, flat = source(), jnp.full((B, *G.shape), 0.7)
    level = jnp.full((B, 3), 2.0)

    @jax.jit
    def call(guidance):
        return estimate(guidance.wrap(G.denoise_fn), source(), level, jobs.nothing_known(cond.shape), cond)

    styled = call(StatisticsGuidance(statistics_of(flat)))
    np.testing.assert_allclose(styled, 0.7, atol=0.15)
    style = styles()
    # On a grid of 4 x 4 every token is a cell: the low-pass is all there is, and statistics follow from it.
    placed = call(StatisticsGuidance(statistics_of(style[:, :1]), 1.0, 1.0))
    np.testing.assert_allclose(placed, jnp.broadcast_to(style[:, :1], placed.shape), atol=1e-3)


def test_known_tokens_stay_and_do_not_count():
    style, cond = styles(), jnp.zeros((B, *G.shape))
    mask = np.zeros((B, *G.shape[:3], 1), np.float32)
    mask[:, 0], mask[:, :, 0] = 1, 1
    known = Known(source(), jnp.asarray(mask), jnp.full((B, 3), 10.0))
    made = np.asarray(flow(StatisticsGuidance(statistics_of(style)), source(), cond, known))
    given = np.broadcast_to(mask, made.shape) > 0.5
    np.testing.assert_array_equal(made[given], np.asarray(source())[given])
    free = made[:, 1:, 1:].reshape(B, -1, 2)
    np.testing.assert_allclose(free.mean(1), moments(style)[0], atol=0.1)


# Shared attention ------------------------------------------------------------------------------------------------


def tokens(seed, rows=4):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, 6, 2, 3)), jnp.float32)


def test_shared_attention_is_the_formula():
    query, key, value = tokens(0), tokens(1) * 2 + 1, tokens(2)
    weight = np.array([0.4, 2.0])
    q, k, v, bias = share_attention(query, key, value, jnp.asarray(weight, jnp.float32))
    found = np.asarray(dot_product_attention(q, k, v, bias=bias, implementation="einsum"))
    np.testing.assert_allclose(dot_product_attention(q, k, v, bias=bias, implementation="xla"), found, atol=1e-5)
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))

    def aligned(x, row):
        own, style = x[row], x[row + 2]
        moved = (own - own.mean(0)) / own.std(0) * style.std(0) + style.mean(0)
        return own + min(weight[row], 1.0) * (moved - own)

    for row in range(4):
        for head in range(2):
            own = row >= 2
            q = query[row, :, head] if own else aligned(query, row)[:, head]
            k = key[row, :, head] if own else aligned(key, row)[:, head]
            scores = np.exp(q @ k.T / np.sqrt(3))
            values = value[row, :, head]
            if not own:
                scores = np.concatenate([scores, weight[row] * np.exp(q @ key[row + 2, :, head].T / np.sqrt(3))], 1)
                values = np.concatenate([values, value[row + 2, :, head]])
            expected = scores / scores.sum(1, keepdims=True) @ values
            np.testing.assert_allclose(found[row, :, head], expected, atol=1e-5)


@pytest.fixture(scope="module")
def attentive(model):
    """The toy model with louder spatial attention; its own is so faint that a style changes next to nothing."""

    def louder(path, leaf):
        return 4.0 * leaf if "spatial" in jax.tree_util.keystr(path) else leaf

    return model.with_params({"unet": jax.tree_util.tree_map_with_path(louder, model.params["unet"])})


def network_inputs(model, seed=0):
    rng = np.random.default_rng(seed)
    clean, noise = (jnp.asarray(rng.standard_normal((2, 3, 8, 8, 2)), jnp.float32) for _ in range(2))
    logsnr = jnp.asarray([[0.0, 1.0, -1.0], [2.0, 2.0, 2.0]])
    cond = model.condition(["a red circle", "a blue square"], None, clean.shape)
    return clean, noise, logsnr, cond


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_a_clip_that_is_its_own_style_comes_out_unchanged(attentive, weight):
    model = attentive
    clean, noise, logsnr, cond = network_inputs(model)
    arguments = (add_noise(clean, noise, logsnr), logsnr, jobs.nothing_known(clean.shape), cond)
    plain = model.run(estimate, *arguments)
    shared = SharedAttention(clean, cond, noise, jnp.float32(weight))
    np.testing.assert_allclose(model.run(estimate, *arguments, wrappers=(shared,)), plain, atol=1e-5)
    other = dataclasses.replace(shared, style=clean[::-1] * 2)
    change = float(jnp.abs(model.run(estimate, *arguments, wrappers=(other,)) - plain).max())
    assert change < 1e-5 if weight == 0 else change > 0.01, change


def test_guidance_goes_around_shared_attention_and_rows_stay_apart(attentive):
    model = attentive
    clean, noise, logsnr, cond = network_inputs(model)
    z, known = add_noise(clean, noise, logsnr), jobs.nothing_known(clean.shape)
    shared = SharedAttention(clean[::-1] * 2, model.condition(None, None, clean.shape), noise, jnp.ones(2))
    (guidance,) = model.guidance(cond, "", 2.5)
    guided = model.run(estimate, z, logsnr, known, cond, wrappers=(shared, guidance))
    apart = [
        model.run(estimate, z, logsnr, known, told, wrappers=(shared,))
        for told in (cond, model.condition(["", ""], None, clean.shape))
    ]
    np.testing.assert_allclose(guided, apart[1] + 2.5 * (apart[0] - apart[1]), atol=1e-4)
    half = dataclasses.replace(shared, weight=jnp.array([0.0, 1.0]))
    mixed = model.run(estimate, z, logsnr, known, cond, wrappers=(half,))
    np.testing.assert_allclose(mixed[0], model.run(estimate, z, logsnr, known, cond)[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], apart[0][1], atol=1e-5)


def test_shared_attention_says_what_does_not_fit():
    with pytest.raises(ValueError, match="Conditioning"):
        shared = SharedAttention(source(), None, source())
        estimate(shared.wrap(G.denoise_fn), source(), jnp.zeros((B, 3)), jobs.nothing_known(source().shape), source())
    with pytest.raises(ValueError, match="half"):
        share_attention(tokens(0), tokens(1), tokens(2), jnp.ones(3))


# The whole -------------------------------------------------------------------------------------------------------


def test_strength_is_traced_and_zero_gives_the_source_back(model):
    source, noise, _, _ = network_inputs(model)
    style = 0.5 + 2 * noise[:1, :1]
    give = functools.partial(stylize_latents, model, source, style, ["a circle", "a square"], keys=KEYS[:2])
    np.testing.assert_allclose(give(strength=0.0), source, atol=1e-5)
    compiled = model._run._cache_size()
    full = give(strength=1.0)
    gaps = [np.abs(moments(latents)[0] - moments(style)[0]).mean() for latents in (source, give(strength=0.5), full)]
    assert model._run._cache_size() == compiled
    assert gaps[2] < 0.3 * gaps[0] and gaps[2] < gaps[1] < gaps[0], gaps


@pytest.mark.parametrize(("method", "shared"), [("flow", 0.0), ("sdedit", 1.0), ("inversion", 0.0)])
def test_known_tokens_of_a_model_are_untouched(model, method, shared):
    source, noise, _, _ = network_inputs(model)
    mask = jnp.zeros((2, 3, 8, 8, 1)).at[:, 0].set(1.0).at[:, :, :2].set(1.0)
    known = Known(source, mask, jnp.full((2, 3), 10.0, jnp.float32))
    made = stylize_latents(model, source, noise, keys=KEYS[:2], known=known, method=method, shared_attention=shared)
    given = np.broadcast_to(mask, made.shape) > 0.5
    np.testing.assert_array_equal(np.asarray(made)[given], np.asarray(source)[given])
    assert np.isfinite(made).all() and np.abs(np.asarray(made - source)[~given]).mean() > 0.05


def test_mistakes_are_named(model):
    source, style, _, _ = network_inputs(model)
    with pytest.raises(ValueError, match="flow, inversion, sdedit"):
        stylize_latents(model, source, style, keys=KEYS[:2], method="paint")
    with pytest.raises(ValueError, match="structure=1"):
        stylize_latents(model, source, style, keys=KEYS[:2], structure=1.0)
    with pytest.raises(ValueError, match="does not fit"):
        stylize_latents(model, source, style[:, :2], keys=KEYS[:2])
