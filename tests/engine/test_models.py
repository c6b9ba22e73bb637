"""Each architecture: greedy equals transformers' `generate`, sampling equals itself, however the work was cut up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.harness import CONFIGS, Harness, generate, prompts, reference, request
from worker.engine.protocol import AddSequence

NEW = 24
PROMPTS = prompts(8)
ARCHITECTURES = sorted(CONFIGS)
# Ways to cut up the same work. The starved one holds about 200 tokens, so that sequences lose their places.
WAYS = {
    "alone": {"slots": 1},
    "batch": {"slots": 32},
    "chunked": {"slots": 8, "max_batch_tokens": 13},
    "starved": {"slots": 8, "kv_memory_bytes": 14 * 16},
}


def build(folder: Path, way: str) -> Harness:
    options = dict(WAYS[way])
    if way == "starved":
        options["kv_memory_bytes"] *= Harness(folder).loop._cache.shape.bytes_per_token
    return Harness(folder, options)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> tuple[str, Path]:
    return request.param, tiny_model(request.param)


@pytest.fixture(scope="module")
def expected(architecture: tuple[str, Path]) -> list[list[int]]:
    model = reference(architecture[1])
    lines = [generate(model, prompt, NEW) for prompt in PROMPTS]
    assert len({token for line in lines for token in line}) > 40, "a model that repeats itself proves little"
    return lines


@pytest.fixture(scope="module")
def sampled(architecture: tuple[str, Path]) -> list[list[int]]:
    harness = Harness(architecture[1], {"slots": 1})
    assert harness.ready.determinism == "exact"
    lines = [harness.run(_seeded(n))[str(n)] for n in range(len(PROMPTS))]
    assert len({tuple(line) for line in lines}) == len(lines)
    return lines


def _seeding(n: int) -> dict[str, float]:
    return {"temperature": 1.0, "seed": n - 3, "top_p": 0.95, "repetition_penalty": 1.1, "frequency_penalty": 0.2}


def _seeded(n: int) -> AddSequence:
    return request(str(n), PROMPTS[n], NEW, **_seeding(n))


@pytest.mark.parametrize("way", sorted(WAYS))
def test_greedy_equals_generate_and_sampling_equals_itself(architecture, expected, sampled, way):
    harness = build(architecture[1], way)
    others = [request(f"other-{n}", p, NEW) for n, p in enumerate(prompts(24, seed=5))] if way == "batch" else []
    greedy = harness.run(*(request(str(n), p, NEW) for n, p in enumerate(PROMPTS)), *others)
    assert [greedy[str(n)] for n in range(len(PROMPTS))] == expected
    drawn = harness.run(*(_seeded(n) for n in range(len(PROMPTS))), *others)
    assert [drawn[str(n)] for n in range(len(PROMPTS))] == sampled
    assert (harness.loop.stats().preemptions > 0) == (way == "starved")


def test_cache_hits_change_nothing(architecture, expected, sampled):
    harness = Harness(architecture[1], {"slots": 4})
    for _ in range(2):
        greedy = harness.run(*(request(str(n), p, NEW) for n, p in enumerate(PROMPTS)))
        assert [greedy[str(n)] for n in range(len(PROMPTS))] == expected
    assert harness.ends["5"].cached_tokens == 128
    drawn = harness.run(*(_seeded(n) for n in range(len(PROMPTS))))
    assert [drawn[str(n)] for n in range(len(PROMPTS))] == sampled


def test_a_shared_beginning_is_computed_once_for_sequences_that_run_together(architecture):
    harness = Harness(architecture[1], {"slots": 4})
    prompt = prompts(1, (100,))[0]
    alone = harness.run(request("a", prompt, NEW, salt="other"))["a"]
    together = harness.run(*(request(str(n), prompt, NEW) for n in range(4)))
    assert all(line == alone for line in together.values())
    together = harness.run(*(request(str(n), [*prompt, n], NEW, seed=n, temperature=1.0) for n in range(4)))
    for n in range(4):
        single = harness.run(request("b", [*prompt, n], NEW, seed=n, temperature=1.0, salt=f"new-{n}"))
        assert together[str(n)] == single["b"]


def test_a_resume_at_every_token_goes_on_the_same(architecture, sampled):
    harness = Harness(architecture[1], {"slots": 16})
    for n in (1, 3):
        resumes = [
            request(str(kept), PROMPTS[n], NEW, output=sampled[n][:kept], salt=str(kept), **_seeding(n))
            for kept in range(1, NEW)
        ]
        got = harness.run(*resumes)
        for kept in range(1, NEW):
            assert got[str(kept)] == sampled[n][kept:], f"resumed after {kept}"
            assert harness.tokens[str(kept)][0].index == kept


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma3"])
def test_contexts_of_several_tiles(tiny_model, name):
    """Keys are read in tiles of 512: prompts before, at and behind the seams, alone, chunked and resumed."""
    model = reference(tiny_model(name))
    long = prompts(4, (500, 512, 770, 1040), seed=9)
    expected = [generate(model, prompt, NEW) for prompt in long]
    harness = Harness(tiny_model(name), {"slots": 4, "max_batch_tokens": 100})
    got = harness.run(*(request(str(n), p, NEW) for n, p in enumerate(long)))
    assert [got[str(n)] for n in range(4)] == expected
    alone = Harness(tiny_model(name), {"slots": 1, "max_batch_tokens": 2048})
    for n, prompt in enumerate(long):
        seeded = alone.run(request("s", prompt, NEW, temperature=1.0, seed=n))["s"]
        assert harness.run(request("s", prompt, NEW, temperature=1.0, seed=n, salt="new"))["s"] == seeded
        resumed = harness.run(request("s", prompt, NEW, output=seeded[:11], temperature=1.0, seed=n, salt="newer"))
        assert resumed["s"] == seeded[11:]
