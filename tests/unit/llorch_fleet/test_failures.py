"""ssh's words, as OpenSSH really says them, to one message, an exit code and a next command."""

from __future__ import annotations

import pytest

from llorch.errors import ExitCode
from llorch.fleet import failures
from llorch.fleet.pools import Pool
from llorch_wire.pool import Failure

POOL = Pool(name="gpu1", host="10.0.0.5", user="me", port=2222)
CHANGED = """@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Host key verification failed.
"""


@pytest.mark.parametrize(
    ("stderr", "kind", "code"),
    [
        (CHANGED, "host-key-changed", ExitCode.ACCESS),
        ("No ED25519 host key is known for x and you have requested strict checking.", "host-key-unknown", 4),
        ("me@10.0.0.5: Permission denied (publickey).", "auth", ExitCode.ACCESS),
        ("Received disconnect from 10.0.0.5: 2: Too many authentication failures", "auth", 4),
        ("ssh: connect to host 10.0.0.5 port 2222: Connection refused", "refused", ExitCode.UNREACHABLE),
        ("ssh: Could not resolve hostname gpu9: Name or service not known", "unknown-host", 5),
        ("ssh: connect to host 10.0.0.5 port 22: Connection timed out", "timeout", 5),
        ("Connection timed out during banner exchange", "timeout", 5),
        ("Timeout, server 10.0.0.5 not responding.", "timeout", 5),
        ("ssh: connect to host 10.0.0.5 port 22: No route to host", "no-route", 5),
        ("kex_exchange_identification: Connection closed by remote host", "dropped", 5),
        ("Connection reset by 10.0.0.5 port 22", "dropped", 5),
        ("client_loop: send disconnect: Broken pipe", "dropped", 5),
        ("", "broken", 5),
    ],
)
def test_transport_failures(stderr: str, kind: str, code: int) -> None:
    error = failures.transport(POOL, 255, "Welcome to gpu1\n" + stderr)
    assert failures.kind_of(error) == kind and error.exit_code == code
    assert error.message.startswith("gpu1") and "@@" not in error.message and error.next_step


@pytest.mark.parametrize(
    ("status", "stderr"),
    [
        (127, "sh: 1: exec: llorch-pool: not found"),
        (127, ""),
        (126, "bash: /x/llorch-pool: cannot execute: required file not found"),
        (1, "Warning: no access to tty\nllorch-pool: Command not found."),
        (127, "fish: Unknown command: llorch-pool"),
    ],
)
def test_a_missing_program(status: int, stderr: str) -> None:
    error = failures.transport(POOL, status, stderr)
    assert failures.kind_of(error) == "missing" and error.next_step == "llorch pool bootstrap gpu1"


def test_what_the_pool_says_keeps_its_exit_code() -> None:
    for rc, code in ((1, 1), (2, 2), (4, 4), (5, 5), (124, 124)):
        error = failures.remote(POOL, rc, Failure(code="x", message="no", next_step="do", detail="a\nb"))
        assert error.exit_code == code and error.message == "gpu1: no\n  a\n  b" and error.next_step == "do"


def test_a_pools_next_step_is_one_that_can_be_typed_here() -> None:
    step = "Stop them (`llorch-pool worker stop w1`), or `llorch pool bootstrap NAME`."
    error = failures.remote(POOL, 1, Failure(code="x", message="no", next_step=step))
    assert error.next_step == "Stop them (`llorch worker stop w1 -p gpu1`), or `llorch pool bootstrap gpu1`."


@pytest.mark.parametrize("status", [1, 255])
def test_a_key_file_that_is_missing_here_is_no_missing_program(status: int) -> None:
    """ssh says this of its own, and goes on."""
    warning = "Warning: Identity file /k not accessible: No such file or directory.\n"
    assert failures.kind_of(failures.transport(POOL, status, warning)) == "broken"
    refused = failures.transport(POOL, 255, warning + "ssh: connect to host 10.0.0.5 port 2222: Connection refused")
    assert failures.kind_of(refused) == "refused"
    denied = failures.transport(POOL, 255, warning + "me@10.0.0.5: Permission denied (publickey).")
    assert failures.kind_of(denied) == "auth" and "/k not accessible" in denied.message


def test_the_ssh_command_to_try_has_the_port_and_the_key() -> None:
    pool = POOL._replace(identity_file="/my key")
    for stderr in ("Permission denied", "Connection refused", "timed out", "No route to host", ""):
        assert "ssh -p 2222 -i '/my key' me@10.0.0.5" in failures.transport(pool, 255, stderr).next_step
    assert "ssh -p 2222 -i '/my key' me@10.0.0.5" in failures.silent(pool, 1).next_step
    changed = failures.transport(POOL._replace(host="fd00::1"), 255, CHANGED).next_step
    assert changed.endswith("llorch pool add --replace gpu1 'me@[fd00::1]:2222'")


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("llorch-pool worker cleanup", "llorch worker cleanup -p gpu1"),
        ("`llorch-pool worker list`, then look", "`llorch worker list -p gpu1`, then look"),
        (
            "llorch-pool model remove --force m0, then download it again",
            "llorch model remove --force m0 -p gpu1, then download it again",
        ),
        ("llorch-pool model verify NAME then", "llorch model verify NAME -p gpu1 then"),
        ("llorch-pool worker restore", "llorch-pool worker restore"),
        ("llorch pool bootstrap NAME, or pip", "llorch pool bootstrap gpu1, or pip"),
    ],
)
def test_commands_are_told_as_they_are_typed_here(there: str, here: str) -> None:
    assert failures.from_afar(there, POOL) == here
