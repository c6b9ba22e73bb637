"""What a worker may register as its address."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from llorch_wire.worker import WorkerUrl

URL: TypeAdapter[str] = TypeAdapter(WorkerUrl)
WRONG = [
    "http://..:1",
    f"http://{'x' * 300}:1",
    "http://:99999",
    "http://h:99999",
    "http://h:0",
    "http://h:x",
    "http://@",
    "http://user:pw@h:1",
    "http://[::1",
    "http://h?y",
    "http://h#y",
    "http://h/path",
    "ftp://h:1",
    "http://a b:1",
]


@pytest.mark.parametrize("url", ["http://10.0.0.5:1", "https://gpu1.example", "http://[::1]:65535", "http://gpü:80"])
def test_where_a_connection_can_be_tried(url: str) -> None:
    assert URL.validate_python(url) == url


@pytest.mark.parametrize("url", WRONG)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValidationError):
        URL.validate_python(url)
