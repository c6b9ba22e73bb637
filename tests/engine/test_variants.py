"""Features that the main configurations leave out: greedy equals `generate` in a batch and in chunks, a resume equals
what it continues. What else holds for every architecture is in test_models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.harness import VARIANTS, Harness, generate, prompts, reference, request

NEW = 16
PROMPTS = prompts(5, (5, 40, 77, 130, 17))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_greedy_equals_generate_and_a_resume_goes_on_the_same(name: str, tiny_model: Callable[[str], Path]):
    model = reference(tiny_model(name))
    expected = [generate(model, prompt, NEW) for prompt in PROMPTS]
    assert len({token for line in expected for token in line}) > 25, "a model that repeats itself proves little"
    harness = Harness(tiny_model(name), {"slots": 8, "max_batch_tokens": 64})
    assert harness.ready.determinism == "exact"
    got = harness.run(*(request(str(n), prompt, NEW) for n, prompt in enumerate(PROMPTS)))
    assert [got[str(n)] for n in range(len(PROMPTS))] == expected
    seeding = {"temperature": 1.0, "seed": 3, "top_p": 0.95}
    whole = harness.run(request("whole", PROMPTS[1], NEW, salt="a", **seeding))["whole"]
    cuts = (1, 7, NEW - 1)
    resumed = harness.run(*(request(str(n), PROMPTS[1], NEW, output=whole[:n], salt=str(n), **seeding) for n in cuts))
    assert [resumed[str(n)] for n in cuts] == [whole[n:] for n in cuts]
