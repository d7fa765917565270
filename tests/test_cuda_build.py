"""The CUDA sources without a GPU: compiled, linked, inspected, imported, and their kernels run on the host.

The build goes through setup.py with FASTKD_FORCE_CUDA=1 against whatever torch is installed, a CPU one included.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from setup_script import load_setup_script

from fastkd_kernels import _extension

ROOT = Path(__file__).parents[1]
HOST = Path(__file__).parent / "cuda_on_host"
CAPABILITIES = (80, 90, 100, 120)
CUDA_SHIMS = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}
"""What csrc/ may take from libtorch_cuda: the C functions of the stable ABI, and nothing that is mangled."""

SETUP = load_setup_script()
CUDA_HOME: Path | None = SETUP.find_cuda_home()
PROBLEM: str | None = SETUP.toolkit_problem(torch, CUDA_HOME)
needs_nvcc = pytest.mark.skipif(PROBLEM is not None, reason=PROBLEM or "")


def cuda_tool(name: str) -> str:
    """One of the tools that the toolkit has, or else Triton's package."""
    if CUDA_HOME is not None and (CUDA_HOME / "bin" / name).exists():
        return str(CUDA_HOME / "bin" / name)
    triton = pytest.importorskip("triton", reason=f"{name} is neither in the CUDA toolkit nor, without Triton, there")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def run(*command: str | Path, **environment: str) -> str:
    finished = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, f"{command}:\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
    return finished.stdout


# the other library is the checkout's: that of the CPU kernels does not depend on CUDA
BUILD = """
import setuptools, setup
settings = setup.build_settings()
settings["ext_modules"] = [extension for extension in settings["ext_modules"] if extension.name.endswith("_C_cuda")]
setuptools.setup(script_args={arguments!r}, **setup.page_settings(), **settings)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of fastkd_kernels, and its library of CUDA kernels built for every architecture."""
    folder = tmp_path_factory.mktemp("cuda_build")
    architectures = ";".join(f"{capability // 10}.{capability % 10}" for capability in CAPABILITIES)
    arguments = ["-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    run(
        sys.executable, "-c", BUILD.format(arguments=arguments),
        FASTKD_FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=architectures, CUDA_HOME=str(CUDA_HOME),
    )  # fmt: skip
    return copy_package(folder)


def copy_package(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastkd_kernels", folder / "fastkd_kernels", ignore=ignored, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def binary(package: Path) -> Path:
    return package / "fastkd_kernels" / "_C_cuda.abi3.so"


def symbols(library: Path, *options: str) -> set[str]:
    printed = run("nm", "--dynamic", "--format=posix", *options, library)
    return {line.split()[0].split("@")[0] for line in printed.splitlines()}


@pytest.mark.slow
@needs_nvcc
def test_only_the_allowed_symbols_are_left_undefined(binary: Path) -> None:
    undefined = symbols(binary, "--undefined-only")
    torch_symbols = {name for name in undefined if re.search("torch|aoti|c10|^_ZN?K?2at", name)}
    assert not {name for name in torch_symbols if name.startswith("_Z")}, "C++ symbols tie the binary to one torch"
    of_the_cpu = symbols(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", "--defined-only")
    assert torch_symbols - of_the_cpu == CUDA_SHIMS


@needs_nvcc
def test_it_brings_no_library_of_torch_and_of_cuda_but_asks_for_them(binary: Path) -> None:
    """A torch without CUDA has no libtorch_cuda.so to link against, that of another machine has."""
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", run("readelf", "--dynamic", binary)))
    major = SETUP.toolkit_version(CUDA_HOME).split(".")[0]
    assert {"libtorch_cpu.so", "libtorch_cuda.so", f"libcudart.so.{major}"} <= needed
    assert not re.search("RUNPATH|RPATH", run("readelf", "--dynamic", binary))


@dataclass
class Kernel:
    capability: int
    name: str
    usage: dict[str, int]
    instructions: list[str]

    @property
    def opcodes(self) -> Counter[str]:
        return Counter(self.instructions)


@pytest.fixture(scope="module")
def kernels(binary: Path) -> list[Kernel]:
    return [kernel for capability in CAPABILITIES for kernel in read_kernels(binary, capability)]


def read_kernels(binary: Path, capability: int) -> Iterator[Kernel]:
    arch = f"--gpu-architecture=sm_{capability}"
    usage = run(cuda_tool("cuobjdump"), arch, "--dump-resource-usage", binary)
    listing = run(cuda_tool("cuobjdump"), arch, "--dump-sass", binary)
    instructions = {
        name: re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", code, re.MULTILINE)
        for name, code in re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL)
    }
    for name, line in re.findall(r"Function (\w+):\n(.*)", usage):
        sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        yield Kernel(capability, name, sizes, instructions[name])


@needs_nvcc
def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    assert {kernel.capability for kernel in kernels} == set(CAPABILITIES)
    for kernel in kernels:
        assert (kernel.usage["STACK"], kernel.usage["LOCAL"]) == (0, 0), f"{kernel.name} for sm_{kernel.capability}"


@needs_nvcc
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_gather_moves_16_bytes_at_a_time(kernels: list[Kernel], capability: int) -> None:
    gathers = [k for k in kernels if "compact_vector" in k.name and k.capability == capability]
    assert len(gathers) == 2  # int32 and int64 row numbers
    for kernel in gathers:
        wide_loads = sum(n for opcode, n in kernel.opcodes.items() if opcode.startswith("LDG.E.128"))
        assert wide_loads >= 4, kernel.opcodes
        assert kernel.opcodes["STG.E.128"] >= 4, kernel.opcodes


@needs_nvcc
def test_what_the_gather_does_on_the_h200(kernels: list[Kernel]) -> None:
    """The facts that NOTES-performance.md builds on: four loads in flight a thread, five blocks a multiprocessor."""
    for kernel in kernels:
        assert not [name for name in kernel.opcodes if name.startswith(("LDL", "STL"))], "registers in local memory"
        if kernel.capability != 90 or "compact_vector" not in kernel.name:
            continue
        moves = [name for name in kernel.instructions if name.startswith(("LDG.E.128", "STG.E.128"))]
        first_store = next(at for at, name in enumerate(moves) if name.startswith("STG"))
        assert first_store >= 4, f"a store waits for fewer than four loads: {moves}"
        assert 5 * 256 * kernel.usage["REG"] <= 65536, "five blocks a multiprocessor keep 80 KiB of loads in flight"
        assert kernel.usage["SHARED"] <= 1024, "the driver's own kilobyte and nothing else"


@needs_nvcc
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bulk_copies_are_there_from_sm_90_on(kernels: list[Kernel], capability: int) -> None:
    bulk = [k for k in kernels if "compact_bulk" in k.name and k.capability == capability]
    assert len(bulk) == 2
    for kernel in bulk:
        copies = sum(n for opcode, n in kernel.opcodes.items() if opcode.startswith("UBLKCP"))
        assert (copies > 0) == (capability >= 90), kernel.opcodes


# The folder it runs in is the checkout, whose package is not the one to import. The library of CPU kernels says with
# which toolkit the other one was built.
IMPORT = """
import importlib.util, sys
sys.path.remove("")
import torch
torch.version.cuda = {cuda!r}
specification = importlib.util.spec_from_file_location("fastkd_kernels._C", {extension!r})
extension = importlib.util.module_from_spec(specification)
specification.loader.exec_module(extension)
extension.cuda_toolkit, extension.cuda_architectures = "13.0", "9.0+PTX"
sys.modules["fastkd_kernels._C"] = extension
import fastkd_kernels
from fastkd_kernels import _extension, info
assert {folder!r} in fastkd_kernels.__file__
assert _extension.missing_reason is None, _extension.missing_reason
survivors = torch.tensor([2, 0], dtype=torch.int32)
with fastkd_kernels.backend("cpu"):
    assert fastkd_kernels.compact([torch.arange(3)], survivors)[0].tolist() == [2, 0]
"""
SAY_WHAT_IS_MISSING = """
assert not _extension.has_kernel("compact", "CUDA")
assert _extension.missing_kernel_reason("compact", "CUDA") == _extension.missing_cuda_reason
report = info.format_report(info.collect())
assert f"cuda_missing       {_extension.missing_cuda_reason}" in report, report
print(_extension.missing_cuda_reason)
"""


def import_package(folder: Path, cuda: str | None, then: str, **environment: str) -> str:
    """Standard output of `then`, behind an import of the package in `folder` by a torch with that CUDA."""
    extension = _extension.extension
    if extension is None or extension.__file__ is None:
        pytest.skip("fastkd_kernels._C was not compiled")
    code = IMPORT.format(cuda=cuda, extension=extension.__file__, folder=str(folder)) + then
    return run(sys.executable, "-c", code, PYTHONPATH=str(folder), **environment)


@needs_nvcc
def test_it_imports_and_registers_for_cuda(package: Path, tmp_path: Path) -> None:
    environment = {}
    if torch.version.cuda is None:
        stub = tmp_path / "libtorch_cuda.so"
        run("cc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", stub, HOST / "libtorch_cuda_stub.c")
        environment = {"LD_PRELOAD": str(stub), "LD_LIBRARY_PATH": f"{CUDA_HOME}/lib64"}
    check = """
assert _extension.missing_cuda_reason is None, _extension.missing_cuda_reason
assert _extension.has_kernel("compact", "CUDA") and _extension.has_kernel("compact_out", "CUDA")
assert info.collect()["extension"]["cuda_architectures"] == ["9.0+PTX"]
"""
    import_package(package, "13.0", check, **environment)


@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        ("12.8", "has CUDA 12.8; install a torch with CUDA 13, or rebuild it with"),
        (None, "has no CUDA; its CPU kernels are in use"),
        ("13.2", r"_C_cuda could not be loaded \(.*libgone\.so\.7.*\); rebuild it with"),
    ],
)
def test_a_cuda_that_does_not_fit_costs_the_cuda_kernels_only(cuda: str | None, said: str, tmp_path: Path) -> None:
    """A library of the same name and another major version may be there, so the version is looked at first."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("makes a library with cc")
    folder, gone = copy_package(tmp_path / "package"), tmp_path / "libgone.so"
    run("cc", "-shared", "-Wl,-soname,libgone.so.7", "-x", "c", os.devnull, "-o", gone)
    library = folder / "fastkd_kernels" / "_C_cuda.abi3.so"
    run("cc", "-shared", "-Wl,--no-as-needed", "-x", "c", os.devnull, "-x", "none", gone, "-o", library)
    reason = import_package(folder, cuda, SAY_WHAT_IS_MISSING)
    assert reason.startswith("the CUDA kernels of the compiled extension, built for CUDA 13.0, are left out: ")
    assert re.search(said, reason), reason
    assert reason.count("\n") == 1, "one sentence"


@pytest.fixture(scope="module")
def kernels_on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/compact_kernels.cuh compiled for the CPU, its blocks and threads run one after the other."""
    library = tmp_path_factory.mktemp("host") / "compact_on_host.so"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler}")
    run(
        compiler, "-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fsanitize=undefined",
        "-fno-sanitize-recover", "-shared", "-fPIC", f"-I{HOST}", f"-I{ROOT / 'csrc'}",
        HOST / "compact_on_host.cpp", "-o", library,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


class HostTensor(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("source_stride", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
    )


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("threads", [32, 256])
@pytest.mark.parametrize("count", [None, 0, 2, 99])
def test_the_kernels_gather_the_right_bytes(
    kernels_on_host: ctypes.CDLL, index_dtype: torch.dtype, bulk: bool, threads: int, count: int | None
) -> None:
    rows = torch.tensor([3, 0, 5, 17, -1, 4], dtype=index_dtype)  # 17 and -1 do not exist
    # rows of: one thread, a few to a warp, several chunks, bulk stages and tiles with a remainder, unaligned, empty
    widths = [1, 8, 12, 48, 4096, 16 * 1031, 16384 * 2 + 32, 4099, 0]
    padding = [0, 0, 4, 16, 0, 16, 0, 1, 0]
    sources = [
        torch.randint(256, (6, width + pad), dtype=torch.uint8) for width, pad in zip(widths, padding, strict=True)
    ]
    targets = [torch.full((6, width), 171, dtype=torch.uint8) for width in widths]
    records = [
        HostTensor(source.data_ptr(), target.data_ptr(), source.stride(0), target.shape[1])
        for source, target in zip(sources, targets, strict=True)
    ]
    for batch in (records[:8], records[8:]):  # a launch takes eight
        kernels_on_host.compact_on_host(
            (HostTensor * len(batch))(*batch), ctypes.c_int(len(batch)), ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_int(rows.element_size()), ctypes.byref(ctypes.c_int32(count)) if count is not None else None,
            ctypes.c_int64(6), ctypes.c_int64(6), ctypes.c_int(threads), ctypes.c_bool(bulk),
        )  # fmt: skip
    live = 6 if count is None else min(count, 6)
    for source, target, width in zip(sources, targets, widths, strict=True):
        for position, row in enumerate(rows.tolist()):
            written = position < live and 0 <= row < 6
            expected = source[row, :width] if written else torch.full((width,), 171, dtype=torch.uint8)
            assert target[position].equal(expected), f"width {width}, position {position}"
