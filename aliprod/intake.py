"""What a request hands over as images, turned into the bytes of image files or the reasons why there are none.

An image is bytes, base64 text, a data: URI or, of hosts that are allowed, a URL. What is wrong with one does not touch
the others.
"""

import base64
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import ip_address
from typing import Any, Self
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urlsplit

from aliprod import InputError
from aliprod.images import MAX_PIXELS, limit

FETCHES = 16  # at a time, a request
URL_SAFE = str.maketrans("-_", "+/")  # base64's other alphabet -> its usual one
PATIENCE = 10.0  # seconds for one fetch


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that is taken in; each has the variable of the environment that sets it."""

    max_images: int = 128  # a request; ALIPROD_MAX_IMAGES
    max_bytes: int = 20_000_000  # an image's file; ALIPROD_MAX_BYTES
    max_pixels: int = MAX_PIXELS  # an image; ALIPROD_MAX_PIXELS
    url_hosts: frozenset[str] = frozenset()  # as they stand in a URL, with the port if it does; ALIPROD_URL_HOSTS

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self:
        """What the environment sets, the hosts separated by spaces. InputError on what is no whole number above 0."""
        numbers = {
            field: limit(f"ALIPROD_{field.upper()}", getattr(cls, field), environment)
            for field in ("max_images", "max_bytes", "max_pixels")
        }
        return cls(**numbers, url_hosts=frozenset(environment.get("ALIPROD_URL_HOSTS", "").lower().split()))

    def take(self, images: Sequence[Any]) -> tuple[list[bytes], dict[int, str]]:
        """The file of each image (N,), b"" for those that there is a reason for: row -> why it was not taken.

        URLs are fetched several at a time. Their number is the caller's to check, by `max_images`.
        """
        with ThreadPoolExecutor(FETCHES) as pool:  # starts no thread before one is needed
            taken = list((pool.map if any(map(_is_url, images)) else map)(self._one, images))
        return (
            [one if isinstance(one, bytes) else b"" for one in taken],
            {row: one for row, one in enumerate(taken) if isinstance(one, str)},
        )

    def _one(self, image: Any) -> bytes | str:
        try:
            if _is_url(image):
                return self._fetch(urlsplit(image))
            if isinstance(image, str):
                image = self._text(image)
            if not isinstance(image, bytes | bytearray):
                raise InputError(f"no image: give base64 text, not {type(image).__name__}")
            self._check(len(image))
            return bytes(image)
        except InputError as error:
            return str(error)
        except TimeoutError:
            return f"the URL cannot be fetched: not done after {PATIENCE:g} seconds"
        except (OSError, HTTPException) as error:
            return f"the URL cannot be fetched: {error}"
        except ValueError as error:
            return f"{'not a URL' if _is_url(image) else 'neither base64 nor a URL'}: {error}"

    def _text(self, image: str) -> bytes:
        """What base64 or a data: URI stands for."""
        about, comma, text = image.strip().partition(",") if _is_data(image) else (";base64", ",", image)
        if not comma:
            raise InputError("a data: URI without a comma, after which its data begin")
        coded = about.replace(" ", "").lower().endswith(";base64")
        size = len(text) - 2 * text.count("%")
        self._check(size * 3 // 4 - 2 if coded else size)  # before room is made for it
        if not coded:
            return unquote_to_bytes(text)
        return base64.b64decode("".join(unquote(text).split()).translate(URL_SAFE), validate=True)

    def _check(self, size: int) -> None:
        if size > self.max_bytes:
            raise InputError(f"more than {self.max_bytes} bytes, the most that is taken")

    def _fetch(self, url: SplitResult) -> bytes:
        """GET, following no redirects, from the hosts allowed. An address that the world cannot reach, which their
        names may come to mean, has to be allowed itself."""
        if url.netloc.lower() not in self.url_hosts:
            raise InputError(f"URLs of {url.netloc} are not allowed here; send the image itself in base64")
        deadline = time.monotonic() + PATIENCE
        context = ssl.create_default_context() if url.scheme.lower() == "https" else None
        connection: HTTPConnection = (
            HTTPSConnection(url.netloc, timeout=PATIENCE, context=context)
            if context
            else HTTPConnection(url.netloc, timeout=PATIENCE)
        )
        late = threading.Event()

        def cut() -> None:
            late.set()
            with contextlib.suppress(OSError):
                socket.socket.shutdown(opened, socket.SHUT_RDWR)  # whatever is waited for ends

        try:
            HTTPConnection.connect(connection)  # of TLS no more than the socket, or there were none to cut
            opened = connection.sock
            if context:
                opened = context.wrap_socket(opened, server_hostname=connection.host, do_handshake_on_connect=False)
                connection.sock = opened
            timer = threading.Timer(max(0, deadline - time.monotonic()), cut)
            timer.start()
            try:
                return self._get(connection, url)
            finally:
                timer.cancel()
                if late.is_set():  # whatever came of it
                    raise TimeoutError
        finally:
            connection.close()

    def _get(self, connection: HTTPConnection, url: SplitResult) -> bytes:
        peer = connection.sock.getpeername()[0]
        if not ip_address(peer).is_global and peer not in {urlsplit(f"//{host}").hostname for host in self.url_hosts}:
            raise InputError(f"{url.netloc} is at {peer}, an address that is not allowed here")
        connection.request("GET", url._replace(scheme="", netloc="", path=url.path or "/", fragment="").geturl())
        answer = connection.getresponse()
        if answer.status != 200:
            redirect = "; redirects are not followed" if answer.status // 100 == 3 else ""
            raise HTTPException(f"{answer.status} {answer.reason}{redirect}")
        data = bytearray()
        while part := answer.read1(65536):
            data += part
            self._check(len(data))
        if answer.length:
            raise HTTPException(f"{answer.length} bytes are missing at its end")
        return bytes(data)


def _is_data(image: str) -> bool:
    return image.lstrip()[:5].lower() == "data:"


def _is_url(image: Any) -> bool:
    return isinstance(image, str) and image[:8].lower().startswith(("http://", "https://"))
