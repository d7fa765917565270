"""What people run on a CPU besides PyTorch: OpenVINO and ONNX Runtime, as good as a user can make them.

    openvino f32, bf16    converted from PyTorch with fused attention; hint, streams and padding are tried out
    openvino int8         the same by NNCF: weights per channel, activations calibrated on rows that are not measured
    onnxruntime f32       fused by onnxruntime's own optimizer: embeddings, attention, sums with normalisation, GELU
    onnxruntime int8      the same, its products quantised dynamically, weights per channel

Every rival runs the full model: the encoder and its last head. Each of them is one extra of this project away
(`pip install 'fastkd-kernels[rivals]'`); `missing` says in words which one is not there.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fastkd_kernels as fk
from fastkd.encoders.layout import TokenLayout

Arrays = dict[str, np.ndarray]
Run = Callable[[Sequence[Arrays]], np.ndarray]

NEEDED = {"openvino": ("openvino", "nncf"), "onnxruntime": ("onnxruntime", "onnx")}
"""Packages of each rival."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TRIED_BATCHES = 6


class Rival(NamedTuple):
    """A full model of another runtime, ready to run."""

    name: str
    how: str
    """What was chosen for it, in words."""
    run: Run
    """Logits of batches, one behind the other."""
    pad_to: int = 1
    """It gets batches whose length is rounded up to this."""


def missing() -> dict[str, str]:
    """Why a rival cannot run here, by its name; empty where both can."""
    return {
        rival: f"{rival} is left out: {' and '.join(absent)} not installed; pip install 'fastkd-kernels[rivals]'"
        for rival, packages in NEEDED.items()
        if (absent := [name for name in packages if importlib.util.find_spec(name) is None])
    }


class _FullModel(nn.Module):
    """The encoder as transformers runs it, and the last head."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        # exporters put back the mode of the outermost module, and so that of the model
        self.train(model.training)

    def forward(self, *inputs: Tensor) -> Tensor:
        batch = dict(zip(self.names, inputs, strict=True))
        hidden_states = self.model.backbone(**batch).last_hidden_state
        return self.model.last_head(hidden_states, TokenLayout(batch["attention_mask"].bool()))


class Prepared(NamedTuple):
    """A rival whose graph is made, and has yet to learn on which batches it runs."""

    name: str
    ready: Callable[[Callable[[int], Sequence[Arrays]]], Rival]
    """For batches that are given, their lengths rounded up to a number."""


def prepare(model: Any, sample: Arrays, calibration: Sequence[Arrays], only: Sequence[str] = ()) -> list[Prepared]:
    """Every rival that is installed, made of a float32 model on the CPU.

    Args:
        model: early-exit, in evaluation mode.
        sample: one batch, to trace with.
        calibration: rows for NNCF, none of which is measured.
        only: names of those that are wanted; all of them where empty.
    """
    absent = missing()
    found: list[Prepared] = []
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for runtime, build in (("openvino", _openvino_rivals), ("onnxruntime", _onnxruntime_rivals)):
            if runtime in absent:
                print(absent[runtime])
                continue
            wanted = [name for name in only if name.startswith(runtime)]
            if wanted or not only:
                found += build(model, sample, calibration, Path(folder), wanted)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about every shape that they trace."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _with_attention(model: Any, implementation: str) -> Any:
    model.backbone.config._attn_implementation = implementation
    return model


def _openvino_rivals(
    model: Any,
    sample: Arrays,
    calibration: Sequence[Arrays],
    folder: Path,
    wanted: Sequence[str],
) -> list[Prepared]:
    import nncf
    import openvino

    names = [name for name in INPUTS if name in sample]
    example = tuple(torch.from_numpy(sample[name]) for name in names)
    # in the backbone's fused attention, and without ops that only this project has
    with torch.no_grad(), fk.backend("reference"):
        converted = openvino.convert_model(_FullModel(_with_attention(model, "sdpa"), names), example_input=example)
    for port, name in zip(converted.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    converted.reshape({name: openvino.PartialShape([-1, -1]) for name in names})
    made: dict[str, tuple[Any, dict[str, str]]] = {
        "openvino f32": (converted, {"INFERENCE_PRECISION_HINT": "f32"}),
        "openvino bf16": (converted, {"INFERENCE_PRECISION_HINT": "bf16"}),
    }
    if calibration and (not wanted or "openvino int8" in wanted):
        quantised = nncf.quantize(
            converted,
            nncf.Dataset([{name: row[name] for name in names} for row in calibration]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
        )
        # the rest in what the processor does best, which is OpenVINO's own choice
        made["openvino int8"] = (quantised, {})
    return [
        Prepared(name, partial(_fastest_openvino, openvino.Core(), name, graph, options))
        for name, (graph, options) in made.items()
        if not wanted or name in wanted
    ]


def _fastest_openvino(
    core: Any, name: str, graph: Any, options: Mapping[str, Any], batches_of: Callable[[int], Sequence[Arrays]]
) -> Rival:
    """The hint and the padding that were fastest on a few of the batches."""
    threads = torch.get_num_threads()
    tried: list[tuple[float, Rival]] = []
    padded = {pad_to: batches_of(pad_to) for pad_to in (1, 16)}
    if _shapes(padded[1]) == _shapes(padded[16]):
        del padded[16]
    for hint, (pad_to, batches) in itertools.product(("LATENCY", "THROUGHPUT"), padded.items()):
        compiled = core.compile_model(
            graph, "CPU", {**options, "PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        )
        run: Run = partial(_run_openvino, compiled)
        if hint == "THROUGHPUT":
            import openvino

            run = partial(_run_openvino_queue, openvino.AsyncInferQueue(compiled))
        padding = "exact lengths" if pad_to == 1 else f"lengths in steps of {pad_to}"
        how = f"{hint.lower()} hint, {padding}, {threads} threads"
        tried.append((_seconds(run, batches[:: max(1, len(batches) // _TRIED_BATCHES)]), Rival(name, how, run, pad_to)))
    return min(tried, key=lambda pair: pair[0])[1]


def _shapes(batches: Sequence[Arrays]) -> list[tuple[int, ...]]:
    return [next(iter(batch.values())).shape for batch in batches]


def _run_openvino(compiled: Any, batches: Sequence[Arrays]) -> np.ndarray:
    return np.concatenate([compiled(batch, share_inputs=True)[0].copy() for batch in batches])


def _run_openvino_queue(queue: Any, batches: Sequence[Arrays]) -> np.ndarray:
    answers: dict[int, np.ndarray] = {}

    def keep(request: Any, number: int) -> None:
        answers[number] = request.get_output_tensor(0).data.copy()

    queue.set_callback(keep)
    for number, batch in enumerate(batches):
        queue.start_async(batch, number)
    queue.wait_all()
    return np.concatenate([answers[number] for number in range(len(batches))])


def _seconds(run: Run, batches: Sequence[Arrays]) -> float:
    run(batches)
    started = time.perf_counter()
    run(batches)
    run(batches)
    return time.perf_counter() - started


def _onnxruntime_rivals(
    model: Any,
    sample: Arrays,
    calibration: Sequence[Arrays],
    folder: Path,
    wanted: Sequence[str],
) -> list[Prepared]:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    config = model.config.backbone
    plain, fused, quantised = (str(folder / f"{name}.onnx") for name in ("plain", "fused", "int8"))
    _export_onnx(model, sample, plain)
    optimised = optimizer.optimize_model(
        plain, "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size, opt_level=1
    )
    fusions = {name: count for name, count in optimised.get_fused_operator_statistics().items() if count}
    optimised.save_model_to_file(fused)
    how = f"fused: {', '.join(f'{count} {name}' for name, count in fusions.items())}; {torch.get_num_threads()} threads"
    rivals = [("onnxruntime f32", fused)]
    if not wanted or "onnxruntime int8" in wanted:
        # the types of fused nodes are not inferred; products of two activations stay float
        kinds = {"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True}
        quantize_dynamic(fused, quantised, per_channel=True, weight_type=QuantType.QInt8, extra_options=kinds)
        rivals.append(("onnxruntime int8", quantised))
    return [
        Prepared(name, partial(_onnxruntime_rival, name, how, _session(path)))
        for name, path in rivals
        if not wanted or name in wanted
    ]


def _export_onnx(model: Any, sample: Arrays, path: str) -> None:
    """By tracing, with attention written out: the pattern that onnxruntime's optimizer knows."""
    names = [name for name in INPUTS if name in sample]
    axes = {0: "rows", 1: "tokens"}
    try:
        with torch.no_grad(), fk.backend("reference"):
            torch.onnx.export(
                _FullModel(_with_attention(model, "eager"), names),
                tuple(torch.from_numpy(sample[name]) for name in names),
                path,
                input_names=names,
                output_names=["logits"],
                dynamic_axes=dict.fromkeys(names, axes) | {"logits": {0: "rows"}},
                opset_version=17,
                dynamo=False,
            )
    finally:
        _with_attention(model, "sdpa")


def _session(path: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _onnxruntime_rival(name: str, how: str, session: Any, batches_of: Callable[[int], Sequence[Arrays]]) -> Rival:
    return Rival(name, how, partial(_run_onnxruntime, session))


def _run_onnxruntime(session: Any, batches: Sequence[Arrays]) -> np.ndarray:
    return np.concatenate([session.run(None, batch)[0] for batch in batches])
