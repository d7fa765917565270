"""The bundle for a GPU, without one and with the Triton that is installed: who takes it compiles nothing or is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import gpu_report
import pytest
from gpu import bundle
from gpu.plan import STEPS

from fastkd_kernels import _extension, _triton

ROOT = Path(__file__).parents[1]
EXTENSION, CUDA_EXTENSION = "_C.abi3.so", "_C_cuda.abi3.so"
LAUNCH_TWO = """
import importlib, pkgutil
import torch
from gpu import stand_in
import fastkd_kernels as fk
from fastkd_kernels import ops
from fastkd_kernels._launch import Launcher

names = [f"fastkd_kernels.ops.{found.name}" for found in pkgutil.iter_modules(ops.__path__)]
launching = [
    module for module in map(importlib.import_module, names)
    if any(isinstance(value, Launcher) for value in vars(module).values())
]
answering = [module for module, _, _ in stand_in.ANSWERS]
assert len(launching) > 5
assert [module.__name__ for module in launching if module not in answering] == []

with stand_in.in_charge():
    logits = torch.randn(32, 4)
    decided = fk.exit_gate(logits, 0.5)
    assert torch.equal(decided.uncertainty <= 0.5, ~torch.isin(torch.arange(32), decided.kept()))
    fk.add_layer_norm(torch.randn(5, 24), None, torch.ones(24), torch.zeros(24))
"""

needs_triton = pytest.mark.skipif(
    not _triton.available or fake_cuda.missing() is not None or _extension.missing_reason is not None,
    reason="needs Triton, gcc and the extension",
)


def launch_two(package: Path, cache: Path, log: Path) -> list[dict[str, Any]]:
    """Two kernels on the stand-in in a process of its own, and what Triton said of them."""
    environment = {**os.environ, **bundle.stand_in_environment(package, cache, log)}
    child = subprocess.run(
        [sys.executable, "-c", LAUNCH_TWO], cwd=log.parent, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return bundle.read_log(log)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two kernels and of files in the place of an extension's libraries."""
    folder = tmp_path_factory.mktemp("bundle")
    libraries = [folder / EXTENSION, folder / CUDA_EXTENSION]
    for library in libraries:
        library.write_bytes(b"an extension")
    kernels = launch_two(ROOT, folder / "cache", folder / "kernels.jsonl")
    assert [(kernel["kernel"], kernel["found"]) for kernel in kernels] == [
        ("_exit_gate_kernel", False),
        ("_add_layer_norm_kernel", False),
    ]
    bundle.assemble(folder / "bundle", libraries, folder / "cache", kernels, 1.0)
    shutil.rmtree(folder / "cache")  # nothing may be read from where it was made
    return folder / "bundle"


@pytest.mark.slow
@needs_triton
def test_another_process_finds_every_kernel_elsewhere(made: Path, tmp_path: Path) -> None:
    news, problem = bundle.take_kernels(tmp_path / "cache", made)
    assert problem is None
    kernels = launch_two(ROOT, tmp_path / "cache", tmp_path / "kernels.jsonl")
    assert [kernel["found"] for kernel in kernels] == [True, True]
    assert news.sentence("early exit") is None


@needs_triton
def test_a_changed_kernel_is_missed_aloud_and_once(made: Path, tmp_path: Path) -> None:
    news, _ = bundle.take_kernels(tmp_path / "cache", made)
    changed = tmp_path / "changed" / "fastkd_kernels"
    shutil.copytree(ROOT / "fastkd_kernels", changed, ignore=shutil.ignore_patterns("__pycache__"))
    source = changed / "ops" / "exit_gate.py"
    text = source.read_text()
    source.write_text(text.replace("        tl.store(count, kept)\n", "        tl.store(count, kept + 0)\n", 1))
    assert source.read_text() != text
    kernels = launch_two(changed.parent, tmp_path / "cache", tmp_path / "kernels.jsonl")
    assert {kernel["kernel"]: kernel["found"] for kernel in kernels} == {
        "_exit_gate_kernel": False,
        "_add_layer_norm_kernel": True,
    }
    said = "early exit: 1 KERNELS NOT IN A BUNDLE were compiled here: 1 of _exit_gate_kernel"
    assert news.sentence("early exit") == said
    assert news.sentence("ceilings") is None


@needs_triton
@pytest.mark.parametrize("trait", ["triton", "kernel sources", "torch", "C++ sources"])
def test_what_was_made_for_something_else_is_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trait: str
) -> None:
    here = bundle.traits()
    monkeypatch.setattr(bundle, "traits", lambda: here | {trait: "another"})
    kernels, extension = bundle.take_kernels(tmp_path, made)[1], bundle.take_extension(made, tmp_path)
    why = f"made for {trait} {here[trait]}, here another"
    of_extension = trait in bundle.OF_EXTENSION
    assert extension == (f"THE BUNDLE'S EXTENSION IS NOT USED: {why}" if of_extension else None)
    assert kernels == (None if of_extension else f"THE BUNDLE'S KERNELS MAY BE MISSED: {why}")
    assert (tmp_path / EXTENSION).exists() != of_extension


@needs_triton
def test_an_extension_that_is_there_stays(made: Path, tmp_path: Path) -> None:
    assert bundle.take_extension(made, tmp_path) is None
    present = tmp_path / EXTENSION
    assert present.read_bytes() == b"an extension"
    assert (tmp_path / CUDA_EXTENSION).read_bytes() == b"an extension"
    assert bundle.take_extension(made, tmp_path) is None
    (tmp_path / CUDA_EXTENSION).unlink()
    present.write_bytes(b"another")
    said = f"THE BUNDLE'S EXTENSION IS NOT USED: another one is there; remove {present}"
    assert bundle.take_extension(made, tmp_path) == said
    assert present.read_bytes() == b"another"
    assert not (tmp_path / CUDA_EXTENSION).exists(), "the two libraries belong together"


def test_no_bundle_and_a_broken_one_are_said(tmp_path: Path) -> None:
    news, why = bundle.take_kernels(tmp_path / "cache", tmp_path)
    assert why is not None
    assert "NO KERNELS FROM A BUNDLE" in why
    assert "`make gpu-bundle`" in why
    (tmp_path / "cache" / "A").mkdir(parents=True)
    (tmp_path / "cache" / "A" / "_kd_rows_kernel.cubin").touch()
    assert news.take() == {"_kd_rows_kernel": 1}, "without a bundle everything that is compiled is told"
    (tmp_path / "manifest.json").write_text("{")
    assert "NO EXTENSION FROM A BUNDLE: JSONDecodeError" in str(bundle.take_extension(tmp_path, tmp_path))


def test_kernels_of_inductor_are_no_news(tmp_path: Path) -> None:
    news = bundle.News(tmp_path)
    for folder, kernel in (("A", "triton_poi_fused_0"), ("B", "_kd_rows_kernel"), ("C", "_kd_rows_kernel")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{kernel}.cubin").touch()
    assert news.take() == {"_kd_rows_kernel": 2}
    assert bundle.News(tmp_path).take() == {}, "what was there before is no news either"


def test_a_bundle_that_cannot_travel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = tmp_path / EXTENSION
    extension.write_bytes(b"12345")
    monkeypatch.setattr(bundle, "MOST_BYTES", 4)
    with pytest.raises(RuntimeError, match="at most 0 may travel"):
        bundle.assemble(tmp_path / "bundle", [extension], tmp_path, [], 0.0)


def test_torch_is_named_with_its_cuda() -> None:
    import torch

    assert bundle.traits()["torch"] == torch.__version__
    assert json.loads(json.dumps(bundle.traits())) == bundle.traits()


def test_the_report_says_aloud_what_a_bundle_lacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = gpu_report.Options(tmp_path / "results", 60.0, ("build",))
    run = gpu_report.Run(options, {"device": "NVIDIA H200"}, {})
    monkeypatch.setattr(bundle, "take_kernels", lambda cache: (bundle.News(cache), "THEY WILL BE MISSED"))
    run.take_kernels()
    compiled = run.kernels.cache / "A" / "_exit_gate_kernel.cubin"
    compiled.parent.mkdir(parents=True)
    compiled.touch()
    run.do(STEPS["build"])
    said = ["THEY WILL BE MISSED", "build: 1 KERNELS NOT IN A BUNDLE were compiled here: 1 of _exit_gate_kernel"]
    assert run.report.problems == said
    assert "\n".join(said).splitlines() == [line for line in capsys.readouterr().out.splitlines() if line in said]


def test_the_extension_is_in_place_before_the_package_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def ask(deadline: float) -> None:
        order.append("asked")
        raise RuntimeError("no torch")

    monkeypatch.setattr(bundle, "take_extension", lambda: order.append("taken"))
    monkeypatch.setattr(gpu_report, "ask", ask)
    assert gpu_report.main([]) == 2
    assert order == ["taken", "asked"]
    assert "no torch" in capsys.readouterr().err


def test_no_other_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    bundle.check_folder(tmp_path)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(RuntimeError, match=r"holds photo\.jpg, which would be lost"):
        bundle.assemble(tmp_path, [], tmp_path, [], 0.0)
    assert (tmp_path / "photo.jpg").exists()
