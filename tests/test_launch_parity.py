"""What our launcher passes to the CUDA driver is what Triton's own launcher passes: seen by one without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from torch import Tensor

from fastkd_kernels import _extension, _triton

pytestmark = [
    pytest.mark.skipif(
        not _triton.available or _extension.extension is None or not hasattr(Tensor, "__dlpack_c_exchange_api__"),
        reason="Triton, the extension or torch's DLPack exchange is missing",
    ),
    pytest.mark.skipif((reason := fake_cuda.missing()) is not None, reason=str(reason)),
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/launch_worker.py saw."""
    library = fake_cuda.build(tmp_path_factory.mktemp("driver"))
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    environment["LD_PRELOAD"] = str(library)  # before anything asks for a real one
    worker = Path(__file__).with_name("launch_worker.py")
    child = subprocess.run([sys.executable, worker, library], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


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


def test_other_values_of_the_same_kind_are_known(launched: dict[str, Any]) -> None:
    records = launched["parts"]["anything_at_all"]
    one_dtype_at_a_time, pairs = records[:28], records[28:]
    assert [record["known"] for record in one_dtype_at_a_time] == [False, False, True, True] * 7
    assert all(second["known"] for second in pairs[1::2])
    assert len({record["triton"]["function"] for record in records}) >= 80


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
