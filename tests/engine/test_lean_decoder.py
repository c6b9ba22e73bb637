"""What makes steps quick on a CPU changes no number: lean decoders, and another number of threads at each step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.harness import Harness, prompts, request
from worker.engine.lean_decoder import RotaryTable, lean_decoder
from worker.engine.lean_layer import LeanLayer
from worker.engine.thread_choice import ThreadChoice

LEAN = ("llama2", "llama3", "mistral", "qwen2", "qwen3")


class Alternating(ThreadChoice):
    """Another number for every step."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        super().__init__(numbers)
        self.used: list[int] = []

    def pick(self, rows: int) -> int:
        self.used.append(self._numbers[len(self.used) % len(self._numbers)])
        return self.used[-1]


@pytest.mark.parametrize("name", LEAN)
def test_the_llama_family_is_lean(tiny_model: Callable[[str], Path], name: str):
    assert Harness(tiny_model(name)).loop._runner._lean is not None


def test_a_model_that_does_more_is_left_alone(tiny_model: Callable[[str], Path]):
    assert Harness(tiny_model("gemma3")).loop._runner._lean is None


def test_a_decoder_that_gives_other_numbers_is_left_alone(tiny_model: Callable[[str], Path]):
    model = _Model(Harness(tiny_model("llama3")).loop._runner._base)
    assert lean_decoder(model, 512) is not None
    layer = model.decoder.layers[1]
    assert isinstance(layer, LeanLayer)
    layer.forward = lambda hidden, **kwargs: 1.01 * LeanLayer.forward(layer, hidden, **kwargs)
    assert lean_decoder(model, 512) is None


class _Model:
    def __init__(self, decoder: torch.nn.Module) -> None:
        self.decoder = decoder
        self.config = decoder.config

    def get_decoder(self) -> torch.nn.Module:
        return self.decoder


@pytest.mark.parametrize("most", [50, 3000, 200_000])
def test_the_table_is_what_the_model_computes(tiny_model: Callable[[str], Path], most: int):
    decoder = Harness(tiny_model("llama3")).loop._runner._base
    size = decoder.layers[0].head_dim
    table = RotaryTable(decoder.rotary_emb, size, most)
    for largest in (3, 49, 1023, 1024, 2999, 40_000, 199_999):
        if largest < most:
            positions = torch.tensor([0, largest // 2, largest])
            cos, sin = decoder.rotary_emb(torch.empty(1, 3, size), positions.unsqueeze(0))
            got = table.of(positions, largest)
            assert torch.equal(got[0][:, 0], cos[0])
            assert torch.equal(got[1][:, 0].abs(), sin[0].abs())
    assert table._tables[0].shape[0] <= min(most, 32_768)


@pytest.mark.parametrize("name", ["llama3", "qwen3_moe", "gemma3"])
def test_the_number_of_threads_changes_no_token(tiny_model: Callable[[str], Path], name: str):
    work = [request(str(n), p, 24, temperature=0.9, seed=n) for n, p in enumerate(prompts(7, (5, 300, 40, 9, 513)))]
    harness = Harness(tiny_model(name), {"slots": 6, "max_batch_tokens": 200})
    expected = harness.run(*work)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # two, however many cores there are: the results are what matters
        other = Harness(tiny_model(name), {"slots": 6, "max_batch_tokens": 200})
        assert other.ready.determinism == "exact"
        choice = other.loop._runner.threads
        assert choice is not None
        other.loop._runner.threads = alternating = Alternating(choice._numbers)
        assert other.run(*work) == expected
        assert set(alternating.used) == set(choice._numbers)
    finally:
        torch.set_num_threads(before)
