"""What this installation has: `python -m fastkd_kernels.info [--json]`.

Versions, what the extension was built for, and for every op which backend it would use here and why another is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

import torch

import fastkd_kernels
from fastkd_kernels import _extension, _triton
from fastkd_kernels._backend import OpBackends, registered_ops

Report = dict[str, Any]


def collect() -> Report:
    """Everything that the command prints; unlike `import fastkd_kernels`, this asks the GPU driver."""
    return {
        "versions": _versions(),
        "extension": _extension_report(),
        "devices": _devices(),
        "ops": {name: _op_report(name, op) for name, op in sorted(registered_ops().items())},
    }


def _versions() -> Report:
    return {
        "fastkd_kernels": fastkd_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _triton.triton.__version__ if _triton.available else None,
        "triton_missing": _triton.missing_reason,
        "triton_interpreted": _triton.interpreting,
    }


def _extension_report() -> Report:
    extension = _extension.extension
    if extension is None:
        return {"missing": _extension.missing_reason}
    missing = _extension.missing_cuda_reason
    return {
        "file": extension.__file__,
        "built_with_torch": extension.built_with_torch,
        "compiler": extension.compiler,
        "cuda_toolkit": extension.cuda_toolkit or None,
        "cuda_architectures": [name for name in extension.cuda_architectures.split(";") if name],
    } | ({} if missing is None else {"cuda_missing": missing})


def _devices() -> list[Report]:
    devices: list[Report] = [{"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(
            {"device": f"cuda:{index}", "name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"}
        )
    return devices


def _op_report(name: str, op: OpBackends) -> Report:
    """What tensors of each device would use, why a backend is missing, and the instruction set of the CPU's kernel."""
    missing = {"cuda": _cuda_reason(op), "cpu": op.cpu}
    uses = {device: device if reason is None else "reference" for device, reason in missing.items()}
    if not torch.cuda.is_available():
        uses["cuda"] = "no device"
    return {
        "uses": uses,
        "missing": {backend: reason for backend, reason in missing.items() if reason is not None},
        "instruction_set": getattr(_extension.extension, "instruction_sets", {}).get(name),
    }


def _cuda_reason(op: OpBackends) -> str | None:
    reason = op.cuda
    if reason is None and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device on this machine"
    return reason


def format_report(report: Report) -> str:
    """The report as text for a terminal."""
    lines = [f"{name:20} {value}" for name, value in report["versions"].items() if value is not None]
    lines += ["", "extension fastkd_kernels._C"]
    lines += [f"  {name:18} {_text(value)}" for name, value in report["extension"].items()]
    lines += ["", "devices"]
    lines += [f"  {device.pop('device'):18} {_text(device)}" for device in map(dict, report["devices"])]
    lines += ["", "ops: the backend that tensors of each device use"]
    for name, op in report["ops"].items():
        by_device = ", ".join(f"{device}: {backend}" for device, backend in op["uses"].items())
        level = op["instruction_set"] if op["uses"]["cpu"] == "cpu" else None
        lines.append(f"  {name:20} {by_device}{f' ({level})' if level else ''}")
        lines += [f"    no {backend}: {reason}" for backend, reason in op["missing"].items()]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return " ".join(value) or "none"
    return "none" if value is None else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastkd_kernels.info", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    report = collect()
    print(json.dumps(report, indent=2) if options.json else format_report(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
