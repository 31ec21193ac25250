#!/usr/bin/env bash
# The last step of DDPM ends at a clean image, except where the last timestep is not 0: then it is a noisy one.
#
# diffusers 0.42.1's DDPMScheduler leaves the noise of a step out where `timestep > 0` is false. With trailing spacing, or an
# offset, the last timestep is greater than 0 (99 of 1000 in 10 steps), though the step goes to the clean image. With a fixed
# variance nothing is seen, since it is about 0 there; with `learned_range`, DeepFloyd IF's, the network may ask for up to
# the level of the last timestep, and that much noise is in the image that is returned. Samplers of imagen_core take no
# noise where a step ends at noise level 0, and the pipeline import takes the spacing over.
#
# Fails if it is not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cat > "$folder/last_step.py" <<'PYTHON'
import torch
from diffusers import DDPMScheduler


def noise_of_last_step(spacing, variance_type):
    """Standard deviation of what differs in the finished image between two seeds."""
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type=variance_type, timestep_spacing=spacing, clip_sample=False
    )
    scheduler.set_timesteps(10)
    last = scheduler.timesteps[-1]
    x = torch.zeros(1, 3, 64, 64)
    output = torch.zeros_like(x)
    if variance_type == "learned_range":
        output = torch.cat([output, torch.ones_like(x)], dim=1)  # the widest variance
    first, second = (
        scheduler.step(output, last, x, generator=torch.Generator().manual_seed(seed)).prev_sample for seed in (0, 1)
    )
    return int(last), ((first - second).std() / 2**0.5).item()


seen = {}
for spacing in ("leading", "trailing"):
    for variance_type in ("fixed_small", "learned_range"):
        last, noise = seen[spacing, variance_type] = noise_of_last_step(spacing, variance_type)
        print(f"{spacing}, {variance_type}: last timestep {last}, noise in the finished image {noise:.3f}")
assert seen["leading", "fixed_small"] == (0, 0.0)
assert seen["leading", "learned_range"] == (0, 0.0)
assert seen["trailing", "fixed_small"][0] == 99
assert seen["trailing", "fixed_small"][1] < 1e-6
assert seen["trailing", "learned_range"][0] == 99
assert 0.1 < seen["trailing", "learned_range"][1] < 0.2
PYTHON
"$folder/venv/bin/python" "$folder/last_step.py"
