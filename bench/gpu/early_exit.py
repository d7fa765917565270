"""Whole early-exit BERT against the best full model, with random weights and an imposed exit pattern.

Heads, gates and compactions all run; only what the gate compares with is replayed: a row that is to leave after this
layer gets a speed of 1, any other a speed of 0. Which rows leave where follows a truncated geometric distribution with
the wanted average, shuffled over the workload.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig

import fastkd
from fastkd.encoders.layout import TokenLayout
from fastkd.engines.graphs import GraphEngine
from fastkd.engines.stream import Stream
from fastkd.engines.stream_batches import TOKENS_PER_RUN, BatchStream
from fastkd.engines.stream_reader import EncodedRow
from fastkd.exits.rule import ExitRule
from fastkd.inference.interleaved import interleaved
from fastkd_kernels.ops.student_head import student_head_reference
from gpu.records import LONG_RUNS, STREAM, STREAM_BATCHES, ModelRow
from gpu.timing import SPIN_UP_SECONDS, Timer, quantiles

SAME_ANSWERS = 0.9
"""Of all rows: random weights are undecided about some, and rounding decides these for each engine."""
SAME_LOGITS = 0.05
"""Of a full model in another order of summation; a wrong layer or row moves the logits by more than half."""
Answers = tuple[Tensor, Tensor | None]
"""Predictions of all rows, and the layers they left after."""
Contestants = dict[str, Callable[[], Answers]]


@dataclass(frozen=True)
class Scale:
    """What is measured: batch sizes and average depths on how many rows of how many tokens."""

    config: Mapping[str, int]
    tokens: int
    batch_sizes: Sequence[int]
    average_layers: Sequence[float]
    dtype: torch.dtype
    repeats: int
    compile_backend: str
    large: int = 32
    """Batches of so many rows and more have a goal."""

    def group(self, name: str) -> list[int]:
        """The "large" batch sizes, or the others."""
        return [size for size in self.batch_sizes if (size >= self.large) == (name == "large")]

    def rows(self, batch_size: int) -> int:
        """Rows of the workload: enough batches that their random mixtures average out.

        A stream ends with runs that are far from full, which is lost in a long input: there more rows.
        """
        if self.tokens <= 16:
            return 2 * batch_size
        return 4096 if batch_size >= 32 else 64 + 8 * batch_size


FULL = Scale({}, 128, (32, 128, 8, 1), (1.14, 2.79), torch.bfloat16, 7, "inductor")
REHEARSAL = Scale(
    {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
    },
    6, (1, 4), (1.5,), torch.float32, 2, "eager", large=4,
)  # fmt: skip


def exit_pattern(rows: int, average: float, layers: int, seed: int = 0) -> Tensor:
    """[rows] int64 exit layers from 1 to `layers` whose mean is near `average`, geometrically distributed."""
    if not 1 <= average <= (1 + layers) / 2:
        raise ValueError(f"average: got {average}, expected 1 to {(1 + layers) / 2}, half of the depth")
    low, high = 0.0, 1.0  # the share that goes on from each layer
    for _ in range(60):
        stays = (low + high) / 2
        mean = sum(stays**layer for layer in range(layers))
        low, high = (stays, high) if mean < average else (low, stays)
    # the share of rows that is still there after each layer, at the middle of every row's quantile
    beyond = 1 - (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    reached = torch.tensor([low**layer for layer in range(1, layers)], dtype=torch.float64)
    depths = 1 + (beyond[:, None] < reached[None, :]).sum(1)
    return depths[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))]


def check_logits(logits: Tensor, expected: Tensor) -> None:
    """Against eager's: as a whole, because rounding moves single elements of a deep bfloat16 model freely.

    Raises:
        AssertionError: they differ by more than SAME_LOGITS of eager's norm, or are not numbers.
    """
    error = (logits.double() - expected.double()).norm() / expected.double().norm()
    assert error <= SAME_LOGITS, f"its logits differ from eager's by {error:.1%} of their norm"


class Replay:
    """Makes a model's gates decide as an exit pattern says, at the cost of the decision they would have taken."""

    def __init__(self, model: fastkd.EarlyExitForSequenceClassification, batches: Sequence[Tensor]) -> None:
        self._speeds = [
            {
                layer: (exits[exits >= layer] == layer).float().to(model.device)
                for layer in range(1, model.num_layers + 1)
            }
            for exits in batches
        ]
        self.batch = 0
        for head in model.heads.values():
            head.decide = partial(self._decide, type(head).decide.__get__(head))

    def _decide(
        self,
        decide: Callable[..., Any],
        hidden_states: Tensor,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        layer: int,
        thresholds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        # the last layer answers every row that is left; an engine with a threshold for each row was told the pattern
        if thresholds is None and layer != rule.last_layer:
            thresholds = self._speeds[self.batch][layer]
        return decide(hidden_states, layout, rule, layer=layer, thresholds=thresholds, **options)


class ReplayedStream(Stream):
    """A stream whose gates decide as an exit pattern says, [rows] exit layers; it costs a copy of them a run more."""

    def __init__(
        self,
        model: fastkd.EarlyExitForSequenceClassification,
        rows: Sequence[Mapping[str, Any]],
        pattern: Tensor,
        tokens_per_run: int,
    ) -> None:
        super().__init__(model, rows, rule=model.exit_rule(0.5), tokens_per_run=tokens_per_run)
        self._pattern = pattern

    def _thresholds_of(self, layer: int, rows: Sequence[EncodedRow]) -> Tensor:
        leaves = self._pattern[[row.position for row in rows]] <= layer
        return leaves.float().to(self._device)


class ReplayedBatches(BatchStream):
    """The same for a stream of batches; `speeds` [layers, B] are 1 from where a row is to leave, one a batch."""

    def __init__(
        self,
        model: fastkd.EarlyExitForSequenceClassification,
        batches: Sequence[Tensor],
        speeds: Sequence[Tensor],
        tokens_per_run: int,
    ) -> None:
        inputs = ({"input_ids": ids} for ids in batches)
        super().__init__(model, inputs, rule=model.exit_rule(0.5), tokens_per_run=tokens_per_run)
        self._speeds = iter(speeds)

    def _thresholds_of(self, rows: int) -> Tensor:
        return next(self._speeds)


class Setting:
    """One batch size: the model, its workload, and all that answer it."""

    def __init__(
        self,
        scale: Scale,
        batch_size: int,
        timer: Timer,
        begin: Callable[[str], bool] = lambda contestant: True,
        leave_if_dead: Callable[[], None] = lambda: None,
    ) -> None:
        """`begin` is asked before each contestant's first answer, `leave_if_dead` after one that failed."""
        torch.manual_seed(0)
        self._begin, self._leave_if_dead = begin, leave_if_dead
        self.scale = scale
        self.batch_size = batch_size
        self.timer = timer
        config = fastkd.EarlyExitConfig(BertConfig(**scale.config), num_labels=4, exits_trained=True)
        model = fastkd.EarlyExitForSequenceClassification(config).eval()
        self.model = nn.Module.to(model, device=timer.device, dtype=scale.dtype)
        vocabulary = model.config.backbone.vocab_size
        self.rows = scale.rows(batch_size)
        ids = torch.randint(vocabulary, (self.rows, scale.tokens), device=timer.device)
        self.batches = list(ids.split(batch_size))
        self.lists = [{"input_ids": row} for row in ids.tolist()]

    # --- the full model ---

    def full_models(self, problems: list[str]) -> Contestants:
        """Every way to run all layers that works here."""
        compiled = self._compile(self._full_in_torch, None)
        reduced = self._compile(self._full_in_torch, "reduce-overhead")
        ways: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "eager": lambda: self._full,
            "eager in a CUDA graph": lambda: self._graphed(self._full),
            "torch.compile": lambda: compiled,
            "torch.compile reduce-overhead": lambda: reduced,
            "torch.compile in a CUDA graph": lambda: self._graphed(compiled),
        }
        contestants: Contestants = {}
        expected = None
        for name, make in ways.items():
            if not self._begin(f"full model, {name}"):
                continue
            try:
                forward = make()
                logits = self._logits_in_full(forward)
                expected = logits if expected is None else expected
                check_logits(logits, expected)
                contestants[name] = partial(self._answer_in_full, forward)
            except Exception as error:  # one way that does not run here must not cost the others
                text = " ".join(str(error).split())[:200]
                problems.append(f"full model, batch {self.batch_size}: {name}: {type(error).__name__}: {text}")
                self._leave_if_dead()
        return contestants

    def _compile(self, function: Callable[..., Tensor], mode: str | None) -> Callable[[Tensor], Tensor]:
        if self.scale.compile_backend == "inductor":
            return torch.compile(function, mode=mode, dynamic=False)
        return torch.compile(function, backend=self.scale.compile_backend, dynamic=False)

    def _full(self, input_ids: Tensor) -> Tensor:
        return self.model.last_head(self._encode(input_ids))

    def _full_in_torch(self, input_ids: Tensor) -> Tensor:
        """The same with the head in plain PyTorch, so that the compiler sees all of it."""
        return student_head_reference(self._encode(input_ids), self.model.last_head.weights())

    def _encode(self, input_ids: Tensor) -> Tensor:
        hidden_states = self.model.backbone.embeddings(input_ids=input_ids)
        for layer in self.model.layers:
            hidden_states = layer(hidden_states, None)
        return hidden_states

    def _graphed(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        static = self.batches[0].clone()
        answers: list[Tensor] = []
        for _ in range(3):
            forward(static)
        replay = self.timer.capture([lambda: answers.append(forward(static))])

        def run(input_ids: Tensor) -> Tensor:
            static.copy_(input_ids)
            replay()
            return answers[-1].clone()

        return run

    def _logits_in_full(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """[rows, classes]; a way that replays a graph writes over its last answer, hence the copies."""
        return torch.cat([forward(ids).clone() for ids in self.batches])

    def _answer_in_full(self, forward: Callable[[Tensor], Tensor]) -> Answers:
        return self._logits_in_full(forward).argmax(-1).cpu(), None

    # --- early exit ---

    def early_exits(self, pattern: Tensor) -> Contestants:
        """Every engine, on this pattern."""
        patterns = pattern.split(self.batch_size)
        layers = torch.arange(1, self.model.num_layers + 1)[:, None]
        speeds = [(exits[None, :] <= layers).float().to(self.timer.device) for exits in patterns]
        return {
            "batch": partial(self._answer_in_batches, Replay(self.model, patterns)),
            "graphs": partial(self._answer_by_graphs, speeds),
            STREAM: partial(self._answer_as_a_stream, pattern),
            STREAM_BATCHES: partial(self._answer_as_streamed_batches, speeds, self.batch_size * self.scale.tokens),
            LONG_RUNS: partial(self._answer_as_streamed_batches, speeds, TOKENS_PER_RUN["cuda"]),
        }

    @cached_property
    def _graphs(self) -> GraphEngine:
        return GraphEngine(self.model, None if self.timer.device.type == "cuda" else self._plain_calls)

    def _plain_calls(self, stage: Callable[[], object]) -> Callable[[], None]:
        return self.timer.capture([stage])

    def _answer_by_graphs(self, speeds: Sequence[Tensor]) -> Answers:
        rule = self.model.exit_rule(0.5)
        pairs = zip(self.batches, speeds, strict=True)
        records = [self._graphs.run(ids, None, rule, thresholds=thresholds) for ids, thresholds in pairs]
        predictions = torch.cat([record.logits.argmax(-1) for record in records])
        return predictions.cpu(), torch.cat([record.exit_layer for record in records]).cpu()

    def _answer_in_batches(self, replay: Replay) -> Answers:
        predictions, layers = [], []
        for number, ids in enumerate(self.batches):
            replay.batch = number
            output = self.model(input_ids=ids, speed=0.5, engine="batch")
            predictions.append(output.logits.argmax(-1))
            layers.append(output.exit_layer)
        return torch.cat(predictions).cpu(), torch.cat(layers).cpu()

    def _answer_as_a_stream(self, pattern: Tensor) -> Answers:
        """From lists of token numbers to an answer a row, in runs of as many tokens as a batch has."""
        answers = list(ReplayedStream(self.model, self.lists, pattern, self.batch_size * self.scale.tokens))
        numbers = self.model.config.label2id
        predictions = torch.tensor([numbers[row.label] for row in answers])
        return predictions, torch.tensor([row.exit_layer for row in answers])

    def _answer_as_streamed_batches(self, speeds: Sequence[Tensor], tokens_per_run: int) -> Answers:
        """Batch after batch, in runs of so many tokens."""
        outputs = list(ReplayedBatches(self.model, self.batches, speeds, tokens_per_run))
        predictions = torch.cat([output.logits.argmax(-1) for output in outputs])
        return predictions.cpu(), torch.cat([output.exit_layer for output in outputs]).cpu()

    def flops_speedup(self, pattern: Tensor) -> float:
        """Full model over early exit, FastBERT's convention."""
        config, tokens = self.model.config, self.scale.tokens
        full = fastkd.flops(config, tokens)
        spent = sum(fastkd.flops(config, tokens, layers=layer, heads=layer) for layer in pattern.tolist())
        return full * len(pattern) / spent

    # --- measuring ---

    @torch.inference_mode()
    def prepare(self) -> None:
        """Compile everything and run it once."""
        self.full_models([])
        self._right_engines(exit_pattern(self.rows, self.scale.average_layers[0], self.model.num_layers), [])

    @torch.inference_mode()
    def measure(self, problems: list[str]) -> list[ModelRow]:
        """Every engine at every average depth against the fastest full model, all taking turns."""
        ways = self.full_models(problems)
        if not self._begin("full models in turn"):
            return []
        full = self._fastest(ways)
        rows = []
        for average in self.scale.average_layers:
            pattern = exit_pattern(self.rows, average, self.model.num_layers)
            rows += self._measure_pattern(pattern, full, problems)
        return rows

    def _fastest(self, contestants: Contestants, keep: int = 3) -> Contestants:
        """Those that may turn out to be the best one, by a single pass each."""
        seconds = {name: self.timer.wall_seconds(answer) for name, answer in contestants.items()}
        return {name: contestants[name] for name in sorted(seconds, key=seconds.__getitem__)[:keep]}

    def _right_engines(self, pattern: Tensor, problems: list[str]) -> Contestants:
        """The engines that run here, follow the pattern and answer as the first of them does."""
        right: Contestants = {}
        expected = None
        for engine, answer in self.early_exits(pattern).items():
            if not self._begin(f"{engine}, {pattern.double().mean().item():.2f} layers"):
                continue
            try:
                predictions, layers = answer()
                assert layers is not None
                assert torch.equal(layers.long(), pattern), "it does not follow the imposed exit pattern"
                expected = predictions if expected is None else expected
                same = (predictions == expected).double().mean().item()
                assert same >= SAME_ANSWERS, f"only {same:.1%} of its answers are those of {next(iter(right))}"
                right[engine] = answer
            except Exception as error:  # one engine that fails must not cost the others
                text = " ".join(str(error).split())[:200]
                problems.append(f"early exit, batch {self.batch_size}: {engine}: {type(error).__name__}: {text}")
                self._leave_if_dead()
        return right

    def _measure_pattern(self, pattern: Tensor, full: Contestants, problems: list[str]) -> list[ModelRow]:
        early = self._right_engines(pattern, problems)
        if not self._begin(f"all in turn, {pattern.double().mean().item():.2f} layers"):
            return []
        self.timer.spin_up(SPIN_UP_SECONDS)
        seconds, _ = interleaved({**full, **early}, self.scale.repeats)
        medians = {name: quantiles(values).median / 1e6 for name, values in seconds.items()}
        best = min(full, key=medians.__getitem__)
        rows = []
        for engine in early:
            spread = quantiles(seconds[engine])
            rows.append(
                ModelRow(
                    batch_size=self.batch_size,
                    rows=self.rows,
                    average_layers=pattern.double().mean().item(),
                    engine=engine,
                    seconds=medians[engine],
                    p20_seconds=spread.p20 / 1e6,
                    p80_seconds=spread.p80 / 1e6,
                    full_engine=best,
                    full_seconds=medians[best],
                    flops_speedup=self.flops_speedup(pattern),
                )
            )
        return rows
