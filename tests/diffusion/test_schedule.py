"""Schedules: inverses, ends, closed forms, and the tables of integer timesteps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vdiff_jax.diffusion.schedule import (
    SCHEDULES,
    Cosine,
    DiscreteTable,
    EDMRho,
    Flow,
    LinearLogSNR,
    LogitNormal,
    grid,
    make_schedule,
    shift_for_length,
    shift_for_resolution,
)

U = jnp.linspace(0.02, 0.98, 49)


@pytest.mark.parametrize("name", SCHEDULES)
def test_u_and_logsnr_are_inverse_and_fall_from_clean_to_noise(name):
    schedule = make_schedule(name)
    levels = schedule.logsnr(U)
    np.testing.assert_allclose(schedule.u(levels), U, atol=1e-5)
    assert (np.diff(levels) < 0).all()
    ends = schedule.logsnr(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(ends, [schedule.logsnr_max, schedule.logsnr_min], atol=1e-4)
    np.testing.assert_allclose(jax.jit(schedule.logsnr)(U), levels, atol=1e-5)
    assert hash(schedule) == hash(make_schedule(name))


def test_cosine_is_the_cosine_schedule_within_a_wide_range():
    with jax.enable_x64(True):
        u = np.linspace(0.05, 0.95, 19)
        wide = Cosine(-60.0, 60.0, shift=-1.5).logsnr(jnp.asarray(u))
        np.testing.assert_allclose(wide, -2 * np.log(np.tan(np.pi * u / 2)) - 1.5, atol=1e-9)


def test_a_shift_moves_the_middle_and_keeps_the_ends():
    shifted = Cosine(shift=-2.0)
    np.testing.assert_allclose(shifted.logsnr(jnp.array([0.0, 1.0])), [10, -10], atol=1e-4)
    assert float(shifted.logsnr(jnp.array(0.5))) == pytest.approx(-2, abs=0.05)
    assert shift_for_resolution(32) == pytest.approx(-2 * np.log(2))
    assert shift_for_resolution(16) == shift_for_length(16) == 0
    assert shift_for_length(64) == pytest.approx(-np.log(4))


def test_flow_is_its_time_with_the_timestep_shift():
    u = np.linspace(0.05, 0.95, 19)
    t = 3 * u / (1 + 2 * u)
    np.testing.assert_allclose(Flow(shift=3.0).logsnr(jnp.asarray(u)), 2 * np.log((1 - t) / t), atol=1e-4)
    np.testing.assert_allclose(Flow().logsnr(jnp.asarray(u)) - 2 * np.log(3), 2 * np.log((1 - t) / t), atol=1e-4)


def test_edm_sigmas_are_the_published_grid():
    steps, rho = 18, 7
    i = np.arange(steps)
    sigmas = (80 ** (1 / rho) + i / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    np.testing.assert_allclose(np.exp(-grid(EDMRho(), steps - 1) / 2), sigmas, rtol=2e-4)


def test_logit_normal_levels_are_normal():
    u = (np.arange(4000) + 0.5) / 4000
    levels = np.asarray(LogitNormal(mean=0.5, std=0.8).logsnr(jnp.asarray(u)))
    assert stats.kstest(levels, stats.norm(-1.0, 1.6).cdf).statistic < 1e-3


def test_grid_walks_from_noise_to_clean():
    levels = grid(LinearLogSNR(), 4)
    np.testing.assert_allclose(levels, [-10, -5, 0, 5, 10], atol=1e-5)


# Tables of integer timesteps


def reference_alphas_bar(betas):
    return np.cumprod(1 - betas)


def test_table_levels_are_those_of_the_betas_at_every_integer():
    for betas, values in (
        ("linear", np.linspace(0.00085, 0.012, 1000)),
        ("scaled_linear", np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    ):
        bar = reference_alphas_bar(values)
        table = DiscreteTable.from_betas(betas)
        got = table.timestep_to_logsnr(jnp.arange(1000))
        np.testing.assert_allclose(got, np.log(bar / (1 - bar)), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(table.logsnr_to_timestep(got), np.arange(1000))
        between = table.timestep_to_logsnr(jnp.array(10.5))
        assert float(between) == pytest.approx(float(got[10] + got[11]) / 2, abs=1e-4)


def test_levels_outside_the_table_meet_its_ends():
    table = DiscreteTable.from_betas()
    np.testing.assert_array_equal(
        table.logsnr_to_timestep(jnp.array([50.0, jnp.inf, -50.0, -jnp.inf])), [0, 0, 999, 999]
    )


def test_zero_terminal_snr_is_exact_and_keeps_the_first_level():
    plain, zero = (DiscreteTable.from_betas("linear", zero_terminal_snr=flag) for flag in (False, True))
    assert zero.table[-1] == -np.inf == zero.logsnr_min
    assert zero.table[0] == pytest.approx(plain.table[0], abs=1e-9)
    assert np.isfinite(zero.table[:-1]).all() and (np.diff(zero.table) < 0).all()
    assert float(zero.logsnr(jnp.array(1.0))) == -np.inf
    assert float(zero.logsnr_to_timestep(jnp.array(-jnp.inf))) == 999
    near_end = zero.timestep_to_logsnr(jnp.array([998.0, 998.5]))
    assert np.isfinite(near_end).all() and near_end[1] < near_end[0]
    # Lin et al. 2024, algorithm 1: sqrt(alpha_bar) is an affine function of the old one.
    root = [np.sqrt(1 / (1 + np.exp(-np.array(table.table)))) for table in (plain, zero)]
    slope, offset = np.polyfit(root[0], root[1], 1)
    np.testing.assert_allclose(slope * root[0] + offset, root[1], atol=1e-9)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [801, 601, 401, 201, 1]),
        ("trailing", [999, 799, 599, 399, 199]),
        ("linspace", [999, 749, 500, 250, 0]),
    ],
)
def test_timesteps_by_spacing(spacing, expected):
    table = DiscreteTable.from_betas(spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
    np.testing.assert_array_equal(table.timesteps(5), expected)
    levels = grid(table, 5)
    np.testing.assert_array_equal(levels[:-1], np.array(table.table, np.float32)[expected])
    np.testing.assert_array_equal(table.logsnr_to_timestep(levels[:-1]), expected)
    assert levels[-1] == np.inf and table.finish
    first = dataclasses.replace(table, final="first")
    assert grid(first, 5)[-1] == np.float32(table.table[0]) and not first.finish


@pytest.mark.parametrize("steps", [1, 3, 7, 999, 1000])
def test_any_number_of_steps_has_as_many_distinct_timesteps(steps):
    for spacing in ("leading", "trailing", "linspace"):
        timesteps = DiscreteTable.from_betas(spacing=spacing).timesteps(steps)
        assert len(timesteps) == steps and (np.diff(timesteps) < 0).all()
        assert timesteps.min() >= 0 and timesteps.max() <= 999


@pytest.mark.parametrize("placing", ["ddim", "euler", "multistep"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_level_of_the_table_is_told_as_its_timestep(betas, zero_terminal_snr, placing):
    table = make_schedule("discrete", betas=betas, zero_terminal_snr=zero_terminal_snr, placing=placing)
    whole = jnp.arange(1000)
    told = jax.jit(table.logsnr_to_timestep)(np.asarray(table.table, np.float32))
    np.testing.assert_allclose(told, whole, atol=0 if placing == "multistep" else 1e-3)
    if placing == "euler":  # between timesteps, sigma is linear
        sigma = np.exp(-np.asarray(table.timestep_to_logsnr(jnp.array([10.0, 10.25, 11.0]))) / 2)
        assert sigma[1] == pytest.approx(0.75 * sigma[0] + 0.25 * sigma[2], rel=1e-5)
        assert float(table.logsnr_to_timestep(-2 * jnp.log(sigma[1]))) == pytest.approx(10.25, abs=1e-3)


def test_the_start_has_the_deviation_of_its_sampler():
    first = DiscreteTable.from_betas().table[-1]
    assert make_schedule("cosine").start_std(10) == make_schedule("discrete").start_std(10) == 1.0
    assert make_schedule("discrete", placing="euler", spacing="leading").start_std(10) == 1.0
    euler = make_schedule("discrete", placing="euler", spacing="trailing").start_std(10)
    assert euler == pytest.approx(1 / np.sqrt(1 + np.exp(first)), rel=1e-6)
    assert make_schedule("discrete", spacing="trailing", placing="multistep").start_std(10) == 1.0


def test_continuous_timesteps_are_a_quarter_of_log_sigma():
    schedule = EDMRho(0.002, 700.0, final="clean")
    levels = grid(schedule, 25)
    assert levels.shape == (26,) and levels[-1] == np.inf
    ends = np.log([700.0, 0.002]) / 4
    np.testing.assert_allclose(schedule.logsnr_to_timestep(levels[np.array([0, 24])]), ends, rtol=1e-5)


def test_mistakes_are_named():
    for setting, value in (("placing", "dense"), ("sigmas", "even"), ("final", "last")):
        with pytest.raises(ValueError, match=f"{value!r} is unknown; use one of"):
            make_schedule("discrete", **{setting: value})
    with pytest.raises(ValueError, match="sigmas 'karras' need placing 'euler' or 'multistep'"):
        make_schedule("discrete", sigmas="karras")
    with pytest.raises(ValueError, match="2 betas are given for num_train_steps 1000"):
        make_schedule("discrete", betas=[0.1, 0.2])
    with pytest.raises(ValueError, match="final level 'zero' is unknown"):
        make_schedule("edm", final="zero")
    with pytest.raises(ValueError, match="flow shift 0 must be positive"):
        make_schedule("flow_table", shift=0)
    with pytest.raises(ValueError, match="steps 0 must be at least 1"):
        grid(make_schedule("discrete"), 0)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        make_schedule("cosin")
    with pytest.raises(ValueError, match=r"'cosine' does not take these settings.*shifft"):
        make_schedule("cosine", shifft=1.0)
    with pytest.raises(ValueError, match="must be smaller"):
        make_schedule("linear_logsnr", logsnr_min=3.0, logsnr_max=-3.0)
    with pytest.raises(ValueError, match="spacing 'even' is unknown"):
        make_schedule("discrete", spacing="even")
    with pytest.raises(ValueError, match=r"steps 1001 must lie in 1\.\.1000"):
        grid(DiscreteTable.from_betas(), 1001)
    with pytest.raises(ValueError, match="betas 'quadratic' are unknown"):
        DiscreteTable.from_betas("quadratic")
