"""DeepFloyd IF's pipelines of diffusers as stages of a cascade, and back: diffusion, and how a stage samples.

diffusers 0.42 keeps the noise levels of training in the scheduler that samples (scheduler/scheduler_config.json), and
those of stage II's low-resolution image in another (image_noising_scheduler/). The constants are those that IFPipeline
and IFSuperResolutionPipeline have in their code.
"""

from collections.abc import Mapping
from typing import Any

from imagen_core.conversion.deepfloyd_unet import unet_config, why_not
from imagen_core.diffusion.config import DenoiserConfig
from imagen_core.diffusion.low_res import UniformNoise
from imagen_core.diffusion.schedules import Discrete

_NUM_STEPS, _GUIDANCE = (100, 50), (7.0, 4.0)  # of stages I and II
_NOISE_LEVEL = 250
"""Step whose noise the low-resolution image gets in sampling."""
_FACTOR = 4
"""How much larger stage II's images are than stage I's."""
_NO_CAP = 1e6  # diffusers has no dynamic thresholding without a largest divisor
_KINDS = {"DDPMScheduler": "ancestral", "DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpmpp_2m"}
_BETAS = {"squaredcos_cap_v2": "cosine", "linear": "linear"}
_COMMON: dict[str, tuple[Any, ...]] = {  # what the schedulers share: the default first, then what else works here
    "prediction_type": ("epsilon",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "clip_sample_range": (1.0,),
}
_LINEAR = {"beta_start": (0.0001,), "beta_end": (0.02,)}  # they count with linear betas only
_SAMPLERS: dict[str, dict[str, tuple[Any, ...]]] = {  # the same of each scheduler
    "DDPMScheduler": {"timestep_spacing": ("leading", "linspace", "trailing")},
    "DDIMScheduler": {"timestep_spacing": ("leading", "linspace", "trailing"), "set_alpha_to_one": (True,)},
    "DPMSolverMultistepScheduler": {
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "solver_order": (2,),
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint",),
        "lower_order_final": (True,),
        "euler_at_final": (False,),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None),
        "final_sigmas_type": ("zero",),
    },
}


def denoiser_config(
    unet: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    noising: Mapping[str, Any] | None = None,
    low_res_px: int | None = None,
) -> DenoiserConfig:
    """The cascade stage that corresponds to a pipeline.

    Args:
        unet, scheduler, noising: its unet/config.json, scheduler/scheduler_config.json and, of stage II,
            image_noising_scheduler/scheduler_config.json.
        low_res_px: side of stage I's images, which stage II does not name; None: a fourth of its own.
    Raises:
        ValueError: a setting is missing, unknown, or has no counterpart here.
    """
    network = unet_config(unet)
    learned = scheduler.get("variance_type") == "learned"
    config: dict[str, Any] = {
        "unet": network.model_dump(),
        "diffusion": {
            "schedule": _schedule("scheduler", scheduler),
            "objective": "eps",
            "variance": "learned" if learned else "learned_range",
        },
        "size_px": network.image_size_px,
    }
    if network.low_res:
        if noising is None:
            raise ValueError("image_noising_scheduler is missing; give a complete pipeline of stage II")
        schedule = _schedule("image_noising_scheduler", noising)
        time = (_NOISE_LEVEL + 0.5) / schedule["num_steps"]  # the middle of the step
        config |= {
            "low_res_px": low_res_px or network.image_size_px // _FACTOR,
            "low_res_upsampling": "bilinear_corners",
            "low_res_noise": {"kind": "uniform", "schedule": schedule, "sample_time": time},
        }
    return DenoiserConfig.model_validate(config)


def sampling(scheduler: Mapping[str, Any], *, low_res: bool) -> dict[str, Any]:
    """A `SamplingConfig`, as plain values: how the pipeline samples with this scheduler.

    Raises:
        ValueError: the scheduler, or a setting of it, has no counterpart here.
    """
    name = scheduler.get("_class_name")
    if name not in _SAMPLERS:
        raise ValueError(f"scheduler: {name} has no counterpart here; give the pipeline a {' or '.join(_SAMPLERS)}")
    _check("scheduler", scheduler, _COMMON | _SAMPLERS[name])
    spacing = scheduler.get("timestep_spacing", _SAMPLERS[name]["timestep_spacing"][0])
    grid: dict[str, Any] = {"kind": "uniform", "spacing": spacing}
    if spacing == "leading":
        grid["offset"] = scheduler.get("steps_offset", 0)
    if name == "DPMSolverMultistepScheduler" and spacing != "trailing":
        grid["skip_lowest"] = True
    return {
        "sampler": _sampler(name, scheduler),
        "grid": grid,
        "num_steps": _NUM_STEPS[low_res],
        "start": "unit_variance",
        "guidance": {"text": _GUIDANCE[low_res]},
        "threshold": _threshold(name, scheduler),
    }


def not_expressible(config: DenoiserConfig) -> str | None:
    """Why no pipeline of DeepFloyd IF has this stage, in words; None if one has."""
    diffusion, unet = config.diffusion, config.unet
    if reason := why_not(unet):
        return f"unet.{reason}"
    if not isinstance(diffusion.schedule, Discrete) or diffusion.schedule.beta not in _BETAS.values():
        return "diffusion.schedule is not discrete with beta cosine or linear"
    if diffusion.schedule.rescale_steps:
        return "diffusion.schedule.rescale_steps is true"
    if diffusion.objective != "eps" or diffusion.variance not in ("learned_range", "learned"):
        return f"diffusion predicts {diffusion.objective}, with variance {diffusion.variance}; not eps, with a learned"
    if unet.low_res:
        noise = config.low_res_noise
        if config.low_res_upsampling != "bilinear_corners" or config.low_res_noise_at != "size_px":
            return f"low_res_upsampling is {config.low_res_upsampling!r}, not 'bilinear_corners'"
        if not isinstance(noise, UniformNoise) or not isinstance(noise.schedule, Discrete):
            return "low_res_noise is not uniform with a discrete schedule"
        if noise.schedule.rescale_steps:
            return "low_res_noise.schedule.rescale_steps is true"
    return None


def published_sampling(*, low_res: bool) -> dict[str, Any]:
    """A `SamplingConfig`, as plain values: how IF's own pipelines sample."""
    scheduler = {
        "_class_name": "DDPMScheduler",
        "variance_type": "learned_range",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
        "sample_max_value": 1.0 if low_res else 1.5,
    }
    return sampling(scheduler, low_res=low_res)


def scheduler_settings(config: DenoiserConfig, session: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json of a stage: what `sampling` reads as this session. Steps and guidance are no part of it.

    Args:
        session: a `SamplingConfig` as plain values.
    Raises:
        ValueError: no scheduler of diffusers that is known here samples so.
    """
    sampler, grid, threshold = (dict(session[part]) for part in ("sampler", "grid", "threshold"))
    name = {kind: name for name, kind in _KINDS.items()}.get(sampler["kind"])
    solver = name == "DPMSolverMultistepScheduler"
    spacing = grid.get("spacing", "linspace")
    for part, value, possible in (
        ("sampler.kind", sampler["kind"], tuple(_KINDS.values())),
        ("sampler.eta", sampler.get("eta", 0.0), (0.0,)),
        ("sampler.kept_noise", sampler.get("kept_noise"), ("of_network",) if name == "DDIMScheduler" else (None,)),
        ("grid.kind", grid["kind"], ("uniform",)),
        ("grid.skip_lowest", grid.get("skip_lowest", False), (solver and spacing != "trailing",)),
        ("threshold.kind", threshold["kind"], ("dynamic", "none") if solver else ("dynamic", "static", "none")),
        ("start", session.get("start"), ("unit_variance",)),
    ):
        if value not in possible:
            raise ValueError(f"{part} is {value!r}, and only {' or '.join(map(repr, possible))} has a counterpart")
    schedule = config.diffusion.schedule
    assert isinstance(schedule, Discrete)
    settings = {
        **_betas(schedule),
        "_class_name": name,
        "prediction_type": "epsilon",
        "timestep_spacing": spacing,
        "steps_offset": grid.get("offset", 0),
        "thresholding": threshold["kind"] == "dynamic",
        "dynamic_thresholding_ratio": threshold["percentile"],
        "sample_max_value": _NO_CAP if threshold.get("cap") is None else threshold["cap"],
    }
    if not solver:
        settings |= {"clip_sample": threshold["kind"] == "static", "clip_sample_range": 1.0}
    if name != "DDIMScheduler":
        settings["variance_type"] = sampler.get("variance") or config.diffusion.variance
    return settings


def noising_settings(config: DenoiserConfig) -> dict[str, Any]:
    """scheduler_config.json of the scheduler that noises stage II's low-resolution image."""
    assert config.low_res_noise is not None
    schedule = config.low_res_noise.schedule
    assert isinstance(schedule, Discrete)
    return {**_betas(schedule), "prediction_type": "epsilon", "variance_type": "fixed_small", "clip_sample": True}


def _schedule(part: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    beta, steps = settings.get("beta_schedule", "linear"), settings.get("num_train_timesteps", 1000)
    if beta not in _BETAS or (beta == "linear" and steps != 1000):
        raise ValueError(f"{part}: beta_schedule {beta!r} in {steps} steps has no counterpart; give {list(_BETAS)}")
    _check(part, settings, _COMMON | (_LINEAR if beta == "linear" else {}))
    return {"kind": "discrete", "num_steps": steps, "beta": _BETAS[beta]}


def _check(part: str, settings: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ValueError for a setting with another value than those of `known`, the default first."""
    for name, possible in known.items():
        if (value := settings.get(name, possible[0])) not in possible:
            raise ValueError(f"{part}: {name} is {value!r}, but only {' or '.join(map(repr, possible))} works here")


def _sampler(name: str, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    kind = _KINDS[name]
    if kind != "ancestral":
        return {"kind": kind, "kept_noise": "of_network"} if kind == "ddim" else {"kind": kind}
    variance = scheduler.get("variance_type", "fixed_small")
    known = {"learned_range": {}, "learned": {}, "fixed_small": {"variance": "fixed_small"}}
    known |= {"fixed_large": {"variance": "fixed_large"}}
    if variance not in known:
        raise ValueError(f"scheduler: variance_type is {variance!r}, but only {' or '.join(known)} works here")
    return {"kind": kind, **known[variance]}


def _betas(schedule: Discrete) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _BETAS.items()}
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": schedule.num_steps,
        "beta_schedule": names[schedule.beta],
        "beta_start": 0.0001,
        "beta_end": 0.02,
    }


def _threshold(name: str, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Dynamic thresholding, else clipping, else nothing; diffusers' solver++ has no clipping of its own."""
    if scheduler.get("thresholding", False):
        ratio, cap = scheduler.get("dynamic_thresholding_ratio", 0.995), scheduler.get("sample_max_value", 1.0)
        return {"kind": "dynamic", "percentile": ratio, "cap": cap}
    clips = name != "DPMSolverMultistepScheduler" and scheduler.get("clip_sample", True)
    return {"kind": "static" if clips else "none"}
