"""How servers are reached: how long a dead one is waited for, what goes past a proxy, addresses without passwords."""

import os
import re
import urllib.parse
import urllib.request

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SETTINGS = {
    # MLflow's own limits would hold up every command, and training at every report, for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # It prints the server's address, its password included, whenever a run ends.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
USERINFO = re.compile(r"(\w://[^\s/:@]*):[^\s/]*@")
QUERY = re.compile(r"(?i)([?&]\w*(?:password|passwd|pwd|token|secret)\w*=)[^\s&]*")


def prepare() -> None:
    """Sets, where the user has not, the limits to waiting for a dead server; what is on this machine goes past any
    proxy. For this process and those it starts, and before anything is asked."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    spelled = ("no_proxy", "NO_PROXY")  # some read the one, some the other
    hosts = [host.strip() for name in spelled for host in os.environ.get(name, "").split(",") if host.strip()]
    if "*" not in hosts:
        os.environ.update(dict.fromkeys(spelled, ",".join(dict.fromkeys([*hosts, *LOOPBACK]))))


def shown(text: str) -> str:
    """A text in which no address has its password."""
    return QUERY.sub(r"\1***", USERINFO.sub(r"\1:***@", text))


def proxy(address: str) -> str:
    """The proxy, without its password, that this environment has an address asked through; "" if none."""
    parts = urllib.parse.urlsplit(address)
    proxies = urllib.request.getproxies()
    found = proxies.get(parts.scheme) or (proxies.get("all") if parts.scheme in ("http", "https") else None)
    return shown(found) if found and not urllib.request.proxy_bypass(parts.hostname or "") else ""
