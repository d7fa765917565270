"""setup.py as a module, for tests of what it knows and builds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load_setup_script() -> ModuleType:
    path = Path(__file__).parent.parent / "setup.py"
    specification = importlib.util.spec_from_file_location("fastkd_setup", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
