"""Remakes schedulers.npz: what the diffusers schedulers do with a fixed analytic network.

    pip install torch diffusers scipy && python tests/golden/make_scheduler_golden.py

The network is `network` below, in numpy, so that both sides compute the same function without weights.

start [1 f h w c], once; for each case and number of steps: settings (the scheduler's json), timesteps [s], sigmas
[s+1] (noise over signal, the last may be 0), output [1 f h w c], for the smaller number of steps x0_hats
[s 1 f h w c] (clean estimates), and for stochastic solvers noise [s 1 f h w c].
"""

import json
import os
import pathlib

import numpy as np

SHAPE = (1, 2, 2, 3, 2)
STEPS = (10, 25)
SEED = 11

LINEAR = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
SCALED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SVD = dict(
    SCALED,
    interpolation_type="linear",
    prediction_type="v_prediction",
    sigma_max=700.0,
    sigma_min=0.002,
    steps_offset=1,
    timestep_spacing="leading",
    timestep_type="continuous",
    use_karras_sigmas=True,
)
V, ZERO_SNR, TRAILING = dict(prediction_type="v_prediction"), dict(rescale_betas_zero_snr=True), "trailing"
UNCLIPPED = dict(clip_sample=False)
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"

CASES = {
    # the settings of AnimateDiff and of ModelScope
    "ddim_linear_offset": ("DDIMScheduler", dict(LINEAR, **UNCLIPPED, steps_offset=1)),
    "ddim_scaled_offset_first": ("DDIMScheduler", dict(SCALED, **UNCLIPPED, steps_offset=1, set_alpha_to_one=False)),
    "ddim_leading_no_offset": ("DDIMScheduler", dict(SCALED, **UNCLIPPED)),
    "ddim_trailing_v": ("DDIMScheduler", dict(SCALED, **V, **UNCLIPPED, timestep_spacing=TRAILING)),
    "ddim_zero_snr_v": ("DDIMScheduler", dict(LINEAR, **V, **ZERO_SNR, **UNCLIPPED, timestep_spacing=TRAILING)),
    "ddim_cosine_x0": (
        "DDIMScheduler",
        dict(UNCLIPPED, beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing=TRAILING),
    ),
    "ddim_trained_betas": (
        "DDIMScheduler",
        dict(UNCLIPPED, num_train_timesteps=100, trained_betas=[round(0.001 + 0.0004 * i, 6) for i in range(100)]),
    ),
    "ddim_clipped": ("DDIMScheduler", dict(SCALED, clip_sample_range=0.8)),
    "ddim_linspace": ("DDIMScheduler", dict(SCALED, **UNCLIPPED, timestep_spacing="linspace")),
    "ddpm": ("DDPMScheduler", dict(SCALED, clip_sample=True, steps_offset=1)),
    "pndm": ("PNDMScheduler", dict(SCALED, skip_prk_steps=True, steps_offset=1)),
    "euler_leading": (EULER, dict(SCALED, timestep_spacing="leading", steps_offset=1)),
    "euler_linspace": (EULER, dict(SCALED)),
    "euler_linspace_linear": (EULER, dict(LINEAR)),
    "euler_trailing_zero_snr_v": (EULER, dict(SCALED, **V, **ZERO_SNR, timestep_spacing=TRAILING)),
    "euler_karras": (EULER, dict(SCALED, use_karras_sigmas=True)),
    "euler_karras_leading": (EULER, dict(SCALED, use_karras_sigmas=True, timestep_spacing="leading", steps_offset=1)),
    "euler_karras_ends_first": (
        EULER,
        dict(SCALED, use_karras_sigmas=True, sigma_min=0.05, sigma_max=12.0, final_sigmas_type="sigma_min"),
    ),
    "euler_exponential": (EULER, dict(SCALED, use_exponential_sigmas=True)),
    "euler_beta": (EULER, dict(SCALED, use_beta_sigmas=True)),
    "euler_svd": (EULER, SVD),
    "euler_ancestral": (ANCESTRAL, dict(SCALED)),
    "dpm": (DPM, dict(SCALED)),
    "dpm_leading": (DPM, dict(SCALED, timestep_spacing="leading", steps_offset=1)),
    "dpm_trailing_zero_snr_v": (DPM, dict(LINEAR, **V, **ZERO_SNR, timestep_spacing=TRAILING)),
    "dpm_karras": (DPM, dict(SCALED, use_karras_sigmas=True)),
    "dpm_exponential": (DPM, dict(SCALED, use_exponential_sigmas=True)),
    "dpm_beta": (DPM, dict(SCALED, use_beta_sigmas=True)),
    "dpm_order_1": (DPM, dict(SCALED, solver_order=1)),
    "dpm_euler_at_final": (DPM, dict(SCALED, euler_at_final=True, final_sigmas_type="sigma_min")),
    "dpm_sde_karras": (DPM, dict(SCALED, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)),
    "unipc": (UNIPC, dict(SCALED)),
    "unipc_exponential": (UNIPC, dict(SCALED, use_exponential_sigmas=True)),
    "unipc_karras_v": (UNIPC, dict(SCALED, **V, use_karras_sigmas=True)),
    "flow": ("FlowMatchEulerDiscreteScheduler", dict()),
    "flow_shift": ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0)),
}


def network(z, timestep):
    """Stands for a denoising network: smooth, bounded, dependent on every input."""
    return np.tanh(0.9 * z + 0.4 * np.sin(2.1 * z + timestep / 160.0)) + 0.1 * np.cos(timestep / 90.0)


def walk(scheduler, name, steps, start):
    """The arrays of one case, from the scheduler's own loop as its pipelines run it."""
    import torch

    scheduler.set_timesteps(steps)
    flow, clip = name.startswith("Flow"), scheduler.config.get("clip_sample", False)
    stochastic = name in ("DDPMScheduler", ANCESTRAL) or "sde" in scheduler.config.get("algorithm_type", "")
    generator = torch.Generator().manual_seed(SEED)
    if hasattr(scheduler, "sigmas"):
        sigmas = np.asarray(scheduler.sigmas, np.float64)
        if flow:
            with np.errstate(divide="ignore"):
                sigmas = sigmas / (1 - sigmas)
    else:
        last = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))
        bar = np.append(scheduler.alphas_cumprod[scheduler.timesteps].double(), float(last))
        with np.errstate(divide="ignore"):
            sigmas = np.sqrt((1 - bar) / bar)

    z = torch.from_numpy(start) * getattr(scheduler, "init_noise_sigma", 1.0)
    kind, x0_hats = scheduler.config.get("prediction_type", "velocity"), []
    for index, timestep in enumerate(scheduler.timesteps):
        shown = z if flow else scheduler.scale_model_input(z, timestep)
        prediction = network(shown.numpy(), float(timestep)).astype(np.float32)
        alpha = 1 / np.sqrt(1 + sigmas[index] ** 2)
        sigma = 1.0 if np.isinf(sigmas[index]) else sigmas[index] * alpha
        x0_hat = {
            "epsilon": lambda: (shown.numpy() - sigma * prediction) / alpha,  # noqa: B023
            "v_prediction": lambda: alpha * shown.numpy() - sigma * prediction,  # noqa: B023
            "sample": lambda: prediction,  # noqa: B023
            "velocity": lambda: shown.numpy() - sigma / (alpha + sigma) * prediction,  # noqa: B023
        }[kind]()
        limit = scheduler.config.get("clip_sample_range", 1.0) if clip else np.inf
        x0_hats.append(np.clip(x0_hat, -limit, limit))
        options = {"generator": generator} if stochastic else {}
        if clip and name == "DDIMScheduler":
            options["use_clipped_model_output"] = True
        z = scheduler.step(torch.from_numpy(prediction), timestep, z, **options).prev_sample
    arrays = {"timesteps": np.asarray(scheduler.timesteps, np.float64), "sigmas": sigmas, "output": z.numpy()}
    if name != "PNDMScheduler" and steps == STEPS[0]:
        arrays["x0_hats"] = np.asarray(x0_hats, np.float32)
    if stochastic:
        generator.manual_seed(SEED)
        arrays["noise"] = np.stack([torch.randn(SHAPE, generator=generator).numpy() for _ in range(steps)])
    return arrays


def main():
    import diffusers
    import torch

    start = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    arrays = {"versions": json.dumps(versions), "start": start}
    for case, (name, fields) in CASES.items():
        arrays[f"{case}/settings"] = json.dumps({"_class_name": name, **fields})
        for steps in STEPS:
            scheduler = getattr(diffusers, name)(**fields)
            for key, value in walk(scheduler, name, steps, start).items():
                arrays[f"{case}/{steps}/{key}"] = value
    path = pathlib.Path(__file__).parent / "schedulers.npz"
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
