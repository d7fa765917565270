"""fastkd.kd.methods: every method trains end to end, its gradients reach what they should, and nothing else."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
from kd_worker import OPTIONS, regression_rows, save_teacher
from tiny_models import one_thread  # noqa: F401  # a fixture
from training_worker import rows
from transformers import AutoModelForSequenceClassification

from fastkd import losses
from fastkd.commands import kd
from fastkd.kd.catalogue import CATALOGUE, markdown_table
from fastkd.kd.methods import METHODS, Shapes, method_of
from fastkd.kd.stage_run import StudentObjective
from fastkd.kd.students import student_from_teacher
from fastkd.kd.teacher import KINDS, Teacher, train_pseudo_classifiers
from fastkd.kd.trainer import KDTrainer
from fastkd.losses import AnnealingKDLoss, RAILKDLoss
from fastkd.losses.catalogue import LOSSES

ROOT = Path(__file__).parents[1]

STUDENTS = {"universal-ca": "bilstm"}
SHAPES = Shapes(student_layers=2, teacher_layers=4, student_width=32, teacher_width=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def batch_of(teacher: Teacher, labels: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    texts = rows(len(labels), seed=seed).dataset["text_a"][:]
    return {**teacher.tokenizer(texts, padding=True, return_tensors="pt"), "labels": labels}


def with_pseudo_classifiers(teacher: Teacher) -> Teacher:
    hidden = torch.randn(40, teacher.num_layers - 1, 32)
    labels = torch.arange(40) % 2 if teacher.num_labels > 1 else torch.rand(40)
    teacher.pseudo_classifiers = train_pseudo_classifiers(
        hidden, labels, teacher.num_labels, OPTIONS.pseudo_classifiers
    )
    return teacher


def test_every_name_of_the_tables_is_there() -> None:
    rivals = {"none", "kd", "pkd-skip", "pkd-last", "alp-kd", "alp-kd-no", "alp-kd-po", "mhkd", "dih", "annealing"}
    assert rivals | {"takd", "distilbert", "rail-kd", "universal-il", "universal-cg", "universal-ca"} <= set(METHODS)
    for name, method in METHODS.items():
        assert sum(stage.share for stage in method.stages) == pytest.approx(1), name
        assert method.teacher_kinds <= set(KINDS)
        method.check({})


def test_catalogue_methods_docs_and_readme_name_the_same() -> None:
    assert list(METHODS) == list(CATALOGUE)
    lines = (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(markdown_table()[0])
    assert lines[start : lines.index("", start)] == markdown_table()
    assert f"[{len(CATALOGUE)} methods](docs/distillation.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert ", ".join(CATALOGUE) in get_type_hints(kd.kd, include_extras=True)["method"].__metadata__[0].help


def test_the_universal_methods_of_inner_layers_are_one() -> None:
    assert METHODS["universal-il"].stages is METHODS["universal-ca"].stages


def weights_in(parameters: Iterable[str]) -> set[str]:
    # beta is the interpolation of the Jensen-Shannon divergence, no weight of a term
    return {name for name in parameters if name.endswith("weight") or re.search("alpha|gamma|beta.", name)}


WEIGHTS = {"label_weight", "kd_weight", "intermediate_weight", "cosine_weight"}


@pytest.mark.parametrize("name", METHODS)
def test_methods_call_their_weights_by_what_they_weigh(name: str) -> None:
    for stage in METHODS[name].stages:
        assert weights_in(stage.argument_names) <= WEIGHTS


@pytest.mark.parametrize("name", LOSSES)
def test_losses_call_their_weights_by_what_they_weigh(name: str) -> None:
    for function in (getattr(losses, name).__init__, getattr(losses, name).forward):
        assert weights_in(inspect.signature(function).parameters) <= WEIGHTS


@pytest.mark.parametrize("num_labels", [2, 1])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_what_the_method_trains_and_nothing_else(
    folder: Path, tmp_path: Path, name: str, num_labels: int
) -> None:
    if num_labels == 1:
        folder = save_teacher(tmp_path / "teacher", num_labels=1)
    teacher = with_pseudo_classifiers(Teacher.load(folder, METHODS[name].pool))
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    labels = torch.tensor([0, 1, 1, 0]) if num_labels == 2 else torch.tensor([0.5, 4.5, 3.0, 1.0])
    for stage in METHODS[name].stages:
        student = student_from_teacher(teacher.model, STUDENTS.get(name, "layers:2")).requires_grad_(True)
        torch.nn.init.normal_(student.classifier.weight, std=0.3)
        loss = stage.loss(Shapes(2, 4, student.config.hidden_size, 32) if name in STUDENTS else SHAPES, {})
        objective = StudentObjective(stage, student, loss, teacher, METHODS[name].pool).train()
        loss.set_progress(0.5, 1)
        value = objective(**batch_of(teacher, labels))["loss"]
        assert value.isfinite()
        assert value.dim() == 0
        value.backward()
        without = [
            key for key, parameter in objective.named_parameters()
            if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
        ]  # fmt: skip
        # softmax does not see a bias that all keys share, and a sum of squares of 0 has no slope
        assert [key for key in without if not key.endswith("key.bias")] == [], f"no gradient in stage {stage.name}"
        frozen = [key for key, parameter in objective.named_parameters() if not parameter.requires_grad]
        assert all(key.endswith("teacher_projection.weight") for key in frozen)
        assert all(
            parameter.grad.isfinite().all() for parameter in objective.parameters() if parameter.grad is not None
        )
        has_heads = any(key.startswith("heads.") for key, _ in objective.named_parameters())
        assert has_heads == ("layer_logits" in stage.student)
        objective.remove_hooks()
        assert not any(module._forward_hooks for module in student.modules())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_a_student_that_transformers_loads(folder: Path, tmp_path: Path, name: str) -> None:
    teacher = Teacher.load(folder, METHODS[name].pool)
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    trainer = KDTrainer(teacher, STUDENTS.get(name, "layers:2"), name, replace(OPTIONS, learning_rate=2e-3))
    result = trainer.train(rows(64), None, tmp_path / "student")
    stages = {entry["stage"] for entry in result.log_history}
    for stage in stages:
        losses = [entry["loss"] for entry in result.log_history if "loss" in entry and entry["stage"] == stage]
        quarter = max(1, len(losses) // 4)
        # the target of Annealing-KD's first stage grows all the while
        if name != "annealing" or stage == 2:
            assert sum(losses[-quarter:]) < sum(losses[:quarter]), f"the loss of stage {stage} does not fall"
    assert len(stages) == len(METHODS[name].stages)
    assert all(torch.equal(value, before[key]) for key, value in teacher.model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert not [key for key in loaded.state_dict() if key.startswith(("heads.", "loss.", "student."))]
    assert loaded.config.id2label == {0: "negative", 1: "positive"}
    inputs = teacher.tokenizer(["a good film"], return_tensors="pt")
    assert loaded.eval()(**inputs).logits.shape == (1, 2)


@pytest.mark.parametrize("name", ["kd", "mhkd", "dih", "annealing", "universal-il", "universal-cg", "pkd-skip"])
def test_regression_trains(tmp_path: Path, name: str) -> None:
    teacher = save_teacher(tmp_path / "teacher", num_labels=1)
    trainer = KDTrainer(teacher, "layers:2", name, replace(OPTIONS, epochs=2))
    result = trainer.train(regression_rows(24), regression_rows(16, seed=1), tmp_path / "student")
    assert {"pearson", "spearman", "loss", "score"} <= set(result.metrics)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_weights_and_arguments_reach_the_loss() -> None:
    stage = method_of("universal-il").stages[0]
    loss: Any = stage.loss(
        SHAPES, {"label_weight": 0.1, "intermediate_weight": 2.0, "kd_temperature": 3.0, "attn_scale": "rsqrt_c"}
    ).loss
    assert (loss.label_weight, loss.kd_weight, loss.intermediate_weight, loss.temperature) == (0.1, 0.4, 2.0, 3.0)
    assert (loss.universal.attn_scale, loss.universal.student_layers) == ("rsqrt_c", "inner")
    pkd: Any = method_of("pkd-last").stages[0].loss(SHAPES, {"intermediate_weight": 10.0, "normalize": False})
    assert (pkd.intermediate_weight, pkd.inner.layer_map, pkd.inner.normalize) == (10.0, "last", False)
    # two stages share what both know, and each takes its own
    first, second = (stage.loss(SHAPES, {"max_temperature": 4}) for stage in method_of("annealing").stages)
    assert isinstance(first.loss, AnnealingKDLoss)
    assert first.loss.max_temperature == 4
    assert not hasattr(second, "loss")


def test_annealing_goes_from_the_highest_temperature_to_1_in_equal_spans() -> None:
    loss: Any = method_of("annealing").stages[0].loss(SHAPES, {"max_temperature": 4})
    seen = []
    for step in range(20):
        loss.set_progress(step / 20, step // 5)
        seen.append(loss.temperature)
    assert seen == [4] * 5 + [3] * 5 + [2] * 5 + [1] * 5
    assert [loss.loss.temperature_at(epoch, 4) for epoch in range(4)] == [4, 3, 2, 1]


def test_rail_draws_other_layers_in_another_epoch() -> None:
    shapes = Shapes(student_layers=3, teacher_layers=12, student_width=32, teacher_width=32)
    loss: Any = method_of("rail-kd").stages[0].loss(shapes, {})
    assert isinstance(loss.inner, RAILKDLoss)
    drawn = set()
    for epoch in range(5):
        loss.set_progress(0.1, epoch)
        drawn.add(loss.inner.layers(12))
    assert len(drawn) > 1


def test_a_narrower_student_is_projected_by_weights_that_learn(folder: Path) -> None:
    loss = method_of("pkd-skip").stages[0].loss(Shapes(2, 4, 16, 32), {})
    assert [tuple(parameter.shape) for parameter in loss.parameters()] == [(32, 16)]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("kd", {"alpha": 1}, "got alpha, but Vanilla KD takes kd_weight, label_weight, temperature"),
        ("none", {"alpha": 1}, "got alpha, but w/o KD takes no arguments"),
        ("universal-cg", {"attention": "dot"}, r"got attention, but Universal-KD \(CG\) takes attn, "),
    ],
)
def test_unknown_arguments_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_of(name).check(arguments)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method: got 'pkd', expected one of none, kd, "):
        method_of("pkd")


def test_values_that_a_loss_refuses_are_refused_before_any_work() -> None:
    before = torch.random.get_rng_state()
    for name, arguments, told in (
        ("universal-cg", {"mix": "average"}, "mix: got 'average', expected one of logits, probs, loss"),
        ("universal-ca", {"direction": "both"}, "direction: got 'both', expected one of forward, reverse, jsd"),
        ("universal-il", {"attn": "cosine"}, "attn: got 'cosine', expected one of "),
        ("universal-il", {"kd_temperature": 0}, "kd_temperature: got 0, expected a finite number above 0"),
        ("alp-kd", {"temperature": math.nan}, "temperature: got nan, expected a finite number above 0"),
        ("dih", {"temperature": [5.0, -1.0]}, "temperature: got -1.0, expected a finite number above 0"),
        ("annealing", {"max_temperature": math.inf}, "max_temperature: got inf, expected a finite number above 0"),
        ("kd", {"kd_weight": "much"}, "kd_weight: got 'much', expected a finite number"),
        ("universal-il", {"attn_space": "centered"}, "attn_space: got 'centered', expected one of logits, centred, "),
        ("universal-cg-two-stage", {"student_layers": "first"}, "student_layers: got 'first'"),
        ("rail-kd", {"variant": "PO"}, "variant: got 'PO', expected one of layerwise, concatenated"),
    ):
        with pytest.raises(ValueError, match=told):
            method_of(name).check(arguments)
    for name in METHODS:
        method_of(name).check({})
    method_of("universal-il").check({"attn_space": "centred"})
    assert torch.equal(torch.random.get_rng_state(), before)
