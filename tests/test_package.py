"""The package as a whole: what it imports, what it does without its optional parts, and how its build fails."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setup_script import load_setup_script

from fastkd_kernels import info

ROOT = Path(__file__).parents[1]

# Python finds no module of a name that stands for None, whether it is imported or only looked for
BLOCKED = "import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"


def python(code: str, *blocked: str, **environment: str) -> str:
    """Standard output of a new interpreter that cannot import `blocked`."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, sys.path)])
    script = BLOCKED.format(blocked=blocked) + code
    child = subprocess.run([sys.executable, "-c", script], env=clean | environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    return child.stdout


USE_EVERY_OP = (Path(__file__).parent / "use_every_op.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", ["transformers", "triton", "fastkd_kernels._C"])
def test_the_kernels_work_without(missing: str) -> None:
    assert python(USE_EVERY_OP + "print('works')", missing).strip() == "works"


def test_a_missing_extension_is_said_once_and_explained() -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        fk.compact([logits], torch.tensor([0]))
print(len([w for w in caught if "compact" in str(w.message)]))
try:
    with fk.backend("cpu"):
        fk.compact([logits], torch.tensor([0]))
except fk.BackendUnavailableError as error:
    print(error)
"""
    setup = "import torch, fastkd_kernels as fk\nlogits = torch.zeros(2, 2)\n"
    warned, error = python(setup + code, "fastkd_kernels._C").splitlines()
    assert warned == "1"
    assert "fastkd_kernels._C could not be loaded" in error
    assert "pip install --no-build-isolation ." in error


def test_a_missing_triton_is_explained() -> None:
    reasons = python(
        "import json; from fastkd_kernels import info; print(json.dumps(info.collect()))",
        "triton",
        "fastkd_kernels._C",
        TRITON_INTERPRET="0",
    )
    report = json.loads(reasons)
    assert report["versions"]["triton"] is None
    assert "pip install triton" in report["versions"]["triton_missing"]
    assert "pip install" in report["ops"]["compact"]["missing"]["cuda"]
    assert report["ops"]["compact"]["uses"]["cpu"] == "reference"


@pytest.mark.slow
def test_a_torch_without_a_gpu_does_not_import_triton() -> None:
    code = """
import torch
torch.version.cuda = torch.version.hip = None
from fastkd_kernels import _triton
print(_triton.available, "triton" in sys.modules, _triton.missing_reason)
"""
    assert re.fullmatch(r"False False torch \S+ has no CUDA; TRITON_INTERPRET=1 .*\n", python(code))
    pytest.importorskip("triton", reason="Triton is not installed")
    for asked_for in ("0", "1"):
        assert python(code, TRITON_INTERPRET=asked_for) == "True True None\n"


def test_import_does_not_touch_the_gpu_driver() -> None:
    code = """
import torch

def touched(*args, **kwargs):
    raise AssertionError("the GPU driver was asked")

for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_capability", "current_device"):
    setattr(torch.cuda, name, touched)
torch._C._cuda_getDeviceCount = touched
import fastkd_kernels
assert "transformers" not in sys.modules, "fastkd_kernels imports transformers"
assert not torch.cuda.is_initialized()
libraries = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "libcuda.so" not in libraries
print("untouched")
"""
    assert python(code).strip() == "untouched"


def test_import_costs_little_more_than_torch() -> None:
    """torch.compile alone takes longer to import than all the rest; it comes along when something is compiled."""
    code = """
import sys, torch
before = set(sys.modules)
import fastkd_kernels
late = ("torch._dynamo", "torch._inductor", "sympy", *(() if torch.version.cuda else ("triton",)))
print(*(name for name in set(sys.modules) - before if name.startswith(late)))
"""
    assert python(code).strip() == ""


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (None, "fastkd needs the package transformers, which is not installed; install"),
        ("4.57.1", "fastkd needs transformers 5.17 or newer, but 4.57.1 is installed; install"),
    ],
)
@pytest.mark.parametrize("program", ["python", "fastkd"])
def test_a_missing_or_old_transformers_is_one_sentence(installed: str | None, said: str, program: str) -> None:
    code = f"""
import sys
from importlib import metadata
def version(name):
    if {installed!r} is None:
        raise metadata.PackageNotFoundError(name)
    return {installed!r}
metadata.version = version
sys.argv = [{program!r}]
try:
    import fastkd
except (ImportError, SystemExit) as error:
    print(type(error).__name__, error)
"""
    kind = "SystemExit" if program == "fastkd" else "ImportError"
    assert python(code).startswith(f"{kind} {said}")


def test_the_oldest_versions_are_those_that_are_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["models"]]
    oldest = dict(line.split("==") for line in (ROOT / "tests" / "lowest.txt").read_text().split())
    for requirement in declared:
        name, version = re.split(">=", requirement.split(",")[0])
        assert oldest.pop(name).startswith(version), requirement
    assert oldest == {}
    checked = "({}, {})".format(*dict(entry.split(">=") for entry in declared)["transformers"].split(",")[0].split("."))
    assert checked in (ROOT / "python" / "fastkd" / "__init__.py").read_text(encoding="utf-8")


def test_a_free_threaded_python_is_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sysconfig\nsysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1\n")
    result = build(stub_torch(tmp_path, "2.13.0", None))
    assert_readable(result, "free-threaded Python", "limited API", "FASTKD_SKIP_EXT=1")


def imported_modules(folder: Path) -> dict[str, set[str]]:
    """Top-level names that each Python file of a folder imports."""
    return {str(path.relative_to(ROOT)): imports_of(path) for path in sorted(folder.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


def test_dependencies_point_one_way() -> None:
    allowed = {"torch", "triton", "fastkd_kernels", *sys.stdlib_module_names}
    files = imported_modules(ROOT / "fastkd_kernels")
    assert len(files) > 5
    for path, names in files.items():
        assert names <= allowed, f"{path} imports {sorted(names - allowed)}"


def test_the_thin_layer_reaches_the_kernels_by_their_public_names() -> None:
    for path in sorted((ROOT / "python" / "fastkd").rglob("*.py")):
        private = re.findall(r"(?:from|import) fastkd_kernels\._\w+", path.read_text(encoding="utf-8"))
        assert not private, f"{path.name}: {private}"


# room -> the rooms that it may import, from the ground up; docs/figures/draw.py draws the house from it
ROOMS: dict[str, list[str]] = {
    "losses": [],
    "data": [],
    "exits": ["data"],
    "encoders": ["data", "exits"],
    "engines": ["data", "encoders", "exits"],
    "model": ["data", "encoders", "engines", "exits"],
    "training": ["data", "encoders", "exits", "losses", "model"],
    "inference": ["data", "encoders", "engines", "exits", "model"],
    "kd": ["data", "encoders", "losses", "model", "training"],
    "report": ["data", "exits", "inference", "training"],
    "serving": ["data", "engines", "exits", "model"],
    "tables": ["data", "encoders", "exits", "inference", "kd", "model", "training"],
    "commands": [
        "data",
        "encoders",
        "engines",
        "exits",
        "inference",
        "kd",
        "model",
        "report",
        "serving",
        "tables",
        "training",
    ],
}
FASTKD = ROOT / "python" / "fastkd"


def files_imported(path: Path, root: Path) -> set[Path]:
    """The files below `root`, a package, that a file of it imports: anywhere in it, for types only too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        for name in names:
            parts = name.split(".")
            module = root.parent.joinpath(*parts)
            if parts[0] == root.name and module.with_suffix(".py").is_file():
                found.add(module.with_suffix(".py"))
    return found


def room_of(path: Path) -> str:
    return path.relative_to(FASTKD).parts[0].removesuffix(".py")


def rooms_imported(code: str) -> set[str]:
    """The rooms that a file imports anywhere in it, and "fastkd" for the package itself, which hands on their names."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {part[1] if part[1:] and part[1] in ROOMS else "fastkd" for part in parts if part[0] == "fastkd"}


def imports_of_rooms() -> dict[str, set[str]]:
    """The rooms that each room really imports."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in sorted(FASTKD.rglob("*.py")):
        if path.parent != FASTKD:
            found[room_of(path)] |= rooms_imported(path.read_text(encoding="utf-8"))
    return {room: others - {room} for room, others in found.items()}


def test_every_file_lives_in_a_room_that_says_what_it_is() -> None:
    folders = {path.parent.name for path in FASTKD.glob("*/__init__.py")}
    assert folders == set(ROOMS)
    assert len(ROOMS) <= 13
    for room in ROOMS:
        docstring = ast.get_docstring(ast.parse((FASTKD / room / "__init__.py").read_text(encoding="utf-8")))
        assert docstring, room


def test_no_arrow_runs_up() -> None:
    below: list[str] = []
    for room, allowed in ROOMS.items():
        assert set(allowed) <= set(below), f"{room} may only import rooms above it in the table"
        below.append(room)


def test_no_import_is_overlooked() -> None:
    assert rooms_imported("from fastkd import losses\ndef f():\n    from fastkd.kd.cache import X") == {"losses", "kd"}
    assert rooms_imported("import fastkd, fastkd.data.rows") == {"fastkd", "data"}
    assert rooms_imported("from fastkd import calibrate\nimport fastkd_kernels") == {"fastkd"}


def test_rooms_import_what_the_table_allows() -> None:
    assert {room: sorted(others) for room, others in imports_of_rooms().items()} == ROOMS


@pytest.mark.parametrize("path", sorted(FASTKD.rglob("catalogue.py")), ids=lambda path: path.parent.name)
def test_a_catalogue_needs_no_torch(path: Path) -> None:
    module = ".".join(path.relative_to(FASTKD.parent).with_suffix("").parts)
    # the command's --help does not wait for torch
    python(f"sys.argv = ['fastkd']\nimport {module}", "torch", "transformers")


@pytest.mark.parametrize("package", [FASTKD, ROOT / "fastkd_kernels"], ids=["fastkd", "fastkd_kernels"])
def test_no_files_import_each_other_in_a_circle(package: Path) -> None:
    faces = {package / "__init__.py", *package.glob("*/__init__.py")}
    imports = {path: files_imported(path, package) - faces - {path} for path in sorted(package.rglob("*.py"))}
    while imports:
        ground = [path for path, others in imports.items() if not others & imports.keys()]
        assert ground, f"a circle among {sorted(str(path.relative_to(package)) for path in imports)}"
        for path in ground:
            del imports[path]


def private_names_of_other_ops(path: Path) -> set[str]:
    """Underscore names that a file takes from `fastkd_kernels.ops`, by import or as an attribute of an imported op."""
    tree, ops, private = ast.parse(path.read_text(encoding="utf-8")), set(), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("fastkd_kernels.ops"):
            continue
        ops |= {alias.asname or alias.name for alias in node.names if node.module == "fastkd_kernels.ops"}
        private |= {alias.name for alias in node.names if alias.name.startswith("_")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ops:
            private |= {node.attr} if node.attr.startswith("_") else set()
    return private


def test_ops_use_each_other_by_their_public_names(tmp_path: Path) -> None:
    for path in sorted((ROOT / "fastkd_kernels").rglob("*.py")):
        private = private_names_of_other_ops(path)
        assert not private, f"{path.name} uses {sorted(private)}"
    seen = tmp_path / "op.py"
    seen.write_text("from fastkd_kernels.ops import b as c\nfrom fastkd_kernels.ops.a import _x, y\nc._z(c.w)\n")
    assert private_names_of_other_ops(seen) == {"_x", "_z"}


def test_contributing_says_which_test_covers_which_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| test | covers |\n|---|---|\n")[1].split("\n\n")[0]
    tests = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    sources = [path for folder in (FASTKD, ROOT / "fastkd_kernels") for path in folder.rglob("*.py")]
    covered: set[Path] = set()
    for row in table.splitlines():
        named, files = row.strip("|").split("|")
        assert set(re.findall(r"`(\w+\.py)`", named)) <= tests, row
        room = ""
        for name in re.findall(r"`([\w/.]+)`", files):
            room = name.rpartition("/")[0] or room
            pattern = f"*/{room}/{name.rpartition('/')[2] or '*.py'}" if room else f"fastkd_kernels/{name}"
            found = {path for path in sources if path.match(pattern)}
            assert found, f"CONTRIBUTING.md names {name}, which is not there"
            covered |= found
    for path in sources:
        has_own_test = f"test_{path.name.lstrip('_')}" in tests
        assert path.name.startswith("__") or has_own_test or path in covered, (
            f"{path.relative_to(ROOT)}: say in CONTRIBUTING.md which test covers it"
        )


def test_contributing_says_what_every_file_beside_the_ops_is_for() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| file of `fastkd_kernels/` | what |\n|---|---|\n")[1].split("\n\n")[0]
    files = {path.name for path in (ROOT / "fastkd_kernels").glob("*.py")} - {"__init__.py", "info.py"}
    assert set(re.findall(r"`(\w+\.py)`", table)) == files


STABLE_HEADERS = re.compile(r"torch/(csrc/stable|headeronly)/|torch/csrc/inductor/aoti_torch/c/shim\.h")


def test_csrc_includes_the_stable_abi_only() -> None:
    sources = sorted((ROOT / "csrc").iterdir())
    assert len(sources) > 3
    for path in sources:
        code = path.read_text(encoding="utf-8")
        headers = re.findall(r"^\s*#\s*include\s*[<\"](.+?)[>\"]", code, re.MULTILINE)
        of_torch = [header for header in headers if header.startswith(("torch/", "ATen/", "c10/"))]
        for header in of_torch:
            assert STABLE_HEADERS.match(header), f"{path.name} includes {header}"
        if of_torch and path.name != "stable_compat.h":
            # it says for which torch; headers before it would take the installed one
            assert headers.index("stable_compat.h") < headers.index(of_torch[0]), path.name


def test_csrc_needs_nothing_newer_than_torch_2_10() -> None:
    """Everything else that is newer hides behind TORCH_TARGET_VERSION; this macro of torch 2.13 does not."""
    for path in sorted((ROOT / "csrc").iterdir()):
        assert "STABLE_TORCH_ERROR_CODE_CHECK" not in path.read_text(encoding="utf-8"), (
            f"{path.name}: use TORCH_ERROR_CODE_CHECK, which torch 2.10 has"
        )


def build(stubs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py with `stubs` in front of everything that is installed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "FASTKD_"))}
    clean |= {"PYTHONPATH": str(stubs)} | environment
    return subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=clean, capture_output=True, text=True
    )


def stub_torch(folder: Path, version: str, cuda: str | None) -> Path:
    utils = folder / "torch" / "utils"
    utils.mkdir(parents=True)
    version_class = f"type('version', (), {{'cuda': {cuda!r}}})"
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\nversion = {version_class}\n")
    (utils / "__init__.py").touch()
    (utils / "cpp_extension.py").write_text(
        "from setuptools import Extension as CppExtension\n"
        "from setuptools.command.build_ext import build_ext as BuildExtension\n"
    )
    return folder


def assert_readable(result: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("fastkd_kernels: ")
    for text in expected:
        assert text in result.stderr


@pytest.mark.parametrize("file", ["__init__.py", "losses/__init__.py"])
def test_type_checkers_see_what_is_imported_late(file: str) -> None:
    """A name that is missing there would be of type Any, and no checker would say so."""
    tree = ast.parse((FASTKD / file).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    (public,) = (
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert sorted(imported) == sorted(ast.literal_eval(public.value))


def test_the_model_needs_no_datasets() -> None:
    """A GPU machine for measuring has torch and transformers and often nothing more of ours."""
    python("from fastkd.model.modeling import EarlyExitForSequenceClassification", "datasets", "typer", "matplotlib")


@pytest.mark.slow
def test_the_gpu_report_needs_no_datasets() -> None:
    bench, names = str(ROOT / "bench"), sorted(path.stem for path in (ROOT / "bench" / "gpu").glob("*.py"))
    code = f"""
import importlib, sys
sys.path.insert(0, {bench!r})
missing = {{}}
for name in {names!r}:
    try:
        importlib.import_module(f"gpu.{{name}}")
    except ImportError as error:
        missing[name] = str(error)
print(missing)
"""
    assert python(code, "datasets", "typer", "plotly", "selenium").strip() == "{}"


@pytest.mark.parametrize("skip", ["0", "1"])
def test_an_old_setuptools_is_one_paragraph(tmp_path: Path, skip: str) -> None:
    """New environments of Python 3.10 and 3.11 hold setuptools 65, which torch 2.10 and 2.11 are content with."""
    (tmp_path / "setuptools.py").write_text('__version__ = "65.5.0"')
    result = build(tmp_path, FASTKD_SKIP_EXT=skip)
    assert_readable(result, "setuptools 65.5.0 is too old", "pip install 'setuptools>=77'")


def test_a_missing_torch_is_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")")
    result = build(tmp_path)
    assert_readable(result, "PyTorch cannot be imported", "pip install torch", "pip install --no-build-isolation .")
    assert build(tmp_path, FASTKD_SKIP_EXT="1").stdout.strip() == "0.1.0"


def test_an_old_torch_is_one_paragraph(tmp_path: Path) -> None:
    result = build(stub_torch(tmp_path, "2.9.1+cpu", None))
    assert_readable(result, "PyTorch 2.9.1+cpu is too old", "torch>=2.10", "pip install torch")


def test_a_missing_toolkit_is_one_paragraph(tmp_path: Path) -> None:
    stubs = stub_torch(tmp_path, "2.11.0+cu130", "13.0")
    result = build(stubs, FASTKD_FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert_readable(result, "FASTKD_FORCE_CUDA=1", "no CUDA toolkit was found", "(CUDA 13.0)", "CUDA_HOME")


def test_a_missing_toolkit_leaves_the_cpu_kernels(tmp_path: Path) -> None:
    result = build(stub_torch(tmp_path, "2.11.0+cu130", "13.0"), CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "building without the CUDA kernels: no CUDA toolkit was found" in result.stderr


def test_a_toolkit_of_another_major_version_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "cuda-12"
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.41'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    stubs = stub_torch(tmp_path / "stubs", "2.11.0+cu130", "13.0")
    result = build(stubs, FASTKD_FORCE_CUDA="1", CUDA_HOME=str(home))
    assert_readable(result, "is 12.9, but torch 2.11.0+cu130 was built with CUDA 13.0")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_what_is_set_up_beside_torch_leaves_it_alone(tmp_path: Path) -> None:
    """pip knows the version in a package's name; a registry's leaves out the +cu130 that torch says of itself."""
    stub_torch(tmp_path, "2.13.0+cu130", "13.0")
    package = tmp_path / "torch-2.13.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", "setup", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (command,) = (line.rsplit(">", 1)[0] for line in planned.splitlines() if re.search(r"> build/torch\S*\.txt$", line))
    told = subprocess.run(command, shell=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert told.stdout.decode().strip() == "torch==2.13.0"


def test_info_prints_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    files = (ROOT / "fastkd_kernels" / "ops").glob("*.py")
    ops = {path.stem for path in files if "register_backends(" in path.read_text(encoding="utf-8")}
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["ops"]) == ops
    for op, of_op in report["ops"].items():
        assert op in text
        for device, used in of_op["uses"].items():
            assert used == device or of_op["missing"][device] in text


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("no-such-compiler", "no C++ compiler can be started as 'no-such-compiler'"), ("false", "cannot compile C++17")],
)
def test_a_compiler_that_cannot_is_one_paragraph(tmp_path: Path, compiler: str, said: str) -> None:
    result = build(stub_torch(tmp_path, "2.13.0", None), CXX=compiler)
    assert_readable(result, said, "apt-get install g++", "xcode-select --install", "FASTKD_SKIP_EXT=1")


def test_an_old_compiler_says_what_it_stumbles_over(tmp_path: Path) -> None:
    compiler = tmp_path / "c++98"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -std=c++98\n')
    compiler.chmod(0o755)
    result = build(stub_torch(tmp_path, "2.13.0", None), CXX=str(compiler))
    assert_readable(result, "cannot compile C++17", "error")


def test_windows_is_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.platform = 'win32'\n")
    result = build(stub_torch(tmp_path, "2.13.0", None))
    assert_readable(result, "not built on Windows yet", "FASTKD_SKIP_EXT=1")


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "environment-variables.md").read_text(encoding="utf-8")
    sources = [ROOT / "setup.py", ROOT / "build_backend.py"]
    for folder in ("fastkd_kernels", "python", "bench", "tests", "docs"):
        sources += (ROOT / folder).rglob("*.py")
    sources += (ROOT / "csrc").rglob("*.[ch]*")
    reads = re.compile(r"""(?:environ(?:\.get\(|\.setdefault\(|\[)|getenv\()\s*["']([A-Z][A-Z0-9_]+)""")
    found = {name for path in sources for name in reads.findall(path.read_text(encoding="utf-8"))}
    assert {"FASTKD_SKIP_EXT", "FASTKD_DEBUG", "TRITON_INTERPRET"} <= found
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    set_there = set(re.findall(r"^([A-Z_]+) :?=", makefile, re.MULTILINE)) | {"CURDIR"}
    found |= set(re.findall(r"\$\(([A-Z_]+)\)", makefile)) - set_there
    assert [name for name in sorted(found) if f"`{name}" not in page] == []


def test_the_page_of_an_index_leads_nowhere_that_is_not_there() -> None:
    """README.md is written for the repository; an index knows none of its files."""
    page, link = load_setup_script().page_for_an_index, re.compile(r"(?:\]\(|src=\")([^)\s\"]+)")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in (page(None), page("https://host/project")):
        assert all(target.startswith(("https://", "http://", "#")) for target in link.findall(text))
        assert text.split("```")[1::2] == readme.split("```")[1::2], "code is no link"
    inside = re.findall(r"https://host/project/(?:blob|raw)/main/([^)#\s\"]+)", page("https://host/project"))
    assert inside
    assert [path for path in inside if not (ROOT / path).exists()] == []


def test_metadata_names_the_repository_where_it_is_told() -> None:
    pages = load_setup_script().page_settings
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FASTKD_REPOSITORY", raising=False)
        assert pages()["project_urls"] == {}
        patch.setenv("FASTKD_REPOSITORY", "https://host/project/")
        assert pages()["project_urls"]["Issues"] == "https://host/project/issues"
