"""What every test shares: a helper that turns a missing service into a skip on a laptop and a failure in CI."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import NoReturn

import pytest


def pytest_configure() -> None:
    """A shell starts what it puts into the background with Ctrl-C ignored, and every process of a test would inherit
    that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def missing_service() -> Callable[[str], NoReturn]:
    """Call it with the reason: skips where CI isn't set, fails where it is."""

    def refuse(reason: str) -> NoReturn:
        if os.environ.get("CI") == "true":
            pytest.fail(f"needed in CI: {reason}")
        pytest.skip(reason)  # a developer's machine may lack sshd, ip or Chromium

    return refuse
