"""The served form: what a request may hand over, what it is answered, and that the model carries all it needs."""

import ast
import base64
import contextlib
import datetime
import http.server
import io
import json
import shutil
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import Server
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from aliprod import InputError, assembly, images, intake, manifest, model
from aliprod.intake import Limits
from aliprod.prediction import recognise
from aliprod.recipe import Round
from tracking import models

ROOT = Path(__file__).parents[1]
MAX_IMAGES, MAX_BYTES = 20, 1_000_000


def save(folder: Path, data: Path) -> model.Saved:
    """The served form, in `folder`/served, of a small network that is sure enough of something for its classes."""
    row = Round(name="tiny", init="random", backbone="test_resnet", image_size=64)
    tables = assembly.tables(row, data)
    torch.manual_seed(0)
    network = assembly.model(row, len(tables.classes), "random")
    torch.nn.init.normal_(network.head.weight)
    network.save(folder / "saved", tables.classes, tables.tree, {})
    example = manifest.paths(tables.val, data)[0]
    mlflow.pyfunc.save_model(folder / "served", **models.form(str(folder / "saved"), example))
    return model.load(folder / "saved")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def saved(home, shop) -> model.Saved:
    return save(home, shop)


@pytest.fixture(scope="module")
def photographs(shop) -> list[bytes]:
    return [Path(file).read_bytes() for file in manifest.paths(manifest.read(shop, "val"), shop)]


@pytest.fixture(scope="module")
def host(photographs) -> Iterator[http.server.ThreadingHTTPServer]:
    """A real web server with photographs, and with all that can be wrong with one."""

    both = threading.Barrier(2, timeout=30)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, data = self.path.partition("?")[0], photographs[0]
            if name == "/silent":
                time.sleep(5)
            if name == "/together":
                both.wait()
            if name == "/moved":
                self.send_response(302)
                self.send_header("Location", "/photograph.jpg")
            else:
                self.send_response(404 if name == "/gone" else 200)
            size = {"/cut": len(data) + 9, "/endless": None, "/slow": None}.get(name, len(data))
            if size:
                self.send_header("Content-Length", str(size))
            self.end_headers()
            try:
                self.wfile.write(data)
                while name in ("/endless", "/slow"):
                    self.wfile.write(bytes(10 if name == "/slow" else 100_000))
                    time.sleep(0.1 if name == "/slow" else 0)
            except OSError:  # they have had enough of it
                pass

        def log_message(self, *about) -> None:
            pass

    class Host(http.server.ThreadingHTTPServer):
        request_queue_size = 128  # what does not fit waits for a second

    with Host(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def serving(home, saved, host) -> Iterator[Server]:
    """`mlflow models serve`, without pickles, away from the checkout."""
    environment = {
        "ALIPROD_MAX_IMAGES": str(MAX_IMAGES),
        "ALIPROD_MAX_BYTES": str(MAX_BYTES),
        "ALIPROD_URL_HOSTS": f"127.0.0.1:{host.server_port}",
        "MALLOC_ARENA_MAX": "2",  # or its size depends on how its threads came to run
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": "",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        command = ["mlflow", "models", "serve", "-m", str(home / "served"), "--env-manager", "local"]
        running = Server(command, "/ping", home).start()
    yield running
    running.kill()


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def table(given: list) -> dict:
    return {"dataframe_split": {"columns": ["image"], "data": [[image] for image in given]}}


def post(server: Server, body: dict | bytes, kind: str = "application/json") -> tuple[int, dict]:
    """The status and the JSON of the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.uri + "/invocations", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)


def ask(server: Server, body: dict | bytes, kind: str = "application/json") -> pd.DataFrame:
    status, answer = post(server, body, kind)
    assert status == 200, answer
    return pd.DataFrame(answer["predictions"])


def same(answers: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(answers, expected, check_exact=False, atol=1e-5, rtol=1e-4)


def encode(image: np.ndarray | Image.Image, form: str) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, form)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["split", "records", "instances", "inputs", "columns", "lines", "parquet"])
def test_every_way_of_asking_is_answered_alike(serving, saved, photographs, form):
    given = [text(image) for image in photographs]
    records = [{"image": image} for image in given]
    if form == "parquet":
        stream = io.BytesIO()
        pd.DataFrame({"image": photographs}).to_parquet(stream)
        answers = ask(serving, stream.getvalue(), "application/vnd.apache.parquet")
    else:
        body = {
            "split": table(given),
            "records": {"dataframe_records": records},
            "instances": {"instances": records},
            "inputs": {"inputs": records},
            "columns": {"inputs": {"image": given}},
            "lines": table([base64.encodebytes(image).decode() for image in photographs]),
        }[form]
        answers = ask(serving, body)
    same(answers, recognise(saved, photographs))
    assert answers["error"].eq("").all() and answers["class_ids"].str[0].nunique() > 1


def test_mlflow_leaves_out_a_parameter_that_the_model_does_not_have(serving, photographs):
    asked = table([text(photographs[0])])
    same(ask(serving, asked | {"params": {"topk": 3}}), ask(serving, asked))


def test_what_is_asked_for_is_answered(serving, saved, photographs):
    params = {"top": 3, "sure": 0.9, "embedding": True}
    answers = ask(serving, table([text(image) for image in photographs]) | {"params": params})
    same(answers, recognise(saved, photographs, **params))
    assert answers["class_ids"].str.len().eq(3).all()
    pixels = np.stack([images.load(image, saved.model.preprocessing) for image in photographs])
    with torch.inference_mode():
        embeddings = saved.model.embed(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    np.testing.assert_allclose(np.array(answers["embedding"].tolist()), embeddings.numpy(), atol=1e-4)


def test_a_bad_image_is_answered_alone(serving, saved, photographs, host):
    good = photographs[1]
    elsewhere = f"http://127.0.0.1:{host.server_port + 1}/photograph.jpg"
    too_many = (
        f"9000 x 9000 pixels; at most {images.MAX_PIXELS} in all are read; ALIPROD_MAX_PIXELS sets it, up to {2**30}"
    )
    refused = {
        "the file is empty": "",
        "the JPEG is cut short": text(photographs[0][:-20]),
        "not an image but text": text(b"not an image"),
        too_many: text(encode(Image.new("1", (9000, 9000)), "PNG")),
        "the PNG is damaged or cut short: image file is truncated": text(
            encode(Image.new("RGB", (50, 50)), "PNG")[:60]
        ),
        "more than 1000000 bytes, the most that is taken": text(bytes(MAX_BYTES + 1)),
        "neither base64 nor a URL: Incorrect padding": "AAA",
        "neither base64 nor a URL: Only base64 data is allowed": "C:\\photograph.jpg",
        "no image: give base64 text, not NoneType": None,
        "no image: give base64 text, not int": 7,
        "no image: give base64 text, not list": [text(good)],
        f"URLs of 127.0.0.1:{host.server_port + 1} are not allowed here; send the image itself in base64": elsewhere,
        "the URL cannot be fetched: 404 Not Found": f"http://127.0.0.1:{host.server_port}/gone",
    }
    odd = {
        "16 bit": cv2.imencode(".png", np.full((40, 30, 3), 40_000, dtype=np.uint16))[1].tobytes(),
        "CMYK": encode(Image.new("CMYK", (40, 30), (0, 200, 200, 0)), "JPEG"),
        "URL": photographs[0],
    }
    read = [text(odd["16 bit"]), text(odd["CMYK"]), f"http://127.0.0.1:{host.server_port}/photograph.jpg?size=large"]
    answers = ask(serving, table([text(good), *refused.values(), *read, text(good)]))
    assert answers["error"].tolist() == ["", *refused, *[""] * 4]
    bad = answers[1 : len(refused) + 1]
    assert not bad[["class_ids", "names", "paths", "confidences"]].map(len).to_numpy().any()
    same(
        answers.drop(bad.index).reset_index(drop=True),
        recognise(saved, [good, odd["16 bit"], odd["CMYK"], odd["URL"], good]),
    )
    assert post(serving, table([text(b"not an image")]))[0] == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (table([""] * (MAX_IMAGES + 1)), f"{MAX_IMAGES + 1} images; a request may have {MAX_IMAGES}"),
        (table([""]) | {"params": {"top": 0}}, "top 0: must be at least 1"),
        (table([""]) | {"params": {"sure": 2.0}}, "sure 2.0: must be from 0 to 1"),
        (table([""]) | {"params": {"sure": float("nan")}}, "sure nan: must be from 0 to 1"),
        (table([""]) | {"params": {"top": None}}, "top null: must have a value, or be left out for its default"),
        (table([""]) | {"params": {"top": 2.5}}, "Invalid parameters found: {('top', "),
        (table([""]) | {"params": {"top": "many"}}, "Invalid parameters found: "),
        (table([""]) | {"params": [3]}, "Parameters must be a dictionary"),
        ({"dataframe_split": {"columns": ["picture"], "data": [[""]]}}, "Failed to enforce schema"),
        ({"images": [""]}, "The input must be a JSON dictionary with exactly one of the input fields"),
        (b"{", "Invalid input. Ensure that input is a valid JSON"),
        (b"\xff\xd8", "Invalid input. Ensure that input is a valid JSON"),
    ],
)
def test_a_mistaken_request_is_refused_with_the_reason(serving, body, says):
    status, answer = post(serving, body)
    assert status == 400
    message = answer["message"].rpartition("\nError: ")[2]  # before it, where MLflow itself refuses, part of the table
    assert message == says if says.endswith(tuple("0123456789")) else message.startswith(says)


def test_many_requests_at_once_are_all_answered_as_if_alone(serving, saved, photographs):
    kinds = [[photographs[number % len(photographs)]] * (1 + number % 3) for number in range(40)]
    bodies = [table([text(image) for image in kind]) for kind in kinds]
    expected = [recognise(saved, kind) for kind in kinds]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda number: ask(serving, bodies[number % 40]), range(200)))
    for number, answer in enumerate(answers):
        same(answer, expected[number % 40])


def memory(server: Server, bodies: list[dict], requests: int) -> list[float]:
    """The resident bytes of the server's processes after every 20th of so many requests, 8 at a time."""
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]

    def one(number: int) -> float:
        ask(server, bodies[number % len(bodies)])
        return sum(process.memory_info().rss for process in processes) if number % 20 == 0 else 0

    with ThreadPoolExecutor(8) as pool:
        return [size for size in pool.map(one, range(requests)) if size]


@pytest.mark.parametrize("requests", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_memory_stays_flat(serving, photographs, requests):
    bodies = [table([text(image) for image in photographs[:size]]) for size in (1, 4, 16)]
    bodies += [table([text(photographs[0]), text(b"not an image"), text(encode(Image.new("1", (9000, 9000)), "PNG"))])]
    sizes = memory(serving, bodies, requests)
    quarter = len(sizes) // 4
    second, last = np.mean(sizes[quarter : 2 * quarter]), np.mean(sizes[-quarter:])
    assert last < 1.03 * second, f"{second / 2**20:.0f} MiB, later {last / 2**20:.0f} MiB"


NAMED = "127.1"  # a name of this machine that is no address, and known where there is no list of hosts


def test_urls_are_fetched_from_allowed_hosts_alone(host, photographs, monkeypatch):
    here = f"127.0.0.1:{host.server_port}"
    limits = Limits(url_hosts=frozenset([here, f"{NAMED}:{host.server_port}"]), max_bytes=MAX_BYTES)
    asked = {
        f"http://{here}/photograph.jpg": "",
        f"HTTP://{here}": "",
        f"http://{NAMED}:{host.server_port}/photograph.jpg": "",
        f"http://{here}/moved": "the URL cannot be fetched: 302 Found; redirects are not followed",
        f"http://{here}/gone": "the URL cannot be fetched: 404 Not Found",
        f"http://{here}/cut": "the URL cannot be fetched: 9 bytes are missing at its end",
        f"http://{here}/endless": f"more than {MAX_BYTES} bytes, the most that is taken",
        f"http://{here}/together?one": "",  # neither is answered before both are asked for
        f"http://{here}/together?other": "",
        f"http://{here}/a b": "the URL cannot be fetched: URL can't contain control characters",
        f"https://{here}/photograph.jpg": "the URL cannot be fetched: [SSL",
        "http://127.0.0.1/photograph.jpg": "URLs of 127.0.0.1 are not allowed here",
        f"http://user@{here}/photograph.jpg": f"URLs of user@{here} are not allowed here",
        f"http://{here}.example.org/photograph.jpg": f"URLs of {here}.example.org are not allowed here",
        "http://[half": "not a URL: ",
        "file:///etc/hostname": "neither base64 nor a URL",
    }
    files, reasons = limits.take(list(asked))
    for row, says in enumerate(asked.values()):
        assert reasons.get(row, "").startswith(says) and bool(says) == (row in reasons), reasons.get(row)
        assert files[row] == (b"" if says else photographs[0])
    monkeypatch.setattr(intake, "PATIENCE", 2.0)
    _, reasons = limits.take([f"http://{here}/slow", f"http://{here}/silent"])
    assert list(reasons.values()) == ["the URL cannot be fetched: not done after 2 seconds"] * 2
    alone = Limits(url_hosts=frozenset([f"{NAMED}:{host.server_port}"]))
    _, reasons = alone.take([f"http://{NAMED}:{host.server_port}/photograph.jpg"])
    assert "at 127.0.0.1, an address that is not allowed here" in reasons[0] or "at ::1" in reasons[0]
    assert "not allowed here" in Limits().take([f"http://{here}/photograph.jpg"])[1][0]


DRIPS = {  # what a server says at once, and then over and over
    b"GET /head": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    b"GET /size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    b"GET /body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    b"\x16\x03\x01": (b"\x16\x03\x03\x3f\xff", b"\x02"),  # TLS: a long record
}


def test_what_drips_is_given_up_wherever_it_does(monkeypatch):
    class Drip(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked = self.request.recv(9000)
            first, more = next(drip for begins, drip in DRIPS.items() if asked.startswith(begins))
            with contextlib.suppress(OSError):
                self.request.sendall(first)
                for _ in range(100):  # for 5 seconds, unless they have had enough of it
                    self.request.sendall(more)
                    time.sleep(0.05)

    monkeypatch.setattr(intake, "PATIENCE", 0.5)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"127.0.0.1:{server.server_address[1]}"
        urls = [f"http://{here}/{name}" for name in ("head", "size", "body")] + [f"https://{here}"]
        files, reasons = Limits(url_hosts=frozenset([here])).take(urls)
        server.shutdown()
    assert set(reasons.values()) == {"the URL cannot be fetched: not done after 0.5 seconds"}
    assert files == [b""] * 4 and sorted(reasons) == [0, 1, 2, 3]


def test_https_is_fetched_from_whom_the_certificate_is_of(tmp_path, monkeypatch):
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAMED)])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAMED)]), critical=False)
    none = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, none)
    certificate = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (tmp_path / "both.pem").write_bytes(secret + certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")

    class Greet(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                continue
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    class Host(socketserver.TCPServer):
        def get_request(self):
            taken, address = super().get_request()
            return context.wrap_socket(taken, server_side=True), address

    with Host(("127.0.0.1", 0), Greet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hosts = [f"{name}:{server.server_address[1]}" for name in (NAMED, "127.0.0.1")]
        limits = Limits(url_hosts=frozenset([*hosts, "127.0.0.1"]))
        urls = [f"https://{host}/photograph" for host in hosts]
        strange = limits.take(urls[:1])
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "both.pem"))
        known = limits.take(urls)
        server.shutdown()
    assert "certificate verify failed: self-signed" in strange[1][0]
    assert known[0] == [b"hello", b""] and "IP address mismatch" in known[1][1]


def test_limits_come_from_the_environment():
    assert Limits.read({}) == Limits()
    set_ = Limits.read({"ALIPROD_MAX_PIXELS": "90", "ALIPROD_URL_HOSTS": "A.example.org  b.example.org:81"})
    assert set_ == Limits(max_pixels=90, url_hosts=frozenset(["a.example.org", "b.example.org:81"]))
    for value in ("many", "0", "-1", "1.5"):
        with pytest.raises(InputError, match=f"ALIPROD_MAX_IMAGES '{value}': must be a whole number above 0"):
            Limits.read({"ALIPROD_MAX_IMAGES": value})


def test_more_pixels_than_allowed_are_refused(saved, photographs):
    width, height = Image.open(io.BytesIO(photographs[0])).size
    most = width * height
    answers = recognise(saved, photographs[:1], max_pixels=most - 1)
    assert answers["error"][0].startswith(f"{width} x {height} pixels; at most {most - 1} in all are read")
    assert not recognise(saved, photographs[:1], max_pixels=most)["error"][0]


def test_our_loader_returns_the_torch_module(home, saved, photographs):
    loaded = models.load(str(home / "served"))
    assert isinstance(loaded.model, torch.nn.Module) and not loaded.model.training
    same(recognise(loaded, photographs), recognise(saved, photographs))
    served = mlflow.pyfunc.load_model(str(home / "served")).unwrap_python_model()
    assert model.weights_digest(served.saved.model) == model.weights_digest(saved.model)


def test_serving_imports_nothing_that_it_does_not_install():
    distributions = {"cv2": "opencv-python-headless", "PIL": "pillow"}
    waiting, seen, used = [ROOT / "tracking" / "served.py"], set(), set()
    while waiting:
        file = waiting.pop()
        seen.add(file)
        for node in ast.parse(file.read_text()).body:  # what is imported inside functions is for other work
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            used |= {name.split(".")[0] for name in names}
            ours = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("aliprod.")}
            waiting += [file for file in ours - seen if file.exists()]
    used -= {"aliprod", *sys.stdlib_module_names}
    assert {distributions.get(name, name) for name in used} <= set(models.SERVING)


def by_torch(saved: model.Saved, files: list[bytes]) -> np.ndarray:
    """Probabilities (N, C), written out."""
    found = []
    with torch.inference_mode():
        for file in files:
            pixels = images.load(file, saved.model.preprocessing)
            found.append(saved.model(torch.from_numpy(pixels).permute(2, 0, 1)[None]).softmax(dim=1)[0])
    return torch.stack(found).numpy()


def test_one_model_answers_alike_by_every_way(grocery, tmp_path, monkeypatch):
    saved = save(tmp_path, grocery)
    files = [Path(file).read_bytes() for file in manifest.paths(manifest.read(grocery, "val"), grocery)]
    request = table([text(file) for file in files])
    (tmp_path / "request.json").write_text(json.dumps(request))
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("ALIPROD_MAX_IMAGES", str(len(files)))
    monkeypatch.setenv("PYTHONPATH", "")
    served = ["-m", str(tmp_path / "served"), "--env-manager", "local"]
    server = Server(["mlflow", "models", "serve", *served], "/ping", tmp_path).start()
    try:
        ways = {"HTTP": ask(server, request)}
    finally:
        server.kill()
    paths = ["-i", str(tmp_path / "request.json"), "-o", str(tmp_path / "answer.json")]
    command = [sys.executable, "-m", "mlflow", "models", "predict", *served, "-t", "json", *paths]
    subprocess.run(command, check=True, cwd=tmp_path)
    ways["command line"] = pd.DataFrame(json.loads((tmp_path / "answer.json").read_text())["predictions"])
    ways["pyfunc"] = mlflow.pyfunc.load_model(str(tmp_path / "served")).predict(pd.DataFrame({"image": files}))
    probabilities = by_torch(saved, files)
    best = probabilities.argmax(axis=1)
    assert len(np.unique(best)) > 5
    for way, answers in ways.items():
        assert answers["error"].eq("").all()
        assert answers["class_ids"].str[0].tolist() == saved.classes["class_id"][best].tolist(), way
        confidences = np.array(answers["confidences"].tolist())
        np.testing.assert_allclose(confidences, np.sort(probabilities)[:, :-6:-1], atol=1e-4, err_msg=way)


@pytest.mark.slow
def test_the_served_model_runs_in_an_environment_of_its_own_pins(home, saved, photographs, tmp_path):
    venv.create(tmp_path / "fresh", with_pip=True)
    python = str(tmp_path / "fresh" / "bin" / "python")
    pins = mlflow.pyfunc.get_model_dependencies(str(home / "served"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", pins], check=True)
    (tmp_path / "request.json").write_text(json.dumps(table([text(image) for image in photographs])))
    served = str(shutil.copytree(home / "served", tmp_path / "served"))
    command = ["models", "predict", "-m", served, "--env-manager", "local", "-t", "json", "-i", "request.json"]
    environment = {"PATH": f"{Path(python).parent}:/usr/bin:/bin", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    away = {"cwd": tmp_path, "env": environment, "check": True}
    subprocess.run([python, "-m", "mlflow", *command, "-o", "answer.json"], **away)
    same(pd.DataFrame(json.loads((tmp_path / "answer.json").read_text())["predictions"]), recognise(saved, photographs))
    code = f"import mlflow; mlflow.pyfunc.load_model({served!r}); import aliprod; print(aliprod.__file__)"
    where = subprocess.run([python, "-c", code], capture_output=True, text=True, **away).stdout
    assert where.strip() == f"{served}/code/aliprod/__init__.py"
