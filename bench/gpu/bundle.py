"""What a lent GPU need not make: the extension and every kernel that its run launches, compiled without a GPU.

    make gpu-bundle                    # or, in an environment like the GPU's: python -m gpu.bundle

The bundle lies in build/gpu-bundle: the extension's two libraries, Triton's cache as one archive, and a manifest of
what they were made for. `take_extension` and `take_kernels` put them where they belong and say aloud what does not fit;
`News` tells which kernels had to be compiled after all. Triton is not told that a cache comes from elsewhere: it looks
each kernel up by a hash of its source, its arguments, its options and all of Triton, so a wrong one is never taken,
only missed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path
from typing import Any

from gpu import ROOT
from gpu.plan import ORDER

FOLDER = ROOT / "build" / "gpu-bundle"
MOST_BYTES = 40 * 2**20
ARCHITECTURES = "9.0+PTX"
STEPS = ("sanitize", "ops", "models", "sweep")
TESTS = tuple(name for step in ORDER for name in step.tests if name != "*")
"""Of tests/, whose launches are in the bundle: those that prove rows. What the others launch is compiled on the GPU."""
SECONDS_A_FILE = 3600.0
"""Of tests: some wait for what a kernel that does not run never writes."""
KEPT = (".cubin", ".json", ".ptx", ".ttgir", ".so")
"""Of what Triton writes: what it loads, and what tests read."""
_MANIFEST, _ARCHIVE = "manifest.json", "triton-cache.tar.xz"


# What both sides have to agree on


def traits() -> dict[str, str]:
    """What the extension and the hashes of the kernels depend on here; nothing is imported, which may hang on a GPU."""
    return {
        "python": platform.python_version(),
        "extension suffix": sysconfig.get_config_var("EXT_SUFFIX"),
        "torch": _torch_version(),
        "triton": _version("triton"),
        "C++ sources": _digest("csrc", (".cpp", ".cu", ".cuh", ".h")),
        "kernel sources": _digest("fastkd_kernels", (".py",)),
    }


OF_EXTENSION = ("extension suffix", "torch", "C++ sources")
OF_CACHE = ("extension suffix", "triton", "kernel sources")


def _torch_version() -> str:
    """With its +cu130, which the version of the package may lack."""
    found = util.find_spec("torch")
    text = "" if found is None or found.origin is None else Path(found.origin).with_name("version.py").read_text()
    named = re.search(r"^__version__\b.*?=\s*['\"](.+?)['\"]", text, re.MULTILINE)
    return named.group(1) if named else _version("torch")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _digest(folder: str, suffixes: tuple[str, ...]) -> str:
    digest = sha256()
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in suffixes:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# Making it


def make(folder: Path, steps: Sequence[str], tests: Sequence[str], cache: Path | None = None) -> dict[str, Any]:
    """Build the extension, compile what `steps` and `tests` launch, and pack both into `folder`.

    Args:
        cache: a folder in which kernels may lie from an earlier time; default: one that is thrown away.

    Raises:
        RuntimeError: something could not be built, or the bundle exceeds MOST_BYTES.
    """
    check_folder(folder)
    began = os.times()
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-") as temporary:
        work = Path(temporary)
        libraries = build_extension(work)
        cache = work / "triton" if cache is None else cache
        kernels = compile_kernels(work, cache, steps, tests)
        now = os.times()
        spent = now.children_user + now.children_system - began.children_user - began.children_system
        return assemble(folder, libraries, cache, kernels, spent)


def assemble(
    folder: Path, libraries: Sequence[Path], cache: Path, kernels: Sequence[Mapping[str, Any]], cpu_seconds: float
) -> dict[str, Any]:
    """The bundle of what was made; returns its manifest.

    Raises:
        RuntimeError: it exceeds MOST_BYTES, or see `check_folder`.
    """
    check_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for library in libraries:
        shutil.copy2(library, folder)
    pack(cache, [kernel["hash"] for kernel in kernels], folder / _ARCHIVE)
    manifest = {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "cpu_seconds": round(cpu_seconds),
        "traits": traits(),
        "extension": [library.name for library in libraries],
        "kernels": {_folder_of(kernel["hash"]): kernel["kernel"] for kernel in kernels},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    size = size_of(folder)
    if size > MOST_BYTES:
        raise RuntimeError(f"the bundle has {size / 2**20:.1f} MiB, at most {MOST_BYTES >> 20} may travel")
    return manifest


def check_folder(folder: Path) -> None:
    """Raise RuntimeError where a folder holds anything that is not part of a bundle."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RuntimeError(f"--output: {folder} is a file; give a folder")
    foreign = next((path.name for path in sorted(folder.iterdir()) if not _is_part(path)), None)
    if foreign is not None:
        raise RuntimeError(f"--output: {folder} holds {foreign}, which would be lost; give another folder")


def _is_part(path: Path) -> bool:
    return path.is_file() and (path.name in (_MANIFEST, _ARCHIVE) or path.match("_C*.so"))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build_extension(work: Path) -> list[Path]:
    """The extension's libraries, beside a copy of the package in `work`; the checkout's own stay."""
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where ninja is
    environment = {"TORCH_CUDA_ARCH_LIST": ARCHITECTURES, "FASTKD_FORCE_CUDA": "1", "PATH": beside_python}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", work, "--build-temp", work / "objects"]
    _run(command, environment, ROOT)
    package = work / "fastkd_kernels"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastkd_kernels", package, ignore=ignored, dirs_exist_ok=True)
    return sorted(package.glob("_C*.so"))


def compile_kernels(work: Path, cache: Path, steps: Sequence[str], tests: Sequence[str]) -> list[dict[str, Any]]:
    """Every kernel that was asked for, once; `work` is where the built package lies."""
    log = work / "kernels.jsonl"
    environment = stand_in_environment(work, cache, log)
    if steps:
        _run([sys.executable, "-m", "gpu.stand_in", "steps", *steps], environment, work)
    for name in tests:
        command = [sys.executable, "-m", "gpu.stand_in", "tests", str(ROOT / "tests" / f"{name}.py")]
        try:
            # outcomes of tests mean nothing without a GPU, so neither does pytest's exit status
            subprocess.run(command, cwd=work, env={**os.environ, **environment}, timeout=SECONDS_A_FILE)
        except subprocess.TimeoutExpired:
            print(f"{name}: ended after {SECONDS_A_FILE:g} s; what it would have launched then is not in the bundle")
    return list({kernel["hash"]: kernel for kernel in read_log(log)}.values())


def stand_in_environment(package: Path, cache: Path, log: Path) -> dict[str, str]:
    """In which `gpu.stand_in` runs with the package of the folder `package`."""
    paths = (package, ROOT, ROOT / "python", ROOT / "bench", ROOT / "tests")
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TRITON_CACHE_DIR": str(cache),
        "FASTKD_KERNELS": str(log),
        "HF_HUB_OFFLINE": "1",
    }


def read_log(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _run(command: Sequence[Any], environment: Mapping[str, str], folder: Path) -> None:
    finished = subprocess.run([str(part) for part in command], cwd=folder, env={**os.environ, **environment})
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(str(part) for part in command)} ended with {finished.returncode}")


def _folder_of(kernel_hash: str) -> str:
    """Where Triton's cache has a kernel."""
    return base64.b32encode(bytes.fromhex(kernel_hash)).decode().rstrip("=")


def pack(cache: Path, hashes: Sequence[str], archive: Path) -> None:
    """These kernels, and the launchers of all; of each only what is of use later."""
    wanted = {_folder_of(one) for one in hashes}
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        # alike next to alike compresses best
        paths = [path for path in cache.glob("*/*") if path.suffix in KEPT]
        for path in sorted(paths, key=lambda path: (path.suffix, path.name, path.parent.name)):
            if path.parent.name in wanted or path.suffix == ".so":
                tar.add(path, f"{path.parent.name}/{path.name}")


# Using it


@dataclass
class News:
    """Kernels that Triton compiled although there is a bundle, or because there is none.

    Attributes:
        cache: where Triton puts what it compiles.
        known: folders of the cache whose kernels have been spoken of.
    """

    cache: Path
    known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.take()  # what lies there already was not compiled by this run

    def take(self) -> Counter[str]:
        """The names of those that came since the last time; Inductor's own kernels are no part of a bundle."""
        found: Counter[str] = Counter()
        for path in self.cache.glob("*/*.cubin"):
            if path.parent.name not in self.known:
                self.known.add(path.parent.name)
                if not path.name.startswith("triton_"):
                    found[path.stem] += 1
        return found

    def sentence(self, step: str) -> str | None:
        """What has to be said after `step`, or None where the bundle had everything."""
        missed = self.take()
        if not missed:
            return None
        names = ", ".join(f"{count} of {name}" for name, count in missed.most_common())
        return f"{step}: {missed.total()} KERNELS NOT IN A BUNDLE were compiled here: {names}"


def take_extension(folder: Path = FOLDER, package: Path = ROOT / "fastkd_kernels") -> str | None:
    """Put the extension into `package`, before anything imports it; returns why it is not used, or None.

    A problem is said, never raised.
    """
    try:
        manifest = _manifest(folder)
        different = _differences(manifest, OF_EXTENSION)
        if different:
            return f"THE BUNDLE'S EXTENSION IS NOT USED: {different}"
        libraries = {folder / name: package / name for name in manifest["extension"]}
        for source, target in libraries.items():
            if target.exists() and target.read_bytes() != source.read_bytes():
                return f"THE BUNDLE'S EXTENSION IS NOT USED: another one is there; remove {target}"
        for source, target in libraries.items():
            temporary = target.with_name(f".{target.name}.tmp")
            shutil.copyfile(source, temporary)
            temporary.replace(target)
    except Exception as error:  # a run without a bundle builds and compiles
        return f"NO EXTENSION FROM A BUNDLE: {type(error).__name__}: {error}"
    return None


def take_kernels(cache: Path, folder: Path = FOLDER) -> tuple[News, str | None]:
    """Unpack the kernels into `cache`, which becomes TRITON_CACHE_DIR.

    Returns:
        What tells of kernels that are compiled all the same, and why they will be, or None.
    """
    try:
        manifest = _manifest(folder)
        cache.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / _ARCHIVE) as tar:
            tar.extractall(cache, filter="data")
        for group in cache.glob("*/__grp__*.json"):
            _point_here(group)
    except Exception as error:
        return News(cache), f"NO KERNELS FROM A BUNDLE: {type(error).__name__}: {error}"
    different = _differences(manifest, OF_CACHE)
    return News(cache, set(manifest["kernels"])), (
        f"THE BUNDLE'S KERNELS MAY BE MISSED: {different}" if different else None
    )


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is none at {folder}; `make gpu-bundle` makes one, without a GPU") from None
    return manifest


def _differences(manifest: Mapping[str, Any], names: Sequence[str]) -> str:
    made_for, here = manifest["traits"], traits()
    return "; ".join(
        f"made for {name} {made_for.get(name)}, here {here[name]}" for name in names if made_for.get(name) != here[name]
    )


def _point_here(group: Path) -> None:
    """Triton notes whole paths: those of the machine where the kernel was compiled."""
    paths = json.loads(group.read_text())["child_paths"]
    here = {name: str(group.with_name(name)) for name in paths if group.with_name(name).exists()}
    if paths != here:
        group.write_text(json.dumps({"child_paths": here}))


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the bundle was made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the bundle (default: build/gpu-bundle)")
    parser.add_argument("--cache", type=Path, help="keeps compiled kernels between two times")
    parser.add_argument("--steps", nargs="*", default=STEPS, help=f"of the report (default: {' '.join(STEPS)})")
    parser.add_argument("--tests", nargs="*", default=TESTS, help=f"of tests/ (default: {' '.join(TESTS)})")
    given = parser.parse_args(arguments)
    try:
        manifest = make(given.output, given.steps, given.tests, given.cache)
    except RuntimeError as error:
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return 1
    for name, value in manifest["traits"].items():
        print(f"{name}: {value}")
    count, size = len(manifest["kernels"]), size_of(given.output) / 2**20
    print(f"{given.output}: {count} kernels, {size:.1f} MiB, made in {manifest['cpu_seconds']} seconds of a core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
