"""Remakes ddim_scheduler.npz: what the diffusers schedulers do with a fixed analytic network.

    pip install torch diffusers && python tests/golden/make_scheduler_golden.py

The network is `network` below, in numpy, so that both sides compute the same function without weights.
Each case holds: settings (json), start [1 f h w c], timesteps [s], output [1 f h w c].
"""

import json
import os
import pathlib

import numpy as np


def network(z, timestep):
    """Stands for a denoising network: smooth, bounded, dependent on every input."""
    return np.tanh(0.9 * z + 0.4 * np.sin(2.1 * z + timestep / 160.0)) + 0.1 * np.cos(timestep / 90.0)


CASES = {
    "ddim_scaled_linear_eps_leading": dict(betas="scaled_linear", kind="eps", spacing="leading", steps_offset=1),
    "ddim_linear_eps_leading_first": dict(betas="linear", kind="eps", spacing="leading", final="first"),
    "ddim_scaled_linear_v_trailing": dict(betas="scaled_linear", kind="v", spacing="trailing"),
    "ddim_linear_v_trailing_zero_snr": dict(betas="linear", kind="v", spacing="trailing", zero_terminal_snr=True),
    "ddim_cosine_x0_trailing": dict(betas="squaredcos_cap_v2", kind="x0", spacing="trailing"),
    "dpmpp_2m_scaled_linear_eps_linspace": dict(
        betas="scaled_linear", kind="eps", spacing="linspace", sampler="dpmpp_2m"
    ),
    "dpmpp_2m_scaled_linear_v_trailing": dict(betas="scaled_linear", kind="v", spacing="trailing", sampler="dpmpp_2m"),
    "euler_flow_velocity": dict(kind="velocity", sampler="euler", shift=3.0),
}
STEPS = 20


def make_scheduler(case):
    import diffusers

    if case.get("sampler") == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=case["shift"])
    settings = dict(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=case["betas"],
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[case["kind"]],
        timestep_spacing=case["spacing"],
        steps_offset=case.get("steps_offset", 0),
        rescale_betas_zero_snr=case.get("zero_terminal_snr", False),
    )
    if case.get("sampler") == "dpmpp_2m":
        return diffusers.DPMSolverMultistepScheduler(**settings, algorithm_type="dpmsolver++", solver_order=2)
    return diffusers.DDIMScheduler(
        **settings, clip_sample=False, set_alpha_to_one=case.get("final", "clean") == "clean"
    )


def main():
    import diffusers
    import torch

    rng = np.random.default_rng(0)
    arrays = {"versions": json.dumps({"diffusers": diffusers.__version__, "torch": torch.__version__})}
    for name, case in CASES.items():
        scheduler = make_scheduler(case)
        scheduler.set_timesteps(STEPS)
        start = rng.standard_normal((1, 2, 3, 4, 4)).astype(np.float32)
        z = torch.from_numpy(start)
        for timestep in scheduler.timesteps:
            prediction = torch.from_numpy(network(z.numpy(), float(timestep)).astype(np.float32))
            z = scheduler.step(prediction, timestep, z).prev_sample
        arrays[f"{name}/settings"] = json.dumps(case)
        arrays[f"{name}/start"] = start
        arrays[f"{name}/timesteps"] = np.asarray(scheduler.timesteps, np.float64)
        arrays[f"{name}/output"] = z.numpy()
    path = pathlib.Path(__file__).parent / "ddim_scheduler.npz"
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
