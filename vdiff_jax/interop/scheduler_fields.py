"""The fields of public scheduler classes, with the values they have where a file leaves them out."""

from __future__ import annotations

from typing import Any

TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
CUT = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
MULTISTEP = {
    **TABLE,
    **SIGMAS,
    "solver_order": 2,
    "thresholding": False,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
}

FIELDS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {
        **TABLE,
        **CUT,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    },
    "DDPMScheduler": {
        **TABLE,
        **CUT,
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    },
    "PNDMScheduler": {**TABLE, "skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading"},
    "EulerDiscreteScheduler": {
        **TABLE,
        **SIGMAS,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_spacing": "linspace",
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**TABLE, "timestep_spacing": "linspace", "rescale_betas_zero_snr": False},
    "DPMSolverMultistepScheduler": {
        **MULTISTEP,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **MULTISTEP,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
    },
    "FlowMatchEulerDiscreteScheduler": {
        **SIGMAS,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "invert_sigmas": False,
        "shift_terminal": None,
        "stochastic_sampling": False,
    },
}
"""By class, the fields that change what it does."""

WITHOUT_EFFECT = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
}
"""Fields that only qualify others, which are refused where they are on."""
