"""Builds fastkd_kernels._C, the CPU kernels, and _C_cuda where a CUDA torch and a toolkit are found.

Two libraries, so that where CUDA's cannot be loaded the other one is: files of csrc that end in _cuda make the second.

Environment variables:
    FASTKD_SKIP_EXT=1      install the Python packages only
    FASTKD_FORCE_CUDA=1    build the CUDA kernels even with a CPU torch; a missing toolkit is then an error
    CUDA_HOME              the CUDA toolkit; default: that of nvcc on PATH, then /usr/local/cuda
    TORCH_CUDA_ARCH_LIST   such as "8.0;9.0+PTX"; default: the visible GPUs, or without one DEFAULT_ARCHITECTURES
    MAX_JOBS               how many compilers run at once
    FASTKD_REPOSITORY      https address of the repository, for a release: where links of the package's page lead
    FASTKD_SANITIZE        sanitizers of the compiler to build in, such as address,undefined; `make sanitize` sets it
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools

OLDEST_TORCH = (2, 10)  # the first with TORCH_BOX and the stable parallel_for
OLDEST_PYTHON = "cp310"  # that the binary serves, with every one after it: csrc/python_api.h
OLDEST_SETUPTOOLS = 77  # the first that reads a licence by its short name in pyproject.toml
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
CXX_FLAGS = [
    "-std=c++17",  # torch 2.13 would ask for C++20, which torch 2.10 does not need
    "-O3",
    "-g0",
    "-Wall",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    # multiply and add in one instruction, which GCC does unasked and clang within a statement only
    "-ffp-contract=fast",
    # only the pragmas for vector code: the threads are those of torch, a second OpenMP runtime would fight them
    "-fopenmp-simd",
    # functions that take 64-byte vectors are all inlined, so how another compiler would pass them does not matter
    "-Wno-psabi",
    "-Wno-pass-failed",  # clang's, of loops in float64 that call a function and so stay scalar
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden", "-Xptxas=-warn-spills"]

# The first finding ends the process, with its line in csrc. Type information of torch's classes is not there to see.
SANITIZER_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]

# what csrc asks of a compiler beside C++17: vectors as types, and functions for one instruction set
COMPILER_PROBE = """
#include <cstdint>
#include <optional>
#include <string_view>
typedef float Vector __attribute__((vector_size(32)));
inline constexpr std::string_view name = "probe";
template <typename T> std::optional<T> first(T value) {
  if constexpr (sizeof(T) > 1) return value;
  return std::nullopt;
}
int main() { Vector sum = {}; return static_cast<int>(sum[0]) + first(0).value_or(name.size()); }
"""

ROOT = Path(__file__).parent


class BuildProblemError(Exception):
    """Something the user has to change; its text says what and how."""


def check_setuptools() -> None:
    version = setuptools.__version__
    if int(version.split(".")[0]) < OLDEST_SETUPTOOLS:
        wanted = f"setuptools>={OLDEST_SETUPTOOLS}"
        raise BuildProblemError(
            f"setuptools {version} is too old: {wanted} is needed. Install it, then build again:\n"
            f"    pip install '{wanted}'\n"
            "    pip install --no-build-isolation ."
        )


def import_torch() -> ModuleType:
    remedy = (
        "Install the torch that you will run with, then build against it:\n"
        f"    pip install torch 'setuptools>={OLDEST_SETUPTOOLS}' wheel ninja\n"
        "    pip install --no-build-isolation .\n"
        "FASTKD_SKIP_EXT=1 installs the Python packages without the compiled kernels."
    )
    try:
        torch = import_module("torch")
    except ImportError as error:
        raise BuildProblemError(
            f"PyTorch cannot be imported by {sys.executable}, which builds this package ({error}). {remedy}"
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildProblemError(f"PyTorch {torch.__version__} is too old: torch>={oldest} is needed. {remedy}")
    return torch


def check_platform() -> None:
    if sys.platform == "win32":
        raise BuildProblemError(
            "the compiled kernels are not built on Windows yet. Use WSL, or install the Python packages alone, whose "
            "ops then run on PyTorch and Triton: set FASTKD_SKIP_EXT=1 and install again."
        )
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildProblemError(
            "the compiled kernels are not built for a free-threaded Python: they use the limited API, which it lacks. "
            "Use an ordinary Python, or install the Python packages alone, whose ops then run on PyTorch and Triton: "
            "set FASTKD_SKIP_EXT=1 and install again."
        )


def check_compiler() -> None:
    """Compile a few lines, which takes a tenth of a second, before ninja starts minutes of them."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    remedy = (
        "Install g++ 10 or clang 14 or newer (Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
        "macOS: xcode-select --install) or point CXX at one, then build again. FASTKD_SKIP_EXT=1 installs the Python "
        "packages without the compiled kernels."
    )
    probe = [*command, "-x", "c++", "-fsyntax-only", "-std=c++17", "-"]
    try:
        tried = subprocess.run(probe, input=COMPILER_PROBE, capture_output=True, text=True)
    except OSError as error:
        raise BuildProblemError(f"no C++ compiler can be started as {command[0]!r} ({error}). {remedy}") from error
    if tried.returncode:
        reason = next((line.strip() for line in tried.stderr.splitlines() if "error" in line), "no reason given")
        raise BuildProblemError(f"{command[0]!r} cannot compile C++17 ({reason}). {remedy}")
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        raise BuildProblemError(
            f"Python's own headers are missing: there is no Python.h in {headers}. Install them (Debian and Ubuntu: "
            "apt-get install python3-dev; Fedora: dnf install python3-devel), then build again. FASTKD_SKIP_EXT=1 "
            "installs the Python packages without the compiled kernels."
        )


def find_cuda_home() -> Path | None:
    """A folder with bin/nvcc and the runtime's headers; torch's own search gives up where torch has no CUDA."""
    given = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc")
    candidates = [given] if given else [str(Path(nvcc).resolve().parents[1]) if nvcc else None, "/usr/local/cuda"]
    for candidate in filter(None, candidates):
        home = Path(candidate)
        # nvcc on PATH may be a script that calls the real one elsewhere: the headers tell
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def toolkit_version(cuda_home: Path) -> str:
    printed = subprocess.run([cuda_home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", printed)
    return found.group(1) if found else "unknown"


def toolkit_problem(torch: ModuleType, cuda_home: Path | None) -> str | None:
    """Why CUDA sources cannot be compiled, or None."""
    if cuda_home is None:
        given = os.environ.get("CUDA_HOME")
        return (
            f"no CUDA toolkit was found{f' at CUDA_HOME={given}' if given else ''} (bin/nvcc and "
            "include/cuda_runtime.h). Install the toolkit of your torch"
            f"{f' (CUDA {torch.version.cuda})' if torch.version.cuda else ''}, or point CUDA_HOME at it."
        )
    version = toolkit_version(cuda_home)
    if torch.version.cuda and version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"the CUDA toolkit at {cuda_home} is {version}, but torch {torch.__version__} was built with "
            f"CUDA {torch.version.cuda}. Install a toolkit of that major version and point CUDA_HOME at it."
        )
    return None


def choose_cuda(torch: ModuleType) -> Path | None:
    """The toolkit to compile the CUDA kernels with, or None for a build without them."""
    forced = os.environ.get("FASTKD_FORCE_CUDA") == "1"
    if not forced and not torch.version.cuda:
        return None
    cuda_home = find_cuda_home()
    problem = toolkit_problem(torch, cuda_home)
    if problem is None:
        return cuda_home
    if forced:
        raise BuildProblemError(f"FASTKD_FORCE_CUDA=1 asks for the CUDA kernels, but {problem}")
    warnings.warn(f"building without the CUDA kernels: {problem}", stacklevel=1)
    return None


def choose_architectures(torch: ModuleType, cuda_home: Path) -> str:
    """TORCH_CUDA_ARCH_LIST as given, or of the visible GPUs, or what this nvcc knows of the default."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return given
    visible = range(torch.cuda.device_count())
    architectures = sorted({torch.cuda.get_device_capability(index) for index in visible})
    names = [f"{major}.{minor}" for major, minor in architectures]
    if not names:
        nvcc = [cuda_home / "bin" / "nvcc", "--list-gpu-code"]
        known = subprocess.run(nvcc, capture_output=True, text=True).stdout.split()
        names = [name for name in DEFAULT_ARCHITECTURES if f"sm_{name.replace('.', '')}" in known]
    return ";".join(names) + "+PTX"


def without_build_paths(torch: ModuleType) -> list[str]:
    """Flags that keep this machine's folders out of the binary, and so out of its error messages."""
    torch_headers = Path(torch.__file__).parent / "include"
    return [f"-ffile-prefix-map={torch_headers}/=", f"-ffile-prefix-map={ROOT.resolve()}/="]


def sanitizer_flags() -> list[str]:
    """Flags for the compiler and the linker; behind the usual ones, so that they win."""
    chosen = os.environ.get("FASTKD_SANITIZE")
    return [f"-fsanitize={chosen}", *SANITIZER_FLAGS] if chosen else []


def sources(ends_in_cuda: bool) -> list[str]:
    paths = [path for suffix in ("cpp", "cu") for path in sorted((ROOT / "csrc").glob(f"*.{suffix}"))]
    return [str(path.relative_to(ROOT)) for path in paths if path.stem.endswith("_cuda") == ends_in_cuda]


def make_extension(name: str, torch: ModuleType, libraries: list[str], defined: dict[str, str]) -> Any:
    """A library of the files of csrc, which belongs to no version of Python and of torch."""
    extension = import_module("torch.utils.cpp_extension").CppExtension(
        f"fastkd_kernels.{name}",
        sources(name.endswith("_cuda")),
        py_limited_api=True,
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.*h"))],
        define_macros=[(macro, f'"{value}"') for macro, value in defined.items()],
        extra_link_args=sanitizer_flags()[:1],
        extra_compile_args={
            "cxx": CXX_FLAGS + without_build_paths(torch) + sanitizer_flags(),
            "nvcc": NVCC_FLAGS + [f"-Xcompiler={flag}" for flag in without_build_paths(torch)],
        },
    )
    # CppExtension adds torch_python and c10, whose C++ symbols would tie the binary to one torch
    extension.libraries = libraries
    return extension


def make_cuda_extension(torch: ModuleType, cuda_home: Path) -> Any:
    extension = make_extension("_C_cuda", torch, ["torch_cpu", "cudart"], {})
    # behind the flag, which linkers obey from there on: a stand-in has nothing that is needed
    extension.extra_link_args += ["-Wl,--no-as-needed", "-ltorch_cuda"]
    extension.include_dirs.append(str(cuda_home / "include"))
    extension.library_dirs += [str(cuda_home / name) for name in ("lib64", "lib") if (cuda_home / name).is_dir()]
    return extension


def stand_in_for_torch_cuda(folder: Path) -> None:
    """An empty libtorch_cuda.so to link against where torch has none; that of the torch which runs is then loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "libtorch_cuda.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-shared", "-nostdlib", f"-Wl,-soname,{name}", "-x", "c++", os.devnull, "-o", folder / name]
    subprocess.run(command, check=True)


def build_settings() -> dict[str, Any]:
    """`ext_modules` and `cmdclass` of the extension.

    Raises:
        BuildProblemError: what is missing for it, and the remedy.
    """
    check_platform()
    check_compiler()
    torch = import_torch()
    cpp_extension = import_module("torch.utils.cpp_extension")
    cuda_home = choose_cuda(torch)
    architectures = toolkit = ""
    extensions = []
    if cuda_home is not None:
        # torch looks both up again by itself, and fails where it has no CUDA or sees no GPU
        cpp_extension.CUDA_HOME = str(cuda_home)
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"] = choose_architectures(torch, cuda_home)
        toolkit = toolkit_version(cuda_home)
        extensions.append(make_cuda_extension(torch, cuda_home))
    defined = {
        "FASTKD_BUILT_WITH_TORCH": torch.__version__,
        "FASTKD_CUDA_ARCHITECTURES": architectures,
        "FASTKD_CUDA_TOOLKIT": toolkit,
    }
    extensions.insert(0, make_extension("_C", torch, ["torch_cpu"], defined))
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": builder_over(cpp_extension.BuildExtension, has_torch_cuda=bool(torch.version.cuda))},
        "options": {"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}},
    }


def builder_over(builder: type, has_torch_cuda: bool) -> type:
    """`builder`, which also removes libraries of earlier builds that Python would load beside its results."""

    class Builder(builder):  # type: ignore[misc]
        def run(self) -> None:
            for extension in self.extensions:
                if "-ltorch_cuda" in extension.extra_link_args and not has_torch_cuda:
                    stand_in = Path(self.build_temp).absolute() / "stand_in"
                    stand_in_for_torch_cuda(stand_in)
                    extension.library_dirs.append(str(stand_in))
            super().run()
            package = (ROOT if self.inplace else Path(self.build_lib)) / "fastkd_kernels"
            made = {Path(path).name for path in self.get_outputs()}
            for library in package.glob("_C*.so"):
                if library.name not in made:
                    library.unlink()

    return Builder


def page_for_an_index(repository: str | None) -> str:
    """README.md, whose relative links lead into the repository; without one their text is left, and no picture."""
    link = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")
    picture = re.compile(r'(<img [^>]*?src=")(?!https?://)([^"]+)("[^>]*>)')

    def absolute(found: re.Match[str]) -> str:
        mark, text, path = found.groups()
        if not repository:
            return "" if mark else text
        return f"{mark}[{text}]({repository}/{'raw' if mark else 'blob'}/main/{path})"

    page = link.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))
    return picture.sub(rf"\1{repository}/raw/main/\2\3" if repository else "", page)


def page_settings() -> dict[str, Any]:
    repository = os.environ.get("FASTKD_REPOSITORY", "").rstrip("/")
    pages = {"Repository": "", "Issues": "/issues", "Documentation": "/tree/main/docs"}
    pages["Changelog"] = "/blob/main/CHANGELOG.md"
    return {
        "long_description": page_for_an_index(repository),
        "long_description_content_type": "text/markdown",
        "project_urls": {name: f"{repository}{path}" for name, path in pages.items()} if repository else {},
    }


def main() -> None:
    try:
        check_setuptools()
        settings = {} if os.environ.get("FASTKD_SKIP_EXT") == "1" else build_settings()
    except BuildProblemError as problem:
        sys.exit(f"fastkd_kernels: {problem}")
    setuptools.setup(**page_settings(), **settings)


if __name__ == "__main__":
    main()
