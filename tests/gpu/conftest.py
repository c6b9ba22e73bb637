"""Everything here needs a CUDA device; without one it is skipped, and counted as skipped."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The device, or a skip."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")  # marked `gpu` besides: `make test` doesn't even collect these
    return torch.device("cuda", torch.cuda.current_device())
