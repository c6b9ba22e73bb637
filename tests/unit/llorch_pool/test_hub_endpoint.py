"""HF_ENDPOINT: checked before anything is asked, and a password in it reaches the mirror alone."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llorch_pool import model_source, models
from llorch_pool.context import Context
from llorch_pool.errors import PoolError
from llorch_pool.hub_endpoint import endpoint, without_password
from llorch_wire.pool import ModelDownload
from tests.support.hub import Hub
from tests.unit.llorch_pool.conftest import Events

PASSWORD = "hunter2-secret"


@pytest.mark.parametrize(
    "value",
    ["not a url", "file:///etc", "ftp://host", "http://", "//host", f"{PASSWORD}@host", f"ftp://me:{PASSWORD}@host",
     f"http://me:{PASSWORD}/x@host", f"http://me:{PASSWORD}@host:port", f"http://me:{PASSWORD}@host/?a=b"],
)  # fmt: skip
def test_what_is_no_address_is_refused_at_once(context: Context, events: Events, value: str) -> None:
    with pytest.raises(PoolError, match="HF_ENDPOINT") as caught:
        models.download(context, ModelDownload(ref="hf:acme/tiny", endpoint=value))
    assert caught.value.code == "usage" and caught.value.next_step and not events.logs()
    assert PASSWORD not in f"{caught.value.message} {caught.value.next_step}"


@pytest.fixture
def refusing() -> Iterator[Callable[[int], str]]:
    """A server that answers everything with one status; gives its address with a password in it."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return f"http://me:{PASSWORD}@127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [401, 403, 404, 418])
def test_a_refusal_does_not_show_the_password(
    context: Context, events: Events, refusing: Callable[[int], str], status: int
) -> None:
    with pytest.raises(PoolError) as caught:
        models.download(context, ModelDownload(ref="hf:acme/tiny", endpoint=refusing(status)))
    assert PASSWORD not in f"{caught.value.message} {caught.value.next_step} {caught.value.detail} {events.logs()}"


def test_a_hub_that_is_away_does_not_show_the_password(
    new_context: Callable[..., Context], events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = new_context()
    monkeypatch.setattr(model_source, "_PAUSES_S", (0.0, None))
    with pytest.raises(PoolError, match="can't be reached") as caught:
        models.download(context, ModelDownload(ref="hf:acme/tiny", endpoint=f"http://me:{PASSWORD}@127.0.0.1:1"))
    assert "http://127.0.0.1:1/acme/tiny" in caught.value.message
    assert PASSWORD not in f"{caught.value.message} {caught.value.next_step} {events.logs()}"


def test_a_mirror_with_a_password_gets_it_and_the_model_comes(context: Context, hub: Hub, repo: Path) -> None:
    """huggingface_hub makes basic authentication of it; the bytes' own requests must do the same."""
    at = endpoint(hub.url.replace("//", f"//me:{PASSWORD}@"))
    assert at.basic == "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode() and PASSWORD not in repr(at)
    info = models.download(context, ModelDownload(ref="hf:acme/tiny", endpoint=at.whole))
    assert models.verify(context, "tiny").ok and PASSWORD not in str(info)
    assert all(request.authorized for request in hub.requests if "/resolve/" in request.path)


def test_the_user_and_password_of_every_url_in_a_text_are_left_out() -> None:
    assert (
        without_password("at http://a:b@h/x and https://c@i, mail me@here")
        == "at http://h/x and https://i, mail me@here"
    )
