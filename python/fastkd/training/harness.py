"""The skeleton of every training, on `transformers.Trainer`: options, one run into a folder, and one stage of it.

`Run` keeps checkpoints beside the output folder and leaves a whole model folder or none; `train_stage` trains one
objective, from its newest whole checkpoint on. A killed run started again with `resume=True` ends in the same weights
as one that was never killed.

Started by `torchrun` or `accelerate launch`, training is data-parallel. n processes of `batch_size` rows take the same
steps as one process of n * `batch_size`: the same rows in each, in the same order, so that without dropout losses and
weights differ by rounding only; dropout is drawn by each process for its own rows. Where the rows of an epoch do not
fill its last step, rows from its start do. A run may go on with another number of processes if the rows of a step stay
as many.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastkd.data.batches import LengthGroupedSampler, ShuffledOnceSampler
from fastkd.data.files import atomic_folder, read_json, write_json
from fastkd.data.own_files import remove_own
from fastkd.data.rows import Rows
from fastkd.data.tensors import apart
from fastkd.model.adapters import save_adapter
from fastkd.training.checks import check_outputs, clear_failed_start, require
from fastkd.training.log import LOG_FILE
from fastkd.training.optimizers import BiasedAdamW
from fastkd.training.processes import by_first, refuse_sharding, use_one_gpu
from fastkd.training.sharding import ShardedObjective, load_whole_state, whole_state

# as `transformers.Trainer` calls them
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# what the official code does in both steps; weight decay it asks for under a name that its optimiser does not read
_FASTBERT: Mapping[str, Any] = {
    "batch_size": 32,
    "weight_decay": 0.0,
    "warmup": 0.1,
    "max_grad_norm": 0.0,
    "max_length": 128,
    "bf16": False,
    "seed": 7,
    "schedule_epochs": 3.0,
    "bias_correction": False,
    "adam_epsilon": 1e-6,
    "shuffle_once": True,
}
# what `transformers.Trainer` would do behind the back of an objective, and what to do instead
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0, 0.0, None), "the loss is the objective's own, which has no label smoothing"),
    "remove_unused_columns": ((False,), "rows have no unused columns"),
    "output_dir": ((), "checkpoints lie beside the finished model; pass output_dir to the training itself"),
    "label_names": ((["labels"], ("labels",)), "the labels of the rows are called 'labels'"),
}
_Options = TypeVar("_Options", bound="TrainOptions")


@dataclass(frozen=True)
class TrainOptions:
    """What every training can be told.

    Attributes:
        epochs: passes over the training rows.
        max_steps: optimiser steps; where given, `epochs` is ignored.
        batch_size: rows a step and process; two processes of 16 do what one of 32 does.
        learning_rate: its peak.
        weight_decay: of trained weight matrices; biases and LayerNorms have none.
        warmup: share of the steps in which the learning rate rises; it then falls linearly to 0.
        max_grad_norm: gradients are clipped to this norm; 0 switches clipping off.
        max_length: tokens a row, special ones included; longer rows are truncated.
        eval_batch_size: rows a batch and process in evaluation.
        eval_steps: evaluate and write a checkpoint every so many steps; None does so after each epoch.
        early_stopping_patience: stop after so many evaluations without a better one; None never stops early.
        bf16: autocast to bfloat16; None uses it where the hardware computes in it.
        seed: of the order of the rows, and of dropout.
        schedule_epochs: the learning rate rises and falls to 0 within so many epochs, whatever `epochs` says, and stays
            there: FastBERT's code gives the distillation the schedule of the fine-tuning, so that its epochs after the
            third change nothing. Steps are counted as there, int(rows * schedule_epochs / batch) + 1, and `warmup` is
            an unrounded share of them. None: the whole run.
        bias_correction: of the moments that Adam keeps; FastBERT's code leaves them biased towards 0, which makes its
            first step 3.2 times as long.
        adam_epsilon: what Adam adds to the root of the second moment; 1e-6 in FastBERT's code.
        shuffle_once: the rows come in one order, `random.Random(seed).shuffle` of theirs, in every epoch, as in
            FastBERT's code, instead of a new order of batches of like length in each.
        keep_last: keep the weights of the last step, not those of the best evaluation.
        fsdp: spread weights, gradients and what the optimizer keeps over the processes (FSDP2); nothing else changes.
        logging_steps: log the mean loss every so many steps.
        progress: show a progress bar and print the logs.
        resume: continue the killed run whose checkpoints lie beside `output_dir`, if there are any.
        overwrite: replace a finished `output_dir`, and unless `resume`, discard the checkpoints of a killed run.
        trainer_arguments: further `transformers.TrainingArguments`; they win over the ones above. Refused are
            `label_smoothing_factor`, `remove_unused_columns`, `output_dir` and `label_names`.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 4e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    max_length: int = 128
    eval_batch_size: int = 64
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    bf16: bool | None = None
    seed: int = 42
    schedule_epochs: float | None = None
    bias_correction: bool = True
    adam_epsilon: float = 1e-8
    shuffle_once: bool = False
    keep_last: bool = False
    fsdp: bool = False
    logging_steps: int = 25
    progress: bool = True
    resume: bool = False
    overwrite: bool = False
    trainer_arguments: Mapping[str, Any] = field(default_factory=dict)

    _fastbert: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "max_length", "eval_batch_size", "logging_steps"):
            require(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        self._check_epochs()
        for name in ("max_steps", "eval_steps", "early_stopping_patience", "schedule_epochs"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "a number above 0, or None")
        for name in ("weight_decay", "max_grad_norm", "adam_epsilon"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name, value in self.trainer_arguments.items():
            allowed, reason = _REFUSED.get(name, ((value,), ""))
            if value not in allowed:
                raise ValueError(f"trainer_arguments: got {name}={value!r}, but {reason}; leave it out")
        require("warmup", self.warmup, 0 <= self.warmup < 1, "a share of the steps in [0, 1)")

    def _check_epochs(self) -> None:
        require("epochs", self.epochs, self.epochs > 0, "a number above 0")

    @classmethod
    def preset(cls: type[_Options], parity: str, **changes: Any) -> _Options:
        """The options under which a run does what another code does; `changes` are options that win over them.

        Args:
            parity: "fastbert", the official code at https://github.com/autoliuweijie/FastBERT as its README runs it.
                What it does to the input is an attribute of model and tokenizer, see `fastkd.data.input_format`.

        Raises:
            ValueError: another code.
        """
        if parity != "fastbert":
            raise ValueError(f"parity: got {parity!r}, expected 'fastbert'")
        return cls(**{**_FASTBERT, **cls._fastbert, **changes})


@dataclass(frozen=True)
class HeadTrainOptions(TrainOptions):
    """Options of trainings in which something new learns beside a body that was trained.

    Attributes:
        head_learning_rate_factor: what is new learns so many times faster.
    """

    head_learning_rate_factor: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.head_learning_rate_factor
        require("head_learning_rate_factor", factor, factor > 0, "a number above 0")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did.

    Attributes:
        output_dir: the model folder; its `trainer_log.json` holds this and the options.
        steps: optimiser steps, those before a kill included.
        train_loss: mean loss over the steps of this process.
        metrics: of the kept weights on the dev rows, without a prefix: `loss`, and `accuracy` (`pearson` and `mse` for
            regression) after `finetune`, `accuracy_layer_<n>` (...) after `distill`, and what early exit does at speed
            0.5: `accuracy_speed_0.5` (`pearson_speed_0.5`), `flops_share_speed_0.5` (of the full model's FLOPs). Empty
            without dev rows.
        seconds: time in the training loop of this process, evaluation included.
        log_history: every log of `transformers.Trainer`.
    """

    output_dir: Path
    steps: int
    train_loss: float
    metrics: dict[str, float]
    seconds: float
    log_history: list[dict[str, float]]


class Objective(nn.Module, ABC):
    """A loss around a model, as `transformers.Trainer` sees it; what the Trainer asks of a model, the model answers."""

    accepts_loss_kwargs = False

    @property
    @abstractmethod
    def core(self) -> PreTrainedModel:
        """The model that is trained."""

    def get_input_embeddings(self) -> nn.Module:
        return self.core.get_input_embeddings()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.core.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same, as the Trainer of transformers 5.17 calls it; later ones prefer the name above."""
        self.core.gradient_checkpointing_enable(**options)


@dataclass(frozen=True)
class TrainingStage:
    """One objective to train: what is minimised, on which rows, and how it is judged.

    Attributes:
        objective: gives `loss` and `logits` of a batch; its parameters that ask for gradients are trained.
        train, dev: tokenised rows with their `length`; without `dev` nothing is evaluated.
        collator: makes a batch of rows.
        metrics: of the predictions on `dev`.
        best_metric: decides which weights are kept; "loss" is better when lower, all others when higher.
        learning_rates: peaks by the prefix of parameters that learn at another rate than `learning_rate`.
    """

    objective: Objective
    train: datasets.Dataset
    dev: datasets.Dataset | None
    collator: Callable[[list[dict[str, Any]]], Any]
    metrics: Callable[[EvalPrediction], dict[str, float]]
    best_metric: str
    learning_rates: Mapping[str, float]
    leaves_unused: bool = False
    """Whether parameters that learn may have no part in the loss, which several processes have to be told."""


def train_stage(
    stage: TrainingStage, folder: Path, options: TrainOptions, callbacks: Sequence[TrainerCallback] = ()
) -> TrainResult:
    """Train one stage with its checkpoints in `folder`, from the newest whole one on; its best weights stay loaded."""
    arguments = training_arguments(folder, options, best_metric=stage.best_metric, evaluates=stage.dev is not None)
    if stage.leaves_unused and "ddp_find_unused_parameters" not in options.trainer_arguments:
        arguments.ddp_find_unused_parameters = True
    added = list(callbacks)
    if options.early_stopping_patience is not None:
        added.append(EarlyStoppingCallback(options.early_stopping_patience))
    trainer = ObjectiveTrainer(
        model=stage.objective,
        args=arguments,
        train_dataset=stage.train.remove_columns("length"),
        eval_dataset=None if stage.dev is None else _sorted_by_length(stage.dev),
        data_collator=stage.collator,
        compute_metrics=stage.metrics,
        callbacks=added,
        learning_rates=stage.learning_rates,
        sampler=_sampler(stage.train["length"][:], arguments, options),
        options=options,
    )
    # it prints to standard output, which belongs to the caller
    trainer.remove_callback(PrinterCallback)
    # no process may look for checkpoints before the first one has put the folder in order
    trainer.accelerator.wait_for_everyone()
    checkpoint = last_checkpoint(folder)
    with _checkpointing_as_before(stage.objective.core):
        output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.make_whole()
    trainer.accelerator.free_memory()
    return TrainResult(
        output_dir=folder,
        steps=output.global_step,
        train_loss=output.training_loss,
        metrics=_kept_metrics(trainer.state, options.keep_last),
        seconds=output.metrics["train_runtime"],
        log_history=trainer.state.log_history,
    )


@contextmanager
def _checkpointing_as_before(model: PreTrainedModel) -> Iterator[None]:
    """The user's model recomputes no activations afterwards unless it did before."""
    before = recomputes_activations(model)
    try:
        yield
    finally:
        if recomputes_activations(model) and not before:
            # transformers 5.17 has the other name only, of which later ones warn
            disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
            disable()


def recomputes_activations(model: nn.Module) -> bool:
    """Whether activations are computed again in the backward pass; transformers' own question has two names."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@dataclass(frozen=True)
class Run:
    """One training on its way into `output_dir`.

    Attributes:
        output_dir: the model folder, which `finish` makes.
        checkpoints: the folder beside it that holds all that a continuation needs; `finish` removes it.
        record: what a continuation must agree with; the log of the finished run begins with it.
        arguments: of a `Trainer` that writes to `checkpoints`.
    """

    output_dir: Path
    checkpoints: Path
    record: dict[str, Any]
    arguments: TrainingArguments

    @classmethod
    def begin(
        cls,
        name: str,
        train: Rows,
        dev: Rows | None,
        output_dir: Path,
        options: TrainOptions,
        *,
        best_metric: str,
        given: Mapping[str, Any] | None = None,
    ) -> Run:
        """Check that nothing would be lost, and write down what is about to run.

        Args:
            name: of the training, "finetune", "distill" or "kd".
            train, dev, output_dir, options, best_metric: see `TrainingStage` and `TrainOptions`.
            given: what a continuation must agree with beside rows and options.

        Raises:
            FileExistsError: `output_dir`, or the checkpoints of an unfinished run, would be lost.
            ValueError: a resumed run was started with other rows or options.
        """
        checkpoints = output_dir.with_name(f"{output_dir.name}.checkpoints")
        arguments = training_arguments(checkpoints, options, best_metric=best_metric, evaluates=dev is not None)
        record = {
            "stage": name,
            "options": {**json.loads(json.dumps(asdict(options), default=str)), **(given or {})},
            "train": _described(train),
            "dev": None if dev is None else _described(dev),
            "processes": arguments.world_size,
            "rows_a_step": _rows_a_step(arguments),
        }
        by_first(
            partial(check_outputs, output_dir, checkpoints, record, resume=options.resume, overwrite=options.overwrite)
        )
        return cls(output_dir, checkpoints, record, arguments)

    @contextmanager
    def cleared_if_failed(self) -> Iterator[None]:
        """Around the work: an error before the first checkpoint leaves nothing in the way of a corrected run."""
        try:
            yield
        except Exception:
            if self.arguments.process_index == 0:
                clear_failed_start(self.checkpoints)
            raise

    @property
    def digests(self) -> dict[str, str]:
        """Fingerprints of the rows by their part in this training, as `config.training_data` holds them."""
        return {
            f"{self.record['stage']} {part}": self.record[part]["digest"]
            for part in ("train", "dev")
            if self.record[part] is not None
        }

    def finish(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, result: TrainResult, adapter: Any = None
    ) -> TrainResult:
        """Leave a whole model folder with its log, and no checkpoints; the result names that folder.

        Of a model in an adapter, a `PeftModel`, the adapter is saved.
        """

        def save() -> None:
            self._save(model, tokenizer, result, adapter)
            remove_own(self.checkpoints)

        by_first(save)
        if adapter is None:
            model.name_or_path = str(self.output_dir)  # an adapter that is trained next names its base by it
        return replace(result, output_dir=self.output_dir)

    def _save(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, result: TrainResult, adapter: Any
    ) -> None:
        log = {
            **self.record,
            "steps": result.steps,
            "train_loss": result.train_loss,
            "seconds": result.seconds,
            "metrics": result.metrics,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "log_history": result.log_history,
        }
        with atomic_folder(self.output_dir) as folder:
            if adapter is None:
                model.save_pretrained(folder)
            else:
                save_adapter(adapter, folder)
            tokenizer.save_pretrained(folder)
            write_json(folder / LOG_FILE, log)


def _rows_a_step(arguments: TrainingArguments) -> int:
    """Of all processes together; gradients may be summed over several."""
    return arguments.per_device_train_batch_size * arguments.world_size


def _described(rows: Rows) -> dict[str, Any]:
    return {"source": rows.source, "rows": len(rows), "digest": rows.digest()}


def _sampler(
    lengths: Sequence[int], arguments: TrainingArguments, options: TrainOptions
) -> LengthGroupedSampler | ShuffledOnceSampler:
    if options.shuffle_once:
        return ShuffledOnceSampler(len(lengths), arguments.seed)
    return LengthGroupedSampler(lengths, _rows_a_step(arguments), arguments.seed)


def _sorted_by_length(tokens: datasets.Dataset) -> datasets.Dataset:
    """Longest first, without the column `length`."""
    lengths = tokens["length"][:]
    order = sorted(range(len(tokens)), key=lengths.__getitem__, reverse=True)
    return tokens.select(order).remove_columns("length")


def _kept_metrics(state: TrainerState, keep_last: bool) -> dict[str, float]:
    """The dev metrics of the weights that were kept, from the log."""
    for entry in reversed(state.log_history):
        if "eval_loss" in entry and (keep_last or entry["step"] == state.best_global_step):
            timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
            return {
                name.removeprefix("eval_"): value
                for name, value in entry.items()
                if name.startswith("eval_") and name not in timing
            }
    return {}


def _ended_with(checkpoint: Path) -> bool:
    """Whether the training was over when it wrote this checkpoint, by its steps or by early stopping."""
    state = read_json(checkpoint / "trainer_state.json", "resume", "")
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop"))


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint in `folder`; a run killed while it wrote one continues from the one before."""
    found = [(int(match[1]), path) for path in Path(folder).glob("*") if (match := _CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        try:
            # written last, so its closing brace vouches for the files before it, those of other processes too
            read_json(path / "trainer_state.json", "resume", "")
        except (FileNotFoundError, ValueError):
            continue
        return path
    return None


def training_arguments(
    checkpoints: Path, options: TrainOptions, *, best_metric: str, evaluates: bool
) -> TrainingArguments:
    """The arguments of a `Trainer` that writes to `checkpoints`; `best_metric` decides which weights are kept."""
    use_cpu = not torch.accelerator.is_available()
    every = {"strategy": "epoch"} if options.eval_steps is None else {"strategy": "steps", "steps": options.eval_steps}
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.eval_batch_size,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "warmup_steps": options.warmup,
        "lr_scheduler_type": "linear",
        "max_grad_norm": options.max_grad_norm,
        "adam_epsilon": options.adam_epsilon,
        "bf16": bf16_is_fast() if options.bf16 is None else options.bf16,
        "use_cpu": use_cpu,
        "dataloader_pin_memory": not use_cpu,
        "seed": options.seed,
        "logging_steps": options.logging_steps,
        "logging_nan_inf_filter": False,
        "disable_tqdm": not options.progress,
        "report_to": "none",
        "save_total_limit": 1,
        "load_best_model_at_end": evaluates and not options.keep_last,
        "metric_for_best_model": best_metric if evaluates else None,
        "greater_is_better": best_metric != "loss" if evaluates else None,
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
    }
    arguments |= {f"save_{name}": value for name, value in every.items()}
    arguments |= {f"eval_{name}": value for name, value in every.items()} if evaluates else {"eval_strategy": "no"}
    made = TrainingArguments(**{**arguments, **options.trainer_arguments})
    refuse_sharding(made)
    use_one_gpu(made)
    return made


def bf16_is_fast() -> bool:
    """Whether the device that would train computes in bfloat16 rather than emulating it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def take_labels(model: PreTrainedModel, rows: Rows) -> None:
    """Give the model the label names of the rows it is about to learn from, and the kind of problem they pose."""
    config = model.config
    if rows.label_names is not None:
        config.id2label = dict(enumerate(rows.label_names))
        config.label2id = {name: index for index, name in enumerate(rows.label_names)}
    config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"


@contextmanager
def asking_for_gradients(wanted: Mapping[nn.Parameter, bool]) -> Iterator[None]:
    """Inside, each of these parameters asks for a gradient or not as given; afterwards it does as before."""
    before = {parameter: parameter.requires_grad for parameter in wanted}
    try:
        for parameter, required in wanted.items():
            parameter.requires_grad_(required)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def only_trainable(model: nn.Module, trained: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """Inside, exactly the parameters `trained` ask for gradients; afterwards each parameter does as before."""
    chosen = set(trained)
    return asking_for_gradients({parameter: parameter in chosen for parameter in model.parameters()})


class ObjectiveTrainer(Trainer):
    """A Trainer over an objective: a learning rate for each part, its own order of rows, evaluation without labels."""

    def __init__(
        self,
        *,
        learning_rates: Mapping[str, float],
        sampler: LengthGroupedSampler | ShuffledOnceSampler,
        options: TrainOptions,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.learning_rates = learning_rates
        self.options = options
        self.sampler = sampler
        self.sharded: ShardedObjective | None = None
        self._has_ended = False
        if isinstance(sampler, LengthGroupedSampler):
            self.add_callback(_SamplerEpoch(sampler))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._has_ended = isinstance(resume_from_checkpoint, str) and _ended_with(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # a run that was killed between its last checkpoint and its end would take one step more
        if self._has_ended:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler | ShuffledOnceSampler:
        return self.sampler

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        epochs = self.options.schedule_epochs
        if epochs is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps = int(len(self.sampler) * epochs / _rows_a_step(self.args)) + 1
        schedule = partial(_official_schedule, steps=steps, warmup=steps * self.options.warmup)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or cast(Any, self.optimizer), schedule)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        if self.options.fsdp and self.args.world_size > 1 and self.sharded is None:
            # before the optimizer, which keeps what it knows of a parameter where that is
            self.sharded = ShardedObjective(cast(nn.Module, self.model), self.accelerator.autocast)
        objective: Any = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(objective))
        groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                own = next((rate for part, rate in self.learning_rates.items() if name.startswith(part)), None)
                groups.setdefault((own, name in decaying), []).append(parameter)
        optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, objective)
        if not self.options.bias_correction:
            optimizer_class = BiasedAdamW
            arguments = {name: arguments[name] for name in ("lr", "betas", "eps")}
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.args.learning_rate if own is None else own,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (own, decays), parameters in groups.items()
            ],
            **arguments,
        )
        return self.optimizer

    def make_whole(self) -> None:
        """Every process has the whole objective again, if it was spread over several."""
        if self.sharded is not None:
            self.sharded.make_whole()
            self.sharded = None

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # another module than the model, so that accelerate puts no DistributedDataParallel around it
        return super()._wrap_model(model, training, dataloader) if self.sharded is None else self.sharded

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.sharded is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=self.sharded.weights())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        weights = cast(nn.Module, self.model).state_dict() if state_dict is None else state_dict
        super()._save(output_dir, state_dict=apart(weights))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(cast(torch.optim.Optimizer, self.optimizer))
        if self.args.should_save:
            torch.save(state, Path(output_dir) / _OPTIMIZER)
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.sharded is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        state = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        load_whole_state(cast(torch.optim.Optimizer, self.optimizer), state)
        cast(Any, self.lr_scheduler).load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))

    def _load_best_model(self) -> None:
        self.make_whole()
        super()._load_best_model()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # each process writes its own, and what the first one writes next vouches for all of them
        self.accelerator.wait_for_everyone()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        if prediction_loss_only:
            return output["loss"], None, None
        return output["loss"], output["logits"], inputs.get("labels")


def _official_schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at `step`: linear to 1 in `warmup` steps, then to 0 at `steps`, and 0."""
    if step < warmup:
        return step / max(1.0, warmup)
    return max(0.0, (steps - step) / max(1.0, steps - warmup))


class _SamplerEpoch(TrainerCallback):
    """Tells the sampler the epoch: accelerate's own way does not reach it behind skipped and sharded batches."""

    def __init__(self, sampler: LengthGroupedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.epoch = int(state.epoch or 0)
