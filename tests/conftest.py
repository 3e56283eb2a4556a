"""What tests share: a tiny catalogue, a tiny network, the grocery photographs where they are, real servers."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from aliprod import catalogue, recipe
from tracking import reach

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
reach.prepare()

ROOT = Path(__file__).parents[1]
GROCERY = ROOT.parent / "shared" / "data" / "grocery"


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Path:
    """A data folder of 8 classes with 6 to 12 train photographs and 2 val photographs each."""
    folder = tmp_path_factory.mktemp("data") / "shop"
    catalogue.render(
        folder, departments=2, categories=1, brands=2, products=2, images=12, imbalance=2, val_images=2, size=96
    )
    return folder


@pytest.fixture(scope="session")
def grocery() -> Path:
    """The real photographs; skips where the folder is missing."""
    if not GROCERY.is_dir():
        pytest.skip(f"the grocery photographs are not at {GROCERY}")
    return GROCERY


@pytest.fixture
def row() -> recipe.Round:
    """A round of two epochs with a network small enough for a processor."""
    return recipe.Round(
        name="tiny", init="random", backbone="test_resnet", epochs=2, batch_size=16, lr=1e-3, image_size=64
    )


@pytest.fixture(autouse=True)
def no_run_of_others(monkeypatch) -> None:
    """No test is within a run or an experiment that another has named; MLflow itself leaves them in the environment."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An SQLite store without runs; making one takes seconds, copying it none."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch) -> MlflowClient:
    """The client of an SQLite store of its own, as `mlflow run` uses by default."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    mlflow.set_tracking_uri(None)  # first, as it drops the variable
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return MlflowClient()


class Server:
    """A real server in a process group of its own, that can be killed and started again on the same port."""

    def __init__(self, command: list[str], health: str, cwd: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self.health = health
        self.cwd = cwd

    def start(self) -> "Server":
        log = (self.cwd / "server.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *self.command], cwd=self.cwd, stdout=log, stderr=log, start_new_session=True
        )
        for _ in range(600):
            try:
                with urllib.request.urlopen(self.uri + self.health, timeout=5):
                    return self
            except OSError:
                assert self.process.poll() is None, (self.cwd / "server.log").read_text()
                time.sleep(0.2)
        raise AssertionError((self.cwd / "server.log").read_text())

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    """A running MLflow tracking server with a store of its own."""
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'server.db'}",
        "--artifacts-destination",
        str(tmp_path / "store"),
    ]
    running = Server(["mlflow", "server", *store, "--workers", "1"], "/health", tmp_path).start()
    yield running
    running.kill()
