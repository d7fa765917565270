"""fastkd.kd.label_unit: a regression's students, whatever the unit of the labels, and what is stored with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
from kd_worker import OPTIONS, regression_rows, save_teacher
from tiny_models import early_exit_model, one_thread, random_batch, save_plain_checkpoint, tokenizer_of  # noqa: F401
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fastkd.data.rows import Rows
from fastkd.encoders.label_scale import LabelScale
from fastkd.kd.label_unit import last_linear, standard_unit
from fastkd.kd.students import student_from_teacher
from fastkd.kd.teacher import PseudoClassifierOptions, Teacher, train_pseudo_classifiers
from fastkd.kd.trainer import KDTrainer

SHORT = replace(OPTIONS, epochs=1)


def scaled(rows: Rows, factor: float, offset: float) -> Rows:
    labels = [factor * label + offset for label in rows.dataset["label"]]
    return replace(rows, dataset=rows.dataset.remove_columns("label").add_column("label", labels))


def teacher_of(folder: Path, factor: float = 1.0, offset: float = 0.0) -> Teacher:
    """One that answers in the unit of labels that are scaled so."""
    teacher = Teacher.load(save_teacher(folder, num_labels=1))
    with torch.no_grad():
        teacher.model.classifier.weight.mul_(factor)
        teacher.model.classifier.bias.mul_(factor).add_(offset)
    return teacher


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**random_batch()).logits


@pytest.mark.parametrize(
    ("method", "student"),
    [("universal-il", "layers:2"), ("mhkd", "bilstm"), ("annealing", "layers:2"), ("takd", "layers:2")],
)
def test_every_unit_of_the_labels_gives_the_same_student(tmp_path: Path, method: str, student: str) -> None:
    """Powers of two, so that both runs round alike."""
    found, mse = [], []
    for name, factor, offset in (("small", 1.0, 0.0), ("large", 1024.0, 4096.0)):
        trainer = KDTrainer(teacher_of(tmp_path / f"{name}-teacher", factor, offset), student, method, SHORT)
        train, dev = (scaled(regression_rows(40, seed), factor, offset) for seed in (0, 1))
        mse.append(trainer.train(train, dev, tmp_path / name).metrics["mse"])
        found.append(answers(trainer.model))
    torch.testing.assert_close(found[1], 1024 * found[0] + 4096, rtol=0, atol=2.0)
    assert mse[1] == pytest.approx(mse[0] * 1024**2, rel=1e-2)


def test_a_regression_learns_standardised_labels_and_answers_in_their_unit(tmp_path: Path) -> None:
    train, dev = (scaled(regression_rows(80, seed), 100.0, 500.0) for seed in (0, 1))
    plain = save_plain_checkpoint(tmp_path / "plain", "bert")
    trainer = KDTrainer(None, plain, "none", OPTIONS)
    result = trainer.train(train, dev, tmp_path / "student")
    scale = LabelScale.of(train)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert saved.config.label_scale == [scale.mean, scale.std]
    torch.testing.assert_close(answers(saved), answers(trainer.model))
    assert result.metrics["mse"] == pytest.approx(result.metrics["loss"] * scale.std**2, rel=1e-4)
    assert result.metrics["loss"] < 2, "1 is what the mean of the labels would have, 12 an answer of 0"
    # a head that was trained stays what it is
    again = KDTrainer(None, tmp_path / "student", "none", replace(OPTIONS, max_steps=1, learning_rate=1e-12))
    again.train(train, dev, tmp_path / "again")
    torch.testing.assert_close(answers(again.model), answers(saved), rtol=1e-4, atol=1e-2)


def test_the_head_of_a_foreign_teacher_is_not_new(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "teacher", 100.0, 500.0)
    assert getattr(teacher.model.config, "label_scale", None) is None
    assert student_from_teacher(teacher.model, "layers:2").config.label_scale == [0.0, 1.0]
    assert student_from_teacher(teacher.model, "layers:2", copy_classifier=False).config.label_scale is None
    assert getattr(student_from_teacher(teacher.model, "bilstm").config, "label_scale", None) is None
    still = replace(OPTIONS, max_steps=1, learning_rate=1e-12)
    trainer = KDTrainer(teacher, "layers:4", "kd", still)
    trainer.train(scaled(regression_rows(40), 100.0, 500.0), None, tmp_path / "student")
    torch.testing.assert_close(answers(trainer.model), answers(teacher.model), rtol=1e-4, atol=1e-2)


def test_classes_have_no_unit(tmp_path: Path) -> None:
    student = student_from_teacher(Teacher.load(save_teacher(tmp_path)).model, "layers:2")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with standard_unit(student, regression_rows(4), tokenizer_of("bert"), has_new_head=True) as unit:
        assert unit is None
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not hasattr(student.config, "label_scale")


def test_a_new_early_exit_student_has_all_heads_in_the_unit_of_the_last() -> None:
    model = early_exit_model("bert", num_labels=1)
    rows = scaled(regression_rows(20), 100.0, 500.0)
    scale = LabelScale.of(rows)
    with torch.no_grad():
        before = model.all_exit_logits(**random_batch())
        with standard_unit(model, rows, tokenizer_of("bert"), has_new_head=True) as unit:
            assert unit is not None
            torch.testing.assert_close(model(**random_batch(), speed=0.0).logits, before[:, -1])
        torch.testing.assert_close(
            model.all_exit_logits(**random_batch()), scale.restored(before), rtol=1e-5, atol=1e-5
        )


def test_a_student_without_such_a_layer_learns_standardised_labels_all_the_same(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "teacher")
    student = student_from_teacher(teacher.model, "layers:2")
    student.classifier = nn.Linear(student.config.hidden_size, 1, bias=False)
    assert last_linear(student, teacher.tokenizer) is None
    rows = regression_rows(40)
    with standard_unit(student, rows, teacher.tokenizer, has_new_head=False) as unit:
        assert unit is not None
        assert unit.answers == unit.labels == LabelScale.of(rows)
    result = KDTrainer(teacher, student, "kd", SHORT).train(rows, rows, tmp_path / "student")
    assert result.metrics["mse"] == pytest.approx(result.metrics["loss"] * LabelScale.of(rows).std ** 2, rel=1e-4)


def test_a_frozen_layer_is_not_scaled(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path)
    assert last_linear(teacher.model, teacher.tokenizer) is None
    student = student_from_teacher(teacher.model, "layers:2").train()
    assert last_linear(student, teacher.tokenizer) is student.classifier
    assert student.training
    assert not student.classifier._forward_hooks


def test_pseudo_classifiers_of_scores_do_not_depend_on_the_unit() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(48, 3, 8)
    labels = hidden[:, 0, 0] + 2.5
    options = PseudoClassifierOptions(epochs=2)
    small, large = (train_pseudo_classifiers(hidden, y, 1, options) for y in (labels, 1024 * labels + 4096))
    features = hidden.transpose(0, 1)
    torch.testing.assert_close(large(features), 1024 * small(features) + 4096, rtol=0, atol=1.0)
