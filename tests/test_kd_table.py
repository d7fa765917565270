"""`fastkd kd-table` and `fastkd kd`: the numbers of known results, what is run and what is not, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import yaml
from kd_worker import save_teacher
from test_cli import refused, succeeded
from tiny_models import one_thread, save_plain_checkpoint  # noqa: F401  # a fixture
from training_worker import LABEL_NAMES, rows
from transformers import AutoModelForSequenceClassification

from fastkd.commands.kd import parsed_arguments
from fastkd.tables import kd_table
from fastkd.tables.kd_table import GridError, Score, load_grid, run_table, table_rows, write_table

TINY = {"epochs": 1, "batch_size": 8, "max_length": 16, "bf16": False, "learning_rate": 1e-3}


def write_split(path: Path, count: int, seed: int) -> None:
    given = rows(count, seed)
    lines = [f"{LABEL_NAMES[row['label']]}\t{row['text_a']}" for row in given.dataset]
    path.write_text("label\ttext\n" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a plain checkpoint, and the folder `data/film` with three splits."""
    folder = tmp_path_factory.mktemp("work")
    save_teacher(folder / "teacher")
    save_plain_checkpoint(folder / "plain", "bert")
    (folder / "data" / "film").mkdir(parents=True)
    for seed, (split, count) in enumerate({"train": 24, "dev": 16, "test": 16}.items()):
        write_split(folder / "data" / "film" / f"{split}.tsv", count, seed)
    return folder


def grid_file(path: Path, **changes: Any) -> Path:
    """A small grid whose tasks and settings may be changed."""
    grid: dict[str, Any] = {
        "title": "Small",
        "seeds": [1, 2],
        "tasks": {
            "Film": {"data": "film"},
            "Score": {"data": "score", "num_labels": 1, "metric": ["pearson", "spearman"]},
        },
        "blocks": [
            {"title": "IL", "student": "layers:2", "methods": ["none", "universal-il"]},
            {"title": "CG", "student": "layers:2", "methods": ["none", "universal-cg"]},
        ],
    }
    path.write_text(yaml.safe_dump({**grid, **changes}), encoding="utf-8")
    return path


def write_result(output: Path, name: str, **metrics: float) -> None:
    path = output / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": "", "metrics": metrics}), encoding="utf-8")


# The table


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """The results of a grid of which one cell is missing."""
    accuracies = {"none": (0.5, 0.7), "universal-il": (0.8, 0.9), "universal-cg": (0.75, None)}
    for method, values in accuracies.items():
        for seed, value in enumerate(values, start=1):
            if value is not None:
                write_result(tmp_path, f"cells/Film/layers-2/{method}/seed-{seed}", accuracy=value)
            write_result(
                tmp_path, f"cells/Score/layers-2/{method}/seed-{seed}", pearson=0.2 * seed, spearman=0.4 * seed
            )
    write_result(tmp_path, "teachers/Film", accuracy=0.95)
    write_result(tmp_path, "teachers/Score", pearson=0.9, spearman=0.8)
    return tmp_path


def test_means_deviations_and_averages_of_known_results(known: Path) -> None:
    grid = load_grid(grid_file(known / "grid.yaml"))
    found = {(row.block, row.method): row.scores for row in table_rows(grid, known)}
    assert list(found) == [
        ("IL", "teacher"), ("IL", "none"), ("IL", "universal-il"), ("CG", "teacher"), ("CG", "none"),
        ("CG", "universal-cg"),
    ]  # fmt: skip

    def near(mean: float, deviation: float | None, seeds: int) -> Any:
        return Score(pytest.approx(mean), None if deviation is None else pytest.approx(deviation), seeds)  # type: ignore[arg-type]

    none = found["IL", "none"]
    assert none["Film"] == near(60, 200**0.5, 2)  # 50 and 70
    assert none["Score"] == near(45, 450**0.5, 2)  # 30 and 60
    assert none["Avg"] == near((40 + 65) / 2, 312.5**0.5, 2)  # (50 + 30) / 2 and (70 + 60) / 2
    assert found["CG", "none"] == none
    assert found["IL", "teacher"] == {"Film": near(95, None, 1), "Score": near(85, None, 1), "Avg": near(90, None, 1)}
    assert found["CG", "universal-cg"]["Film"] == near(75, None, 1)
    assert found["CG", "universal-cg"]["Avg"] == near((75 + 30) / 2, None, 1)


def test_the_table_in_markdown_and_csv(known: Path) -> None:
    write_table(load_grid(grid_file(known / "grid.yaml")), known)
    lines = (known / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Small"
    assert "over 2 seeds" in lines[2]
    assert "## IL: student layers:2" in lines
    header = lines.index("| Model | Film | Score | Avg |")
    assert lines[header + 2] == "| Teacher | 95.0 | 85.0 | 90.0 |"
    assert lines[header + 3] == "| w/o KD | 60.0 ± 14.1 | **45.0 ± 21.2** | 52.5 ± 17.7 |"
    assert lines[header + 4] == "| Universal-KD (IL) | **85.0 ± 7.1** | **45.0 ± 21.2** | **65.0 ± 14.1** |"
    assert "| Universal-KD (CG) | **75.0** (of 1) | **45.0 ± 21.2** | **52.5** (of 1) |" in lines
    with (known / "table.csv").open(encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 6 * 3
    assert records[3] == {
        "block": "IL", "student": "layers:2", "method": "none", "task": "Film", "mean": "60.0000",
        "deviation": "14.1421", "seeds": "2",
    }  # fmt: skip


def test_a_table_without_results_is_empty(tmp_path: Path) -> None:
    grid = load_grid(grid_file(tmp_path / "grid.yaml"))
    assert all(row.scores == {} for row in write_table(grid, tmp_path))


def test_seeds_come_outermost_and_shared_rows_once(tmp_path: Path) -> None:
    names = [cell.name for cell in load_grid(grid_file(tmp_path / "grid.yaml")).cells()]
    methods = ("none", "universal-il", "universal-cg")
    assert names == [
        f"{task}/layers-2/{method}/seed-{seed}" for seed in (1, 2) for task in ("Film", "Score") for method in methods
    ]


# The run


def tiny_grid(work: Path, path: Path, **changes: Any) -> kd_table.Grid:
    settings: dict[str, Any] = {
        "tasks": {"Film": {"data": "film", "teacher": str(work / "teacher")}},
        "blocks": [{"student": "layers:2", "methods": ["none", "universal-il", "rail-kd"]}],
        "train": TINY,
        "train_rows": 16,
        "eval_rows": 12,
    }
    return load_grid(grid_file(path, **{**settings, **changes}), work / "data")


@pytest.mark.slow
def test_a_grid_goes_on_where_it_stopped(work: Path, tmp_path: Path) -> None:
    grid, output = tiny_grid(work, tmp_path / "grid.yaml"), tmp_path / "table"

    class Interrupted(Exception):
        pass

    started: list[str] = []

    def stop_at_the_fifth(done: int, total: int, name: str) -> None:
        assert (done, total) == (len(started), 6)
        started.append(name)
        if len(started) == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_table(grid, output, stop_at_the_fifth)
    finished = {path: path.stat().st_mtime_ns for path in (output / "cells").rglob("*.json")}
    assert len(finished) == 4
    # all of the first seed, and a table of what there is
    assert {score.seeds for row in table_rows(grid, output)[2:] for score in row.scores.values()} == {1}
    assert "Universal-KD (IL)" in (output / "table.md").read_text(encoding="utf-8")

    resumed: list[str] = []
    run_table(grid, output, lambda done, total, name: resumed.append(name))
    assert resumed == [cell.name for cell in grid.cells()][4:]
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    result = json.loads((output / "cells" / "Film" / "layers-2" / "universal-il" / "seed-1.json").read_text())
    assert (result["train_rows"], result["eval_rows"], result["steps"]) == (16, 12, 2)
    assert set(result["metrics"]) == {"accuracy", "f1", "matthews"}
    assert not list(output.glob(".cell-*"))

    # the same seed gives the same cell
    path = output / "cells" / "Film" / "layers-2" / "universal-il" / "seed-2.json"
    before = json.loads(path.read_text())
    path.unlink()
    run_table(grid, output)
    after = json.loads(path.read_text())
    assert {**after, "seconds": 0, "crc32": ""} == {**before, "seconds": 0, "crc32": ""}

    changed = tiny_grid(work, tmp_path / "changed.yaml", train={**TINY, "learning_rate": 2e-3})
    with pytest.raises(GridError, match=r"seed-1.json was run with other settings; delete it to run it again"):
        run_table(changed, output)


def test_a_teacher_is_fine_tuned_once_a_task(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {
        "tasks": {"Film": {"data": "film", "teacher_rows": 20}},
        "teacher": {"checkpoint": str(work / "plain"), "dev_rows": 8},
        "blocks": [{"student": "layers:2", "methods": ["none", "kd"]}],
        "seeds": [1],
    }
    grid = tiny_grid(work, tmp_path / "grid.yaml", **changes)
    tuned = []
    plain = kd_table.KDTrainer.train

    def counted(trainer: Any, train: Any, dev: Any, output_dir: Path, *rest: Any) -> Any:
        if trainer.teacher is None:
            tuned.append((len(train), len(dev), output_dir.name))
        return plain(trainer, train, dev, output_dir, *rest)

    monkeypatch.setattr(kd_table.KDTrainer, "train", counted)
    table = run_table(grid, tmp_path / "table")
    assert tuned == [(20, 8, "Film")]
    assert set(table[0].scores) == {"Film", "Avg"}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "table" / "teachers" / "Film").num_labels == 2


def test_the_layers_of_teacher_and_student_are_named(work: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "tasks": {"Film": {"data": "film", "teacher": str(work / "teacher")}},
        "teacher": {"layers": "encoder.layer"},
        "blocks": [{"student": "layers:2", "methods": ["universal-il"], "train": {"student_layers": "encoder.layer"}}],
        "seeds": [1],
    }
    named = tiny_grid(work, tmp_path / "grid.yaml", **changes)
    assert set(run_table(named, tmp_path / "table")[1].scores) == {"Film", "Avg"}
    for wrong in (
        {"teacher": {"layers": "blocks"}},
        {"blocks": [{**changes["blocks"][0], "train": {"student_layers": "blocks"}}]},
    ):
        grid = tiny_grid(work, tmp_path / "grid.yaml", **{**changes, **wrong})
        with pytest.raises(ValueError, match="layers: got 'blocks', but BertModel has no list of modules of that name"):
            run_table(grid, tmp_path / f"not-{next(iter(wrong))}")


def test_processes_can_share_a_grid_by_tasks(work: Path, tmp_path: Path) -> None:
    tasks = {name: {"data": "film", "teacher": str(work / "teacher")} for name in ("One", "Two")}
    blocks = [{"student": "layers:2", "methods": ["none"]}]
    grid = tiny_grid(work, tmp_path / "grid.yaml", tasks=tasks, blocks=blocks, seeds=[1])
    first = run_table(grid, tmp_path / "table", tasks=["Two"])
    assert set(first[1].scores) == {"Two"}
    assert set(run_table(grid, tmp_path / "table", tasks=["One"])[1].scores) == {"One", "Two", "Avg"}
    with pytest.raises(GridError, match="tasks: the grid has no Three, only One, Two"):
        run_table(grid, tmp_path / "table", tasks=["Three"])


@pytest.mark.slow
def test_students_choose_their_weights_by_dev_rows(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int | None] = []
    plain = kd_table.KDTrainer.train

    def counted(trainer: Any, train: Any, dev: Any, output_dir: Path, *rest: Any) -> Any:
        given.append(None if dev is None else len(dev))
        assert trainer.options.metric == ("accuracy",)
        return plain(trainer, train, dev, output_dir, *rest)

    monkeypatch.setattr(kd_table.KDTrainer, "train", counted)
    blocks = [{"student": "layers:1", "methods": ["none"]}]
    for name, changes in {
        "all": {},
        "some": {"dev_rows": 5},
        "none": {"dev_rows": 0},
        "evaluated": {"eval_split": "dev"},
    }.items():
        grid = tiny_grid(work, tmp_path / "grid.yaml", blocks=blocks, seeds=[1], **changes)
        run_table(grid, tmp_path / name)
    assert given == [16, 5, None, None]
    found = json.loads((tmp_path / "some" / "cells" / "Film" / "layers-1" / "none" / "seed-1.json").read_text())
    assert (found["dev_rows"], found["dev_metrics"]["score"]) == (5, found["dev_metrics"]["accuracy"])
    assert "at most 5 dev rows choose their weights" in (tmp_path / "some" / "table.md").read_text()
    assert "their last weights" in (tmp_path / "evaluated" / "table.md").read_text()


TRIALS: list[dict[str, Any]] = [
    {},
    {"train": {"learning_rate": 5e-3}, "arguments": {"kd": {"temperature": 1.0}}},
]


def test_dev_rows_choose_among_trials_and_later_seeds_run_the_chosen(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [{"title": "T", "student": "layers:1", "methods": ["none", "kd"], "trials": TRIALS}]
    grid = tiny_grid(work, tmp_path / "grid.yaml", blocks=blocks)
    ran: list[tuple[Any, ...]] = []

    def made_up(runner: Any, cell: kd_table.Cell) -> None:
        cell = kd_table._chosen(runner.grid, runner.output, cell)  # type: ignore[assignment]
        options = kd_table._options(runner.grid, cell)
        ran.append((cell.method, cell.trial, cell.seed, options.learning_rate, dict(options.arguments)))
        best = 2 if cell.method == "kd" else 1
        path = tmp_path / "table" / "cells" / f"{cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        score = 0.9 if cell.trial == best else 0.8
        result = {
            "settings": runner._settings(cell),
            # the rows that are evaluated would choose the other one
            "metrics": {"accuracy": 1 - score + cell.seed / 100},
            "dev_metrics": {"score": score},
        }
        path.write_text(json.dumps(result), encoding="utf-8")

    monkeypatch.setattr(kd_table._Runner, "run", made_up)
    rows = run_table(grid, tmp_path / "table")
    rate = TINY["learning_rate"]
    assert ran == [
        ("none", 1, 1, rate, {}), ("kd", 1, 1, rate, {}),
        ("none", 2, 1, 5e-3, {}), ("kd", 2, 1, 5e-3, {"temperature": 1.0}),
        ("none", 1, 2, rate, {}), ("kd", 2, 2, 5e-3, {"temperature": 1.0}),
    ]  # fmt: skip
    assert [row.trials for row in rows] == [{}, {"Film": 1}, {"Film": 2}]
    assert rows[2].scores["Film"].mean == pytest.approx(11.5)
    text = (tmp_path / "table" / "table.md").read_text(encoding="utf-8")
    assert "2. learning_rate 0.005; Vanilla KD: temperature 1.0" in text
    assert "| Vanilla KD | 2 |" in text
    run_table(grid, tmp_path / "table")
    assert len(ran) == 6, "what is finished is not run again"


def test_a_grid_with_trials_runs(work: Path, tmp_path: Path) -> None:
    """One of them trains the teacher's pseudo-classifiers otherwise."""
    trials = [{}, {"train": {"pseudo_classifiers": {"epochs": 1}}}]
    blocks = [{"student": "layers:2", "methods": ["mhkd"], "trials": trials}]
    rows = run_table(tiny_grid(work, tmp_path / "grid.yaml", blocks=blocks), tmp_path / "table")
    assert rows[1].scores["Film"].seeds == 2
    chosen = rows[1].trials["Film"]
    assert (tmp_path / "table" / "cells" / "Film" / "layers-2" / "mhkd" / f"trial-{chosen}" / "seed-2.json").is_file()
    assert len(list((tmp_path / "table" / "answers").iterdir())) == 2


def test_the_cost_of_assistants_counts(work: Path, tmp_path: Path) -> None:
    blocks = [{"student": "layers:1", "methods": ["kd", "takd"]}]
    run_table(tiny_grid(work, tmp_path / "grid.yaml", blocks=blocks, seeds=[1]), tmp_path / "table")
    steps = {
        method: json.loads((tmp_path / f"table/cells/Film/layers-1/{method}/seed-1.json").read_text())["steps"]
        for method in ("kd", "takd")
    }
    assert steps["takd"] == 2 * steps["kd"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"blocks": [{"student": "layers:2", "methods": ["kd"], "trials": [{"arguments": {"dih": {}}}]}]},
            r"blocks\[0\].trials\[0\].arguments: dih is not a method of this block",
        ),
        (
            {"blocks": [{"student": "layers:2", "methods": ["kd"], "trials": [{"train": {"lr": 1}}]}]},
            "layers:2, kd, Film: unknown lr",
        ),
        (
            {"blocks": [{"student": "layers:2", "methods": ["kd"], "trials": [{}]}], "eval_split": "dev"},
            "trials: dev rows choose among them",
        ),
        ({"seeds": []}, "no seeds; a grid needs tasks, blocks and seeds"),
        ({"seeds": [1, 1]}, r"seeds: got \[1, 1\], expected different whole numbers"),
        ({"metod": 1}, "unknown metod; expected some of tasks, blocks, seeds"),
        ({"train": {"lr": 1}}, "IL, none, Film: unknown lr; expected some of epochs"),
        ({"train": {"epochs": -1}}, "IL, none, Film: epochs: got -1, expected a number above 0"),
        ({"train": {"seed": 3}}, "IL, none, Film: seed in train; expected it as seeds"),
        ({"eval_split": "train"}, "eval_split: got 'train', expected one of dev, test"),
        ({"tasks": {"Film": {"metric": "accuracy"}}}, "tasks.Film: no data; name the folder of its rows"),
        ({"tasks": {"Film": {"data": "film", "metric": "pearson"}}}, "a regression has num_labels: 1"),
        ({"tasks": ["film"]}, "tasks: got list, expected names and values"),
        ({"blocks": [{"student": "layers:2"}]}, r"blocks\[0\]: no methods; a block needs a student and its methods"),
        ({"blocks": [{"student": "layers:2", "methods": ["pkd"]}]}, r"blocks\[0\].methods: method: got 'pkd'"),
        ({"blocks": [{"student": "x", "methods": "kd"}]}, r"blocks\[0\].methods: got 'kd', expected a list"),
        (
            {"blocks": [{"student": "layers:2", "methods": ["kd"], "arguments": {"dih": {}}}]},
            "dih is not a method of this block",
        ),
        (
            {"blocks": [{"student": "layers:2", "methods": ["kd"], "arguments": {"kd": {"tau": 1}}}]},
            "got tau, but Vanilla KD takes kd_weight, label_weight, temperature",
        ),
        (
            {
                "blocks": [
                    {"title": "A", "student": "layers:2", "methods": ["kd"]},
                    {"title": "B", "student": "layers:2", "methods": ["kd"], "train": {"epochs": 9}},
                ]
            },
            "'A' and 'B' both have kd with student layers:2, but with other train",
        ),
    ],
)
def test_a_wrong_grid_is_refused_before_any_work(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GridError, match=message):
        load_grid(grid_file(tmp_path / "grid.yaml", **changes))


def test_numbers_and_options_are_read_as_meant(tmp_path: Path) -> None:
    train = {"learning_rate": "1e-4", "pseudo_classifiers": {"epochs": 3}, "assistants": ["layers:3"]}
    grid = load_grid(grid_file(tmp_path / "grid.yaml", train=train))
    options = kd_table._options(grid, next(grid.cells()))
    assert options.learning_rate == 1e-4
    assert options.pseudo_classifiers.epochs == 3
    assert options.assistants == ("layers:3",)
    assert options.seed == 1


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("tasks: [", encoding="utf-8")
    with pytest.raises(GridError, match="not valid YAML"):
        load_grid(tmp_path / "grid.yaml")


def test_the_grid_of_the_published_table_is_right() -> None:
    grid = load_grid(Path(__file__).parents[1] / "bench" / "kd_table.yaml")
    assert len(grid.seeds) >= 3
    assert {name.replace("-", "").lower() for name in grid.tasks} == {"cola", "mrpc", "rte", "sst2", "stsb"}
    methods = [set(block.methods) for block in grid.blocks]
    assert {"none", "kd", "pkd-skip", "mhkd", "alp-kd", "universal-il"} <= methods[0]
    assert {"takd", "dih", "annealing", "universal-cg"} <= methods[1]
    assert all({"none", "kd", "universal-ca"} <= chosen for chosen in methods[2:])
    assert [block.student for block in grid.blocks[2:]] == ["bilstm", "gated-cnn"]
    larger = load_grid(Path(__file__).parents[1] / "bench" / "kd_table_2000.yaml")
    assert larger.blocks == grid.blocks
    assert larger.seeds == grid.seeds
    assert larger.train_rows == 10 * grid.train_rows
    tuned = load_grid(Path(__file__).parents[1] / "bench" / "kd_table_tuned.yaml")
    assert (tuned.tasks, tuned.seeds, tuned.train_rows) == (larger.tasks, larger.seeds, larger.train_rows)
    for block, untuned in zip(tuned.blocks, larger.blocks, strict=True):
        assert (block.title, block.student, block.train) == (untuned.title, untuned.student, untuned.train)
        assert set(untuned.methods) <= set(block.methods)
        assert len(block.trials) == 2
        for trial in block.trials:
            # equal budget: what one method is tried with, every other is too
            assert set(trial.arguments) in (set(), set(block.methods) - {"none"})


# Commands


def test_kd_table_command(work: Path, tmp_path: Path) -> None:
    blocks = [{"title": "Small students", "student": "layers:1", "methods": ["none", "kd"]}]
    tiny_grid(work, tmp_path / "grid.yaml", blocks=blocks, seeds=[1])
    arguments = ["kd-table", tmp_path / "grid.yaml", "--data", work / "data", "-o", tmp_path / "table"]
    report = json.loads(succeeded(*arguments, "--json").stdout)
    assert [row["method"] for row in report["rows"]] == ["teacher", "none", "kd"]
    assert set(report["rows"][2]["scores"]["Film"]) == {"mean", "deviation", "seeds"}
    shown = succeeded(*arguments).stdout
    assert "Small students" in shown
    assert "Vanilla KD" in shown
    assert "Examples" in succeeded("kd-table", "--help").stdout


def test_kd_command(work: Path, tmp_path: Path) -> None:
    fixed = ["--data", work / "data" / "film", "--max-steps", 2, "--batch-size", 8, "--max-length", 16, "--no-bf16"]
    result = succeeded(
        "kd", "--teacher", work / "teacher", "--student", "layers:2", *fixed, "-o", tmp_path / "student",
        "--set", "kd_weight=0.5", "--set", "attn_scale=rsqrt_c", "--cache", tmp_path / "cache", "--metric", "f1",
        "--json",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert (report["steps"], report["method"]) == (2, "universal-il")
    assert report["metrics"]["score"] == report["metrics"]["f1"]
    log = json.loads((tmp_path / "student" / "trainer_log.json").read_text())
    assert log["options"]["arguments"] == {"kd_weight": 0.5, "attn_scale": "rsqrt_c"}
    assert (tmp_path / "cache" / "cache.json").exists()
    shown = succeeded("kd", "--method", "none", "--student", work / "plain", *fixed, "-o", tmp_path / "tuned").stdout
    assert f"fastkd kd --teacher {tmp_path / 'tuned'}" in shown
    output = succeeded("kd", "--help").stdout
    assert output.count("fastkd kd ") >= 4
    assert "Next:" in output


def test_bad_commands_are_one_sentence(work: Path, tmp_path: Path) -> None:
    data = ["--data", work / "data" / "film", "-o", tmp_path / "out"]
    teacher = ["--teacher", work / "teacher"]
    assert "--set: got 'kd_weight', expected NAME=VALUE" in refused("kd", *teacher, *data, "--set", "kd_weight")
    assert "got tau, but Universal-KD (IL) takes" in refused("kd", *teacher, *data, "--set", "tau=1")
    assert "method: got 'ukd', expected one of none" in refused("kd", *teacher, *data, "--method", "ukd")
    assert "teacher: got None, but the method 'universal-il'" in refused("kd", *data, "--student", work / "plain")
    assert "spec: got 'layers:9', expected 1 to 4 layers" in refused("kd", *teacher, *data, "--student", "layers:9")
    assert "--no-cache: got --cache too; give one of them" in refused(
        "kd", *teacher, *data, "--cache", tmp_path, "--no-cache"
    )
    assert "no yaml" not in refused("kd-table", tmp_path / "absent.yaml", "-o", tmp_path / "table")
    assert not (tmp_path / "out").exists()


def test_values_are_read_as_yaml() -> None:
    given = parsed_arguments(["kd_weight=0.5", "normalize=false", "layer_map=[2, 4]", "attn=uniform"])
    assert given == {"kd_weight": 0.5, "normalize": False, "layer_map": [2, 4], "attn": "uniform"}
