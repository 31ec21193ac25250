"""Python imports this at its start where this folder is on PYTHONPATH: in every process that a test starts."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if "TESTS_REFUSED_FILE" in os.environ:
    spec = spec_from_file_location("tests.network", Path(__file__).resolve().parents[1] / "network.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()
