"""The engine beside transformers' `generate` and its continuous batching, written into docs/benchmarks.md.

Runs `llorch-worker bench` on the demo model and on 33M random weights, or (`--from`) takes the last lines of earlier
runs, which may hold some of the workloads each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.report import last_line, table, where, write_section

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"demo model": ("--model", "llorch_demo/model"), "33M random weights": ()}
TARGETS = {
    ("batch 1", "generate"): 0.9,
    ("batch 32", "generate"): 0.9,
    ("batch 32", "transformers-cb"): 1.2,
    ("mixed 32", "generate"): 2.0,
    ("long prompt 16", "transformers-cb"): 2.0,
}


def measure(model: tuple[str, ...], rounds: int, threads: int) -> dict[str, Any]:
    """One run of `llorch-worker bench`; its report."""
    command = [sys.executable, "-m", "worker.bench", *model, "--rounds", str(rounds), "--threads", str(threads)]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=7200)
    return json.loads(finished.stdout.splitlines()[-1])


def merged(reports: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By model: the reports of its workloads put together, a later one instead of an earlier one."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        name = "33M random weights" if "33" in Path(report["model"]).name else "demo model"
        whole = found.setdefault(name, {**report, "workloads": []})
        names = {row["name"] for row in report["workloads"]}
        whole["workloads"] = [row for row in whole["workloads"] if row["name"] not in names] + report["workloads"]
        whole["newcomer"] = report["newcomer"]
    return found


def rows(report: dict[str, Any]) -> list[list[str]]:
    """A table's lines: tokens a second, and paired ratios with quartiles."""
    lines: list[list[str]] = []
    for row in report["workloads"]:
        speed = row["tokens_per_second"]
        line = [row["name"], f"{speed['llorch']:.0f}"]
        for other in ("generate", "transformers-cb"):
            if other not in speed:
                line += ["–", "–"]
                continue
            low, high = row["ratio_quartiles"][other]
            target = TARGETS.get((row["name"], other))
            wanted = "" if target is None else f", wanted {target:g}"
            line += [f"{speed[other]:.0f}", f"{row['ratio_to'][other]:.2f} ({low:.2f}–{high:.2f}{wanted})"]
        lines.append([*line, f"{row['first_token_ms']:.0f}", f"{row['between_tokens_ms']:.1f}"])
    return lines


def section(reports: dict[str, dict[str, Any]]) -> str:
    """The section of the page."""
    header = ["workload", "llorch", "generate", "ratio", "transformers CB", "ratio", "first token, ms", "between, ms"]
    parts = [
        "## The engine beside others",
        "`python -m bench.engine` (`llorch-worker bench` on each model): tokens/s of engines in one process on the "
        "same float32 weights, taking turns; ratio: the median of paired ratios of times (quartiles), above 1 llorch "
        "is faster. `generate` runs one padded batch. Each other engine has the number of threads that is best for it.",
    ]
    for name, report in reports.items():
        newcomer = report["newcomer"]
        allowed = 3 * newcomer["others_step_ms"] + newcomer["alone_ms"]
        parts.append(f"### {name}, {report['threads']} threads, {report['rounds']} rounds")
        parts.append(table(header, rows(report)))
        parts.append(
            f"A newcomer of {newcomer['prompt']} tokens beside {newcomer['beside']} that decode a long text: first "
            f"token after {newcomer['steps']} step(s), {newcomer['first_token_ms']:.1f} ms; three of their steps and "
            f"its own prefill are {allowed:.1f} ms."
        )
    torch = next(iter(reports.values()))["torch"]
    return "\n\n".join([*parts, f"{where()}, torch {torch}"])


def main() -> int:
    """Measure or read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--from", dest="files", type=Path, nargs="+", default=[], help="outputs of llorch-worker bench")
    args = parser.parse_args()
    if args.files:
        reports = [json.loads(path.read_text().splitlines()[-1]) for path in args.files]
    else:
        reports = [measure(model, args.rounds, args.threads) for model in MODELS.values()]
    together = merged(reports)
    write_section("engine", section(together))
    last_line(together)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
