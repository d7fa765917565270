"""Folders of commands that go on where they stopped: only what they left is taken up, and no input is removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastkd.data.files import reading
from fastkd.data.work_folders import MARK, check_work_folder, claim_folder, forget_folders, owner_of


def test_an_empty_folder_is_taken_and_taken_up_again(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new" / "deep"):
        check_work_folder(folder, "demo")
        assert owner_of(folder) is None
        claim_folder(folder, "demo")
        (folder / "report.json").write_text("{}", encoding="utf-8")
        claim_folder(folder, "demo")
        assert owner_of(folder) == "demo"


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"holds thesis.txt, which fastkd demo did not leave there; choose"):
        claim_folder(tmp_path, "demo")
    with pytest.raises(FileExistsError, match=r"thesis.txt is not a folder"):
        claim_folder(tmp_path / "thesis.txt", "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["", "[1]", '"demo"', '{"command": ["demo"]}', '{"command": "other"}', "\0"])
def test_a_mark_of_another_form_is_no_mark(tmp_path: Path, content: str) -> None:
    (tmp_path / MARK).write_text(content, encoding="utf-8")
    with pytest.raises(FileExistsError, match=f"holds {MARK}"):
        claim_folder(tmp_path, "demo")


def test_a_command_goes_on_with_what_another_left(tmp_path: Path) -> None:
    claim_folder(tmp_path / "out" / "news", "demo")
    with pytest.raises(FileExistsError, match="holds news"):
        claim_folder(tmp_path / "out", "kd-table")
    for folder in (tmp_path / "out", tmp_path / "out" / "news"):
        claim_folder(folder, "table2", ("demo",))
    assert owner_of(tmp_path / "out") == "table2"
    # and the demo may be run again
    claim_folder(tmp_path / "out" / "news", "demo")


def test_what_a_killed_process_left_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / ".fastkd-fastkd-0123abcd-1-xyz_1.json").touch()
    claim_folder(tmp_path, "demo")


def test_no_input_is_removed_to_start_over(tmp_path: Path) -> None:
    for name, file in (("model", "model.safetensors"), ("corpus", "train.tsv")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    with (
        reading(tmp_path / "corpus"),
        pytest.raises(ValueError, match=r"corpus would be removed, but .*corpus is an input"),
    ):
        forget_folders([tmp_path / "model", tmp_path / "corpus"])
    assert (tmp_path / "model" / "model.safetensors").exists()
    forget_folders([tmp_path / "model", tmp_path / "corpus", tmp_path / "absent"])
    assert not list(tmp_path.iterdir())


def test_no_file_of_the_user_is_removed_to_start_over(tmp_path: Path) -> None:
    for path in ("model/config.json", "model.checkpoints/checkpoint-7/notes.txt"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    with pytest.raises(FileExistsError, match=r"checkpoint-7/notes\.txt is yours; move it away"):
        forget_folders([tmp_path / "model", tmp_path / "model.checkpoints"])
    assert (tmp_path / "model" / "config.json").exists()
