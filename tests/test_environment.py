"""The environment: one list of packages and one list of Pythons, whoever installs; nothing that needs a screen."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import pytest
import yaml
from conftest import ROOT
from mlflow.utils.environment import _PythonEnv
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tracking import models

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
CONDA = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
LISTED = [Requirement(line) for line in next(part["pip"] for part in CONDA if isinstance(part, dict))]
WINDOWS = re.compile(r"libGL|libX11|libxcb|libQt|libgtk|libSM\b|libICE")
WINDOWED = {"opencv-python", "opencv-contrib-python", "imaug", "imgaug", "imagecorruptions", "imagecorruptions-imaug"}


def resolved(python: str, resolution: str) -> dict[str, str]:
    """The version of each package that uv would install, wheels alone."""
    settings = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    limits = re.findall(r"constraint='(.+)'$", settings, re.MULTILINE)  # uv does not read pip's settings

    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header", "-"]
    command += ["--python-version", python, "--resolution", resolution, "--only-binary", ":all:"]
    command += [word for path in limits for word in ("--constraint", path)]
    lines = "\n".join(map(str, LISTED))
    return dict(
        line.split("==")
        for line in subprocess.run(command, input=lines, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    )


@pytest.mark.slow
@pytest.mark.parametrize("resolution", ["lowest-direct", "highest"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_finds_wheels_between_the_bounds_and_none_with_windows(python, resolution):
    assert not WINDOWED & resolved(python, resolution).keys()


@pytest.mark.slow
def test_uv_would_install_what_pip_installed():
    pins = resolved("{}.{}".format(*sys.version_info), "highest")
    assert {name: importlib.metadata.version(name) for name in pins} == pins


def test_what_is_installed_has_no_windows():
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    assert installed > {"opencv-python-headless", "sindre-imgaug"}
    assert not WINDOWED & installed


def test_opencv_needs_no_library_of_a_screen():
    folder = Path(cv2.__file__).parent
    libraries = [str(path) for path in (*folder.rglob("*.so"), *folder.parent.glob("opencv*.libs/*"))]
    needed = subprocess.run(["ldd", *libraries], check=True, capture_output=True, text=True).stdout
    assert "libavcodec" in needed and not WINDOWS.search(needed)


def test_a_served_model_installs_what_training_installed():
    assert set(models.SERVING) <= {requirement.name for requirement in LISTED}


def test_every_list_of_pythons_is_the_same():
    wanted = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if f"3.{minor}.5" in wanted] == PYTHONS
    assert SpecifierSet(CONDA[0].removeprefix("python")) == wanted

    newest_first = re.search(r"^PYTHONS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert newest_first.split() == [f"python{python}" for python in reversed(PYTHONS)]
    assert f"Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}" in (ROOT / "README.md").read_text()


def test_mlflow_makes_an_environment_of_the_python_that_it_runs_in():
    environment = _PythonEnv.from_conda_yaml(ROOT / "conda.yaml")
    assert environment.python == "{}.{}.{}".format(*sys.version_info)
    assert environment.python in SpecifierSet(PROJECT["requires-python"])
    assert environment.build_dependencies == ["pip"]
    assert [Requirement(line) for line in environment.dependencies] == LISTED


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder where the Pythons are those named, each with or without the module that makes venvs."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("conda.yaml", "pyproject.toml"):
        (tmp_path / name).touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").symlink_to(shutil.which("make"))

    def run(*command: str, **pythons: bool) -> subprocess.CompletedProcess:
        for name, whole in pythons.items():
            executable = tmp_path / "bin" / name.replace("_", ".")
            executable.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n' if whole else "#!/bin/sh\nexit 1\n")
            executable.chmod(0o755)
        environment = {"PATH": str(tmp_path / "bin")}
        return subprocess.run(["make", *command], cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3_11": True, "python3_12": True, "python3_13": True}, "python3.13"),
        ({"python3_11": True, "python3_12": True, "python3_13": False}, "python3.12"),
        ({"python3_11": True, "python3_14": True, "python3_10": True}, "python3.11"),
    ],
)
def test_make_takes_the_newest_python_that_can_make_an_environment(make, pythons, taken):
    ran = make("--dry-run", "test", **pythons)
    assert f"\n{taken} -m venv --clear .venv\n" in ran.stdout


@pytest.mark.parametrize(
    ("pythons", "line"),
    [
        ({}, r"None of python3\.13 python3\.12 python3\.11 is here: install one \(.+\) or name it: make PYTHON=\.\.\."),
        ({"python3_14": True}, r"None of .+"),
        ({"python3_12": False}, r"python3\.12 cannot make an environment: .* \(apt install python3\.12-venv\)"),
    ],
)
def test_make_says_in_one_line_which_python_is_missing(make, pythons, line):
    ran = make("test", **pythons)
    said = [text for text in ran.stderr.splitlines() if not text.startswith("make:")]
    assert ran.returncode and len(said) == 1 and re.fullmatch(line, said[0]), ran.stderr


def test_a_wheel_has_the_recipes(tmp_path):
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for file in filter(lambda name: (ROOT / name).is_file(), files.split("\0")[:-1]):
        (tmp_path / "source" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / "source" / file)

    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True)
    (sources,) = tmp_path.glob("aliprod-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "installed", sources], check=True)

    recipes = {path.name for path in (ROOT / "entrypoints" / "recipes").glob("*.toml")}
    assert {path.name for path in (tmp_path / "installed" / "entrypoints" / "recipes").glob("*.toml")} == recipes
    code = "from entrypoints.command import recipe_path; print(recipe_path('grocery'))"
    where = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert Path(where.strip()) == tmp_path / "installed" / "entrypoints" / "recipes" / "grocery.toml"


def test_a_test_that_hangs_ends_with_where_it_hung(tmp_path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["faulthandler_timeout"] >= 600
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\nfaulthandler_timeout = 1\nfaulthandler_exit_on_timeout = {settings['faulthandler_exit_on_timeout']}"
    )
    (tmp_path / "test_hang.py").write_text("import time\ndef test_that_hangs():\n    time.sleep(600)\n")
    options = re.search(r"\bpytest (-n .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]

    command = [sys.executable, "-m", "pytest", *options.split(), "-n", "1", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1
    assert len(re.findall("in test_that_hangs", ran.stderr)) == 1, "xdist would start a file anew, again and again"
