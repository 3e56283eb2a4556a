"""A real S3 store behind a proxy that counts: what goes there and comes back, once, whole, whatever breaks between."""

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from aliprod import InputError, assembly, csvfile, manifest, recipe
from entrypoints import clean, evaluate
from entrypoints.command import command
from tracking import copies, models, parts, server, storage

RCLONE = Path(sys.executable).parent / "rclone"
if not RCLONE.exists():
    pytest.skip("the server's parts: pip install -e '.[server]'", allow_module_level=True)

PROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
KEYS = {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "not-to-be-printed"}
MEGABYTE = 1_000_000


class Proxy(socketserver.ThreadingTCPServer):
    """Between a client and the store: what was asked, how many bytes came back; slow, or wrong, if told to."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.port = port
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.reset()

    def reset(self) -> None:
        self.asked: list[str] = []
        self.received = 0
        self.pause = 0.0  # seconds for each 64 KiB
        self.flip = b""  # what is changed, once, wherever it is in an answer

    def finish_request(self, client: socket.socket, _: Any) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as store:
            upwards = threading.Thread(target=self.pump, args=(client, store, self.note), daemon=True)
            upwards.start()
            self.pump(store, client, self.count)
            upwards.join()

    def pump(self, source: socket.socket, to: socket.socket, see: Callable[[bytes], bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                to.sendall(see(data))
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def note(self, data: bytes) -> bytes:
        time.sleep(self.pause)
        if found := re.match(rb"(GET|HEAD|PUT|POST) (\S+) HTTP", data):
            with self.lock:
                self.asked.append(f"{found[1].decode()} {found[2].decode()}")
        return data

    def count(self, data: bytes) -> bytes:
        time.sleep(self.pause)
        with self.lock:
            self.received += len(data)
            if self.flip and self.flip in data:
                data, self.flip = data.replace(self.flip, bytes(len(self.flip)), 1), b""
        return data

    def gets(self) -> list[str]:
        """Paths of the objects that were asked for, in the alphabet's order."""
        with self.lock:
            return sorted(asked.removeprefix("GET ") for asked in self.asked if re.match(r"GET /[^?]*$", asked))


class Store:
    """The store in a process of its own, killed and started again on the same port, and the proxy before it."""

    def __init__(self, root: Path, *options: str):
        self.root = root
        self.options = options
        self.port = parts.free_port()
        self.start()
        self.proxy = Proxy(self.port)

    def start(self) -> None:
        environment = os.environ | {"RCLONE_AUTH_KEY": '"{},{}"'.format(*KEYS.values())}
        address = f"127.0.0.1:{self.port}"
        command = ["serve", "s3", "--addr", address, "--config", os.devnull, *self.options, str(self.root)]
        with (self.root.parent / "rclone.log").open("ab") as log:
            self.process = subprocess.Popen([RCLONE, *command], env=environment, stdout=log, stderr=log)
        while not parts.answers(f"http://127.0.0.1:{self.port}"):
            assert self.process.poll() is None
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Store]:
    root = tmp_path_factory.mktemp("store") / "buckets"
    for number in range(2100):
        path = root / "many" / "folder" / f"{number % 70}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    (root / "bucket").mkdir()
    store = Store(root)
    yield store
    store.kill()
    store.proxy.shutdown()


@pytest.fixture
def s3(running, monkeypatch) -> Store:
    """The store as the environment names it."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_S3"))]:
        monkeypatch.delenv(name)
    environment = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{running.proxy.server_address[1]}"} | KEYS
    for name, value in (environment | {"AWS_EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(name, value)
    running.proxy.reset()
    return running


@pytest.fixture
def address(request) -> str:
    """A folder of the bucket for this test alone."""
    return f"s3://bucket/{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}"


@pytest.fixture
def big(tmp_path) -> Path:
    """A file of 40 MB."""
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(40 * MEGABYTE))
    return path


def sums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fetching(address: str, work: Path) -> subprocess.Popen[str]:
    """`fetch` in a process of its own."""
    code = (
        "import signal, sys, pathlib; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job may ignore it
        "from tracking import copies; copies.fetch(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, address, str(work)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def wait_for_part(process: subprocess.Popen[str], work: Path, size: int) -> None:
    """Until so many bytes of an object have arrived."""
    while process.poll() is None and sum(path.stat().st_size for path in work.glob("s3/.bucket.partial/*")) < size:
        time.sleep(0.01)
    assert process.poll() is None


def test_a_data_folder_goes_there_and_comes_back_equal(s3, shop, address, tmp_path):
    expected = sums(shop)
    size = sum(path.stat().st_size for path in shop.rglob("*") if path.is_file())
    assert storage.upload(shop, address) == (len(expected), size, 0)
    puts = [asked for asked in s3.proxy.asked if asked.startswith("PUT")]
    last = puts[next(index for index, put in enumerate(puts) if not put.endswith(".jpg")) :]
    assert not [put for put in last if put.endswith(".jpg")], "who sees the tables finds the photographs"
    assert storage.upload(shop, address) == (0, 0, len(expected))
    assert len([asked for asked in s3.proxy.asked if asked.startswith("PUT")]) == len(puts)
    copy = copies.fetch(address, tmp_path)
    assert copy == tmp_path / "s3" / address.removeprefix("s3://") and sums(copy) == expected
    assert len(s3.proxy.gets()) == len(expected)
    again = copies.fetch(f"{address}/", tmp_path)
    assert again == copy and len(s3.proxy.gets()) == len(expected), "nothing is fetched twice"
    assert copies.fetch(f"{address}/train.json", tmp_path) == copy / "train.json"
    assert len(s3.proxy.gets()) == len(expected)


def test_a_large_file_goes_in_parts(s3, big, address, tmp_path):
    assert storage.upload(big, f"{address}/renamed.bin") == (1, 40 * MEGABYTE, 0)
    assert len([asked for asked in s3.proxy.asked if "partNumber=" in asked]) == 5
    assert storage.upload(big, f"{address}/renamed.bin").skipped == 1
    changed = big.read_bytes()[:-1] + b"!"
    big.write_bytes(changed)
    assert storage.upload(big, f"{address}/renamed.bin") == (1, 40 * MEGABYTE, 0), "equal in size alone"
    assert copies.fetch(f"{address}/renamed.bin", tmp_path).read_bytes() == changed


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "deep" / "b.jpg").symlink_to("nowhere"), r"No such file or directory: '.*b\.jpg'"),
        (lambda folder: (folder / "deep" / "b.jpg").symlink_to("b.jpg"), r"Too many levels of symbolic.*b\.jpg'"),
        (lambda folder: (folder / "deep" / "b.jpg").chmod(0), r"Permission denied: '.*b\.jpg'"),
        (lambda folder: (folder / "loop").symlink_to(folder), "loop: a link to a folder that it lies in itself"),
        (lambda folder: (folder / "deep" / "loop").symlink_to(folder), "loop: a link to a folder that it lies in"),
    ],
    ids=["a link to nothing", "a link to itself", "a file of others", "a folder in itself", "deeper in itself"],
)
def test_an_upload_that_fails_says_which_file_and_why(s3, address, tmp_path, capsys, spoil, words):
    for number in range(100):  # more than go at a time: what is under way is called back
        path = tmp_path / "source" / "deep" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    folder = tmp_path / "source"
    if "Permission" in words:
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        (folder / "deep" / "b.jpg").touch()
    spoil(folder)
    s3.proxy.pause = 0.05
    assert run_command("upload", {"source": folder, "to": address}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line), line


def test_a_store_that_takes_nothing_says_so(running, s3, big, tmp_path, capsys, monkeypatch):
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    store = Store(tmp_path / "buckets", "--read-only")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{store.port}")
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    try:
        (tmp_path / "shop").mkdir()
        for number in range(30):
            (tmp_path / "shop" / f"{number}.jpg").write_bytes(b"x")
        for source, to in ((big, "s3://bucket/big.bin"), (tmp_path / "shop", "s3://bucket/shop")):
            assert run_command("upload", {"source": source, "to": to}) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert re.match(rf"{to}.*: .+", line) and "TypeError" not in line, line
    finally:
        store.kill()
        store.proxy.shutdown()


def test_a_stopped_upload_ends_as_stopped_and_leaves_nothing_half(s3, big, address, capsys):
    s3.proxy.pause = 0.02

    def stop() -> None:
        while not any("partNumber=" in asked for asked in list(s3.proxy.asked)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    assert run_command("upload", {"source": big, "to": f"{address}/big.bin"}) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    s3.proxy.reset()
    found = storage.client().list_objects_v2(Bucket="bucket", Prefix=address.rpartition("/")[2])
    assert "Contents" not in found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_fetch_goes_on_where_it_was(s3, big, address, tmp_path, number):
    storage.upload(big, f"{address}/big.bin")
    s3.proxy.reset()
    s3.proxy.pause = 0.01
    process = fetching(address, tmp_path)
    wait_for_part(process, tmp_path, 10 * MEGABYTE)
    process.send_signal(number)
    process.wait()
    s3.proxy.reset()
    assert sums(copies.fetch(address, tmp_path)) == {"big.bin": hashlib.sha256(big.read_bytes()).hexdigest()}
    assert s3.proxy.received < 31 * MEGABYTE
    assert not list(tmp_path.glob("s3/.bucket.partial/*"))


def test_a_store_that_goes_away_and_comes_back_is_waited_for(s3, big, address, tmp_path):
    storage.upload(big, f"{address}/big.bin")
    s3.proxy.reset()
    s3.proxy.pause = 0.01
    process = fetching(address, tmp_path)
    wait_for_part(process, tmp_path, 10 * MEGABYTE)
    s3.kill()
    s3.proxy.pause = 0.0
    time.sleep(1)
    assert process.poll() is None
    s3.start()
    assert process.wait(60) == 0
    assert sums(copies.fetch(address, tmp_path)) == {"big.bin": hashlib.sha256(big.read_bytes()).hexdigest()}
    assert s3.proxy.received < 50 * MEGABYTE and len(s3.proxy.gets()) >= 2


def test_processes_of_a_machine_fetch_each_object_once(s3, shop, address, tmp_path):
    storage.upload(shop, address)
    s3.proxy.reset()
    processes = [fetching(address, tmp_path) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    gets = s3.proxy.gets()
    assert len(gets) == len(set(gets)) == len(sums(shop)) and sums(tmp_path / "s3" / address[5:]) == sums(shop)
    assert sum("objects fetched" in text for text in said) == 1


def test_only_what_changed_there_or_here_is_fetched_again(s3, address, tmp_path):
    source = tmp_path / "source"
    for name in "abcdefg":
        (source / name).mkdir(parents=True)
        (source / name / "x.txt").write_text(f"first {name}")
    storage.upload(source, address)
    copy = copies.fetch(address, tmp_path)
    (source / "a" / "x.txt").write_text("other")
    (source / "b" / "x.txt").write_text("Other b")
    storage.upload(source, address)
    storage.client().delete_object(Bucket="bucket", Key=f"{address.rpartition('/')[2]}/c/x.txt")
    (copy / "d" / "x.txt").write_text("fir")
    (copy / "e" / "x.txt").unlink()
    (copy / "f" / "x.txt").write_text("FIRST f")
    s3.proxy.reset()
    copies.fetch(address, tmp_path)
    assert [get.split("/")[3] for get in s3.proxy.gets()] == list("abdef")
    shutil.rmtree(source / "c")
    assert sums(copy) == sums(source)


def test_what_changes_or_goes_after_it_was_listed_is_taken_as_it_is(s3, address, tmp_path, monkeypatch):
    client, prefix, listing = storage.client(), address.rpartition("/")[2], storage.note_there
    for name in ("changed", "gone", "same"):
        client.put_object(Bucket="bucket", Key=f"{prefix}/{name}", Body=b"first")

    def listed_before(*given: Any) -> int:
        found = listing(*given)
        client.put_object(Bucket="bucket", Key=f"{prefix}/changed", Body=b"another")
        client.delete_object(Bucket="bucket", Key=f"{prefix}/gone")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(storage, "note_there", listed_before)
        copy = copies.fetch(address, tmp_path)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {"changed": b"another", "same": b"first"}
    s3.proxy.reset()
    assert copies.fetch(address, tmp_path) == copy and not s3.proxy.gets()


def test_what_was_cut_off_when_all_had_arrived_is_fetched_anew(s3, address, tmp_path, monkeypatch):
    storage.client().put_object(Bucket="bucket", Key=f"{address.rpartition('/')[2]}/x.txt", Body=b"all of it")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(storage, "intact", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        copies.fetch(address, tmp_path)
    (left,) = tmp_path.glob("s3/.bucket.partial/*")
    assert left.read_bytes() == b"all of it"
    assert (copies.fetch(address, tmp_path) / "x.txt").read_bytes() == b"all of it"


def test_what_arrives_wrong_is_noticed(s3, address, tmp_path, monkeypatch):
    client, key = storage.client(), f"{address.rpartition('/')[2]}/x.txt"
    client.put_object(Bucket="bucket", Key=key, Body=b"without metadata: by its MD5")
    s3.proxy.flip = b"its MD5"
    assert copies.fetch(f"{address}/x.txt", tmp_path).read_bytes() == b"without metadata: by its MD5"
    assert len(s3.proxy.gets()) == 2
    monkeypatch.setattr(copies, "ATTEMPTS", 2)
    client.put_object(Bucket="bucket", Key=key, Body=b"something", Metadata={"sha256": "0" * 64})
    with pytest.raises(InputError, match=rf"{address}/x.txt: what arrives has not the size or checksum"):
        copies.fetch(f"{address}/x.txt", tmp_path)
    assert (tmp_path / "s3/bucket" / key).read_bytes().startswith(b"without"), "left as it was"


def test_thousands_of_objects_are_listed_page_by_page(s3, tmp_path):
    copy = copies.fetch("s3://many/folder", tmp_path)
    assert sums(copy) == sums(s3.root / "many" / "folder")
    assert len([asked for asked in s3.proxy.asked if "list-type=2" in asked]) == 3
    s3.proxy.reset()
    assert copies.fetch("s3://many", tmp_path) == tmp_path / "s3" / "many" and not s3.proxy.gets()


def test_without_the_store_a_complete_copy_does(s3, shop, address, tmp_path, monkeypatch, capsys):
    storage.upload(shop, address)
    copy = copies.fetch(address, tmp_path)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{parts.free_port()}")
    capsys.readouterr()
    assert copies.fetch(address, tmp_path) == copy
    assert capsys.readouterr().out == f"{address}: the store does not answer; taken as it was fetched before\n"
    (copy / "product_tree.json").unlink()
    for _ in range(2):
        with pytest.raises(InputError, match=rf"^{address}: Could not connect to the endpoint URL"):
            copies.fetch(address, tmp_path)
    with pytest.raises(InputError, match="Could not connect"):
        copies.fetch(f"{address}/train.json", tmp_path)


MISTAKES = {
    "bucket": ("s3://none/shop", {}, r"s3://none/shop: no such bucket"),
    "folder": ("s3://bucket/none", {}, r"s3://bucket/none: nothing is there"),
    "form": ("s3://", {}, r"'s3://': not of the form s3://bucket/folder"),
    "path": ("s3://bucket/../x", {}, r"'s3://bucket/../x': its parts must be plain names"),
    "a file": ("s3://many/folder/0/0.txt", {}, r"data 's3://many/folder/0/0.txt': no folder"),
    "secret": (
        "s3://bucket/x",
        {"AWS_SECRET_ACCESS_KEY": "wrong-one"},
        r"the secret key does not belong",
    ),
    "key": (
        "s3://bucket/x",
        {"AWS_ACCESS_KEY_ID": "wrong-one"},
        r"bucket/x: the store does not know this access",
    ),
    "none": ("s3://bucket/x", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, r"x: no credentials; set AWS_"),
    "endpoint": ("s3://bucket/x", {"AWS_ENDPOINT_URL_S3": "nowhere"}, r"s3://bucket/x: Invalid endpoint: nowhere"),
}


@pytest.mark.parametrize(("data", "environment", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(s3, store, data, environment, message, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = {"recipe": "demo", "round": "", "data": data, "init": "", "overrides": "", "resume": "", "minutes": 0}
    assert run_command("train", given | {"work": "work"}) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line
    assert not [secret for secret in (*KEYS.values(), "wrong-one") if re.search(rf"\b{secret}\b", line)]


def test_a_result_that_has_to_be_here_is_refused_there(capsys):
    assert run_command("prepare", {"data": "demo", "output": "s3://bucket/tables", "seed": 0, "work": "work"}) == 2
    assert "output 's3://bucket/tables': must be on this machine" in capsys.readouterr().err


def run_command(name: str, given: dict[str, Any]) -> int:
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    before, sys.argv = sys.argv, [name, *words]
    try:
        command(importlib.import_module(f"entrypoints.{name}").main)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        sys.argv = before
    return 0


def mlflow_run(entry: str, **given: object) -> None:
    pairs = [word for name, value in given.items() for word in ("-P", f"{name}={value}")]
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", entry, "--env-manager", "local", *pairs]
    subprocess.run(command, check=True)


def test_it_is_uploaded_and_mlflow_run_trains_from_there(s3, shop, store, row, address, tmp_path, capsys):
    assert run_command("upload", {"source": shop, "to": f"{address}/shop"}) == 0
    said = capsys.readouterr().out
    assert re.search(rf"{address}/shop: {len(sums(shop))} files uploaded, \d\.\d MB; 0 were there already", said)
    whole = manifest.read(shop, "train")
    listed = manifest.class_index(whole)[["class_id"]].assign(confidence=[0.9, 0.2] * 4)
    for name, table in {"part": whole.iloc[::2], "list": listed}.items():
        csvfile.write(table, tmp_path / f"{name}.csv")
        storage.upload(tmp_path / f"{name}.csv", f"{address}/{name}.csv")
    fields = {"manifest": f"{address}/part.csv", "select_list": f"{address}/list.csv", "min_confidence": 0.5}
    (tmp_path / "small.toml").write_text(recipe.to_toml(row.model_copy(update=fields)))
    mlflow_run("train", recipe=tmp_path / "small.toml", data=f"{address}/shop", work=tmp_path / "work")
    run = store.get_run(models.newest({"aliprod.round": "tiny"}) or "").data
    assert run.tags["aliprod.data"] == manifest.digest(whole)
    assert run.params["data_folder"] == str(tmp_path / "work" / "s3" / address[5:] / "shop")
    chosen = whole.iloc[::2]["class_id"].isin(listed["class_id"][::2])
    assert (run.params["num_classes"], run.params["num_train"]) == ("4", str(chosen.sum()))


def test_tables_are_scored_and_cleaned_from_there_to_there(s3, shop, store, row, address, tmp_path):
    table = manifest.read(shop, "train").iloc[:-3]
    storage.upload(shop, f"{address}/shop")
    for name, rows in {"part": table, "few": manifest.read(shop, "val").iloc[:7]}.items():
        csvfile.write(rows, tmp_path / f"{name}.csv")
        storage.upload(tmp_path / f"{name}.csv", f"{address}/{name}.csv")
    tables = assembly.tables(row, shop)
    assembly.model(row, len(tables.classes), "random").save(tmp_path / "model", tables.classes, tables.tree, {})
    evaluate.main("model", f"{address}/shop", f"{address}/few.csv", "fp32", Path("work"))
    (run,) = store.search_runs(["1"])
    assert len(pd.read_parquet(store.download_artifacts(run.info.run_id, "predictions.parquet"))) == 7
    given = ("misclassified", 0.92, 2, 0, 5, 1.0, 0.0, "fp32", f"{address}/clean/reliable.csv", 0, Path("work"))
    clean.main("model", f"{address}/shop", f"{address}/part.csv", *given)
    folder = copies.fetch(f"{address}/clean", tmp_path / "elsewhere")
    about = json.loads((folder / "reliable.json").read_text())
    kept = manifest.read_csv(folder / "reliable.csv")
    assert (about["source"], about["digest"]) == (manifest.digest(table), manifest.digest(kept))


@pytest.mark.parametrize("name", ["main", "train", "tune"])
@pytest.mark.parametrize("field", ["manifest", "select_list"])
def test_every_entry_that_reads_recipes_reads_their_tables_there(s3, store, shop, row, tmp_path, name, field, capsys):
    text = recipe.to_toml(row.model_copy(update={field: "s3://none/x.csv"}))
    (tmp_path / "small.toml").write_text(text + "[[tune]]\nround = 'tiny'\nlr = { low = 1e-4, high = 1e-2 }\n")
    given = {key: about.get("default", "") for key, about in PROJECT["entry_points"][name]["parameters"].items()}
    assert run_command(name, given | {"recipe": tmp_path / "small.toml", "data": shop}) == 2
    assert "s3://none/x.csv: no such bucket" in capsys.readouterr().err


def test_the_teams_server_brings_such_a_store(shop, tmp_path, monkeypatch, address):
    known = server.read_secrets(tmp_path / "team")
    with server.s3(tmp_path / "team", known) as (_, endpoint):
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", endpoint)
        for name in KEYS:
            monkeypatch.setenv(name, known[name])
        storage.upload(shop, "s3://mlflow/shop")
        assert sums(copies.fetch("s3://mlflow/shop", tmp_path)) == sums(shop)


@pytest.mark.slow
def test_the_grocery_photographs_are_trained_from_there(s3, grocery, store, address, tmp_path):
    mlflow_run("upload", source=grocery, to=address)
    given = {
        "recipe": "grocery",
        "round": "frozen",
        "data": address,
        "overrides": "epochs=2",
        "work": tmp_path / "work",
    }
    mlflow_run("train", **given)
    assert sums(tmp_path / "work" / "s3" / address[5:]) == sums(grocery)
    scores = store.get_run(models.newest({"aliprod.round": "frozen"}) or "").data.metrics
    assert scores["num_corrupt"] == 0 and scores["map"] > 0.4
