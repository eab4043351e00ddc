"""The objective over the mixture: what the network is shown, and losses known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.diffusion.patterns import NUM_ROWS, ROWS, Mixture, draw_batch
from vdiff_jax.diffusion.process import alpha_sigma
from vdiff_jax.diffusion.schedule import make_schedule
from vdiff_jax.training.diffusion_objective import make_diffusion_loss, predictor
from vdiff_jax.training.step import sample_keys

SCHEDULE = make_schedule("cosine")
KINDS = ("prefix", "both_ends", "first_only", "every_nth", "random_frames", "suffix")
CONSTANT = 0.8  # the value of the clips that the exact networks know
BATCH, SHAPE = 256, (5, 2, 2, 3)
RNG = np.random.default_rng(0)
TIMES = np.tile(np.arange(5, dtype=np.float32), (BATCH, 1))
LATENTS = RNG.normal(size=(BATCH, *SHAPE)).astype(np.float32)
KEYS = sample_keys(jax.random.key(0), BATCH)


def make(predict_fn, encode_text=None, **settings):
    settings = {
        "null_prompt": None, "schedule": SCHEDULE, "mixture": Mixture(), "kind": "eps", "weighting": "eps",
        "weighting_settings": {}, **settings,
    }  # fmt: skip
    return make_diffusion_loss(predict_fn, encode_text, **settings)


@functools.cache
def compiled(predict_fn, kind):
    seen = {}

    def spy(params, *args):
        seen["inputs"] = args
        return predict_fn(params, *args)

    @jax.jit
    def run(params, latents):
        loss, metrics = make(spy, kind=kind)(params, {"latents": latents, "times": TIMES}, KEYS)
        return loss, metrics, seen["inputs"]

    return run


def evaluate(predict_fn, latents=LATENTS, kind="eps", params=None):
    """(loss, metrics, what the network saw), numpy."""
    return jax.tree.map(np.asarray, compiled(predict_fn, kind)(params or {}, latents))


def zero(params, z, *_):
    return jnp.zeros_like(z)


def test_a_zero_network_has_the_loss_of_the_noise():
    loss, metrics, (_, logsnr, mask, _, _) = evaluate(zero)
    np.testing.assert_allclose(loss, 1.0, atol=0.05)  # the variance of eps, over unknown tokens
    np.testing.assert_allclose(metrics["eps_loss"], loss, rtol=1e-5)
    assert 0.1 < mask.mean() < 0.4
    unknown = 1 - mask.mean((2, 3, 4))
    counts = np.histogram(np.clip(logsnr, -9.99, 9.99), np.linspace(-10, 10, 9), weights=unknown)[0]
    np.testing.assert_allclose(metrics["eps_loss_by_logsnr_count"], counts, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(metrics["eps_loss_by_row_sum"].sum() / BATCH, metrics["eps_loss"], rtol=1e-5)


def test_rows_of_the_log_follow_the_mixture():
    _, metrics, _ = evaluate(zero)
    count = metrics["eps_loss_by_row_count"]
    expected = np.array([getattr(Mixture(), row) for row in ROWS])
    assert count.shape == (NUM_ROWS,) and count.sum() == BATCH
    np.testing.assert_allclose(count / BATCH, expected, atol=4 * np.sqrt(0.25 / BATCH))


def exact_eps(params, z, logsnr, mask, context_logsnr, cond):
    """The noise in clips of CONSTANT, off by params["error"]."""
    alpha, sigma = (value[:, :, None, None, None] for value in alpha_sigma(logsnr))
    return (z - alpha * CONSTANT) / sigma + params["error"]


def exact_v(params, z, logsnr, *rest):
    """The same as v = alpha eps - sigma x, of which x follows from z too: v = eps / alpha - (sigma / alpha) z."""
    alpha, sigma = (value[:, :, None, None, None] for value in alpha_sigma(logsnr))
    return (exact_eps(params, z, logsnr, *rest) - sigma * z) / alpha


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_network_that_inverts_the_noising_has_no_loss(kind):
    """Of constant clips the noise can be read from z, if and only if z, level and mask belong together."""
    latents = np.full((BATCH, *SHAPE), CONSTANT, np.float32)
    exact = {"eps": exact_eps, "v": exact_v}[kind]
    _, metrics, _ = evaluate(exact, latents, kind, {"error": 0.0})
    assert metrics["eps_loss"] < 1e-3
    _, metrics, _ = evaluate(exact, latents, kind, {"error": 0.5})
    np.testing.assert_allclose(metrics["eps_loss"], 0.25, rtol=0.02)


def worse_when_clean(params, z, logsnr, *rest):
    return exact_eps({"error": (logsnr / 10)[:, :, None, None, None]}, z, logsnr, *rest)


def test_every_frame_counts_in_the_bin_of_its_own_level():
    """The error of this network is the level of each frame, and clips of ramps hold many levels."""
    latents = np.full((BATCH, *SHAPE), CONSTANT, np.float32)
    _, metrics, (_, logsnr, _, _, _) = evaluate(worse_when_clean, latents, params={})
    mean = metrics["eps_loss_by_logsnr_sum"] / metrics["eps_loss_by_logsnr_count"]
    edges = np.linspace(-1, 1, 9)
    low, high = np.minimum(edges[:-1] ** 2, edges[1:] ** 2), np.maximum(edges[:-1] ** 2, edges[1:] ** 2)
    assert np.ptp(logsnr, axis=1).max() > 5
    assert (mean >= low - 1e-3).all() and (mean <= high + 1e-3).all()


def test_known_tokens_are_shown_at_their_own_level():
    """With latents of zero, z is pure noise of sigma(level): of the context where known, of the frame elsewhere."""
    zeros = np.zeros((BATCH, *SHAPE), np.float32)
    _, _, (z, logsnr, mask, context_logsnr, cond) = evaluate(zero, zeros)
    known = mask[..., 0] > 0.5
    level = np.where(known, context_logsnr[:, :, None, None], logsnr[:, :, None, None])
    unit = z / np.sqrt(1 / (1 + np.exp(level)))[..., None]
    for where in (known, ~known):
        np.testing.assert_allclose(unit[where].std(), 1.0, atol=0.05)
    np.testing.assert_array_equal(cond.times, TIMES)


def test_noise_of_a_clip_depends_on_its_key_alone():
    """The batch's levels are drawn together, its noise by sample."""
    zeros = np.zeros((BATCH, *SHAPE), np.float32)
    _, _, (z, logsnr, mask, context_logsnr, _) = evaluate(zero, zeros)
    level = np.where(mask > 0.5, context_logsnr[..., None, None, None], logsnr[..., None, None, None])
    noise = z * np.sqrt(1 + np.exp(level))
    assert np.abs(np.corrcoef(noise.reshape(BATCH, -1)[:8])[~np.eye(8, dtype=bool)]).max() < 0.6
    frames = noise.reshape(BATCH, 5, -1)
    assert abs(np.mean(frames[:, 0] * frames[:, 1])) < 0.05


PREFIX = Mixture(
    text_to_video=0.0, known_frames=1.0, hole=0.0, ramp=0.0, independent=0.0,
    prefix=1.0, both_ends=0.0, first_only=0.0, every_nth=0.0, random_frames=0.0, suffix=0.0,
)  # fmt: skip


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("num_frames", [1, 3])
def test_prompts_are_dropped_at_their_rate(rate, num_frames):
    """One frame is never known and three always show something, so each clip has one of the two rates."""
    size = 2000
    rates = {"prompt_dropout": rate, "context_prompt_dropout": 1 - rate}
    if num_frames == 3:
        rates = {"prompt_dropout": 1 - rate, "context_prompt_dropout": rate}
    tokens = np.tile(np.arange(10, 14, dtype=np.int32), (size, 1))
    batch = {
        "latents": np.zeros((size, num_frames, 1, 1, 1), np.float32),
        "times": np.tile(np.arange(num_frames, dtype=np.float32), (size, 1)),
        "tokens": tokens,
        "token_mask": np.ones((size, 4), bool),
    }
    null = (jnp.array([1, 2, 0, 0]), jnp.array([True, True, False, False]))
    seen = {}

    def predict(params, z, logsnr, mask, context_logsnr, cond):
        seen["cond"] = cond
        return z

    def encode(params, tokens, mask):
        return params["scale"] * tokens[..., None].astype(jnp.float32)

    @jax.jit
    def run(keys):
        make(predict, encode, null_prompt=null, mixture=PREFIX, **rates)({"scale": 2.0}, batch, keys)
        return seen["cond"]

    cond = run(sample_keys(jax.random.key(1), size))
    text, mask = np.asarray(cond.text)[..., 0], np.asarray(cond.text_mask)
    dropped = ~mask[:, 2]
    np.testing.assert_allclose(dropped.mean(), rate, atol=4 * np.sqrt(0.09 / size) if 0 < rate < 1 else 0)
    np.testing.assert_array_equal(text[dropped], np.tile([2.0, 4.0, 0.0, 0.0], (dropped.sum(), 1)))
    np.testing.assert_array_equal(text[~dropped], 2.0 * tokens[~dropped])


def test_ready_features_pass_through_and_the_predictor_finds_its_parameters():
    seen = {}

    def apply(params, z, logsnr, mask, context_logsnr, cond):
        seen["text"], seen["params"] = cond.text, params
        return z

    batch = {
        "latents": jnp.zeros((2, 1, 1, 1, 1)),
        "times": jnp.zeros((2, 1)),
        "text": jnp.arange(12.0).reshape(2, 3, 2),
        "token_mask": jnp.ones((2, 3), bool),
    }
    null = (jnp.zeros((3, 2)), jnp.ones(3, bool))
    loss_fn = make(predictor(apply), null_prompt=null, prompt_dropout=0.0)

    @jax.jit
    def run(params, batch, keys):
        loss_fn(params, batch, keys)
        return seen

    shown = run({"unet": jnp.float32(3.0), "text_encoder": jnp.zeros(())}, batch, KEYS[:2])
    np.testing.assert_array_equal(shown["text"], batch["text"])
    assert shown["params"] == 3.0


def mean_of_frames(params, z, logsnr, mask, context, cond):
    """A network that mixes frames, as real ones do: only real ones."""
    real = cond.valid[:, :, None, None, None]
    return params["scale"] * z + jnp.sum(jnp.where(real, z, 0.0), 1, keepdims=True) / jnp.sum(real, 1, keepdims=True)


def test_what_fills_a_clip_up_changes_neither_loss_nor_gradient():
    length = np.arange(BATCH) % 5 + 1
    valid = np.arange(5)[None] < length[:, None]
    filler = np.where(valid[:, :, None, None, None], LATENTS, 7.0)
    loss_fn = make(mean_of_frames)

    @jax.jit
    def run(latents, valid):
        batch = {"latents": latents, "times": TIMES, "valid": valid}
        return jax.value_and_grad(loss_fn, has_aux=True)({"scale": jnp.float32(0.5)}, batch, KEYS)

    one, other = run(LATENTS, valid), run(filler, valid)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert float(one[0][0]) != float(run(LATENTS, np.ones_like(valid))[0][0])
    counted = one[0][1]["eps_loss_by_logsnr_count"].sum()
    assert counted <= valid.sum()  # frames that fill up are in no bin


def test_patterns_are_those_of_the_real_frames():
    """A clip of n real frames draws what a clip of n frames draws: it keeps one unknown, and knows none beyond."""
    length = jnp.arange(BATCH) % 5 + 1
    mixture = Mixture(text_to_video=0.0, known_frames=0.6, hole=0.4, ramp=0.0, independent=0.0)
    drawn = jax.jit(lambda key: draw_batch(key, mixture, SCHEDULE, BATCH, 5, 2, 2, None, length))(jax.random.key(0))
    known, real = np.asarray(drawn.mask)[..., 0] > 0.5, np.arange(5)[None] < np.asarray(length)[:, None]
    assert not known[~real].any()
    assert not (known | ~real[:, :, None, None]).all((1, 2, 3)).any()
    assert (np.asarray(drawn.row)[np.asarray(length) == 1] == 0).all()  # an image is text to image
    ends = known[np.asarray(length) == 3].all((2, 3))
    assert (ends[:, 0] & ends[:, 2] & ~ends[:, 1]).any()  # both ends are those of the real clip
    last = {kind: float(kind == "suffix") for kind in KINDS}
    mixture = Mixture(text_to_video=0.0, known_frames=1.0, hole=0.0, ramp=0.0, independent=0.0, **last)
    drawn = jax.jit(lambda key: draw_batch(key, mixture, SCHEDULE, BATCH, 5, 2, 2, None, length))(jax.random.key(0))
    frames = np.asarray(drawn.mask)[..., 0].min((2, 3))
    clips = np.asarray(length) > 1
    assert (frames[clips, np.asarray(length)[clips] - 1] == 1).all() and (frames[clips, 0] == 0).all()
