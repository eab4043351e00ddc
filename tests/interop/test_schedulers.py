"""Scheduler files: what they become, what comes back, and what is refused or said in a warning."""

import json
import warnings

import pytest

from vdiff_jax.diffusion.schedule import EDMRho, FlowTable, make_schedule
from vdiff_jax.interop.schedulers import process_settings, scheduler_json

DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
DPM = {"_class_name": "DPMSolverMultistepScheduler"}
UNIPC = {"_class_name": "UniPCMultistepScheduler"}
EULER = {"_class_name": "EulerDiscreteScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}

# As published; what other classes left in them included.
MODELSCOPE = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.15.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "thresholding": False,
    "trained_betas": None,
}
SVD = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "trained_betas": None,
    "use_karras_sigmas": True,
}


def test_the_files_of_the_video_families():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modelscope, svd = process_settings(MODELSCOPE), process_settings(SVD)
    assert (modelscope["prediction"], modelscope["schedule"], modelscope["sampler"]) == ("eps", "discrete", "ddim")
    assert modelscope["clip_x0"] is None
    table = make_schedule("discrete", **modelscope["schedule_settings"])
    assert (table.spacing, table.steps_offset, table.final) == ("leading", 1, "first")
    assert (svd["prediction"], svd["schedule"], svd["sampler"]) == ("v", "edm", "euler_edm")
    assert make_schedule("edm", **svd["schedule_settings"]) == EDMRho(0.002, 700.0, 7.0, "clean")
    flow = process_settings({**FLOW, "shift": 3.0})
    assert (flow["prediction"], flow["sampler"]) == ("velocity", "euler")
    assert make_schedule(flow["schedule"], **flow["schedule_settings"]) == FlowTable(3.0, 1000)


@pytest.mark.parametrize(
    "config",
    [
        MODELSCOPE,
        SVD,
        {**FLOW, "shift": 5.0},
        {**DDIM, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {**DDIM, "num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.3]},
        {**DDIM, "clip_sample": True, "clip_sample_range": 2.0},
        {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1},
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        {**EULER, "use_karras_sigmas": True, "sigma_min": 0.03, "sigma_max": 14.0, "final_sigmas_type": "sigma_min"},
        {**EULER, "use_exponential_sigmas": True},
        {**DPM, "use_karras_sigmas": True},
        {**DPM, "algorithm_type": "sde-dpmsolver++", "timestep_spacing": "leading", "steps_offset": 1},
        {**DPM, "solver_order": 1},
        {**DPM, "solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
        {**UNIPC, "use_beta_sigmas": True},
    ],
)
@pytest.mark.filterwarnings("ignore:scheduler_config.json")
def test_files_come_back(config):
    settings = process_settings(config)
    written = scheduler_json(settings)
    assert written["_class_name"] == config["_class_name"]
    assert process_settings(json.loads(json.dumps(written))) == settings
    for key in written.keys() & config.keys():  # what is written is what was read
        assert written[key] == config[key] or key == "beta_schedule" or (key, written[key]) == ("beta_start", 0.0001)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "_class_name None is not built"),
        ({"_class_name": "LCMScheduler"}, "'LCMScheduler' is not built; load the checkpoint"),
        ({"_class_name": "HeunDiscreteScheduler"}, "'HeunDiscreteScheduler' is not built.*name one of these"),
        ({**DDIM, "thresholding": True}, "thresholding True is not built; use False"),
        ({**DDIM, "prediction_type": "flow"}, "prediction_type 'flow' is not built"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type 'learned_range'"),
        ({**EULER, "interpolation_type": "log_linear"}, "interpolation_type 'log_linear'"),
        ({**EULER, "use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of use_karras_sigmas and use_beta"),
        ({**SVD, "sigma_max": None}, "timestep_type 'continuous' is not built; set use_karras_sigmas"),
        ({**SVD, "final_sigmas_type": "sigma_min"}, "final_sigmas_type 'sigma_min'"),
        ({**DPM, "use_lu_lambdas": True}, "use_lu_lambdas True"),
        ({**DPM, "use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({**DPM, "lambda_min_clipped": -5.1}, "lambda_min_clipped -5.1"),
        ({**DPM, "variance_type": "learned"}, "variance_type 'learned'"),
        ({**DPM, "algorithm_type": "magic"}, "algorithm_type 'magic'"),
        ({**UNIPC, "solver_p": ["diffusers", "DDIM"]}, "solver_p"),
        ({**UNIPC, "solver_order": 1}, "solver_order 1"),
        ({**FLOW, "use_dynamic_shifting": True}, "use_dynamic_shifting True"),
        ({**FLOW, "shift_terminal": 0.1}, "shift_terminal 0.1"),
        ({**FLOW, "stochastic_sampling": True}, "stochastic_sampling True"),
    ],
)
def test_what_is_not_built_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        process_settings(config)


@pytest.mark.parametrize(
    ("config", "message", "sampler"),
    [
        ({**DDIM, "colour": "red"}, "unknown fields have no effect: colour", "ddim"),
        ({**DDIM, "clip_sample": True}, "clip_sample: the noise kept", "ddim"),
        ({**DDIM, "timestep_spacing": "linspace"}, "'linspace': DDIMScheduler lands between", "ddim"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}, "variance_type 'fixed_large'", "ddpm"),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler is not built: sampler dpmpp_2m", "dpmpp_2m"),
        ({**DPM, "solver_order": 3}, "solver_order 3: order 2 is used", "dpmpp_2m"),
        ({**DPM, "solver_type": "heun"}, "solver_type 'heun'", "dpmpp_2m"),
        ({**DPM, "algorithm_type": "sde-dpmsolver"}, r"'sde-dpmsolver': sde-dpmsolver\+\+ is used", "dpmpp_2m_sde"),
        ({**DPM, "final_sigmas_type": "sigma_min"}, "final_sigmas_type 'sigma_min': the last step", "dpmpp_2m"),
        (
            {**DPM, "use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
            "'squaredcos_cap_v2': timesteps are rounded",
            "dpmpp_2m",
        ),
        ({**UNIPC, "predict_x0": False}, "predict_x0 False", "unipc"),
        ({**UNIPC, "solver_type": "bh1"}, "solver_type 'bh1': 'bh2' is used", "unipc"),
        ({**UNIPC, "disable_corrector": [0]}, r"disable_corrector \[0\]", "unipc"),
        ({**UNIPC, "lower_order_final": False}, "lower_order_final False", "unipc"),
    ],
)
def test_another_walk_is_said(config, message, sampler):
    with pytest.warns(UserWarning, match=message):
        assert process_settings(config)["sampler"] == sampler


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosine"}, "schedule 'cosine', sampler 'ddim'.*no public scheduler"),
        ({"sampler": "unipc"}, "placed as 'ddim', sampler 'unipc'"),
        ({"prediction": "velocity"}, "prediction 'velocity' have no public scheduler"),
        (
            {"schedule": "edm", "schedule_settings": {"final": "clean", "rho": 5.0}, "sampler": "euler_edm"},
            "rho 5.0 has no public scheduler",
        ),
        ({"sampler": "dpmpp_2m", "clip_x0": 1.0}, "PNDMScheduler has no field clip_sample"),
        (
            {"sampler": "euler_ancestral", "schedule_settings": {"placing": "euler", "sigmas": "karras"}},
            "EulerAncestralDiscreteScheduler has no field use_karras_sigmas",
        ),
    ],
)
def test_what_no_public_scheduler_does_is_not_written(change, message):
    settings = {"prediction": "v", "schedule": "discrete", "schedule_settings": {}, "sampler": "ddim", **change}
    with pytest.raises(ValueError, match=message):
        scheduler_json(settings)
