"""Where people run it: other locales and terminals, streams that are closed or full, users without a name or a home,
a share of the processors, packages of the same names."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from aliprod import InputError, assembly, catalogue, enrolment, manifest, recipe, surroundings
from aliprod.processors import available_cpus
from aliprod.progress import progress
from entrypoints import predict
from tests.test_entrypoints import options, run_command
from tracking import models, storage

ROOT = Path(__file__).parents[1]
PLAIN = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "MLFLOW_DISABLE_TELEMETRY": "true"}
SMALL = {"departments": 1, "categories": 1, "brands": 1, "products": 2, "images": 2, "imbalance": 1, "val_images": 1,
         "noise": 0, "size": 48, "seed": 0}  # fmt: skip
SPEAKING = """
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from aliprod import surroundings
surroundings.prepare()
from aliprod import streams
from aliprod.progress import progress
with streams.unfailing():
    for _ in progress(range(3)):
        print("a caf\\u00e9, a \\u4e2d, a \\udce9", flush=True)
    print("x" * 100_000)
    print("and then", file=sys.stderr, flush=True)
Path(sys.argv[1]).write_text("done")
"""
STREAMS = {
    "open": (">{0}.out 2>{0}.err", "UTF-8", "a café, a 中, a \\udce9\n", "and then\n"),
    "ASCII": (">{0}.out 2>{0}.err", "ascii", "a caf\\xe9, a \\u4e2d, a \\udce9\n", "and then\n"),
    "GBK": (">{0}.out 2>{0}.err", "gbk", "a café, a 中, a \\udce9\n", "and then\n"),
    "full": (
        ">/dev/full 2>{0}.err",
        "UTF-8",
        None,
        "and then\nwhat was printed is incomplete: No space left on device\n",
    ),
    "full errors": (">{0}.out 2>/dev/full", "UTF-8", "a café", None),
    "closed": (">&- 2>{0}.err", "UTF-8", None, "and then\n"),
    "closed errors": (">{0}.out 2>&-", "UTF-8", "a café", None),
    "all closed": ("<&- >&- 2>&-", "UTF-8", None, None),
    "gone": ("2>{0}.err | exit 3", "UTF-8", None, "and then\n"),
    "gone errors": ("2>&1 >{0}.out | exit 3", "UTF-8", "a café", None),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_what_cannot_be_said_ends_no_work(kind, tmp_path):
    redirected, encoding, out, err = STREAMS[kind]
    script = f'set -o pipefail; ( "$0" -c "$1" "$2"; echo $? >"$2.status" ) {redirected.format(tmp_path / "file")}'
    environment = PLAIN | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    subprocess.run(["bash", "-c", script, sys.executable, SPEAKING, str(tmp_path / "file")], env=environment)
    assert (tmp_path / "file").read_text() == "done"
    assert (tmp_path / "file.status").read_text() == "0\n"
    if out:
        assert (tmp_path / "file.out").read_text(encoding=encoding).startswith(out)
    if err:
        assert (tmp_path / "file.err").read_text(encoding=encoding) == err


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_a_command_means_the_same_files_in_every_locale(tmp_path, encoding):
    environment = PLAIN | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "entrypoints.demo_data", *options(**SMALL, output=tmp_path / "café ®")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0 and not done.stderr
    assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == ["café ®".encode()]
    shown = "caf\\xe9 \\xae" if encoding == "ascii" else "café \\xae"
    assert done.stdout.decode(encoding) == f"{tmp_path}/{shown}: 6 photographs of 2 products\n"


def test_photographs_are_read_whatever_bytes_their_names_are(row, shop, store, tmp_path, capsys):
    tables = assembly.tables(row, shop)
    assembly.model(row, len(tables.classes), "random").save(tmp_path / "model", tables.classes, tables.tree, {})
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for name in (b"na\xefve.jpg", b"\xff.jpg", b"plain.jpg"):
        shutil.copy(manifest.paths(tables.val, shop)[0], folder / os.fsdecode(name))
    predict.main(str(tmp_path / "model"), str(folder), 1, 0.0, "head", Path("out.csv"), Path("work"))
    answers = pd.read_csv("out.csv", keep_default_na=False)
    assert answers["error"].tolist() == ["", "", ""]
    names = [Path(file).name for file in answers["file"]]
    assert sorted(names) == sorted(["na\\udcefve.jpg", "\\udcff.jpg", "plain.jpg"])
    (run,) = store.search_runs(["1"])
    logged = pd.read_csv(store.download_artifacts(run.info.run_id, "predictions.csv"), keep_default_na=False)
    assert logged["file"].tolist() == answers["file"].tolist()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("prepare", {"data": "caf\udce9", "output": "tables", "seed": 0, "work": "work"}),
        ("demo_data", SMALL | {"output": "caf\udce9"}),
        ("upload", {"source": "here", "to": "s3://bucket/caf\udce9"}),
        ("enroll", {"model": "newest", "images": "x.jpg", "class_id": "1", "name": "caf\udce9", "path": "",
                    "work": "work"}),
    ],
    ids=["data", "output", "to", "name"],
)  # fmt: skip
def test_any_other_text_that_is_not_utf8_is_refused_in_a_line(name, given, store, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(name, options(**given))
    assert stopped.value.code == 2
    assert "caf\\udce9': must be UTF-8\n" in capsys.readouterr().err


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A folder that every user can write to, in folders that every user can enter, which `tmp_path` is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.parametrize("name", ["na\udcefve.jpg", "caf\udce9/plain.jpg"])
def test_names_that_no_table_or_store_can_hold_are_refused_by_enroll_and_upload(name, shop, tmp_path, monkeypatch):
    photograph = tmp_path / "folder" / "90001" / name
    photograph.parent.mkdir(parents=True)
    shutil.copy(manifest.paths(manifest.read(shop, "val"), shop)[0], photograph)
    escaped = re.escape(name.encode("utf-8", "backslashreplace").decode())
    with pytest.raises(InputError, match=f"{escaped}': the name is not UTF-8"):
        enrolment.listed(str(tmp_path / "folder"))
    with pytest.raises(InputError, match=f"{escaped}': the name is not UTF-8"):
        list(storage._files(tmp_path / "folder", "there"))


def test_a_program_without_stderr_may_use_the_library(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress(range(3))) == [0, 1, 2]


def as_nobody(home: str | None) -> tuple[list[str], dict[str, str]]:
    """How to become a user of no name without a home, and the environment of one; as root, for real."""
    environment = {name: value for name, value in PLAIN.items() if name != "HOME"} | ({"HOME": home} if home else {})
    if os.getuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root becomes another user with setpriv, which is not there")
        reading = "-all,+dac_read_search"  # wherever this Python is, it may be read
        caps = [f"--{kind}={reading}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
        return ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", *caps], environment
    if home is None:
        pytest.skip("only root can be a user whom the password file does not know")
    return [], environment


@pytest.mark.parametrize("home", [None, "/"])
def test_a_user_without_name_and_home_is_no_matter_to_the_libraries(home, everybodys):
    become, environment = as_nobody(home)
    code = (
        "import entrypoints, getpass, matplotlib, mlflow.tracking.context.default_context as context\n"
        "print(getpass.getuser() == context._get_user(), matplotlib.get_cachedir())"
    )
    command = [*become, sys.executable, "-c", code]
    environment |= {"TMPDIR": str(everybodys)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    place = everybodys / f"aliprod-{12345 if become else os.getuid()}"
    assert done.stdout.startswith(f"True {place}") and place.stat().st_mode & 0o777 == 0o700


def test_a_folder_for_caches_that_somebody_else_has_prepared_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours = tmp_path / f"aliprod-{os.getuid()}"
    assert surroundings._temporary_folder() == str(ours) == surroundings._temporary_folder()
    ours.chmod(0o777)
    assert surroundings._temporary_folder() != str(ours)
    ours.rmdir()
    ours.symlink_to(tmp_path)
    assert surroundings._temporary_folder() != str(ours)


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["closed", "full"])
def test_a_round_is_trained_by_a_user_without_name_and_home_whom_nobody_hears(
    row, empty_store, everybodys, streams, monkeypatch
):
    become, environment = as_nobody("/nonexistent")
    place = everybodys / "éè"
    place.mkdir()
    catalogue.render(
        place / "мое", departments=1, categories=1, brands=1, products=3, images=6, val_images=2, imbalance=1, size=64
    )
    (place / "tiny.toml").write_text(recipe.to_toml(row.model_copy(update={"augment": "strong"})))
    shutil.copy(empty_store, place / "mlflow.db")
    for path in (place, place / "mlflow.db"):
        path.chmod(0o777)
    environment |= {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{place}/mlflow.db"
    given = {"recipe": place / "tiny.toml", "round": "", "data": place / "мое", "init": "", "overrides": "",
             "resume": "", "minutes": 0, "work": place / "work"}  # fmt: skip
    redirected = {"closed": ">&- 2>&- <&-", "full": ">/dev/full 2>/dev/full"}[streams]
    command = [*become, sys.executable, "-m", "entrypoints.train", *options(**given)]
    ended = subprocess.run(["bash", "-c", f'"$0" "$@" {redirected}', *command], cwd=place, env=environment)
    assert ended.returncode == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["MLFLOW_TRACKING_URI"])
    store = MlflowClient()
    experiment = store.get_experiment_by_name("aliprod")
    (run,) = store.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and models.logged(run)
    assert not list(place.glob("work/runs/*/refused.jsonl"))


def group(root: Path, version: int, quotas: dict[str, str]) -> None:
    """The files of a process in the control group /batch/job, with limits of groups by their path."""
    (root / "proc/self").mkdir(parents=True)
    list_of_groups = {1: "5:memory:/batch/job\n4:cpu,cpuacct:/batch/job\n", 2: "0::/batch/job\n"}[version]
    (root / "proc/self/cgroup").write_text(list_of_groups)
    for path, quota in quotas.items():
        folder = root / "sys/fs/cgroup" / ("" if version == 2 else "cpu,cpuacct") / path
        folder.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (folder / "cpu.max").write_text(quota)
        else:
            for name, value in zip(("quota", "period"), quota.split(), strict=True):
                (folder / f"cpu.cfs_{name}_us").write_text(value)


QUOTAS = {
    "none": (1, {}, 64),
    "unlimited": (2, {"": "max 100000", "batch/job": "max 100000"}, 64),
    "unlimited, version 1": (1, {"": "-1 100000", "batch/job": "-1 100000"}, 64),
    "two": (2, {"batch/job": "200000 100000"}, 2),
    "two, version 1": (1, {"batch/job": "200000 100000"}, 2),
    "one and a half is begun": (2, {"batch/job": "150000 100000"}, 2),
    "a tenth": (2, {"batch/job": "10000 100000"}, 1),
    "of the group above": (2, {"batch": "300000 100000", "batch/job": "max 100000"}, 3),
    "the least of both": (1, {"batch": "300000 100000", "batch/job": "400000 100000"}, 3),
    "of a container's root": (2, {"": "500000 100000"}, 5),
    "of a container's root, version 1": (1, {"": "500000 100000"}, 5),
    "more than there are": (2, {"batch/job": "9900000 100000"}, 64),
    "nonsense": (2, {"batch/job": "many"}, 64),
}


@pytest.mark.parametrize("kind", QUOTAS)
def test_threads_are_as_many_as_the_quota_pays_for(kind, tmp_path, monkeypatch):
    version, quotas, expected = QUOTAS[kind]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    group(tmp_path, version, quotas)
    assert available_cpus(tmp_path) == expected


def test_threads_are_as_many_as_the_processors_this_process_is_bound_to():
    if len(bound := os.sched_getaffinity(0)) < 2:
        pytest.skip("this process is bound to one processor as it is")
    code = (
        "import entrypoints, torch, cv2\n"
        "from aliprod.images import Images, Preprocessing\n"
        "images = Images([], None, Preprocessing(8, (0, 0, 0), (1, 1, 1), 'bilinear'))\n"
        "print(images.workers, torch.get_num_threads(), cv2.getNumberOfCPUs())"
    )
    command = ["taskset", "--cpu-list", str(min(bound)), sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=PLAIN, check=True, capture_output=True, text=True)
    assert done.stdout == "1 1 1\n"


def test_a_quota_is_told_to_the_libraries_that_know_none(monkeypatch):
    for given, expected in ((None, "1"), ("3", "3")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        monkeypatch.setattr(surroundings, "available_cpus", lambda: 1)
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        surroundings.prepare()
        assert os.environ["OMP_NUM_THREADS"] == expected


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_ours_are_found_first_where_the_project_runs(kind, tmp_path):
    for name in ("tracking", "entrypoints", "aliprod"):
        strange(tmp_path, name, kind)
    command = [sys.executable, "-m", "entrypoints.demo_data", *options(**SMALL, output=tmp_path / "demo")]
    environment = PLAIN | {"PYTHONPATH": str(tmp_path)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert (tmp_path / "demo" / "train.json").exists()


@pytest.mark.parametrize("name", ["tracking", "aliprod"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_somebody_elses_package_of_our_name_is_named_by_its_file(kind, name, tmp_path):
    file = strange(tmp_path, name, kind)
    command = [sys.executable, "-m", "entrypoints.demo_data", *options(**SMALL, output="demo")]
    environment = PLAIN | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"the package {name!r} that Python finds is {file}, not this project's {ROOT / name}: "
        "rename it, or start from another folder\n"
    )


def strange(folder: Path, name: str, kind: str) -> Path:
    """A file or package of somebody else's."""
    path = folder / f"{name}.py" if kind == "file" else folder / name / "__init__.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise SystemExit('never imported')")
    return path
