"""How a stage samples, as a table of sums: what its sampler does with images, without the sampler.

Every step of a sampler adds up the image, estimates of the clean image and noise, each times a number that depends on
the noise levels alone; so a sampler that is given vectors of coefficients instead of images returns the coefficients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from imagen_core.cascade import CascadeStage
from imagen_core.diffusion.guidance import GuidedDenoiser
from imagen_core.diffusion.variance import is_learned
from imagen_core.samplers import SeededNoise, sample
from imagen_core.samplers.base import History
from imagen_core.samplers.loop import new_history, start_std

Instruction = dict[str, Any]
_PROBES = {"learned_range_sigmoid": (-torch.inf, torch.inf)}
_SHAPE = (8,)
_TOLERANCE = 1e-6


@dataclass(slots=True)
class _Recorder:
    """Stands for the denoiser and the noise: every call is written down and gives the unit vector of its result."""

    stage: CascadeStage
    size: int
    names: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    channels: Tensor | None = None
    """What the network says of the variance: a number that stands for all pixels."""
    latest: str = ""

    def new(self, kind: str) -> tuple[str, Tensor]:
        name = f"{kind}{len(self.names)}"
        unit = torch.zeros(self.size, dtype=torch.float64)
        unit[len(self.names)] = 1
        self.names.append(name)
        return name, unit

    def noise(self) -> Tensor:
        name, unit = self.new("noise")
        self.instructions.append({"noise": name})
        return unit

    def denoise(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        """As of `GuidedDenoiser.unclipped`."""
        self.latest, _ = self.new("estimate")
        before, unit = self.new("unclipped")
        guided = self.stage.sampling.guidance.applies(sigma)
        self.instructions.append(
            {
                "estimate": self.latest,
                "unclipped": before,
                "of": self.terms(x),
                "sigma": float(sigma),
                "guided": guided,
            }
        )
        return unit, self.channels

    def clip(self, unclipped: Tensor) -> Tensor:
        """As of `GuidedDenoiser.clip`: the unit vector of the estimate that was recorded just before."""
        estimate = torch.roll(unclipped, -1)
        if self.terms(unclipped).keys() != {self.instructions[-1].get("unclipped")}:
            raise ValueError("its sampler clips something else than the network's latest estimate")
        return estimate

    def terms(self, vector: Tensor) -> dict[str, float]:
        """The coefficients that are not zero, by the name of what they are multiplied with."""
        return {self.names[index]: float(vector[index]) for index in vector.nonzero().flatten().tolist()}


def sampling_table(stage: CascadeStage) -> list[Instruction]:
    """The instructions of one stage, which `files/cascade_sampling.py` follows; the last one sets the stage's images.

    `{noise: NAME}` takes standard normal numbers. `{estimate: NAME, of: {NAME: NUMBER}, sigma, guided}` runs the
    network on a sum of images; `unclipped: NAME` names its estimate before the threshold. `{image: NAME, of: {NAME:
    NUMBER}}` adds up; the term `noise` of an entry `variance` has the deviation number * exp(log_ratio * v), v being
    the channels of an estimate's variance.

    Raises:
        ValueError: the sampler does something else than adding up, or the grid does not suit it.
    """
    config, settings = stage.config, stage.sampling
    sigmas = settings.grid.sigmas(config.diffusion.schedule, settings.num_steps)
    levels = sigmas.float().double()  # as the loop rounds them
    recorder = _Recorder(stage, 2 + 12 * len(levels))
    history = new_history(config.diffusion.schedule, len(levels) - 1)
    x = start_std(levels, settings.start, config.diffusion.schedule) * recorder.noise()
    for index in range(len(levels) - 1):
        x = _step(recorder, x, levels[index], levels[index + 1], history)
    table = _without_unused(recorder.instructions)
    _check(stage, table, levels)
    return table


def _without_unused(table: Sequence[Instruction]) -> list[Instruction]:
    """Without the names of estimates before the threshold that no entry reads."""
    read = {name for entry in table for name in entry.get("of", ())}
    return [{key: value for key, value in entry.items() if key != "unclipped" or value in read} for entry in table]


def _step(recorder: _Recorder, x: Tensor, sigma: Tensor, sigma_next: Tensor, history: History) -> Tensor:
    """Records one step, and returns the unit vector of the image that it gives."""
    diffusion, sampler = recorder.stage.config.diffusion, recorder.stage.sampling.sampler
    denoise = GuidedDenoiser(recorder.denoise, diffusion, recorder.clip)
    learns, variance = is_learned(diffusion.variance), None
    low, high = (torch.tensor(value, dtype=torch.float64) for value in _PROBES.get(diffusion.variance, (0.0, 1.0)))
    before, known = replace(history, derivatives=list(history.derivatives)), list(recorder.names)
    recorder.channels = low if learns else None
    result = sampler.step(denoise, x, sigma, sigma_next, recorder.noise, history)
    terms = recorder.terms(result)
    if learns:
        again = _Recorder(recorder.stage, recorder.size, known, channels=high)
        other = again.terms(
            sampler.step(
                GuidedDenoiser(again.denoise, diffusion, again.clip), x, sigma, sigma_next, again.noise, before
            )
        )
        changed = [name for name, value in terms.items() if value != other.get(name)]
        if len(changed) > 1 or (changed and not changed[0].startswith("noise")):
            raise ValueError(f"sampler {sampler.kind}: the learned variance changes more than the noise of a step")
        if changed:
            ratio = torch.tensor(other[changed[0]] / terms[changed[0]], dtype=torch.float64)
            variance = {"noise": changed[0], "log_ratio": float(ratio.log()), "channels": recorder.latest}
    name, unit = recorder.new("image")
    recorder.instructions.append({"image": name, "of": terms} | ({"variance": variance} if variance else {}))
    return unit


def _check(stage: CascadeStage, table: Sequence[Instruction], levels: Tensor) -> None:
    """Compares the table with the sampler itself, on numbers and a function in place of images and a network.

    Raises:
        ValueError: they differ.
    """
    settings, diffusion = stage.sampling, stage.config.diffusion
    learns = is_learned(diffusion.variance)

    def denoise(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        scaled = x / (1 + sigma)  # a weak function of x: large steps from high noise amplify every rounding
        return sigma.sin() + 1e-3 * scaled.sin(), scaled.cos() if learns else None

    expected = sample(
        settings.sampler,
        GuidedDenoiser(denoise, diffusion, _clip),
        levels,
        SeededNoise([0]),
        _SHAPE,
        dtype=torch.float64,
        start=settings.start,
        schedule=diffusion.schedule,
    )
    found = _followed(table, denoise, SeededNoise([0]), sigmoid=diffusion.variance == "learned_range_sigmoid")
    scale = max(1.0, float(expected.abs().max()))
    if not float((found - expected).abs().max()) <= _TOLERANCE * scale:
        raise ValueError(
            f"sampler {getattr(settings.sampler, 'kind', settings.sampler)}: its steps are no sums of images, "
            "estimates and noise, so no table can hold them; take another sampler"
        )


def _clip(estimate: Tensor) -> Tensor:
    """Stands for the threshold."""
    return estimate.clamp(-0.5, 0.5)


def _followed(table: Sequence[Instruction], denoise: Any, noise: SeededNoise, *, sigmoid: bool) -> Tensor:
    """What `files/cascade_sampling.py` does with a table, for numbers, float64 (1, *_SHAPE)."""
    values: dict[str, Tensor] = {}
    channels: dict[str, Tensor | None] = {}
    result = torch.zeros(())
    for entry in table:
        if "noise" in entry:
            values[entry["noise"]] = noise.normal(_SHAPE, dtype=torch.float64)
            continue
        factors: Mapping[str, Any] = entry["of"]
        if "variance" in entry:
            varied = entry["variance"]
            share = channels[varied["channels"]]
            assert share is not None
            spread = (varied["log_ratio"] * (share.sigmoid() if sigmoid else share)).exp()
            factors = {**factors, varied["noise"]: factors[varied["noise"]] * spread}
        result = sum((factor * values[name] for name, factor in factors.items()), torch.zeros(()))
        if "estimate" in entry:
            name = entry["estimate"]
            unclipped, channels[name] = denoise(result, torch.tensor(entry["sigma"], dtype=torch.float64))
            values[name], values[entry.get("unclipped", "")] = _clip(unclipped), unclipped
        else:
            values[entry["image"]] = result
    return result
