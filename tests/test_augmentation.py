"""fastkd.data.augmentation: altered copies of rows, and which trainings learn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import datasets
from tiny_models import one_thread, tokenizer_of  # noqa: F401  # a fixture
from training_worker import load, options_of, rows, save_plain, train

from fastkd.data.augmentation import with_altered_copies
from fastkd.data.batches import tokenize
from fastkd.training.self_distillation import DistillOptions, distill

CLS, SEP = 1, 2
TOKENS = {
    "input_ids": [[CLS, 10, 11, 12, SEP], [CLS, SEP], [CLS, 13, 14, 10, SEP, 10, SEP]],
    "token_type_ids": [[0] * 5, [0] * 2, [0] * 5 + [1] * 2],
    "length": [5, 2, 7],
}


def _altered(copies: int, rate: float = 0.5, seed: int = 3) -> Any:
    return with_altered_copies(datasets.Dataset.from_dict(TOKENS), [0, CLS, SEP], copies, rate, seed)


def test_copies_stand_behind_the_rows_and_differ_in_ordinary_tokens_only() -> None:
    found = _altered(40)
    assert len(found) == 3 * 41
    assert found[:3] == TOKENS
    for name in ("token_type_ids", "length"):
        assert found[name][:] == TOKENS[name] * 41
    ordinary = {10, 11, 12, 13, 14}
    for number, ids in enumerate(found["input_ids"]):
        own = TOKENS["input_ids"][number % 3]
        assert [token if token in (CLS, SEP) else 10 for token in ids] == [
            token if token in (CLS, SEP) else 10 for token in own
        ]
        assert set(ids) - {CLS, SEP} <= ordinary
    firsts = found["input_ids"][3::3]
    assert len({tuple(ids) for ids in firsts}) > 20, "copies of a row must differ from each other"


def test_as_many_tokens_change_as_asked_for_and_come_as_often_as_in_the_rows() -> None:
    """Three of the seven ordinary tokens are a 10, so one drawn in its place is another with probability 4 / 7."""
    found = _altered(4000, rate=0.3)["input_ids"][3:]
    tens = [ids[at] for ids in found[2::3] for at in (3, 5)]
    assert sum(token != 10 for token in tens) / len(tens) == pytest.approx(0.3 * 4 / 7, abs=0.02)
    assert sum(token == 11 for token in tens) / len(tens) == pytest.approx(0.3 / 7, abs=0.01)
    everywhere = _altered(2000, rate=1.0)["input_ids"][3:]
    drawn = [token for ids in everywhere for token in ids if token not in (CLS, SEP)]
    assert drawn.count(10) / len(drawn) == pytest.approx(3 / 7, abs=0.02)


def test_copies_depend_on_the_seed_alone() -> None:
    assert _altered(5)[:] == _altered(5)[:]
    assert _altered(5)["input_ids"][:] != _altered(5, seed=4)["input_ids"][:]


def test_rows_of_nothing_but_special_tokens_stay() -> None:
    empty = datasets.Dataset.from_dict({"input_ids": [[CLS, SEP]] * 2})
    assert with_altered_copies(empty, [CLS, SEP], 2, 1.0, 0)["input_ids"][:] == [[CLS, SEP]] * 6


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    plain = save_plain(folder / "plain")
    return train("finetune", load(plain, num_labels=2), folder / "finetuned").output_dir


def _distilled(folder: Path, output: Path, **changes: Any) -> tuple[Any, set[tuple[int, ...]]]:
    """The result, and the training rows that the encoder saw."""
    model = load(folder)
    seen: set[tuple[int, ...]] = set()
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(
        lambda _, inputs: seen.update(tuple(token for token in ids if token) for ids in inputs[0].tolist())
    )
    options = options_of("distill", **{"epochs": None, "min_steps": 0, **changes})
    done = distill(model, rows(80), None, output, options, tokenizer_of("bert"))
    return done, seen


@pytest.mark.parametrize(
    ("changes", "steps", "copies"),
    [
        ({"min_steps": 40}, 40, 3),
        ({"max_steps": 40}, 40, 3),
        ({"max_steps": 35}, 35, 3),
        ({"max_steps": 10}, 10, 0),
        ({"max_steps": 40, "augmented_copies": 0}, 40, 0),
        ({"epochs": 4}, 40, 0),
        ({"epochs": 1, "augmented_copies": 2}, 30, 2),
        ({"max_steps": 240, "augmentation_rate": 0.9}, 240, 9),
        ({"max_steps": 40, "train_backbone": True}, 40, 0),
        ({"max_steps": 40, "train_backbone": True, "augmented_copies": 3}, 40, 3),
    ],
    ids=[
        "few rows",
        "steps",
        "part of a pass",
        "one pass",
        "none wanted",
        "epochs",
        "asked for",
        "at most",
        "backbone",
        "asked for with the backbone",
    ],
)
def test_a_training_of_many_steps_on_few_rows_sees_copies(
    finetuned: Path, tmp_path: Path, changes: dict[str, Any], steps: int, copies: int
) -> None:
    done, seen = _distilled(finetuned, tmp_path / "out", **changes)
    assert done.steps == steps
    own = {tuple(ids) for ids in tokenize(rows(80), tokenizer_of("bert"), 16)["input_ids"]}
    assert bool(seen - own) == (copies > 0)
    assert len(seen) <= len(own) * (copies + 1)
    # copies of short rows may be alike, and the last steps may not reach all
    assert len(seen) >= len(own) * (copies + 1) * 0.6


@pytest.mark.parametrize(("option", "value"), [("augmented_copies", -1), ("augmentation_rate", 0.0)])
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option}: got {value}, expected"):
        DistillOptions(**{option: value})


def test_fastbert_has_no_copies() -> None:
    assert DistillOptions.preset("fastbert").augmented_copies == 0
