#!/usr/bin/env bash
# The last noise level of diffusers' flow-matching Euler scheduler depends on who lists the levels.
#
# In diffusers 0.42.1 FlowMatchEulerDiscreteScheduler shifts its table of levels when it is made, takes the ends of the
# shifted table as the range of set_timesteps(n), and shifts the levels in between again: with shift=3 the last level
# before 0 is not 0.001 shifted once, 0.0030, but twice, 0.0089. Levels that one gives (`sigmas=`, as most pipelines do) are
# shifted once. With shift=1 both are the same. A comparison step by step has to list the levels: tests/imagen_core/samplers
# compares both, and docs/how-to/sample.md says which grid is which.
#
# Fails if it is not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from diffusers import FlowMatchEulerDiscreteScheduler


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


for shift in (1.0, 3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(10)
    own = float(scheduler.sigmas[-2])
    scheduler.set_timesteps(sigmas=[1 - 0.999 * n / 9 for n in range(10)])
    given = float(scheduler.sigmas[-2])
    once = shifted(0.001, shift)
    print(f"shift {shift:g}: its own last level {own:.4f}, of levels that end at 0.001 {given:.4f}; shifted once {once:.4f}")
    assert abs(given - once) < 1e-6
    assert abs(own - shifted(once, shift)) < 1e-6
PYTHON
