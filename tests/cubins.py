"""Compiles Triton kernels to GPU machine code without a GPU, and reads back what the assembler made of them.

The suite runs Triton's interpreter, which is chosen when a kernel is defined, so compiling happens in child
processes. They stay for the next test, because importing torch and Triton costs more than most kernels.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

CAPABILITIES = (80, 90, 100, 120)

Argument = str | int | float | bool | None
"""The value of a tl.constexpr parameter. For any other, its type in Triton's own notation with what the launcher would
find out about the value: "*bf16:16" is a pointer divisible by 16, "i64" a plain integer; and 1 or None where the
argument is that, because the launcher compiles those in."""


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of a kernel.

    Attributes:
        kernel: where it is defined, "package.module:name".
        arguments: every parameter of the kernel.
        options: of the compiler, such as num_warps.
    """

    kernel: str
    arguments: Mapping[str, Argument]
    options: Mapping[str, int] = field(default_factory=lambda: {"num_warps": 4})


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel for one GPU generation; sizes in bytes a thread."""

    spec: KernelSpec
    capability: int
    path: str
    registers: int
    stack: int
    local: int
    shared: int

    def opcodes(self) -> Counter[str]:
        """How often each instruction occurs, e.g. {"LDG.E.128": 4}; takes a third of a second."""
        listing = _tool("cuobjdump", "-sass", self.path)
        return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", listing, re.MULTILINE))

    def polled_words(self) -> list[tuple[int, int]]:
        """Of each load of words that other programs change: how many words, and how many copies threads hold of each.

        Raises:
            AssertionError: the assembler was given more such loads than the compiler has, so that a thread might use
                two of them for one.
        """
        ttgir, ptx = (Path(self.path).with_suffix(suffix).read_text() for suffix in (".ttgir", ".ptx"))
        layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<(\{.*?\})>", ttgir, re.MULTILINE))
        words, held = [], 0
        for size, layout in re.findall(r"tt\.load .*isVolatile = true.*: tensor<(\d+)x[^,]*, (#\w+)>", ttgir):
            sizes = [
                int(re.findall(rf"{name} = \[(\d+)\]", layouts[layout])[0])
                for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
            ]
            copies = -(-math.prod(sizes) // int(size))
            words.append((int(size), copies))
            held += max(int(size) * copies // math.prod(sizes[1:]), 1)
        assert len(words) == ttgir.count("isVolatile = true"), "a volatile load in a layout that is not understood"
        assert ptx.count("ld.volatile.global.b32") == held, (ptx.count("ld.volatile.global.b32"), held)
        return words

    def assert_no_spills(self) -> None:
        """Spilled registers live in local memory, on the stack; without either there are none."""
        assert (self.stack, self.local) == (0, 0), (
            f"{self.spec} for sm_{self.capability}: {self.stack} bytes of stack and {self.local} of local memory, "
            f"{self.registers} registers"
        )

    def assert_arithmetic_is_imitated(self) -> None:
        """What is approximate in this kernel is what `gpu_arithmetic` knows of; it would miss a lg2.approx."""
        ptx = Path(self.path).with_suffix(".ptx").read_text()
        approximate = set(re.findall(r"\b\w+\.(?:approx|full)\.[\w.]+", ptx))
        unknown = approximate - {"ex2.approx.f32", "div.full.f32", "sqrt.approx.f32", "rsqrt.approx.f32"}
        assert not unknown, f"{self.spec} for sm_{self.capability}: {unknown}"


def compile_kernels(specs: Iterable[KernelSpec], capabilities: Iterable[int] = CAPABILITIES) -> list[Cubin]:
    """Every spec compiled for every compute capability, in that order.

    Raises:
        RuntimeError: a kernel does not compile; the message holds the compiler's.
    """
    jobs = [(spec, capability) for spec in specs for capability in capabilities]
    workers = _processors() if len(jobs) > 8 else 1
    with ThreadPoolExecutor(workers) as pool:
        batches = list(
            pool.map(_compile_in_child, range(workers), (jobs[worker::workers] for worker in range(workers)))
        )
    return [batches[job % workers][job // workers] for job in range(len(jobs))]


def _processors() -> int:
    """How many children may compile at once: two, or the one processor that a worker of pytest-xdist has."""
    return 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)


def _compile_in_child(worker: int, jobs: Sequence[tuple[KernelSpec, int]]) -> list[Cubin]:
    child = _child(worker, os.pathsep.join(path for path in sys.path if path))
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps([(asdict(spec), capability) for spec, capability in jobs]) + "\n")
    child.stdin.flush()
    answer = json.loads(child.stdout.readline() or '{"problem": "the child has gone"}')
    if "problem" in answer:
        raise RuntimeError(f"compiling Triton kernels failed:\n{answer['problem']}")
    return [_inspect(spec, capability, path) for (spec, capability), path in zip(jobs, answer["paths"], strict=True)]


@cache
def _child(worker: int, python_path: str) -> subprocess.Popen[str]:
    """A process that compiles what it is sent, until the tests end."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": python_path}
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, env=environment, text=True)
    atexit.register(child.kill)
    return child


def _inspect(spec: KernelSpec, capability: int, path: str) -> Cubin:
    usage = _tool("cuobjdump", "-res-usage", path)
    sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return Cubin(spec, capability, path, sizes["REG"], sizes["STACK"], sizes["LOCAL"], sizes["SHARED"])


def _tool(name: str, *arguments: str) -> str:
    import triton

    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(binary), *arguments], check=True, capture_output=True, text=True).stdout


def _compile(spec: KernelSpec, capability: int) -> str:
    """Path of the cubin, in Triton's cache."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastkd_kernels._launch import OPTIONS

    module, name = spec.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature, constants, attributes = {}, {}, {}
    for position, (parameter, declared) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        argument = spec.arguments[parameter]
        if declared.is_constexpr or not isinstance(argument, str):
            signature[parameter] = "constexpr"
            constants[(position,)] = argument
            continue
        signature[parameter], _, divisor = argument.partition(":")
        if divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**OPTIONS, **spec.options})
    return str(next(path for file, path in compiled.metadata_group.items() if file.endswith(".cubin")))


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is no answer
    for line in sys.stdin:
        try:
            answer = {"paths": [_compile(KernelSpec(**spec), capability) for spec, capability in json.loads(line)]}
        except Exception:
            answer = {"problem": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _main()
