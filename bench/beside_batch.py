"""What a batch flood costs interactive work, in simulated time: the real planner, its memory, the same arrivals.

The figures depend on no machine. `tests/chaos/test_fairness.py` shows one of them with real processes.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from bench.report import last_line, table, write_section
from orchestratord.planner import PlanPolicy
from tests.support.simulated_house import House, Result, Shape

LOADS = (0.3, 0.5, 0.7, 0.8, 0.9)
SHAPES = (Shape(workers=1, slots=4), Shape(), Shape(workers=4, slots=8))
SEEDS = 3


def p95_ms(results: list[Result]) -> float:
    return statistics.quantiles([wait for result in results for wait in result.waits_ms], n=20)[-1]


def row(shape: Shape, load: float, seconds: float) -> list[str]:
    service_ms = shape.interactive_tokens * shape.token_ms + shape.prefill_ms + 2 * shape.dispatch_ms
    slots = shape.workers * shape.slots
    shape = replace(shape, per_s=load * slots * 1000 / service_ms, seconds=seconds)
    alone = [House(replace(shape, seed=seed), PlanPolicy()).run() for seed in range(SEEDS)]
    beside = [House(replace(shape, seed=seed, batch_outstanding=60), PlanPolicy()).run() for seed in range(SEEDS)]
    left = (1 - load) * slots * seconds * 1000 / shape.token_ms * SEEDS
    return [
        f"{shape.workers} × {shape.slots}",
        f"{load:.0%}",
        f"{p95_ms(alone):.0f}",
        f"{p95_ms(beside):.0f}",
        f"{sum(result.batch_tokens for result in beside) / left:.0%}",
        f"{sum(result.yields for result in beside) / sum(len(result.waits_ms) for result in beside):.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    options = parser.parse_args()
    rows = [row(shape, load, options.seconds) for shape in SHAPES for load in LOADS]
    head = ["workers × slots", "interactive load", "p95 wait alone, ms", "beside a flood", "batch gets of the rest"]
    text = f"""## Interactive work beside a batch flood

`python -m bench.beside_batch --write`: the planner in simulated time, {SEEDS} × {options.seconds:.0f} s of Poisson
arrivals of {Shape.interactive_tokens} tokens at {Shape.token_ms:.0f} ms, with and without 60 batch tasks of
{Shape.batch_tokens} tokens waiting at any time; a yield takes up to
{Shape.yield_ms + Shape.token_ms + 2 * Shape.dispatch_ms:.0f} ms. It depends on no machine.

{table([*head, "yields for each interactive task"], rows)}"""
    print(text)
    if options.write:
        write_section("beside-batch", text)
    last_line({"benchmark": "beside_batch", "rows": rows})


if __name__ == "__main__":
    main()
