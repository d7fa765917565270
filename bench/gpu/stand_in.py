"""What a GPU would be asked to launch, without one: kernels are compiled for compute capability 9.0, nothing runs.

    python -m gpu.stand_in steps ops sweep            # what these steps of the report launch
    python -m gpu.stand_in tests FILE...              # what these tests launch; their outcomes mean nothing

Ops take tensors of the CPU for a GPU's, Triton compiles into TRITON_CACHE_DIR and launches on a CUDA driver without a
device, and the ops' own CPU kernels say what comes out, so that whoever asked goes on. Each kernel that was found in
the cache or compiled is a line of the file that FASTKD_KERNELS names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

# kernels that are interpreted are not compiled; read when the first of them is defined
os.environ["TRITON_INTERPRET"] = "0"

import torch

from gpu import ROOT

sys.path.append(str(ROOT / "tests"))

import fake_cuda

from fastkd_kernels import _backend
from fastkd_kernels.ops import (
    compact,
    distillation_loss,
    exit_gate,
    fused_linear_kd_loss,
    kd_loss,
    layer_norm,
    packed,
    student_head,
    universal_kd_loss,
)

KERNELS_VARIABLE = "FASTKD_KERNELS"
_ops: Any = torch.ops.fastkd_kernels


def _gate(logits: torch.Tensor, call: exit_gate.GateCall) -> Any:
    return exit_gate._run("cpu", logits, call)[:3]


def _head_and_gate(hidden_states: Any, head: Any, layout: Any, call: exit_gate.GateCall, logits: torch.Tensor) -> Any:
    logits.copy_(student_head._student_head_cpu(hidden_states, head, layout))
    return _gate(logits, call)


ANSWERS: Sequence[tuple[Any, str, Callable[..., Any]]] = (
    (exit_gate, "_exit_gate_triton", _gate),
    (student_head, "_student_head_cuda", lambda *arguments: student_head._student_head_cpu(*arguments)),
    (student_head, "_student_head_exit_cuda", _head_and_gate),
    (compact, "_compact_out_triton", lambda *arguments: _ops.compact_out(*arguments)),
    (packed, "_pack_triton", lambda *arguments: _ops.pack_(*arguments)),
    (packed, "_unpack_triton", lambda *arguments: _ops.unpack_(*arguments)),
    (packed, "_compact_packed_triton", lambda *arguments: _ops.compact_packed_(*arguments)),
    (layer_norm, "_add_layer_norm_triton", lambda *arguments: _ops.add_layer_norm_(*arguments)),
    (layer_norm, "_embed_layer_norm_triton", lambda *arguments: _ops.embed_layer_norm_(*arguments)),
    (kd_loss, "launch", lambda *arguments: _ops.kd_loss_forward(*arguments)),
    (universal_kd_loss, "_launch", lambda *arguments: _ops.universal_kd_loss_forward(*arguments)),
    (distillation_loss, "_launch", lambda *arguments: _ops.distillation_loss_forward(*arguments)),
    (fused_linear_kd_loss, "_launch", lambda *arguments: _ops.fused_linear_kd_loss_forward(*arguments)),
)
"""Functions that launch Triton kernels, and what they return once they have: the same op on a CPU."""


def _answered(launch: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    def launch_and_answer(*arguments: Any) -> Any:
        launch(*arguments)
        return answer(*arguments)

    return launch_and_answer


def _resolve(op: str, device: torch.device) -> str:
    return _backend._forced.name or "cuda"


@contextmanager
def in_charge() -> Iterator[None]:
    """Put the stand-in in the place of a GPU."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastkd-driver-"))
        stack.enter_context(fake_cuda.FakeCuda(fake_cuda.build(Path(folder))).in_charge())
        for module in (_backend, compact, layer_norm, packed):
            stack.enter_context(patch.object(module, "resolve", _resolve))
        for module, name, answer in ANSWERS:
            stack.enter_context(patch.object(module, name, _answered(getattr(module, name), answer)))
        stack.enter_context(_noting())
        yield


@contextmanager
def _noting() -> Iterator[None]:
    """Write down every kernel that Triton finds in its cache or compiles."""
    import triton

    def note(*, src: Any, metadata: Mapping[str, Any], cache_hit: bool, **others: Any) -> None:
        path = os.environ.get(KERNELS_VARIABLE)
        if path:
            with open(path, "a", encoding="utf-8") as stream:
                line = {"kernel": src.name, "hash": metadata["hash"], "found": cache_hit}
                stream.write(json.dumps(line) + "\n")

    with patch.object(triton.knobs.compilation, "listener", note):
        yield


# As a pytest plugin

_stack = ExitStack()


def pytest_configure() -> None:
    _stack.enter_context(in_charge())


def pytest_unconfigure() -> None:
    _stack.close()


# The steps of the report


def launch_ops() -> None:
    """Our own providers of every case."""
    from gpu import cases

    for cases_of in cases.ALL.values():
        for case in cases_of(cases.FULL, torch.device("cpu")):
            ours = [provider for name, provider in case.providers.items() if name.startswith(cases.OURS)]
            _each(f"{case.op} {case.name}", [provider.run for provider in ours], case.make_inputs)


def launch_sweep() -> None:
    """Every launch configuration."""
    from gpu import sweep

    for swept in (one for cases_of in sweep.OF_OP.values() for one in cases_of(sweep.FULL, torch.device("cpu"))):
        _each(f"sweep of {swept.op} {swept.name}", list(swept.configs.values()), swept.make_inputs)


def _each(what: str, runs: Sequence[Callable[..., Any]], make_inputs: Callable[[], Sequence[Any]]) -> None:
    inputs = make_inputs()
    failed: list[str] = []
    for run in runs:
        try:
            run(*inputs)
        except Exception as error:  # more shared memory than there is, for one: a GPU says so too
            failed.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    print(f"{what}: {len(runs)} launched{''.join(f'; {text}' for text in dict.fromkeys(failed))}", flush=True)


def launch_models() -> None:
    """Whole early-exit models by every engine, on fewer rows than the report has."""
    from gpu import early_exit, timing

    @dataclass(frozen=True)
    class Short(early_exit.Scale):
        def rows(self, batch_size: int) -> int:
            return max(2 * batch_size, 64)

    full = early_exit.FULL
    scale = Short(**{name: getattr(full, name) for name in full.__dataclass_fields__})
    scale = replace(scale, compile_backend="eager")
    with torch.inference_mode():
        for batch_size in scale.batch_sizes:
            problems: list[str] = []
            setting = early_exit.Setting(scale, batch_size, timing.WallTimer())
            for average in scale.average_layers:
                pattern = early_exit.exit_pattern(setting.rows, average, setting.model.num_layers)
                setting._right_engines(pattern, problems)
            print(f"early exit, batch {batch_size}: {problems or 'every engine ran'}", flush=True)


def launch_sanitize() -> None:
    """The small cases that sanitizers run."""
    import sanitize

    with suppress(AssertionError):
        sanitize.main([])


STEPS: Mapping[str, Callable[[], None]] = {
    "sanitize": launch_sanitize,
    "ops": launch_ops,
    "models": launch_models,
    "sweep": launch_sweep,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("steps", "tests"))
    parser.add_argument("names", nargs="*", help=f"steps, of {', '.join(STEPS)}, or files of tests")
    given = parser.parse_args(arguments)
    if given.what == "tests":
        import pytest

        return int(
            pytest.main(["-q", "-p", "gpu.stand_in", "-c", str(ROOT / "pyproject.toml"), "--tb=no", *given.names])
        )
    torch.manual_seed(0)
    with in_charge():
        for name in given.names or STEPS:
            STEPS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
