"""Streams, pools, captures and turns of the engines: played on the CPU (`cuda_on_cpu`), and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cuda_on_cpu import Cuda, Placed, on_cpu
from test_engine_graphs import DEVICE, Plain, answer, assert_same
from test_model import infer, mixed_speed
from test_stream_batches import assert_answers, half_of_a_gpu, some_batches
from tiny_models import early_exit_model, one_thread, random_batch  # noqa: F401  # one is a fixture
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fastkd_kernels as fk
from fastkd.engines import cuda_graphs, packed_layers, stream_batches
from fastkd.engines.cuda_graphs import CudaGraphs, Look, Recent, Turns, obstacle
from fastkd.engines.graphs import GraphEngine
from fastkd.engines.packed_encoder import encoder_of
from fastkd.engines.stream_batches import BatchStream

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
without_gpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU does what is played here")
ZERO, ONE = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """Two GPUs that are played, with layers as a GPU runs them."""
    monkeypatch.setattr(packed_layers, "linear_on", lambda device: packed_layers.JoinedLinear)
    monkeypatch.setattr(stream_batches, "is_capturable", lambda model: model.device.type == "cuda")
    played = Cuda()
    with played.in_charge():
        yield played


def captures(cuda: Cuda) -> list[Any]:
    return [entry for entry in cuda.log if entry[0] == "capture"]


def batch_stream(model: Any, batches: list[Any], speed: float, **options: Any) -> BatchStream:
    return BatchStream(model, batches, rule=model.exit_rule(speed), **options)


class Products:
    """Something to capture: x = tanh(x w)."""

    def __init__(self) -> None:
        self.x, self.weight = torch.randn(3, 4), torch.randn(4, 4)

    def __call__(self) -> None:
        self.x.copy_((self.x @ self.weight).tanh())


# Devices and streams


@without_gpu
def test_a_model_beside_the_current_device(cuda: Cuda) -> None:
    model, batch = early_exit_model(), random_batch()
    speed = mixed_speed(model, batch)
    expected = infer(model, batch, speed, engine="batch")
    placed, batches = Placed(model, "cuda:1"), some_batches()
    engine = GraphEngine(placed)
    for _ in range(3):
        assert_same(answer(engine, batch, speed), expected)
    for _ in range(2):
        outputs = list(batch_stream(placed, batches, speed, tokens_per_run=64))
        assert_answers(model, batches, outputs, speed)
    assert {entry[1].device for entry in captures(cuda)} == {ONE}
    assert {entry[1] for entry in cuda.log if entry[0] == "record"} == {1}, "events of the stream that works"
    assert cuda.current_stream().device == ZERO, "the caller's device is as it was"
    assert cuda.current_stream().number == cuda.current_stream(ONE).number == 0, "and so are the streams"


@without_gpu
def test_models_on_two_devices_take_turns(cuda: Cuda) -> None:
    model, batch = early_exit_model(), random_batch()
    speed = mixed_speed(model, batch)
    expected = infer(model, batch, speed, engine="batch")
    models = [Placed(model, name) for name in ("cuda:0", "cuda:1")]
    engines = [GraphEngine(placed) for placed in models]
    for _ in range(2):
        for engine in engines:
            assert_same(answer(engine, batch, speed), expected)
    assert {entry[1].device for entry in captures(cuda)} == {ZERO, ONE}


@without_gpu
def test_models_on_two_devices_in_two_threads(cuda: Cuda) -> None:
    # modules of their own, as two models have
    models = [early_exit_model() for _ in range(2)]
    batch = random_batch()
    speed = mixed_speed(models[0], batch)
    expected = infer(models[0], batch, speed, engine="batch")

    def work(number: int) -> None:
        with on_cpu(cuda):
            placed = Placed(models[number], f"cuda:{number}")
            engine = GraphEngine(placed)
            for _ in range(3):
                assert_same(answer(engine, batch, speed), expected)
                outputs = list(batch_stream(placed, [batch], speed))
                assert torch.equal(outputs[0].exit_layer, expected.exit_layer)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))
    assert {entry[1].device for entry in captures(cuda)} == {ZERO, ONE}


@without_gpu
def test_other_threads_may_allocate_during_a_capture(cuda: Cuda) -> None:
    CudaGraphs(ZERO)(Products())
    assert [entry[3] for entry in captures(cuda)] == ["thread_local"]


def test_a_stream_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own streams come round after 32."""
    asked: list[Any] = []

    class Driver:
        code = 0

        def cuStreamCreate(self, handle: Any, flags: int) -> int:
            asked.append(flags)
            ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = 0x5EED
            return self.code

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))
    assert cuda_graphs._new_stream(ONE) == (0x5EED, ONE)
    assert asked == [ONE, 1]
    monkeypatch.setattr(Driver, "code", 201)
    with pytest.raises(RuntimeError, match="cuStreamCreate returned 201"):
        cuda_graphs._new_stream(ONE)


# Pools, streams and graphs


@without_gpu
def test_a_new_pool_when_all_graphs_have_gone(cuda: Cuda) -> None:
    recorder, run = CudaGraphs(ZERO), Products()
    replays = [recorder(run) for _ in range(2)]
    assert len({entry[2] for entry in captures(cuda)}) == 1, "graphs share a pool"
    replays.clear()
    recorder(run)()
    assert len({entry[2] for entry in captures(cuda)}) == 2


@without_gpu
def test_engines_capture_again_after_weights_change(cuda: Cuda) -> None:
    model, batch, batches = early_exit_model(), random_batch(), some_batches()
    placed = Placed(model, "cuda:0")
    engine = GraphEngine(placed)
    for _ in range(3):
        speed = mixed_speed(model, batch)
        expected = infer(model, batch, speed, engine="batch")
        before = len(captures(cuda))
        for _ in range(2):
            assert_same(answer(engine, batch, speed), expected)
            assert_answers(model, batches, list(batch_stream(placed, batches, speed)), speed)
        assert len(captures(cuda)) > before
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)


@without_gpu
def test_graphs_of_others_outlive_those_that_go(cuda: Cuda) -> None:
    """Destroying a graph frees cuBLAS' workspace of its stream, which other graphs of that stream read."""
    first, second, run = CudaGraphs(ZERO), CudaGraphs(ZERO), Products()
    kept, goes, other = first(run), first(run), second(run)
    del goes
    gc.collect()
    kept()
    del kept
    gc.collect()
    other()


@without_gpu
def test_no_two_recorders_share_a_stream(cuda: Cuda) -> None:
    recorders = [CudaGraphs(ZERO) for _ in range(40)]
    replays = [recorder(Products()) for recorder in recorders]
    assert len({entry[1] for entry in captures(cuda)}) == 40
    assert len({workspace for replay in replays for workspace in replay.__self__.workspaces}) == 40


@without_gpu
def test_one_capture_at_a_time(cuda: Cuda) -> None:
    """Beginning one waits for the device, which breaks the other."""
    meeting = threading.Barrier(2, timeout=0.3)
    recorders = [CudaGraphs(torch.device("cuda", index)) for index in range(2)]

    def captured() -> None:
        if cuda.current_stream().capturing is not None:
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait()

    def work(recorder: CudaGraphs) -> None:
        with on_cpu(cuda):
            recorder(captured)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, recorders))
    assert not any(recorder.calls_instead for recorder in recorders)


@without_gpu
def test_a_stream_is_lent_again_when_its_last_graph_has_gone(cuda: Cuda) -> None:
    recorder, run = CudaGraphs(ZERO), Products()
    replay = recorder(run)
    del recorder
    gc.collect()
    CudaGraphs(ZERO)(Products())
    (mine, other) = (entry[1] for entry in captures(cuda))
    assert mine != other, "a stream was lent again while a graph of it was alive"
    replay()
    del replay
    gc.collect()
    again = CudaGraphs(ZERO)
    again(Products())
    assert captures(cuda)[-1][1] in (mine, other)


@without_gpu
def test_nothing_is_collected_during_a_capture(cuda: Cuda) -> None:
    seen: list[bool] = []
    CudaGraphs(ZERO)(lambda: seen.append(gc.isenabled()))
    assert seen == [True] * CudaGraphs.WARM_UPS + [False]
    assert gc.isenabled()


# What a graph reads


@without_gpu
@pytest.mark.parametrize("how", ["autocast", "hook"])
@pytest.mark.parametrize("engine", ["graphs", "stream_batches"])
def test_what_was_captured_is_kept(cuda: Cuda, engine: str, how: str) -> None:
    """A packed call, which asks for the encoder, lets go of the weights that were joined for the graphs."""
    model, batch = early_exit_model(), random_batch()
    placed, speed = Placed(model, "cuda:0"), mixed_speed(model, batch)
    expected = infer(model, batch, speed, engine="batch")
    graphs = GraphEngine(placed)

    def run() -> Any:
        if engine == "graphs":
            return answer(graphs, batch, speed)
        (output,) = batch_stream(placed, [batch], speed)
        return output

    run()
    before = len(captures(cuda))
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            encoder_of(placed)
    else:
        handle = model.layers[0].register_forward_hook(lambda *_: None)
        encoder_of(placed)
        handle.remove()
    gc.collect()
    assert_same(run(), expected)
    assert len(captures(cuda)) == before, "the same graphs, not new ones"


@without_gpu
def test_weights_that_change_while_graphs_point_to_copies_of_them(cuda: Cuda) -> None:
    model, batch = early_exit_model(), random_batch()
    placed = Placed(model, "cuda:0")
    engine = GraphEngine(placed)
    answer(engine, batch, 0.6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    encoder_of(placed)  # joins them anew
    gc.collect()
    assert_same(answer(engine, batch, 0.6), infer(model, batch, 0.6, engine="batch"))


@without_gpu
def test_autocast_has_graphs_of_its_own(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    # tensors stay on the CPU, and so does autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind, ask=torch.is_autocast_enabled: ask("cpu"))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind, ask=torch.get_autocast_dtype: ask("cpu"))
    model, batch = early_exit_model(), random_batch()
    placed, speed = Placed(model, "cuda:0"), mixed_speed(model, batch)
    engine = GraphEngine(placed)
    expected = infer(model, batch, speed, engine="batch")
    stages = []
    for _ in range(2):
        assert_same(answer(engine, batch, speed), expected)
        assert_answers(model, [batch], list(batch_stream(placed, [batch], speed)), speed)
        with torch.autocast("cpu", torch.bfloat16):
            half = infer(model, batch, speed, engine="batch")
            record = answer(engine, batch, speed)
            same = record.exit_layer == half.exit_layer
            assert same.double().mean() > 0.8
            torch.testing.assert_close(record.logits[same], half.logits[same], rtol=0.1, atol=0.3)
            assert not torch.allclose(half.logits, expected.logits, atol=1e-4)
            assert not torch.allclose(record.logits, expected.logits, atol=1e-4), "computed in float32"
            (output,) = batch_stream(placed, [batch], speed)
            assert not torch.allclose(output.logits, expected.logits, atol=1e-4), "computed in float32"
            torch.testing.assert_close(output.logits[same], half.logits[same], rtol=0.1, atol=0.3)
        gc.collect()  # casts that autocast kept have gone with it
        stages.append(len(captures(cuda)))
    assert stages[0] == stages[1]


@without_gpu
def test_a_model_that_moved_is_not_replayed(cuda: Cuda) -> None:
    model, first, second = early_exit_model(), random_batch(seed=1), random_batch(seed=2)
    placed = Placed(model, "cuda:0")
    engine = GraphEngine(placed)
    answer(engine, first, 0.6)
    graphs = [stage.replay.__self__ for memory in engine._memories.values() for stage in memory.stages.values()]
    replays = sum(graph.replays for graph in graphs)
    placed.move("cpu")
    for _ in range(2):
        with pytest.raises(
            ValueError, match="model: got one on cpu, CUDA graphs need a CUDA device; use the batch engine"
        ):
            answer(engine, second, 0.6)
    assert sum(graph.replays for graph in graphs) == replays
    assert not engine._memories, "what graphs wrote to is given back"
    placed.move("cuda:1")
    assert_same(answer(engine, second, 0.6), infer(model, second, 0.6, engine="batch"))
    assert captures(cuda)[-1][1].device == ONE


@without_gpu
def test_a_stream_of_batches_whose_model_moves_says_so(cuda: Cuda) -> None:
    model, batches = early_exit_model(), some_batches(rows=(8,) * 9)
    placed = Placed(model, "cuda:0")
    answers = batch_stream(placed, batches, 0.6, tokens_per_run=64)
    next(answers)
    placed.move("cuda:0")
    with pytest.raises(RuntimeError, match="model: its weights were moved or replaced while the stream ran"):
        list(answers)
    assert_answers(model, batches, list(batch_stream(placed, batches, 0.6)), 0.6)


@without_gpu
def test_other_parameters_in_the_place_of_those_captured(cuda: Cuda) -> None:
    model, batch = early_exit_model(), random_batch()
    placed = Placed(model, "cuda:0")
    engine = GraphEngine(placed)
    answer(engine, batch, 0.6)
    model.load_state_dict({name: 1.05 * value for name, value in model.state_dict().items()}, assign=True)
    assert_same(answer(engine, batch, 0.6), infer(model, batch, 0.6, engine="batch"))


@without_gpu
def test_neither_engines_nor_packed_layers_keep_the_memory_of_a_model_that_moved(cuda: Cuda) -> None:
    model = early_exit_model(head="linear")  # folded heads keep one of their weights
    placed = Placed(model, "cuda:0")
    engine = GraphEngine(placed)
    answer(engine, random_batch(), 0.6)
    encoder_of(placed)
    list(batch_stream(placed, some_batches(), 0.6))
    memory = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    placed.move("cpu")
    gc.collect()
    assert [reference() for reference in memory] == [None] * len(memory)


@without_gpu
def test_graphs_of_other_weights_are_not_given_back(cuda: Cuda) -> None:
    """Two streams of one model, between which its weights change."""
    model, batches = early_exit_model(), some_batches(rows=(8,) * 9)
    placed = Placed(model, "cuda:0")
    first = batch_stream(placed, batches, 0.6, tokens_per_run=64)
    next(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    second = batch_stream(placed, batches, 0.6, tokens_per_run=64)
    next(second)
    list(first)
    third = batch_stream(placed, batches, 0.6, tokens_per_run=64)
    assert third._memory is not first._memory
    assert_answers(model, batches, list(third), 0.6)


# What cannot be captured


@without_gpu
def test_a_hooked_model_is_called(cuda: Cuda) -> None:
    model, batch = early_exit_model(), random_batch()
    speed = mixed_speed(model, batch)
    seen: list[int] = []
    model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    placed = Placed(model, "cuda:0")
    engine = GraphEngine(placed)
    with pytest.warns(RuntimeWarning, match="CUDA graphs: a BertLayer has a hook or a wrapper") as told:
        answer(engine, batch, speed)
    assert len(told) == 1
    seen.clear()
    record = answer(engine, batch, speed)
    assert len(seen) == 1
    assert_same(record, infer(model, batch, speed, engine="batch"))
    assert_answers(model, [batch], list(batch_stream(placed, [batch], speed)), speed)
    assert not captures(cuda)


def test_what_keeps_a_model_out_of_graphs() -> None:
    assert obstacle(early_exit_model()) is None
    model = early_exit_model()
    model.layers[1].forward = model.layers[1].forward
    assert "a wrapper" in str(obstacle(model))
    model = early_exit_model()
    model.layers[1].compile(backend="eager")
    assert "a BertLayer is compiled" in str(obstacle(model))
    model = early_exit_model()
    model.heads["0"].to("meta")
    assert obstacle(model) == "the weights lie on cpu and meta"


def made_up(*shape: int, device: str = "cuda:1", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, device=device, dtype=dtype)


ATEN = torch.ops.aten
LOOKED_AT: list[tuple[Callable[[], Any], str | None]] = [
    (lambda: made_up(3) + 1, None),
    (lambda: ATEN.index(made_up(3), [made_up(2, dtype=torch.int64)]), None),
    (lambda: made_up(3) * torch.tensor(2.0), None),
    (lambda: made_up(3, device="cpu").nonzero(), None),
    (lambda: made_up(3).cpu(), "_to_copy takes tensors on cpu and cuda:1"),
    (lambda: made_up(3).to("cuda:0"), "_to_copy takes tensors on cuda:0 and cuda:1"),
    (lambda: ATEN.copy_(made_up(3), made_up(3, device="cpu")), "copy_ takes tensors on cpu and cuda:1"),
    (lambda: made_up().cpu(), "_to_copy takes tensors on cpu and cuda:1"),
    (lambda: ATEN.nonzero(made_up(3)), "the host waits for the GPU in nonzero"),
    (lambda: made_up().item(), "the host waits for the GPU in _local_scalar_dense"),
]


@pytest.mark.parametrize(("run", "problem"), LOOKED_AT)
def test_operations_that_a_graph_cannot_hold(run: Callable[[], Any], problem: str | None) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), Look() as look:
        run()
    assert look.problem == problem


def test_an_index_by_truth_has_an_unknown_size() -> None:
    with FakeTensorMode():
        rows, mask = made_up(3), made_up(3, dtype=torch.bool)
        problem = cuda_graphs._problem_of(ATEN.index.Tensor, (rows, [mask]), {}, rows)
    assert problem == "the host waits for the GPU in index"


@without_gpu
def test_what_waits_is_seen_before_it_is_captured(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = "the host waits for the GPU in nonzero"
    monkeypatch.setattr(
        cuda_graphs, "_problem_of", lambda function, *_: problem if "nonzero" in str(function) else None
    )
    recorder, calls = CudaGraphs(ZERO), []
    with pytest.warns(RuntimeWarning, match=problem) as told:
        replays = [recorder(lambda: calls.append(torch.ones(2).nonzero())) for _ in range(3)]
    assert len(told) == 1
    assert not captures(cuda)
    calls.clear()
    for replay in replays:
        replay()
    assert len(calls) == 3


@without_gpu
def test_a_capture_that_fails_costs_itself_alone(cuda: Cuda) -> None:
    model, batch, batches = early_exit_model(), random_batch(), some_batches()
    speed = mixed_speed(model, batch)
    expected = infer(model, batch, speed, engine="batch")
    placed = Placed(model, "cuda:1")
    engine = GraphEngine(placed)
    answers = batch_stream(placed, batches, speed, tokens_per_run=64)
    cuda.fail_captures = True
    message = "CUDA graphs: a capture failed .RuntimeError: CUDA error"
    with pytest.warns(RuntimeWarning, match=message) as told:
        records = [answer(engine, batch, speed) for _ in range(2)]
    assert len(told) == 1
    with pytest.warns(RuntimeWarning, match=message) as told:
        outputs = list(answers)
    assert len(told) == 1
    for record in records:
        assert_same(record, expected)
    assert_answers(model, batches, outputs, speed)
    assert cuda.current_stream(ONE).number == 0, "the stream of the capture is not left current"
    assert not cuda.recording, "nor is the allocator left recording"
    cuda.fail_captures = False
    before = len(captures(cuda))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(answer(GraphEngine(placed), batch, speed), expected)
        assert_answers(model, batches, list(batch_stream(placed, batches, speed)), speed)
    assert len(captures(cuda)) > before


@without_gpu
def test_streams_that_call_do_not_keep_the_model(cuda: Cuda) -> None:
    model = early_exit_model()
    placed = Placed(model, "cuda:0")
    cuda.fail_captures = True
    with pytest.warns(RuntimeWarning, match="a capture failed"):
        list(batch_stream(placed, some_batches(), 0.6))
    reference = weakref.ref(placed)
    del placed
    gc.collect()
    assert reference() is None


# Turns


def test_threads_on_one_engine_do_not_mix_answers() -> None:
    model = early_exit_model()
    meeting = threading.Barrier(2, timeout=0.2)

    def slow(run: Callable[[], Any]) -> Callable[[], None]:
        """Waits before each run for another thread, which comes only where nothing keeps it away."""

        def replay() -> None:
            try:
                meeting.wait()
            except threading.BrokenBarrierError:
                meeting.reset()
            run()

        return replay

    engine = GraphEngine(model, slow)
    batches = [random_batch(seed=seed) for seed in range(2)]
    expected = [infer(model, batch, 0.6, engine="batch") for batch in batches]
    start = threading.Barrier(2)

    def work(number: int) -> list[fk.ExitRecord]:
        start.wait()
        return [answer(engine, batches[number], 0.6) for _ in range(3)]

    with ThreadPoolExecutor(2) as threads:
        for number, records in enumerate(threads.map(work, range(2))):
            for record in records:
                assert_same(record, expected[number])


def test_threads_on_one_stream_of_batches_get_each_answer_once() -> None:
    model, batches = early_exit_model().to(DEVICE), some_batches(rows=tuple(range(1, 25)))
    answers = BatchStream(model, batches, rule=model.exit_rule(0.6), tokens_per_run=64, recorder=Plain())
    given: list[int] = []

    def work(_: int) -> None:
        for output in answers:
            given.append(len(output.logits))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert sorted(given) == list(range(1, 25))


@without_gpu
def test_callers_on_other_streams_wait_for_what_is_queued(cuda: Cuda) -> None:
    turns = Turns(ONE)
    mine, other = cuda.new_stream(ONE), cuda.new_stream(ONE)
    for stream in (mine, mine, other):
        with cuda.stream(stream), turns.take():
            pass
    assert mine.waited_for == []
    assert other.waited_for == [mine]


def test_those_used_last_are_kept() -> None:
    kept: Recent[int, str] = Recent(2)
    kept.keep(1, "a")
    kept.keep(2, "b")
    assert kept.find(1) == "a"
    kept.keep(3, "c")
    assert list(kept) == [1, 3]
    assert kept.find(2) is None


def test_few_runs_of_other_sizes_and_lengths_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_batches, "MAX_RUNS", 3)
    model, batches = early_exit_model().to(DEVICE), some_batches(rows=(1, 2, 3, 4, 5, 6, 7, 8, 13))
    answers = BatchStream(model, batches, rule=model.exit_rule(0.6), tokens_per_run=20, recorder=Plain())
    assert_answers(model, batches, list(answers), 0.6)
    assert [len(lane.runs) for lane in answers._memory.lanes] == [3, 3]


# On a GPU


def gpu_products(device: torch.device = ZERO) -> Products:
    run = Products()
    run.x, run.weight = (torch.randn(256, 256, device=device, dtype=torch.bfloat16) for _ in range(2))
    return run


@needs_gpu
def test_graphs_in_all_their_lives() -> None:
    """Captured, destroyed, captured again, beside others that go: every replay computes what calls compute."""

    def check(run: Products, replay: Callable[[], None]) -> None:
        start = torch.randn_like(run.x)
        run.x.copy_(start)
        run()
        expected = run.x.clone()
        run.x.copy_(start)
        replay()
        torch.testing.assert_close(run.x, expected, rtol=0.02, atol=0.02)

    recorders = [CudaGraphs(ZERO) for _ in range(40)]
    runs = [[gpu_products() for _ in range(2)] for _ in recorders]
    replays = [[recorder(run) for run in of] for recorder, of in zip(recorders, runs, strict=True)]
    assert not any(recorder.calls_instead for recorder in recorders)
    assert len({recorder._stream.cuda_stream for recorder in recorders if recorder._stream}) == 40
    for number in range(1, 40, 2):
        replays[number].pop()
    replays[0].clear()
    gc.collect()
    torch.cuda.empty_cache()
    filler = [torch.randn(2**22, device=ZERO) for _ in range(20)]
    for of, kept in zip(runs, replays, strict=True):
        for run, replay in zip(of, kept, strict=False):
            check(run, replay)
    again = gpu_products()
    check(again, recorders[0](again))
    assert len(filler) == 20


AFTER_A_FAILURE = """
import warnings

import torch
from fastkd.engines.cuda_graphs import CudaGraphs

device = torch.device("cuda", 0)

def waits():
    torch.ones(3, device=device)
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream().synchronize()

before = torch.cuda.current_stream()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    CudaGraphs(device)(waits)()
assert ["a capture failed" in str(warning.message) for warning in told] == [True], told
assert torch.cuda.current_stream() == before
torch.cuda.empty_cache()
x = torch.ones(3, device=device)
later = CudaGraphs(device)
replay = later(lambda: x.add_(1))
assert not later.calls_instead
seen = x.clone()
replay()
assert torch.equal(x, seen + 1)
"""


@needs_gpu
def test_a_failed_capture_and_one_after_it() -> None:
    """In a process of its own, in which it may break what comes after it."""
    done = subprocess.run([sys.executable, "-c", AFTER_A_FAILURE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_gpu
def test_a_module_that_waits_is_called_on_a_gpu() -> None:
    recorder = CudaGraphs(ZERO)
    with pytest.warns(RuntimeWarning, match="the host waits for the GPU in nonzero"):
        recorder(lambda: torch.ones(3, device=ZERO).nonzero())()


@needs_gpu
def test_a_model_of_a_gpu_moves_to_the_cpu_and_back() -> None:
    model = half_of_a_gpu()
    batches = some_batches(rows=(13, 5))
    engine = GraphEngine(model)

    def on_gpu() -> list[Tensor]:
        return [answer(engine, batch, 0.6).logits.clone() for batch in batches]

    expected = on_gpu()
    allocated = torch.cuda.memory_allocated()
    nn.Module.to(model, "cpu")
    assert torch.cuda.memory_allocated() < allocated
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device"):
        on_gpu()
    nn.Module.to(model, ZERO)
    for ours, before in zip(on_gpu(), expected, strict=True):
        torch.testing.assert_close(ours, before, rtol=0.05, atol=0.1)


@needs_gpu
def test_threads_share_an_engine_while_batches_are_pinned() -> None:
    """Two threads on one engine with streams of their own, beside a stream of batches whose loader pins memory."""
    model = half_of_a_gpu()
    engine = GraphEngine(model)
    batches = some_batches(rows=(13, 8))
    expected = [answer(engine, batch, 0.6) for batch in batches]
    engine._start()
    rows = [{name: value.cpu() for name, value in batch.items()} for batch in some_batches(rows=(8,) * 40)]

    def ask(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                record = answer(engine, batches[number], 0.6)
                torch.testing.assert_close(record.logits, expected[number].logits, rtol=0.05, atol=0.1)

    def read(_: int) -> None:
        loader = torch.utils.data.DataLoader(rows, batch_size=None, pin_memory=True)  # type: ignore[arg-type]
        assert len(list(model.stream_batches(loader, speed=0.6))) == len(rows)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda number: read(number) if number == 2 else ask(number), range(3)))
    assert not engine._recorder.calls_instead  # type: ignore[union-attr]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU, and a second one")
def test_engines_on_the_second_gpu() -> None:
    model = nn.Module.to(half_of_a_gpu(), ONE)
    batches = [{name: value.to(ONE) for name, value in batch.items()} for batch in some_batches()]
    expected = [infer(model, batch, 0.6, engine="batch") for batch in batches]
    engine = GraphEngine(model)
    for output, batch, wanted in zip(model.stream_batches(batches, speed=0.6), batches, expected, strict=True):
        for ours in (output, answer(engine, batch, 0.6)):
            same = ours.exit_layer == wanted.exit_layer
            assert same.double().mean() >= 0.8
            torch.testing.assert_close(ours.logits[same], wanted.logits[same], rtol=0.05, atol=0.1)
