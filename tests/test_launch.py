"""The launcher of Triton kernels: what it passes to the driver is what Triton's own launcher passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda
import pytest
import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels import _extension, _launch, _triton
from fastkd_kernels.ops import exit_gate as exit_gate_module

needs_launcher = pytest.mark.skipif(
    not _triton.available or _extension.extension is None or not hasattr(Tensor, "__dlpack_c_exchange_api__"),
    reason="Triton, the extension or torch's DLPack exchange is missing",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/launch_worker.py saw."""
    if (reason := fake_cuda.missing()) is not None:
        pytest.skip(reason)
    library = fake_cuda.build(tmp_path_factory.mktemp("driver"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    worker = Path(__file__).with_name("launch_worker.py")
    child = subprocess.run([sys.executable, worker, library], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@needs_launcher
@pytest.mark.parametrize(
    ("part", "kernels"),
    [
        ("exit_gates", {"_exit_gate_kernel"}),
        ("heads", {"_student_head_kernel"}),
        (
            "losses",
            {
                *("_kd_rows_kernel", "_kd_stream_kernel", "_universal_rows_kernel", "_universal_stream_kernel"),
                *("_distillation_kernel", "_scale_kernel"),
            },
        ),
        ("packed_rows", {"_pack_kernel", "_unpack_kernel", "_compact_packed_kernel", "_compact_kernel"}),
        ("normalisations", {"_add_layer_norm_kernel", "_embed_layer_norm_kernel"}),
        ("anything_at_all", {"anything"}),
    ],
)
def test_the_driver_gets_what_triton_would_pass(launched: dict[str, Any], part: str, kernels: set[str]) -> None:
    records = launched["parts"][part]
    assert {record["kernel"] for record in records} == kernels
    for record in records:
        assert (record["by_triton"], record["remembered"], record["launches"]) == (True, True, 1), record
        assert record["ours"] == record["triton"], record
        assert len(record["ours"]["parameters"]) > 2, record


@needs_launcher
def test_other_values_of_the_same_kind_are_known(launched: dict[str, Any]) -> None:
    records = launched["parts"]["anything_at_all"]
    one_dtype_at_a_time, pairs = records[:28], records[28:]
    assert [record["known"] for record in one_dtype_at_a_time] == [False, False, True, True] * 7
    assert all(second["known"] for second in pairs[1::2])
    assert len({record["triton"]["function"] for record in records}) >= 80


@needs_launcher
def test_what_is_left_to_triton(launched: dict[str, Any]) -> None:
    special = launched["special"]
    error = special.pop("error")
    assert error == "launching a Triton kernel: CUDA error 700, an error of the fake driver"
    assert special == {
        "nothing special": False,
        "another thread": False,
        "a hook": True,
        "names told to the hook": ["_exit_gate_kernel"] * 2,
        "no context": True,
        "a number beyond 64 bits": True,
        "a pointer as a number": True,
        "launches of an empty grid": 0,
        "parameters unknown to the driver": True,
        "no extension": True,
    }


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({}, True),
        ({"num_ctas": 2}, False),
        ({"global_scratch_size": 128}, False),
        ({"profile_scratch_size": 128}, False),
        ({"launch_cooperative_grid": True}, False),
        ({"launch_pdl": True}, False),
    ],
)
def test_only_plain_launches_are_ours(changes: dict[str, int], plain: bool) -> None:
    usual = {"num_ctas": 1, **dict.fromkeys(_launch._SPECIAL, 0)}
    assert _launch._is_plain(SimpleNamespace(**{**usual, **changes})) == plain
    for name in changes:
        usual.pop(name)
        assert not _launch._is_plain(SimpleNamespace(**usual))


@needs_launcher
def test_every_kernel_has_a_launcher() -> None:
    """A kernel started by Triton's own syntax would take its time, and the current device instead of its tensors'."""
    package = Path(fk.__file__).parent
    starts = [
        f"{path.relative_to(package)}:{number}"
        for path in sorted(package.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "kernel[" in line and path.name != "_launch.py"
    ]
    assert starts == []


class _NotAgain:
    """In the place of a kernel that has been remembered."""

    pre_run_hooks = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        raise AssertionError("Triton's launcher was asked again")


@needs_launcher
@needs_gpu
def test_on_a_gpu_the_second_launch_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(33, 5, device="cuda")
    first = fk.exit_gate(logits, 0.5)
    monkeypatch.setattr(exit_gate_module._launch_exit_gate, "kernel", _NotAgain())
    again = fk.exit_gate(logits, 0.5)
    torch.testing.assert_close(again.uncertainty, first.uncertainty, rtol=0, atol=0)
    assert again.kept().tolist() == first.kept().tolist()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = fk.exit_gate(logits, 0.5)
    stream.synchronize()
    assert there.kept().tolist() == first.kept().tolist()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fk.exit_gate(logits, 0.5)
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    monkeypatch.undo()
    assert captured.kept().tolist() == fk.exit_gate(logits, 0.5).kept().tolist()


@needs_gpu
def test_on_a_gpu_launching_is_enabled() -> None:
    fk.exit_gate(torch.randn(2, 3, device="cuda"), 0.5)
    assert _launch._enable()
    assert exit_gate_module._launch_exit_gate._binaries is not None
