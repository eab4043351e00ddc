"""The objective of public networks: levels of the table, the EDM loss, pictures that are dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.diffusion.continuous import EDMRho
from vdiff_jax.diffusion.discrete import DiscreteTable
from vdiff_jax.diffusion.prediction import target
from vdiff_jax.diffusion.schedule import make_schedule
from vdiff_jax.diffusion.timestep_levels import SVD_SIGMAS, told_levels
from vdiff_jax.training.step import sample_keys
from vdiff_jax.training.timestep_objective import PLAIN_WEIGHTING, make_timestep_loss

BATCH, SHAPE = 400, (2, 2, 2, 3)
RNG = np.random.default_rng(0)
TABLE = DiscreteTable.from_betas(num_train_steps=50)
EDM = EDMRho(sigma_min=0.002, sigma_max=700.0, final="clean")
BATCH_OF = {
    "latents": RNG.normal(size=(BATCH, *SHAPE)).astype(np.float32),
    "times": np.tile(np.arange(2, dtype=np.float32), (BATCH, 1)),
}
PICTURE = {
    "image_latents": np.ones((BATCH, 2, 2, 3), np.float32),
    "image_embedding": np.ones((BATCH, 4), np.float32),
    "added": np.ones((BATCH, 3), np.float32),
}


def evaluate(network, batch, schedule, drawn, kind, **settings):
    """(loss, what the network saw), numpy. network: of z and the timestep `[b f 1 1 1]`."""
    seen = {}

    def predict(params, z, logsnr, known_mask, context_logsnr, cond):
        seen.update(z=z, timestep=logsnr, cond=cond, mask=known_mask)
        return network(z, logsnr[..., None, None, None])

    settings = {"weighting": PLAIN_WEIGHTING[kind], "weighting_settings": {}, "null_prompt": None, **settings}
    loss_fn = make_timestep_loss(predict, schedule=schedule, drawn=drawn, kind=kind, **settings)
    run = jax.jit(lambda batch: (*loss_fn({}, batch, sample_keys(jax.random.key(0), BATCH)), dict(seen)))
    loss, _, shown = run(batch)
    return jax.tree.map(np.asarray, (loss, shown))


def test_every_timestep_of_a_table_is_drawn_alike_and_nothing_is_known():
    _, seen = evaluate(lambda z, t: z, BATCH_OF, TABLE, TABLE, "eps")
    timestep = seen["timestep"]
    assert not seen["mask"].any()
    np.testing.assert_array_equal(timestep[:, 0], timestep[:, 1])  # one level a clip
    np.testing.assert_array_equal(timestep, np.round(timestep))
    np.testing.assert_array_equal(np.bincount(timestep[:, 0].astype(int)), BATCH // 50)
    logsnr, told = told_levels(TABLE, TABLE, jnp.array([0.0, 0.5, 0.999]))
    np.testing.assert_allclose(logsnr, np.array(TABLE.table)[[0, 25, 49]], rtol=1e-6)
    np.testing.assert_array_equal(told, [0, 25, 49])


@pytest.mark.parametrize("kind", PLAIN_WEIGHTING)
def test_the_plain_weighting_is_the_squared_error_of_the_output(kind):
    """Of a network that is always off by a half, whatever the level."""
    zeros = {**BATCH_OF, "latents": np.zeros((BATCH, *SHAPE), np.float32)}

    def off(z, timestep):
        logsnr = TABLE.timestep_to_logsnr(timestep[:, :, 0, 0, 0].astype(jnp.int32))
        sigma = jnp.sqrt(jax.nn.sigmoid(-logsnr))[..., None, None, None]
        return target(kind, jnp.zeros_like(z), z / sigma, logsnr) + 0.5

    loss, _ = evaluate(off, zeros, TABLE, TABLE, kind)
    np.testing.assert_allclose(loss, 0.25, rtol=1e-3)


def test_the_loss_of_svd_is_that_of_edm():
    """|D - x|^2 (sigma^2 + 1) / sigma^2 with D = x_noisy / (sigma^2 + 1) - sigma / sqrt(sigma^2 + 1) F; F = z / 2."""
    drawn = make_schedule("logit_normal", **SVD_SIGMAS, logsnr_min=EDM.logsnr_min, logsnr_max=EDM.logsnr_max)
    loss, seen = evaluate(lambda z, t: 0.5 * z, BATCH_OF, EDM, drawn, "v")
    log_sigma = 4 * seen["timestep"][:, 0]
    np.testing.assert_allclose([log_sigma.mean(), log_sigma.std()], [0.7, 1.6], atol=0.02)
    sigma = np.exp(log_sigma)[:, None, None, None, None]
    noisy, output = seen["z"] * np.sqrt(1 + sigma**2), 0.5 * seen["z"]
    denoised = noisy / (1 + sigma**2) - sigma / np.sqrt(1 + sigma**2) * output
    weight = (sigma**2 + 1) / sigma**2
    np.testing.assert_allclose(loss, np.mean(weight * np.square(denoised - BATCH_OF["latents"])), rtol=1e-3)


def test_pictures_are_dropped_in_part_and_whole():
    _, seen = evaluate(lambda z, t: z, BATCH_OF | PICTURE, EDM, EDM, "v", picture_dropout=0.2)
    cond = seen["cond"]
    embedding, latents = cond.text[:, 0, 0] == 1, cond.image_latents[:, :, 0, 0, 0].all(axis=1)
    shares = [np.mean(a & b) for a in (embedding, ~embedding) for b in (latents, ~latents)]
    np.testing.assert_allclose(shares, [0.4, 0.2, 0.2, 0.2], atol=0.08)
    assert cond.image_latents.shape == (BATCH, 2, 2, 2, 3) and cond.text.shape == (BATCH, 1, 4)


def test_dropped_prompts_are_the_empty_one_and_padding_is_read():
    batch = BATCH_OF | {"text": np.ones((BATCH, 5, 4), np.float32), "token_mask": np.ones((BATCH, 5), bool)}
    null = jnp.zeros((5, 4)), jnp.zeros(5, bool)
    _, seen = evaluate(lambda z, t: z, batch, TABLE, TABLE, "eps", null_prompt=null, prompt_dropout=0.3)
    assert seen["cond"].text_mask is None
    np.testing.assert_allclose(np.mean(seen["cond"].text[:, 0, 0] == 0), 0.3, atol=0.08)


def test_a_schedule_without_timesteps_is_refused():
    cosine = make_schedule("cosine")
    with pytest.raises(ValueError, match="Cosine knows no timesteps"):
        told_levels(cosine, cosine, jnp.zeros(1))
