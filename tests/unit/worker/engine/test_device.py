"""Which device a name leads to, with what torch says about CUDA replaced: no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from worker.engine.assemble import choose_device
from worker.engine.loader import LoadError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch sees two GPUs; the list holds those that were made the current one."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1] if chosen else 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_numbered_gpu_becomes_the_current_one(two_gpus: list[int]) -> None:
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert two_gpus == [1]
    assert choose_device("cuda") == torch.device("cuda", 1)


def test_a_gpu_that_isnt_there_is_named_with_those_that_are(two_gpus: list[int]) -> None:
    with pytest.raises(LoadError, match="--device cuda:2: this process sees cuda:0 to cuda:1"):
        choose_device("cuda:2")
    assert two_gpus == []


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_without_cuda_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoadError, match=f"--device {name}: torch .* finds none here"):
        choose_device(name)
    assert choose_device("cpu").type == "cpu"
