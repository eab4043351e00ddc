"""Scheduler files of public checkpoints -> prediction, schedule, sampler, and back.

A scheduler_config.json says three things at once: what the network was trained on (betas, prediction type), where a
walk places its timesteps, and which solver walks. Here they are `prediction`, `schedule` with its settings, and
`sampler`. What cannot be honoured is refused, or said in a warning where only the path of the walk is another.

Known differences that remain, all in the solver and not in the network's inputs:

    DDIM, DDPM      theirs step to `t - T // steps` whatever timestep comes next; ours to the next one. The same where
                    steps divide T and spacing is "leading" or "trailing".
    clip_sample     DDIM keeps the noise of the uncut estimate, ours that of the cut one (`ClipEstimate`).
    PNDM            not built; DPM-Solver++ 2M walks the same timesteps.
    sigma_min       DPM-Solver++ with final_sigmas_type "sigma_min" takes the last of 15 or more steps at order 2.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from vdiff_jax.interop.scheduler_fields import FIELDS, SIGMAS, WITHOUT_EFFECT

FILE = "scheduler_config.json"

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def process_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler_config.json means here.

    Returns:
        prediction, schedule, schedule_settings and sampler as in a model's settings, and clip_x0: the limit of clean
        estimates (`sampling.clipping.ClipEstimate`), or None.
    Raises:
        ValueError: a class or a setting that is not built.
    Warns of settings whose walk is another one here, and of fields that no known class has.
    """
    name = config.get("_class_name")
    if name == "LCMScheduler":
        raise _not_built("_class_name", name, "load the checkpoint that its consistency model was distilled from")
    if name not in FIELDS:
        known = ", ".join(FIELDS)
        raise ValueError(
            f"{FILE}: _class_name {name!r} is not built; where its betas and prediction_type are right for the "
            f"checkpoint, name one of these instead: {known}."
        )
    every = set().union(WITHOUT_EFFECT, *FIELDS.values())
    unknown = sorted(key for key in config if key not in every and not key.startswith("_"))
    if unknown:
        _warn(f"unknown fields have no effect: {', '.join(unknown)}")
    # What another class left in the file has no effect on this one, as in the library that wrote it.
    fields = {key: config[key] if key in config else default for key, default in FIELDS[name].items()}
    if name == "FlowMatchEulerDiscreteScheduler":
        return _flow(fields)
    prediction = fields["prediction_type"]
    if prediction not in PREDICTIONS:
        raise _not_built("prediction_type", prediction, f"use one of {', '.join(PREDICTIONS)}")
    _refuse(fields, thresholding=False, use_flow_sigmas=False, use_dynamic_shifting=False, use_lu_lambdas=False)
    settings = {
        "prediction": PREDICTIONS[prediction],
        "schedule": "discrete",
        "schedule_settings": _table_settings(name, fields),
        "sampler": _sampler(name, fields),
        "clip_x0": float(fields["clip_sample_range"]) if fields.get("clip_sample") else None,
    }
    if fields.get("timestep_type", "discrete") == "continuous" and prediction == "v_prediction":
        settings.update(_continuous(fields))
    elif fields.get("interpolation_type", "linear") != "linear":
        raise _not_built("interpolation_type", fields["interpolation_type"], "use 'linear'")
    return settings


def _table_settings(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Settings of schedule "discrete"."""
    if name.startswith("Euler"):
        placing = "euler"
    else:
        placing = "multistep" if "solver_order" in fields else "ddim"
    betas = fields["trained_betas"]
    settings = {
        "betas": fields["beta_schedule"] if betas is None else list(betas),
        "num_train_steps": fields["num_train_timesteps"],
        "beta_start": fields["beta_start"],
        "beta_end": fields["beta_end"],
        "zero_terminal_snr": bool(fields.get("rescale_betas_zero_snr", False)),
        "spacing": fields["timestep_spacing"],
        "steps_offset": fields["steps_offset"],
        "final": "clean",
        "placing": placing,
    }
    if not fields.get("set_alpha_to_one", True) or fields.get("final_sigmas_type", "zero") == "sigma_min":
        settings["final"] = "first"
    kinds = [kind for kind in ("karras", "exponential", "beta") if fields.get(f"use_{kind}_sigmas")]
    if len(kinds) > 1:
        raise ValueError(f"{FILE}: only one of use_{'_sigmas and use_'.join(kinds)}_sigmas can be true.")
    if kinds:
        settings["sigmas"] = kinds[0]
        settings |= {key: fields[key] for key in ("sigma_min", "sigma_max") if fields.get(key) is not None}
        if kinds[0] == "karras" and name.startswith("DPM") and settings["betas"] == "squaredcos_cap_v2":
            _warn("use_karras_sigmas with beta_schedule 'squaredcos_cap_v2': timesteps are rounded, not cut")
    if placing == "ddim" and settings["spacing"] == "linspace":
        _warn(f"timestep_spacing 'linspace': {name} lands between its timesteps, here each step ends at the next one")
    return settings


def _sampler(name: str, fields: dict[str, Any]) -> str:
    if name == "DDIMScheduler":
        if fields["clip_sample"]:
            _warn("clip_sample: the noise kept in a step is that of the clipped estimate (use_clipped_model_output)")
        return "ddim"
    if name == "DDPMScheduler":
        variance = fields["variance_type"]
        if variance.startswith("learned"):
            raise _not_built("variance_type", variance, "use a checkpoint whose network predicts no variance")
        if not variance.startswith("fixed_small"):
            _warn(f"variance_type {variance!r}: steps add the noise of 'fixed_small'")
        return "ddpm"
    if name == "PNDMScheduler":
        _warn("PNDMScheduler is not built: sampler dpmpp_2m walks the same timesteps")
        return "dpmpp_2m"
    if name.startswith("Euler"):
        return "euler_ancestral" if "Ancestral" in name else "euler_edm"
    order = fields["solver_order"]
    if order > 2:
        _warn(f"solver_order {order}: order 2 is used")
    if name == "UniPCMultistepScheduler":
        return _unipc(fields, order)
    return _dpm_solver(fields, order)


def _unipc(fields: dict[str, Any], order: int) -> str:
    _refuse(fields, solver_p=None)
    if order == 1:
        raise _not_built("solver_order", 1, "use 2")
    for key, built in (("predict_x0", True), ("solver_type", "bh2"), ("disable_corrector", [])):
        # Solver types of other classes mean bh2 here, as in the library that wrote the file.
        if fields[key] != built and fields[key] not in ("midpoint", "heun", "logrho"):
            _warn(f"{key} {fields[key]!r}: {built!r} is used")
    if not fields["lower_order_final"]:
        _warn("lower_order_final False: the last step is of order 1")
    return "unipc"


def _dpm_solver(fields: dict[str, Any], order: int) -> str:
    _refuse(fields, variance_type=None)
    if fields["lambda_min_clipped"] > -20:
        raise _not_built("lambda_min_clipped", fields["lambda_min_clipped"], "use -Infinity")
    algorithm = fields["algorithm_type"]
    if algorithm in ("dpmsolver", "sde-dpmsolver"):
        _warn(f"algorithm_type {algorithm!r}: {algorithm}++ is used")
    elif algorithm not in ("dpmsolver++", "sde-dpmsolver++", "deis"):  # deis means dpmsolver++ in that class
        raise _not_built("algorithm_type", algorithm, "use 'dpmsolver++' or 'sde-dpmsolver++'")
    if fields["solver_type"] == "heun" and order > 1:
        _warn("solver_type 'heun': 'midpoint' is used")
    if fields["final_sigmas_type"] == "sigma_min" and order > 1 and not fields["euler_at_final"]:
        _warn("final_sigmas_type 'sigma_min': the last step is of order 1 for any number of steps")
    if order == 1:
        return "ddpm" if algorithm.startswith("sde") else "ddim"
    return "dpmpp_2m_sde" if algorithm.startswith("sde") else "dpmpp_2m"


def _continuous(fields: dict[str, Any]) -> dict[str, Any]:
    """A network told ln(sigma) / 4, such as Stable Video Diffusion."""
    if not fields["use_karras_sigmas"] or fields["sigma_min"] is None or fields["sigma_max"] is None:
        raise _not_built("timestep_type", "continuous", "set use_karras_sigmas, sigma_min and sigma_max as well")
    if fields["final_sigmas_type"] != "zero":
        raise _not_built("final_sigmas_type", fields["final_sigmas_type"], "use 'zero' with continuous timesteps")
    edm = {"sigma_min": fields["sigma_min"], "sigma_max": fields["sigma_max"], "rho": 7.0, "final": "clean"}
    return {"schedule": "edm", "schedule_settings": edm}


def _flow(fields: dict[str, Any]) -> dict[str, Any]:
    off = dict.fromkeys(("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling", *SIGMAS), False)
    _refuse(fields, shift_terminal=None, **off)
    settings = {"shift": fields["shift"], "num_train_steps": fields["num_train_timesteps"]}
    return {
        "prediction": "velocity",
        "schedule": "flow_table",
        "schedule_settings": settings,
        "sampler": "euler",
        "clip_x0": None,
    }


def _refuse(fields: dict[str, Any], **built: Any) -> None:
    """Raises ValueError where a field of the class is not as built. 0, False and None are one value."""
    for key, value in built.items():
        if key in fields and (fields[key] or None) != (value or None):
            raise _not_built(key, fields[key], f"use {value!r}")


def _not_built(key: str, value: Any, fix: str) -> ValueError:
    return ValueError(f"{FILE}: {key} {value!r} is not built; {fix}.")


def _warn(message: str) -> None:
    warnings.warn(f"{FILE}: {message}", stacklevel=4)


# Back ------------------------------------------------------------------------------------------------------------

_CLASSES: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("ddim", "ddim"): ("DDIMScheduler", {}),
    ("ddim", "ddpm"): ("DDPMScheduler", {}),
    ("ddim", "dpmpp_2m"): ("PNDMScheduler", {"skip_prk_steps": True}),
    ("euler", "euler_edm"): ("EulerDiscreteScheduler", {}),
    ("euler", "euler_ancestral"): ("EulerAncestralDiscreteScheduler", {}),
    ("multistep", "ddim"): ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    ("multistep", "ddpm"): ("DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
    ("multistep", "dpmpp_2m"): ("DPMSolverMultistepScheduler", {}),
    ("multistep", "dpmpp_2m_sde"): ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("multistep", "unipc"): ("UniPCMultistepScheduler", {}),
}
"""Public class and its distinguishing fields, by placing of timesteps and sampler."""


def scheduler_json(settings: Any) -> dict[str, Any]:
    """The scheduler_config.json with which public samplers walk as a model with these settings does.

    settings: a mapping or dataclass with prediction, schedule, schedule_settings, sampler and, if there is one,
        clip_x0. `process_settings` of the result gives them back.
    Raises:
        ValueError: a schedule, or a sampler on its timesteps, that no public class has.
    """
    values = dict(settings) if isinstance(settings, Mapping) else dataclasses.asdict(settings)
    schedule, given, sampler = values["schedule"], dict(values["schedule_settings"]), values["sampler"]
    prediction = {ours: theirs for theirs, ours in PREDICTIONS.items()}.get(values["prediction"])
    if schedule == "flow_table" and sampler == "euler" and values["prediction"] == "velocity":
        flow = {"num_train_timesteps": given.get("num_train_steps", 1000), "shift": given.get("shift", 1.0)}
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **flow}
    if schedule == "edm" and given.get("final") == "clean" and sampler == "euler_edm" and prediction == "v_prediction":
        if given.get("rho", 7.0) != 7.0:
            raise ValueError(f"schedule 'edm' with rho {given['rho']} has no public scheduler; theirs have rho 7.")
        return {
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": prediction,
            "timestep_type": "continuous",
            "use_karras_sigmas": True,
            "sigma_min": given.get("sigma_min", 0.002),
            "sigma_max": given.get("sigma_max", 80.0),
            "timestep_spacing": "leading",
        }
    placing = given.get("placing", "ddim")
    found = _CLASSES.get((placing, sampler)) if schedule == "discrete" else None
    if found is None or prediction is None:
        on = f" with timesteps placed as {placing!r}" if schedule == "discrete" else ""
        raise ValueError(
            f"schedule {schedule!r}{on}, sampler {sampler!r} and prediction {values['prediction']!r} have no public "
            "scheduler together; use schedule 'discrete' with the sampler its timesteps are placed for."
        )
    name, extra = found
    return _table_json(name, extra, prediction, given, values.get("clip_x0"))


def _table_json(
    name: str, extra: dict[str, Any], prediction: str, given: dict[str, Any], clip_x0: float | None
) -> dict[str, Any]:
    betas = given.get("betas", "scaled_linear")
    first = given.get("final", "clean") == "first"
    sigmas = given.get("sigmas", "table")
    written = {
        "num_train_timesteps": given.get("num_train_steps", 1000),
        "beta_start": given.get("beta_start", 0.00085),
        "beta_end": given.get("beta_end", 0.012),
        "beta_schedule": betas if isinstance(betas, str) else "linear",
        "trained_betas": None if isinstance(betas, str) else list(betas),
        "prediction_type": prediction,
        "timestep_spacing": given.get("spacing", "leading"),
        "steps_offset": given.get("steps_offset", 0),
        **extra,
    }
    wanted = {
        "rescale_betas_zero_snr": (bool(given.get("zero_terminal_snr", False)), False),
        "clip_sample": (clip_x0 is not None, False),
        "clip_sample_range": (1.0 if clip_x0 is None else clip_x0, 1.0),
        "sigma_min": (given.get("sigma_min"), None),
        "sigma_max": (given.get("sigma_max"), None),
        **{f"use_{kind}_sigmas": (sigmas == kind, False) for kind in ("karras", "exponential", "beta")},
    }
    end = "set_alpha_to_one" if "set_alpha_to_one" in FIELDS[name] else "final_sigmas_type"
    wanted[end] = (not first, True) if end == "set_alpha_to_one" else ("sigma_min" if first else "zero", "zero")
    for key, (value, usual) in wanted.items():
        if key in FIELDS[name]:
            written[key] = value
        elif value != usual:
            raise ValueError(f"{name} has no field {key}, which these settings need to be {value!r}.")
    return {"_class_name": name, **written}
