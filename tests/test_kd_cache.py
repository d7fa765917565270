"""fastkd.kd.cache: what the teacher says, whatever the order, and an error where another would have said it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import datasets
import torch
from kd_worker import OPTIONS, regression_rows, save_teacher
from tiny_models import one_thread  # noqa: F401  # a fixture
from training_worker import rows

from fastkd.data.batches import LengthSortedBatches, tokenize
from fastkd.data.rows import Rows
from fastkd.kd.cache import StaleCacheError, TeacherCache, example_ids
from fastkd.kd.teacher import PseudoClassifierOptions, Teacher, tokenizer_fingerprint, train_pseudo_classifiers

ALL = ("logits", "layer_logits", "hidden_states")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def teacher(folder: Path) -> Teacher:
    return Teacher.load(folder)


def cache_of(folder: Path, teacher: Teacher, **changes: Any) -> TeacherCache:
    return TeacherCache(
        folder, teacher, **{"max_length": 16, "pseudo_classifiers": OPTIONS.pseudo_classifiers, **changes}
    )


def live(teacher: Teacher, given: Rows) -> dict[str, torch.Tensor]:
    """What the teacher says now, row by row in the order of the rows."""
    tokens = tokenize(replace(given, dataset=given.dataset.remove_columns("label")), teacher.tokenizer, 16)
    batches = LengthSortedBatches(tokens, teacher.tokenizer, 1)
    found = [teacher.signals(batch, ALL) for batch in batches]
    back = torch.tensor(batches.order).argsort()
    return {
        "logits": torch.cat([signals.logits for signals in found])[back],
        "layer_logits": torch.cat([signals.layer_logits.transpose(0, 1) for signals in found])[back],
        "hidden_states": torch.cat([signals.hidden_states.transpose(0, 1) for signals in found])[back],
    }


def counted(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each batch that the teacher is asked from now on."""
    asked: list[int] = []
    plain = teacher.signals

    def signals(batch: Any, kinds: Any) -> Any:
        asked.append(len(batch["input_ids"]))
        return plain(batch, kinds)

    monkeypatch.setattr(teacher, "signals", signals)
    return asked


def test_the_cache_says_what_the_teacher_says(teacher: Teacher, tmp_path: Path) -> None:
    given = rows(50)
    cache = cache_of(tmp_path / "cache", teacher)
    cache.ensure(given, ALL)
    answers, expected = cache.answers(example_ids(given), ALL), live(teacher, given)
    assert answers["layer_logits"].shape == (50, 4, 2)
    for kind in ALL:
        torch.testing.assert_close(answers[kind], expected[kind], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answers["layer_logits"][:, -1], answers["logits"], rtol=0, atol=0)
    # layers and rows differ, so that a mixed-up answer would be seen
    assert answers["layer_logits"].std(1).min() > 1e-3
    assert len(answers["hidden_states"][:, 0].unique(dim=0)) == len(set(example_ids(given)))


def test_order_and_other_processes_change_nothing(teacher: Teacher, folder: Path, tmp_path: Path) -> None:
    given = rows(40)
    cache = cache_of(tmp_path / "cache", teacher)
    cache.ensure(given, ALL)
    order = torch.randperm(40).tolist()
    shuffled = replace(given, dataset=given.dataset.select(order))
    fresh = cache_of(tmp_path / "cache", Teacher.load(folder))
    expected = cache.answers(example_ids(given), ALL)
    for kind, values in fresh.answers(example_ids(shuffled), ALL).items():
        torch.testing.assert_close(values, expected[kind][order], rtol=0, atol=0)


def test_repeated_texts_are_asked_once(teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a good film", "a bad film", "a good film", "who was cold"]
    given = Rows(datasets.Dataset.from_dict({"text_a": texts, "label": [1, 0, 0, 1]}), None, 2, "repeated")
    ids = example_ids(given)
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3
    asked = counted(teacher, monkeypatch)
    cache = cache_of(tmp_path / "cache", teacher)
    cache.ensure(given, ["logits"])
    assert sum(asked) == 3
    answers = cache.answers(ids, ["logits"])["logits"]
    torch.testing.assert_close(answers[0], answers[2], rtol=0, atol=0)


def test_pairs_are_told_apart_by_where_they_are_cut() -> None:
    pairs = {"text_a": ["a good", "a"], "text_b": ["film", "good film"]}
    first, second = example_ids(Rows(datasets.Dataset.from_dict(pairs), None, None, "pairs"))
    single = example_ids(Rows(datasets.Dataset.from_dict({"text_a": ["a good film"]}), None, None, "single"))[0]
    assert len({first, second, single}) == 3


def test_an_interrupted_pass_goes_on_and_a_full_cache_asks_nothing(
    teacher: Teacher, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkd.kd.cache.SHARD_ROWS", 16)
    given = rows(50)
    unique = len(set(example_ids(given)))

    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == unique
        if done >= 32:
            raise Interrupted

    with pytest.raises(Interrupted):
        cache_of(tmp_path / "cache", teacher).ensure(given, ALL, stop)
    assert len(list((tmp_path / "cache").glob("logits-*.safetensors"))) == 2

    again = Teacher.load(folder)
    asked = counted(again, monkeypatch)
    cache = cache_of(tmp_path / "cache", again)
    cache.ensure(given, ALL)
    assert sum(asked) == unique - 32
    expected = live(again, given)
    asked.clear()
    for kind, values in cache.answers(example_ids(given), ALL).items():
        torch.testing.assert_close(values, expected[kind], rtol=1e-5, atol=1e-5)
    cache_of(tmp_path / "cache", again).ensure(given, ALL)
    assert asked == []


def test_only_what_is_wanted_is_kept(teacher: Teacher, tmp_path: Path) -> None:
    given = rows(30)
    cache = cache_of(tmp_path / "cache", teacher)
    cache.ensure(given, ["layer_logits"])
    kinds = {path.name.split("-")[0] for path in (tmp_path / "cache").glob("*-*.safetensors")}
    assert kinds == {"logits", "layer_logits"}
    # N x C float32 numbers and an id for each example, and a header a shard
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("layer_logits-*"))
    unique = len(set(example_ids(given)))
    assert size <= unique * (4 * 2 * 4 + 16) + 300
    # hidden states are added later by one more pass, and the pseudo-classifiers stay
    before = (tmp_path / "cache" / "pseudo_classifiers.safetensors").read_bytes()
    cache.ensure(given, ALL)
    assert cache.answers(example_ids(given), ["hidden_states"])["hidden_states"].shape == (30, 4, 32)
    assert (tmp_path / "cache" / "pseudo_classifiers.safetensors").read_bytes() == before


def test_an_unknown_example_is_an_error(teacher: Teacher, tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "cache", teacher)
    cache.ensure(rows(10), ["logits"])
    with pytest.raises(KeyError):
        cache.answers(example_ids(rows(10, seed=5)), ["logits"])


# Stale


def _changed_weight(folder: Path) -> Teacher:
    teacher = Teacher.load(folder)
    with torch.no_grad():
        teacher.model.bert.encoder.layer[1].output.dense.bias[3] += 1e-6
    return Teacher(teacher.model, teacher.tokenizer)


def _changed_tokenizer(folder: Path) -> Teacher:
    teacher = Teacher.load(folder)
    teacher.tokenizer.add_tokens(["film"])
    teacher.tokenizer.add_tokens(["splendid"])
    return Teacher(teacher.model, teacher.tokenizer)


@pytest.mark.parametrize(
    ("make", "changes", "reason"),
    [
        (_changed_weight, {}, "another teacher;"),
        (_changed_tokenizer, {}, "another tokenizer;"),
        (Teacher.load, {"max_length": 12}, "max_length 16, now 12;"),
        (Teacher.load, {"bf16": True}, "precision float32, now bfloat16;"),
        (lambda folder: Teacher.load(folder, "mean"), {}, "pool cls, now mean;"),
    ],
)
def test_a_stale_cache_is_an_error_with_its_remedy(
    teacher: Teacher, folder: Path, tmp_path: Path, make: Any, changes: dict[str, Any], reason: str
) -> None:
    cache_of(tmp_path / "cache", teacher).ensure(rows(8), ["logits"])
    with pytest.raises(StaleCacheError, match=reason) as caught:
        cache_of(tmp_path / "cache", make(folder), **changes)
    assert "name another folder, or delete this one" in str(caught.value)
    cache_of(tmp_path / "cache", Teacher.load(folder))


def test_pseudo_classifiers_of_other_rows_are_an_error(teacher: Teacher, folder: Path, tmp_path: Path) -> None:
    cache_of(tmp_path / "cache", teacher).ensure(rows(20), ["layer_logits"])
    other = cache_of(tmp_path / "cache", Teacher.load(folder))
    with pytest.raises(StaleCacheError, match=r"holds pseudo-classifiers for another training rows; name another"):
        other.ensure(rows(20, seed=7), ["layer_logits"])
    other.ensure(rows(20, seed=7), ["logits"])  # the teacher's own answers do not depend on them
    more = PseudoClassifierOptions(epochs=4)
    with pytest.raises(StaleCacheError, match=r"pseudo-classifiers for epochs 3, now 4;"):
        cache_of(tmp_path / "cache", Teacher.load(folder), pseudo_classifiers=more).ensure(rows(20), ["layer_logits"])


def test_a_teacher_takes_no_pseudo_classifiers_to_another_cache(teacher: Teacher, folder: Path, tmp_path: Path) -> None:
    cache_of(tmp_path / "first", teacher).ensure(rows(20), ["layer_logits"])
    again = cache_of(tmp_path / "second", teacher)
    again.ensure(rows(20, seed=7), ["layer_logits"])
    fresh = cache_of(tmp_path / "third", Teacher.load(folder))
    fresh.ensure(rows(20, seed=7), ["layer_logits"])
    ids = example_ids(rows(20, seed=7))
    expected = fresh.answers(ids, ["layer_logits"])["layer_logits"]
    torch.testing.assert_close(again.answers(ids, ["layer_logits"])["layer_logits"], expected, rtol=0, atol=0)


def test_a_folder_with_other_things_in_it_is_left_alone(teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no teacher cache"):
        cache_of(tmp_path, teacher)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_tokens_are_too_much_to_keep(teacher: Teacher, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a cache cannot hold sequence_output"):
        cache_of(tmp_path / "cache", teacher).ensure(rows(8), ["sequence_output"])


def test_padding_and_truncating_leave_a_tokenizer_what_it_was(teacher: Teacher) -> None:
    before = tokenizer_fingerprint(teacher.tokenizer)
    teacher.tokenizer(["a good film", "bad"], padding="max_length", truncation=True, max_length=9)
    assert tokenizer_fingerprint(teacher.tokenizer) == before


# Pseudo-classifiers


def test_pseudo_classifiers_learn_and_leave_the_teacher_alone(teacher: Teacher, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    given = rows(80)
    cache = cache_of(tmp_path / "cache", teacher, pseudo_classifiers=PseudoClassifierOptions(epochs=20))
    cache.ensure_pseudo_classifiers(given)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "cache.json", "pseudo_classifiers.json", "pseudo_classifiers.safetensors",
    ]  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    predicted = live(teacher, given)["layer_logits"][:, :-1].argmax(-1)
    right = (predicted == torch.tensor(given.dataset["label"][:])[:, None]).double().mean(0)
    assert right.min() > 0.8, right


def test_pseudo_classifiers_repeat_and_do_not_touch_the_random_state() -> None:
    features, labels = torch.randn(64, 3, 8) * torch.tensor([1e-3, 1, 50])[:, None] + 5, torch.randint(0, 2, (64,))
    state = torch.get_rng_state()
    first = train_pseudo_classifiers(features, labels, 2, PseudoClassifierOptions())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = train_pseudo_classifiers(features, labels, 2, PseudoClassifierOptions())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_pseudo_classifiers_do_not_care_for_the_scale_of_a_layer() -> None:
    labels = torch.arange(200) % 2
    clean = torch.randn(200, 1, 6) + 2 * labels[:, None, None]
    features = torch.cat([clean, 100 * clean + 1000, 1e-3 * clean], dim=1)
    classifiers = train_pseudo_classifiers(features, labels, 2, PseudoClassifierOptions())
    logits = classifiers(features.transpose(0, 1))
    right = (logits.argmax(-1) == labels).double().mean(1)
    assert right.min() > 0.9, right


def test_pseudo_classifiers_of_a_regression(tmp_path: Path) -> None:
    teacher = Teacher.load(save_teacher(tmp_path / "teacher", num_labels=1))
    given = regression_rows(80)
    cache = cache_of(tmp_path / "cache", teacher, pseudo_classifiers=PseudoClassifierOptions(epochs=30))
    cache.ensure(given, ["layer_logits"])
    predicted = cache.answers(example_ids(given), ["layer_logits"])["layer_logits"][:, :-1, 0]
    errors = (predicted - torch.tensor(given.dataset["label"][:])[:, None]).square().mean(0)
    assert errors.max() < 0.5 * 4.0  # 4 is the variance of the scores
    key = json.loads((tmp_path / "cache" / "pseudo_classifiers.json").read_text())
    assert key["training rows"] == given.digest()
