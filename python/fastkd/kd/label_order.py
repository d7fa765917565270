"""Whose class is whose: teacher, student and rows number the same classes in one order, by their names."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from fastkd.data.errors import DataError
from fastkd.data.labels import names_of_classes
from fastkd.data.rows import Rows
from fastkd.kd.teacher import Teacher
from fastkd.training.checks import check_labels

Names = tuple[str, ...]


def common_order(
    student: PreTrainedModel, teacher: Teacher | None, train: Rows, dev: Rows | None
) -> tuple[Teacher | None, Rows, Rows | None]:
    """Teacher and rows with their classes in the student's order; a student without names takes those of the rows.

    Where the rows have no names either, it takes the teacher's. The student keeps its order, because its classifier may
    be trained already.

    Raises:
        DataError: rows without labels, or with labels that are not the models'.
        ValueError: teacher and student name other classes, or the same in another order while the labels of the rows
            are numbers, which could be either's.
    """
    of_student = names_of_classes(student.config.id2label)
    of_teacher = None if teacher is None else names_of_classes(teacher.model.config.id2label)
    order = of_student or train.label_names or of_teacher
    if order is None:
        _check(student, teacher, train, dev)
        _check_same_count(student, teacher)
        return teacher, train, dev
    if of_teacher is not None:
        _check_same_set(of_teacher, order, of_student is not None)
        _check_numbers(of_teacher, order, {"train": train, "dev": dev})
    elif teacher is not None and train.label_names not in (None, order):
        raise DataError(
            f"teacher: its classes have no names, and {train.source} numbers them differently from the student; name "
            "them (id2label and label2id in its config.json)"
        )
    train, dev = _ordered(train, order), None if dev is None else _ordered(dev, order)
    _check(student, None, train, dev)
    _check_same_count(student, teacher)
    if teacher is not None:
        teacher = teacher.in_order_of(order)
        if of_teacher is None:
            _check(student, teacher, train, dev)
    if of_student is None and student.config.num_labels == len(order):
        student.config.id2label = dict(enumerate(order))
        student.config.label2id = {name: index for index, name in enumerate(order)}
    return teacher, train, dev


def _ordered(rows: Rows, order: Names) -> Rows:
    """`rows` in this order, where they have the same names; `check_labels` says what is wrong with others."""
    is_same_set = rows.label_names is not None and set(rows.label_names) == set(order)
    return rows.in_order_of(order) if is_same_set else rows


def _check(student: PreTrainedModel, teacher: Teacher | None, train: Rows, dev: Rows | None) -> None:
    for argument, rows in (("train", train), ("dev", dev)):
        check_labels(student, rows, argument, required=True)
        if teacher is not None:
            check_labels(teacher.model, rows, argument, required=True)


def _check_same_count(student: PreTrainedModel, teacher: Teacher | None) -> None:
    if teacher is None or teacher.num_labels == student.config.num_labels:
        return
    raise DataError(
        f"teacher: it has {teacher.num_labels} labels, the student {student.config.num_labels}; load the rows with "
        f"num_labels={teacher.num_labels}, or choose another student"
    )


def _check_same_set(of_teacher: Names, order: Names, is_students: bool) -> None:
    if set(of_teacher) == set(order):
        return
    other = "the student" if is_students else "the rows"
    raise DataError(
        f"teacher: it has the labels {', '.join(of_teacher)}, {other} {'has' if is_students else 'have'} "
        f"{', '.join(order)}; rename those that mean the same (id2label and label2id in config.json)"
    )


def _check_numbers(of_teacher: Names, order: Names, given: dict[str, Rows | None]) -> None:
    """Numbers in the rows name no class, so they say nothing where the models disagree about their order."""
    unnamed = [argument for argument, rows in given.items() if rows is not None and rows.label_names is None]
    if of_teacher == order or not unnamed:
        return
    raise DataError(
        f"{unnamed[0]}: its labels are numbers, but class 0 is {of_teacher[0]} for the teacher and {order[0]} for the "
        f"student; load the rows with label_names={_quoted(of_teacher)} or label_names={_quoted(order)}, whichever "
        "matches their numbers"
    )


def _quoted(names: Sequence[str]) -> str:
    return str(list(names))
