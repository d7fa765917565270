"""The vector code of the CPU kernels: one choice of instruction set for all ops, right results from every compiler.

`simd_driver.cpp` is built by each compiler that is here, for aarch64 by the cross compiler, and runs without PyTorch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from setup_script import load_setup_script

from fastkd_kernels import _extension
from fastkd_kernels.ops.exit_gate import uncertainty_reference

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
ARM = "aarch64-linux-gnu-g++"
COMPILERS = ["g++", "clang++", ARM]
NEEDS = {
    "g++": "apt-get install g++",
    "clang++": "apt-get install clang",
    ARM: "apt-get install g++-aarch64-linux-gnu qemu-user",
}
NAMES = {"default": "SSE2", "avx2": "AVX2", "avx512": "AVX-512"}

Results = dict[str, torch.Tensor]


def compile_flags() -> list[str]:
    """Those of the extension."""
    return load_setup_script().CXX_FLAGS


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The command that runs what a compiler builds; built once, or skipped where a tool is missing."""
    built: dict[str, list[str]] = {}

    def build(compiler: str) -> list[str]:
        emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"] if compiler == ARM else []
        if not all(map(shutil.which, [compiler, *emulator[:1]])):
            pytest.skip(f"no {compiler} here, or nothing to run its programs: {NEEDS[compiler]}")
        if compiler not in built:
            program = tmp_path_factory.mktemp("simd") / "driver"
            headers = [f"-I{CSRC}", "-isystem", str(Path(torch.__file__).parent / "include")]
            # nothing of PyTorch is called, so nothing of it is linked
            linking = ["-ffunction-sections", "-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all"]
            # the ops of one source each are included by the driver
            sources = [str(HERE / "simd_driver.cpp"), *map(str, sorted(CSRC.glob("distillation_rows_*.cpp")))]
            command = [compiler, *compile_flags(), "-O2", "-w", *headers, *sources, *linking, "-o", str(program)]
            subprocess.run(command, check=True)
            built[compiler] = [*emulator, str(program)]
        return built[compiler]

    return build


def run(command: list[str], **environment: str) -> tuple[dict[str, str], Results]:
    """Which instruction set each op chose, and what it computed."""
    printed = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in printed.splitlines()]
    chosen = {line[1]: line[2] for line in lines if line[0] == "chosen"}
    return chosen, {line[0]: torch.tensor([*map(float, line[1:])]) for line in lines if line[0] != "chosen"}


def made_up(count: int, step: float) -> torch.Tensor:
    return (1.5 * torch.sin(step * torch.arange(count, dtype=torch.float64))).float().double()


def divergence(lanes: int) -> torch.Tensor:
    """Both gradients with respect to the tempered logits, and the divergence: lane after lane of every class."""
    teacher, student = (made_up(13 * lanes, step).reshape(13, lanes) for step in (0.7, 1.1))
    tempered = [(logits / 2).requires_grad_() for logits in (teacher, student)]
    log_p, log_q = (logits.log_softmax(0) for logits in tempered)
    log_mixture = torch.logaddexp(log_p + torch.tensor(0.3).log(), log_q + torch.tensor(0.7).log())
    value = 0.3 * (log_p.exp() * (log_p - log_mixture)).sum(0) + 0.7 * (log_q.exp() * (log_q - log_mixture)).sum(0)
    gradients = torch.autograd.grad(value.sum(), tempered)
    return torch.cat([*gradients, value.detach()[None]]).flatten()


def heads() -> torch.Tensor:
    width, count = 40, 2
    matrices = [made_up(count * width * width, step).reshape(count, width, width) for step in (0.7, 0.3)]
    rows = made_up(9 * 11 * width, 0.17).reshape(9, 11, width)
    queries = torch.einsum("bi,hij->bhj", rows[:, 0], matrices[0]) + made_up(count * width, 1.1).reshape(count, width)
    contexts = (queries @ rows.mT).softmax(-1) @ rows
    dense = (torch.einsum("bhi,hij->bj", contexts, matrices[1]) + made_up(width, 0.9)).tanh()
    return (dense @ made_up(3 * width, 0.5).reshape(3, width).T + made_up(3, 1.3)).flatten()


def expected() -> Results:
    """Everything in float64."""
    query, key, value = (made_up(45 * 20, step).reshape(45, 20) for step in (0.7, 1.1, 0.3))
    x, y, weight = (made_up(77, step) for step in (0.7, 1.1, 0.3))
    halves = [row.bfloat16().double() for row in (x, y, weight)]
    return {
        "exit_gate": uncertainty_reference(made_up(35 * 19, 0.7).reshape(35, 19)),
        "exit_gate_of_long_rows": uncertainty_reference(made_up(3000, 0.7).reshape(3, 1000), "margin"),
        "layer_norm": F.layer_norm(x + y, (77,), weight, y),
        "layer_norm_bfloat16": F.layer_norm(halves[0] + halves[1], (77,), halves[2], halves[1]),
        "varlen_attention": ((query @ key.T * 0.2).softmax(-1) @ value).flatten(),
        "student_head": heads(),
        "divergence_float32": divergence(1),
        "divergence_float64": divergence(1),
        "divergence_packed": divergence(16),
    }


def assert_right(results: Results) -> None:
    truth = expected()
    assert results.keys() == truth.keys()
    for name, values in results.items():
        # logits of the heads follow 80 products of sines that grow to some hundred before their softmax
        tolerance = {"layer_norm_bfloat16": 2**-8, "student_head": 1e-4}.get(name, 4e-6)
        torch.testing.assert_close(values.double(), truth[name], rtol=tolerance, atol=tolerance, msg=name)


def best_on(capability: str) -> str:
    """What ATEN_CPU_CAPABILITY allows and this processor has."""
    features = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    lacks_avx512 = not {"avx512f", "avx512dq", "avx512vl", "avx512bw"} <= set(features)
    return NAMES["avx2" if capability == "avx512" and lacks_avx512 else capability]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are those of x86-64")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("capability", NAMES)
def test_every_level_of_every_compiler(driver: Callable[[str], list[str]], compiler: str, capability: str) -> None:
    chosen, results = run(driver(compiler), ATEN_CPU_CAPABILITY=capability)
    assert {"exit_gate", "kd_loss", "layer_norm", "student_head", "varlen_attention"} <= chosen.keys()
    assert chosen == dict.fromkeys(chosen, best_on(capability))
    assert_right(results)


@pytest.mark.slow
def test_arm_computes_with_neon(driver: Callable[[str], list[str]]) -> None:
    chosen, results = run(driver(ARM))
    assert chosen == dict.fromkeys(chosen, "NEON")
    assert_right(results)


@pytest.mark.skipif(_extension.extension is None, reason="needs the compiled extension")
def test_the_extension_says_what_each_op_chose() -> None:
    chosen = _extension.extension.instruction_sets
    assert {"exit_gate", "kd_loss", "universal_kd_loss", "distillation_loss", "student_head"} <= chosen.keys()
    # whole layers have products by instructions of their own
    assert chosen.pop("encoder_layer") in {*NAMES.values(), "NEON", "baseline", "AVX512-VNNI", "AVX512-BF16", "AMX"}
    assert set(chosen.values()) <= {*NAMES.values(), "NEON", "baseline"}
    assert "gcc" in _extension.extension.compiler.lower() or "clang" in _extension.extension.compiler.lower()
