"""A checkpoint that is mistyped is looked for on the disk, and the hub is not asked for it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fastkd.data import files
from fastkd.model.checkpoints import check_path, checkpoint_path
from fastkd.model.loading import load_config, load_model


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def no_network(*arguments: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    for name in ("tuned", "models/distilled"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("tunde", "did you mean tuned?"),
        ("./tunde", "did you mean tuned?"),
        ("models/distiled", "did you mean models/distilled?"),
        ("models/other", "there is no folder models/other"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("~/no such model", "there is no folder"),
    ],
)
def test_a_mistyped_folder_is_refused_with_names_that_are_near(given: str, near: str) -> None:
    for load in (checkpoint_path, load_config, load_model):
        with pytest.raises(FileNotFoundError) as raised:
            load(given)
        assert near in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["bert-base-uncased", "google/bert_uncased_L-2_H-128_A-2", "tuned", "models/distilled"]
)
def test_names_on_the_hub_and_folders_that_are_there_pass(name: str) -> None:
    assert checkpoint_path(name) == name


def test_a_model_that_was_being_replaced_is_put_back_before_it_is_loaded(here: Path) -> None:
    holder = here / f".tuned-fastkd-{files._here()}-{2**22 + 1}-x"
    holder.mkdir()
    (here / "tuned").rename(holder / "old")
    check_path("tuned")
    assert (here / "tuned" / "config.json").is_file()


def test_files_and_folders_without_a_model_are_called_what_they_are(here: Path) -> None:
    (here / "data").mkdir()
    (here / "data" / "train.tsv").touch()
    with pytest.raises(NotADirectoryError, match=r"data/train.tsv is a file; name the folder that holds the model"):
        check_path("data/train.tsv")
    with pytest.raises(FileNotFoundError, match=r"checkpoint: no config.json in data; expected a folder that"):
        load_config("data")
    (here / "data" / "config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"data/config.json is not a model configuration .*; correct it, or save or download"
    ):
        load_config("data")
