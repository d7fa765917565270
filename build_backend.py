"""setuptools' build hooks (PEP 517, PEP 660), against the torch that the package will run with.

An isolated build sees nothing that is installed and would fetch a torch of its own, gigabytes with CUDA. The binary is
built on LibTorch's stable ABI, so one torch serves as well as another: the one in the environment that is installed
into is taken, and only where there is none a requirement asks for one.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import build_meta

# as in the Makefile: a fixed version, for which an index or a folder of wheels may hold a small CPU build
TORCH = "torch==2.13.0"

Settings = Mapping[str, Any] | None


def installed_torch() -> Path | None:
    """The site-packages folder with a torch, of the environment that is installed into."""
    folders = [folder for prefix in _environments() for folder in _site_packages(prefix)]
    return next((folder for folder in folders if (folder / "torch" / "version.py").exists()), None)


def _environments() -> list[Path]:
    """Where the package may go: pip runs the hooks with that environment's interpreter, uv with one of its own."""
    found = [Path(sys.prefix)]
    if "UV" in os.environ:
        commands = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
        active = [folder.parent for folder in commands if (folder.parent / "pyvenv.cfg").exists()]
        named = [os.environ.get("UV_PROJECT_ENVIRONMENT"), os.environ.get("CONDA_PREFIX")]
        found += [*active, *(Path(name) for name in named if name), Path(__file__).parent / ".venv"]
    return found


def _site_packages(prefix: Path) -> list[Path]:
    is_own_system = prefix == Path(sys.base_prefix)
    prefixes = [str(prefix)]
    if not is_own_system and _sees_system_packages(prefix):
        prefixes.append(sys.base_prefix)
    folders = [Path(folder) for folder in site.getsitepackages(prefixes)]
    return [*folders, Path(site.getusersitepackages())] if is_own_system else folders


def _sees_system_packages(prefix: Path) -> bool:
    try:
        lines = (prefix / "pyvenv.cfg").read_text(encoding="utf-8").lower().splitlines()
    except OSError:
        return False
    return "include-system-site-packages = true" in [line.strip() for line in lines]


def _lacks_torch() -> bool:
    """Whether an extension is built, and no torch can be imported for it yet."""
    return os.environ.get("FASTKD_SKIP_EXT") != "1" and importlib.util.find_spec("torch") is None


def required_torch() -> list[str]:
    """What an isolated build has to fetch: nothing where a torch is at hand or no extension is built."""
    if not _lacks_torch() or installed_torch() is not None:
        return []
    _say(
        f"fastkd-kernels: no torch is installed in {sys.prefix}, so {TORCH} is fetched to compile against, 200 MB to 3 "
        "GB according to the index. To avoid that, first install the torch that you will run with (pip install torch), "
        "or set FASTKD_SKIP_EXT=1 for the Python packages alone."
    )
    return [TORCH]


def _say(sentence: str) -> None:
    """On the terminal too: installers keep what a hook prints to themselves."""
    print(sentence, file=sys.stderr, flush=True)
    try:
        with open("/dev/tty", "w", encoding="utf-8") as terminal:
            print(f"\n{sentence}", file=terminal)
    except OSError:
        return


def _reach_torch() -> None:
    """Let setup.py import the installed torch; last on the path, so that the build's own tools come first."""
    folder = installed_torch() if _lacks_torch() else None
    if folder is not None:
        sys.path.append(str(folder))


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return required_torch()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return required_torch()


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    _reach_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    _reach_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _reach_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _reach_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    # MANIFEST.in names the sources, so that packing them needs no torch
    os.environ["FASTKD_SKIP_EXT"] = "1"
    return build_meta.build_sdist(sdist_directory, config_settings)
