"""What a request hands over: base64 of either alphabet and data: URIs become bytes, or a reason."""

import base64
from urllib.parse import quote

import pytest

from aliprod.intake import Limits

FILE = b"\xff\xd8\xff\xfb\xef\xbe a photograph?"
TEXT, SAFE = base64.b64encode(FILE).decode(), base64.urlsafe_b64encode(FILE).decode()


@pytest.mark.parametrize(
    "image",
    [
        f"data:image/jpeg;base64,{TEXT}",
        f"DATA:image/jpeg;charset=utf-8;BASE64,{TEXT}",
        f"data:;base64,{quote(TEXT, safe='')}",
        f"  data:image/png; base64,{TEXT[:9]}\n {TEXT[9:]}\n",
        f"data:application/octet-stream,{quote(FILE)}",
        f"data:image/webp;base64,{SAFE}",
        TEXT,
        SAFE,
    ],
)
def test_a_data_uri_and_either_alphabet_of_base64_stand_for_their_bytes(image):
    assert SAFE != TEXT
    assert Limits().take([image]) == ([FILE], {})


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("data:image/jpeg;base64", "a data: URI without a comma, after which its data begin"),
        ("data:image/jpeg;base64,AAA", "neither base64 nor a URL: Incorrect padding"),
        ("data:image/jpeg;base64,A?==", "neither base64 nor a URL: Only base64 data is allowed"),
        (f"data:image/jpeg;base64,{TEXT * 9}", "more than 100 bytes, the most that is taken"),
        (f"data:image/jpeg,{'%00' * 101}", "more than 100 bytes, the most that is taken"),
    ],
)
def test_a_data_uri_that_is_none_has_its_reason_and_its_neighbour_its_bytes(image, reason):
    assert Limits(max_bytes=100).take([TEXT, image]) == ([FILE, b""], {1: reason})
    assert Limits(max_bytes=100).take([f"data:,{'%00' * 100}"]) == ([bytes(100)], {})
