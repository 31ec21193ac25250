#!/usr/bin/env bash
# `len(x)` and `x.shape[0]` are the same number, but one of them makes an exported network fit one batch size only.
#
# `torch.export` of torch 2.13.0 traces without Python's bytecode by default (`strict=False`). There `len(tensor)` must return an
# int to Python, so the size becomes a constant: with `Dim.DYNAMIC` the export is refused ("specialized"), and with
# `Dim.AUTO` it succeeds and the program refuses every other batch when it is called. With `strict=True`, or with
# `x.shape[0]`, the size stays free. The networks in imagen_core/models use `shape[0]` for that reason.
#
# Fails if it is not as seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/mean.py" <<'PYTHON'
import torch
from torch.export import Dim, export


class ByLen(torch.nn.Module):
    def forward(self, x):
        return x.sum(dim=0) / len(x)


class ByShape(torch.nn.Module):
    def forward(self, x):
        return x.sum(dim=0) / x.shape[0]


def outcome(module, size, strict):
    """What an export for 3 rows says of 5 rows of ones."""
    try:
        program = export(module, (torch.ones(3, 2),), dynamic_shapes=({0: size},), strict=strict)
    except Exception as error:
        return f"export: {type(error).__name__}"
    try:
        return program.module()(torch.ones(5, 2)).tolist()
    except Exception as error:
        return f"call: {type(error).__name__}"


seen = {
    (type(module).__name__, name, strict): outcome(module, size, strict)
    for module in (ByLen(), ByShape())
    for name, size in (("dynamic", Dim.DYNAMIC), ("auto", Dim.AUTO))
    for strict in (False, True)
}
for case, result in seen.items():
    print(*case, result)
assert seen.pop(("ByLen", "dynamic", False)) == "export: UserError"
assert seen.pop(("ByLen", "auto", False)) == "call: AssertionError"
assert len(seen) == 6
assert all(result == [1.0, 1.0] for result in seen.values())
PYTHON
"$folder/venv/bin/python" "$folder/mean.py"
