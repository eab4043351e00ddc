"""Our scan equals the public schedulers on the same table and the same network."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff_jax.diffusion.prediction import to_x0
from vdiff_jax.diffusion.process import from_vp
from vdiff_jax.diffusion.schedule import DiscreteTable
from vdiff_jax.sampling.job import nothing_known
from vdiff_jax.sampling.samplers import make_sampler, sample
from vdiff_jax.types import Job

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "ddim_scheduler.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files if "/" in name})


def network(z, timestep):
    """The analytic network of golden/make_scheduler_golden.py."""
    return jnp.tanh(0.9 * z + 0.4 * jnp.sin(2.1 * z + timestep / 160.0)) + 0.1 * jnp.cos(timestep / 90.0)


def case_of(name):
    return json.loads(str(GOLDEN[f"{name}/settings"])), GOLDEN[f"{name}/timesteps"]


def levels_of(case, timesteps):
    """The plan's levels `[s+1]`, and the function from level to the timestep that the network is told."""
    if case.get("sampler") == "euler":
        t = timesteps / 1000
        with np.errstate(divide="ignore"):
            return np.append(2 * np.log((1 - t) / t), np.inf), lambda logsnr: 1000 * jax.nn.sigmoid(-logsnr / 2)
    table = DiscreteTable.from_betas(case["betas"], zero_terminal_snr=case.get("zero_terminal_snr", False))
    offset = case.get("steps_offset", 0)
    if case.get("sampler") != "dpmpp_2m":  # that scheduler has a spacing rule of its own
        np.testing.assert_array_equal(table.timesteps(len(timesteps), case["spacing"], offset), timesteps)
        return table.grid(len(timesteps), case["spacing"], offset, case.get("final", "clean")), table.logsnr_to_timestep
    levels = table.timestep_to_logsnr(timesteps.astype(np.int32))
    return np.append(levels, np.inf), table.logsnr_to_timestep


@pytest.mark.parametrize("name", CASES)
def test_sampling_equals_the_public_scheduler(name):
    case, timesteps = case_of(name)
    levels, to_timestep = levels_of(case, timesteps)
    process = "flow" if case.get("sampler") == "euler" else "vp"

    def denoise_fn(z, logsnr, known, cond, *, next_logsnr, keys):
        native = from_vp(z, logsnr, process)
        prediction = network(native, to_timestep(logsnr)[:, :, None, None, None])
        return to_x0(case["kind"], prediction, z, logsnr)

    start = jnp.asarray(GOLDEN[f"{name}/start"])
    plan = jnp.broadcast_to(jnp.asarray(levels, jnp.float32)[:, None, None], (len(levels), *start.shape[:2]))
    job = Job(z=start, plan=plan, known=nothing_known(start.shape), cond=None)
    sampler = make_sampler(case.get("sampler", "ddim"))
    finish = case.get("final", "clean") == "clean"
    output = sample(denoise_fn, job, sampler, jax.random.split(jax.random.key(0), 1), finish=finish)
    np.testing.assert_allclose(output, GOLDEN[f"{name}/output"], atol=1e-4, rtol=0)


def test_zero_terminal_snr_starts_at_pure_noise():
    table = DiscreteTable.from_betas("linear", zero_terminal_snr=True)
    assert table.grid(20, "trailing")[0] == -np.inf
    assert np.isfinite(table.grid(20, "trailing")[1:-1]).all()
