"""Outputs: whole or absent, never in the place of what they must not replace, and no litter of killed runs."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fastkd.data import files


def model_folder(path: Path, content: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": files.MODEL_TYPE}))
    (path / "model.safetensors").write_text(content)
    return path


# the package without what it imports at once: processes start in a moment
LIGHT = f"""
import sys, types
package = types.ModuleType("fastkd")
package.__path__ = [{str(Path(files.__file__).parents[1])!r}]
sys.modules["fastkd"] = package
"""


def program(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", LIGHT + textwrap.dedent(code), *map(str, arguments)]


def in_another_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(program(code, *arguments), capture_output=True, text=True, timeout=60)


# Files


def test_a_device_and_a_pipe_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    before = os.stat(os.devnull)
    files.write_text(os.devnull, "nobody reads this")
    after = os.stat(os.devnull)
    assert stat.S_ISCHR(after.st_mode)
    assert (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino)

    pipe, read = tmp_path / "pipe.txt", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    files.write_text(pipe, "through the pipe")
    reader.join(10)
    assert read == ["through the pipe"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe.txt"]


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target.txt", tmp_path / "link.txt"
    for existing in (False, True):
        if not existing:
            link.symlink_to(target)
        files.write_text(link, f"content {existing}")
        assert link.is_symlink()
        assert target.read_text() == f"content {existing}"


def test_what_is_read_is_not_replaced_under_any_name(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.tsv").write_text("rows")
    (tmp_path / "link.tsv").symlink_to(data / "train.tsv")
    os.link(data / "train.tsv", tmp_path / "hard.tsv")
    with files.reading(data):
        for name in (
            data / "train.tsv",
            tmp_path / "link.tsv",
            tmp_path / "hard.tsv",
            data / ".." / "data" / "train.tsv",
        ):
            with pytest.raises(ValueError, match="is also an input"):
                files.write_text(name, "lost")
        files.write_text(data / "answers.tsv", "beside them")
    files.write_text(data / "train.tsv", "now it may be")


# Folders


def test_only_folders_that_fastkd_wrote_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model_folder(tmp_path / "home")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_text("mine")
    nested = model_folder(tmp_path / "nested")
    (nested / "notes").mkdir()
    work = model_folder(tmp_path / "home" / "work")
    (work / "here").mkdir()
    monkeypatch.chdir(work / "here")
    holding = model_folder(tmp_path / "holding")
    (holding / "train.tsv").write_text("rows")
    annotated = model_folder(tmp_path / "annotated")
    (annotated / "notes.txt").write_text("mine")
    carded = model_folder(tmp_path / "carded")
    (carded / "README.md").write_text("my own card")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"model_type": "bert"}))
    expected = {
        photos: "was not written by fastkd",
        plain: "was not written by fastkd",
        nested: "holds the folder notes, which is yours",
        annotated: "holds notes.txt, which is yours and would be lost; move it away",
        carded: "holds README.md, which is yours",
        work: "the folder you are in",
        tmp_path / "home": "(the folder you are in|your home folder)",
        holding: "is an input",
    }
    with files.reading(holding / "train.tsv"):
        for folder, words in expected.items():
            content = sorted(path for path in folder.rglob("*"))
            with pytest.raises((FileExistsError, ValueError), match=words):
                files.check_output_folder(folder, overwrite=True)
            with pytest.raises((FileExistsError, ValueError), match=words), files.atomic_folder(folder):
                pass
            assert sorted(path for path in folder.rglob("*")) == content
    (annotated / "notes.txt").unlink()
    with files.atomic_folder(annotated) as fresh:
        (fresh / "model.safetensors").write_text("new")
    assert [path.name for path in annotated.iterdir()] == ["model.safetensors"]


def test_the_log_of_a_training_is_a_mark_too(tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (student / "trainer_log.json").write_text(json.dumps({"stage": "kd"}))
    files.check_output_folder(student, overwrite=True)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        files.check_output_folder(student, overwrite=False)


def test_a_link_to_a_folder_stays(tmp_path: Path) -> None:
    folder, link = model_folder(tmp_path / "disk" / "model"), tmp_path / "model"
    link.symlink_to(folder)
    with files.atomic_folder(link) as fresh:
        (fresh / "model.safetensors").write_text("new")
    assert link.is_symlink()
    assert (folder / "model.safetensors").read_text() == "new"


KILLED_WHILE_REPLACING = """
    import os, sys
    from pathlib import Path
    from fastkd.data import files
    target, can_exchange, step = Path(sys.argv[1]), sys.argv[2] == "True", int(sys.argv[3])
    if not can_exchange:
        files._exchange = lambda first, second: False
    calls = 0
    def killed_at(call):
        def counted(*arguments):
            global calls
            calls += 1
            if calls == step:
                os._exit(9)
            result = call(*arguments)
            return result
        return counted
    Path.rename = killed_at(Path.rename)
    files.shutil.rmtree = killed_at(files.shutil.rmtree)
    if can_exchange:
        files._exchange = killed_at(files._exchange)
    with files.atomic_folder(target) as fresh:
        (fresh / "config.json").write_text('{"model_type": "fastkd_early_exit"}')
        (fresh / "model.safetensors").write_text("new")
"""


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_kill_at_any_step_of_the_replacement_leaves_a_model(tmp_path: Path, can_exchange: bool, step: int) -> None:
    target = model_folder(tmp_path / "model")
    if can_exchange and not files._exchange(model_folder(tmp_path / "a"), model_folder(tmp_path / "b")):
        pytest.skip("this file system cannot exchange two names")
    in_another_process(KILLED_WHILE_REPLACING, target, can_exchange, step)
    if can_exchange:
        assert target.is_dir()
    files.restore(target)
    assert (target / "model.safetensors").read_text() in ("old", "new")
    with files.atomic_folder(target) as fresh:
        (fresh / "model.safetensors").write_text("newest")
    assert (target / "model.safetensors").read_text() == "newest"
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "a", "b"}


# What killed runs leave


def test_temporaries_of_killed_runs_go_and_those_of_others_stay(tmp_path: Path) -> None:
    killed = """
        import os, sys
        from pathlib import Path
        from fastkd.data import files
        with files.atomic_path(Path(sys.argv[1]) / "trace.safetensors"):
            with files.atomic_folder(Path(sys.argv[1]) / "model"):
                os._exit(9)
    """
    in_another_process(killed, tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    assert all(name.startswith(".") for name in left)
    foreign = tmp_path / left[0].replace(files._here(), "0" * 8)
    foreign.mkdir()
    (tmp_path / ".mine-1.txt").write_text("not ours")
    with files.atomic_path(tmp_path / "running.txt") as running:
        files._cleared.clear()
        files.write_text(tmp_path / "next.txt", "the next run")
        assert running.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [foreign.name, ".mine-1.txt", "next.txt", "running.txt"]
    )


class _Foreign(Exception):
    """What a writer in another language raises."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        _Foreign("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    target = model_folder(tmp_path / "model")
    writers: list[Callable[[], object]] = [
        lambda: files.atomic_path(tmp_path / "trace.safetensors"),
        lambda: files.atomic_folder(target),
    ]
    for writer in writers:
        with pytest.raises(OSError, match=r"the disk is full, so .* was not written; make room"), writer():  # type: ignore[attr-defined]
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "model.safetensors").read_text() == "old"
    with pytest.raises(_Foreign, match="something else"), files.atomic_path(tmp_path / "x"):
        raise _Foreign("something else")


# Ends


COMMAND = """
    import os, signal, sys, time
    import typer
    from fastkd.commands import screen

    def main(kind: str) -> None:
        with screen.screen_for(False) as shown:
            for number in range(2000):
                shown.out.print(f"line {number}")
            if kind == "wait":
                shown.say("ready")
                sys.stderr.flush()
                time.sleep(30)

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    screen.run(app)
"""


def test_a_reader_that_has_enough_and_closed_streams_make_no_traceback() -> None:
    command = program(COMMAND, "print")
    for closed in ("| head -1", "<&-", ">&-", "<&- >&-", "> /dev/full"):
        shell = subprocess.run(
            ["bash", "-c", f'"$0" "$@" {closed}', *command], capture_output=True, text=True, timeout=100
        )
        assert "Traceback" not in shell.stderr, (closed, shell.stderr)
        assert "Exception ignored" not in shell.stderr, (closed, shell.stderr)
        if closed == "> /dev/full":
            assert "No space left" in shell.stderr
            assert shell.returncode == 2


def test_sigterm_ends_a_command_as_ctrl_c_does() -> None:
    for sent, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            program(COMMAND, "wait"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background job, which the tests may be, hands on that Ctrl-C is ignored
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stderr is not None
        assert process.stderr.readline().strip() == "ready"
        time.sleep(0.1)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code
        assert "finished files are complete" in errors
        assert "Traceback" not in errors
