"""The engine's section of the page, put together from runs that hold some of the workloads each."""

from __future__ import annotations

from typing import Any

from bench.engine import merged, rows, section


def report(model: str, *names: str, others: tuple[str, ...] = ("generate", "transformers-cb")) -> dict[str, Any]:
    return {
        "model": model,
        "threads": 2,
        "rounds": 9,
        "torch": "2.13",
        "newcomer": {
            "beside": 16,
            "prompt": 64,
            "steps": 1,
            "first_token_ms": 9.0,
            "others_step_ms": 2.0,
            "alone_ms": 5.0,
        },
        "workloads": [
            {
                "name": name,
                "tokens_per_second": {"llorch": 300.0, **dict.fromkeys(others, 100.0)},
                "ratio_to": dict.fromkeys(others, 3.0),
                "ratio_quartiles": {other: [2.5, 3.25] for other in others},
                "first_token_ms": 40.0,
                "between_tokens_ms": 2.5,
            }
            for name in names
        ],
    }


def test_parts_of_one_model_come_together_and_the_later_one_counts():
    later = report("x/m33", "batch 32", others=("generate",))
    together = merged([report("llorch_demo/model", "batch 1"), report("x/m33", "batch 1", "batch 32"), later])
    assert list(together) == ["demo model", "33M random weights"]
    assert [row["name"] for row in together["33M random weights"]["workloads"]] == ["batch 1", "batch 32"]
    assert together["33M random weights"]["workloads"][1]["ratio_to"] == {"generate": 3.0}


def test_a_line_names_ratio_quartiles_and_what_was_wanted():
    line = rows(report("demo", "batch 32", others=("generate",)))[0]
    assert line == ["batch 32", "300", "100", "3.00 (2.50–3.25, wanted 0.9)", "–", "–", "40", "2.5"]


def test_the_section_tells_how_long_a_newcomer_waits():
    text = section(merged([report("llorch_demo/model", "mixed 32")]))
    assert "### demo model, 2 threads, 9 rounds" in text
    assert "first token after 1 step(s), 9.0 ms; three of their steps and its own prefill are 11.0 ms" in text
