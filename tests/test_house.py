"""The rules of the house: who may import what, one list of everything, names that say what a file is for."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = {name: sorted((ROOT / name).glob("*.py")) for name in ("aliprod", "entrypoints", "tracking")}
FILES = [file for files in PACKAGES.values() for file in files]
PROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
ENTRIES = PROJECT["entry_points"]


def imports(file: Path) -> set[str]:
    """Every module a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            assert "*" not in [alias.name for alias in node.names], f"{file}: star import"
    return found


def roots(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


@pytest.mark.parametrize("file", PACKAGES["aliprod"], ids=lambda file: file.name)
def test_the_library_knows_nothing_of_tracking(file):
    assert not roots(file) & {"mlflow", "boto3", "tracking", "entrypoints", "argparse"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_only_tracking_imports_mlflow_and_only_tuning_optuna(file):
    if file.parent.name != "tracking":
        assert not roots(file) & {"mlflow", "boto3"}
    if file.stem not in ("tuning", "tune"):
        assert "optuna" not in roots(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_figure_is_of_the_kind_that_knows_fonts(file):
    assert file.stem == "lettering" or not {"matplotlib.figure", "matplotlib.pyplot"} & imports(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_file_has_one_job_and_a_name(file):
    assert file.stem not in {"utils", "helpers", "common", "misc"}
    assert ast.get_docstring(ast.parse(file.read_text())), "says what it is for"


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_what_is_public_says_what_it_is(file):
    outer = ast.parse(file.read_text()).body
    inner = [
        node for cls in outer if isinstance(cls, ast.ClassDef) and not cls.name.startswith("_") for node in cls.body
    ]
    for node in outer + inner:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{file.name}:{node.lineno} {node.name}"


@pytest.mark.parametrize(
    ("package", "names", "heavy"),
    [
        ("aliprod", ["recipe", "manifest", "taxonomy", "metrics"], {"torch", "cv2"}),
        ("entrypoints", ["demo_data", "prepare", "reap", "rollback", "send", "upload"], {"torch"}),
    ],
)
def test_what_needs_no_network_loads_without_torch(package, names, heavy):
    code = f"import sys, {', '.join(f'{package}.{name}' for name in names)}; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ENTRIES)
def test_mlproject_and_script_have_the_same_parameters(name):
    entry = ENTRIES[name]
    declared = list(entry["parameters"])
    main = importlib.import_module(f"entrypoints.{name}").main
    assert declared == list(inspect.signature(main).parameters)
    assert entry["command"].split() == [
        *f"python -m entrypoints.{name}".split(),
        *(word for parameter in declared for word in (f"--{parameter}", f"{{{parameter}}}")),
    ]
    assert all(f"{parameter}:" in main.__doc__ or parameter in main.__doc__ for parameter in declared)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_readme_has_every_parameter_and_its_default(name):
    readme = (ROOT / "README.md").read_text()
    section = re.search(rf"^\| `{name}` \|.*$", readme, re.MULTILINE)
    assert section, f"README has no row for {name}"
    for parameter, about in ENTRIES[name]["parameters"].items():
        default = str(about["default"]) if "default" in about else None
        expected = f"`{parameter}`" if default in (None, "") else f"`{parameter}={default}`"
        assert expected in section[0]


def test_every_import_is_in_the_one_list_of_dependencies():
    distributions = {
        "cv2": "opencv-python-headless",
        "PIL": "pillow",
        "imgaug": "sindre-imgaug",
        "mpl_toolkits": "matplotlib",
    }
    distributions |= {"faiss": "faiss-cpu"}
    environment = yaml.safe_load((ROOT / "conda.yaml").read_text())
    listed = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    names = {re.split(r"[<>=~ \[]", line)[0] for line in listed}
    used = set().union(*map(roots, FILES)) - set(sys.stdlib_module_names) - set(PACKAGES)
    assert {distributions.get(name, name) for name in used} <= names
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["dependencies"]


def test_mlflow_builds_the_environment_everyone_has():
    assert PROJECT["conda_env"] == "conda.yaml"
    assert not (ROOT / "uv.lock").exists(), "it would make the uv manager ignore conda.yaml"
