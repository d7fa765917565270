"""`--config FILE`: a training is repeated from the YAML that it left in its folder, and every bad line is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import command_line
import yaml
from command_line import fastkd, succeeded, tracebacks_off  # noqa: F401  # a fixture
from tiny_models import one_thread, save_plain_checkpoint  # noqa: F401  # a fixture


def refused(*arguments: object) -> str:
    """Without the box of a terminal and its line breaks."""
    return " ".join(command_line.refused(*arguments).replace("│", " ").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    save_plain_checkpoint(folder / "plain", "bert")
    rows = [
        "label\ttext_a",
        *(f"{('bad', 'good')[row % 2]}\tthe film was {('dull', 'fun')[row % 2]}" for row in range(24)),
    ]
    (folder / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def trained(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def settings(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_training_is_repeated_with_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    short = ("--max-steps", 2, "--batch-size", 8, "--no-bf16", "--seed", 7)
    succeeded("finetune", "plain", "--train", "train.tsv", "-o", "tuned", "--head", "linear", "--num-labels", 2, *short)
    succeeded("distill", "tuned", "--train", "train.tsv", "-o", "model", "--temperature", 2, *short)
    succeeded(
        "kd", "--method", "kd", "--teacher", "tuned", "--student", "layers:1", "--train", "train.tsv", "-o", "student",
        "--set", "kd_weight=0.5", "--set", "temperature=2", *short,
    )  # fmt: skip
    for command, output in (("finetune", "tuned"), ("distill", "model"), ("kd", "student")):
        written = Path(output) / f"{command}.yaml"
        assert f"fastkd {command} --config {command}.yaml -o OTHER" in written.read_text(encoding="utf-8")
        succeeded(command, "--config", written, "-o", f"{output}-again")
        assert trained(Path(f"{output}-again")) == trained(Path(output)), command
        assert settings(Path(f"{output}-again") / f"{command}.yaml") == settings(written) | {
            "output": f"{output}-again"
        }
    assert settings(Path("student/kd.yaml"))["set"] == ["kd_weight=0.5", "temperature=2"]


def test_flags_of_the_command_line_win(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"checkpoint: {folder / 'plain'}\ntrain: {folder / 'train.tsv'}\nmax-steps: 3\nbatch-size: 8\nbf16: false\n"
    )
    done = succeeded("finetune", "--config", file, "-o", tmp_path / "out", "--max-steps", 1)
    assert "1 steps" in done.stdout
    assert settings(tmp_path / "out" / "finetune.yaml")["max-steps"] == 1
    # the next command carries what differs from the defaults, not every line of the file
    assert "--seed" not in done.output


def test_under_a_preset_only_what_was_given_is_written(folder: Path, tmp_path: Path) -> None:
    succeeded(
        "finetune", folder / "plain", "--train", folder / "train.tsv", "-o", tmp_path / "out", "--parity", "fastbert",
        "--max-steps", 1, "--no-bf16",
    )  # fmt: skip
    written = settings(tmp_path / "out" / "finetune.yaml")
    assert set(written) == {"checkpoint", "output", "train", "parity", "max-steps", "bf16"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: 1e-4", "learning_rate: fastkd finetune has no such option; did you mean learning-rate?"),
        ("temprature: 2", "temprature: fastkd finetune has no such option; see fastkd finetune --help"),
        ("overwrite: true", "overwrite: belongs on the command line, as --overwrite"),
        ("data: [a, b]", "data: got a list, expected one value as after --data"),
        ("label-column: yes", "label-column: got true, expected a text or a number; quote a word such as 'yes'"),
        ("epochs: many", "Invalid value for '--epochs'"),
        ("- epochs", "got list, expected lines such as learning-rate: 4.0e-05"),
        ("epochs: [", "while parsing"),
    ],
)
def test_a_bad_line_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert said in refused("finetune", "plain", "-o", tmp_path / "out", "--config", tmp_path / "bad.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    # the path is long, and may be broken anywhere
    assert "absent.yaml:cannotberead" in refused("distill", "--config", tmp_path / "absent.yaml").replace(" ", "")


def test_what_a_file_leaves_out_is_still_required(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert "Missing" in refused("finetune", "--config", tmp_path / "empty.yaml")
