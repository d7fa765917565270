"""What an isolated build fetches and sees: hooks run by the interpreter of an environment made for the test."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment with nothing in it."""
    folder = tmp_path / "an environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


def install_torch(environment: Path) -> Path:
    torch = site_packages(environment) / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text("__version__ = '2.13.0'")
    (torch / "version.py").touch()
    return torch


def hook(environment: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Code after `import build_backend`, behind a path that hides what is installed, as pip runs it."""
    tools = environment / "tools"
    if not tools.exists():
        tools.mkdir()
        packages = Path(setuptools.__file__).parents[1]
        for name in ("setuptools", "_distutils_hack"):
            (tools / name).symlink_to(packages / name)
    hidden = "import sys; sys.path = [entry for entry in sys.path if 'site-packages' not in entry]"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTKD_")}
    return subprocess.run(
        [environment / "bin" / "python", "-c", f"{hidden}\nimport build_backend\n{code}"],
        env=clean | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tools}"} | variables,
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )


REQUIRED = "print(build_backend.get_requires_for_build_wheel(), build_backend.get_requires_for_build_editable())"


def test_an_installed_torch_is_taken(environment: Path) -> None:
    torch = install_torch(environment)
    result = hook(environment, f"{REQUIRED}\nbuild_backend._reach_torch()\nimport torch\nprint(torch.__file__)")
    required, found = result.stdout.splitlines()
    assert required == "[] []"
    assert Path(found) == torch / "__init__.py"
    assert result.stderr == ""


def test_a_missing_torch_is_fetched_and_said(environment: Path) -> None:
    result = hook(environment, REQUIRED)
    assert re.fullmatch(r"\['torch==[\d.]+'\] \['torch==[\d.]+'\]\n", result.stdout)
    for text in ("no torch is installed in", "is fetched to compile against", "pip install torch", "FASTKD_SKIP_EXT=1"):
        assert text in result.stderr


def test_a_build_without_the_extension_and_a_source_archive_fetch_nothing(environment: Path) -> None:
    assert hook(environment, REQUIRED, FASTKD_SKIP_EXT="1").stdout == "[] []\n"
    assert hook(environment, "print(build_backend.get_requires_for_build_sdist())").stdout == "[]\n"


def test_a_torch_of_the_system_counts_where_the_environment_sees_it(environment: Path) -> None:
    folders = "import site\nsite.getsitepackages = lambda prefixes: [f'{prefix}/packages' for prefix in prefixes]\n"
    torch = environment / "system" / "packages" / "torch"
    torch.mkdir(parents=True)
    (torch / "version.py").touch()
    code = f"{folders}sys.base_prefix = {str(environment / 'system')!r}\nprint(build_backend.installed_torch())"
    assert hook(environment, code).stdout == "None\n"
    settings = environment / "pyvenv.cfg"
    settings.write_text(settings.read_text().replace("packages = false", "packages = true"))
    assert hook(environment, code).stdout == f"{torch.parent}\n"


def test_uv_sees_the_torch_of_the_active_environment(environment: Path, tmp_path: Path) -> None:
    """uv runs the hooks in an environment of its own, and leaves the active one on the path."""
    active = tmp_path / "active"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", active], check=True)
    torch = install_torch(active)
    path = f"{environment / 'bin'}{os.pathsep}{active / 'bin'}{os.pathsep}{os.environ['PATH']}"
    show = "print(build_backend.installed_torch())"
    assert hook(environment, show, PATH=path, UV="/bin/uv").stdout == f"{torch.parent}\n"
    assert hook(environment, show, PATH=path).stdout == "None\n"
    conda = hook(environment, show, CONDA_PREFIX=str(active), UV="/bin/uv")
    assert conda.stdout == f"{torch.parent}\n"


def test_makefile_and_backend_name_one_torch() -> None:
    in_makefile = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    in_backend = re.search(r'^TORCH = "(\S+)"$', (ROOT / "build_backend.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert in_makefile is not None
    assert in_backend is not None
    assert in_makefile.group(1) == in_backend.group(1)


def test_the_source_archive_builds_and_tests_from_itself(tmp_path: Path) -> None:
    """It holds every file of the checkout but what serves the checkout itself."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    code = f"import build_backend; print(build_backend.build_sdist({str(tmp_path)!r}))"
    # a build in the checkout would leave its egg-info behind
    source = tmp_path / "source"
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    missing = {name for name in listed.stdout.splitlines() if not name.startswith(".")} - inside
    assert missing == set()


def test_continuous_integration_runs_make_targets_and_nothing_else() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[0].split())
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    if not workflows:
        pytest.skip("a source archive has no workflows")
    runs = [run for path in workflows for run in re.findall(r"^\s+- run: ?(.*)$", path.read_text(), re.MULTILINE)]
    assert len(runs) > 5
    for run in runs:
        called = re.fullmatch(r"make ([\w-]+|\$\{\{ matrix\.leg \}\})", run)
        assert called, f"{run!r} is no make target"
        assert called.group(1) in targets or called.group(1).startswith("${{"), run


def test_files_that_the_build_names_are_there() -> None:
    """cibuildwheel's command and the Makefile's run where no test of this suite does."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = set(re.findall(r"\{project\}/([\w/.]+)", settings))
    named |= set(re.findall(r"\b(?:tests|bench)/\w+\.(?:py|txt)\b", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_file_of_vector_code_is_compiled_for_aarch64() -> None:
    """All but the files that need the headers of that machine's Python."""
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", "simd", f"PYTHON={sys.executable}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    compiled = set(re.findall(r"-c (csrc/\w+\.cpp)", planned))
    bound = {path for path in (ROOT / "csrc").glob("*.cpp") if "PyObject" in path.read_text(encoding="utf-8")}
    bound.add(ROOT / "csrc" / "module_cuda.cpp")
    assert compiled == {f"csrc/{path.name}" for path in set((ROOT / "csrc").glob("*.cpp")) - bound}


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def planned_by_make(target: str, tree: Path = ROOT) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", target, f"SYSTEM_PYTHON={sys.executable}"],
        cwd=tree, env=clean, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return planned.stdout


@needs_make
def test_packing_installs_no_developers_tools() -> None:
    for target in ("sdist", "wheel"):
        assert ".[dev]" not in planned_by_make(target), target
    assert "ninja" not in planned_by_make("sdist")
    assert ".[dev]" in planned_by_make("setup")


@needs_make
@pytest.mark.parametrize("leg", ["lowest", "newest"])
def test_a_leg_without_a_wheel_builds_one_before_it_fetches_packages(leg: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "setup.py", "tests/lowest.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    planned = planned_by_make(leg, tmp_path)
    assert 0 < planned.index("auditwheel repair") < planned.index(f"venv build/{leg}")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "fastkd_kernels-0.1.0-cp310-abi3-linux_x86_64.whl").touch()
    assert "auditwheel repair" not in planned_by_make(leg, tmp_path)


@needs_make
def test_a_removed_environment_is_set_up_again(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "build").mkdir()
    for stamp in ("compiling", "setup"):
        (tmp_path / "build" / f"{stamp}.venv.stamp").touch()
    command = ["make", "--dry-run", "setup", "ACTIVE="]
    planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert 0 <= planned.index("-m venv") < planned.index("setuptools>=") < planned.index(".[dev]")


@needs_make
def test_release_wheels_without_a_container_say_so_in_a_sentence(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho 'no daemon is running' >&2\necho 'a second line' >&2\nexit 1\n")
    docker.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for engine in ({}, {"CIBW_CONTAINER_ENGINE": "no-such-engine; create_args: --rm"}):
        result = subprocess.run(
            ["make", "release-wheels"],
            cwd=ROOT, env=os.environ | {"PATH": path} | engine, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode != 0
        sentence = result.stderr.splitlines()[0]
        assert "CIBW_CONTAINER_ENGINE=podman" in sentence
        assert "make wheel" in sentence
        assert ("no-such-engine: command not found" if engine else "(no daemon is running)") in sentence
