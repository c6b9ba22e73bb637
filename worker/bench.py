"""`llorch-worker bench`: this engine beside others, on one machine, in one process, on the same weights.

Read `main` first. Every round runs each contender once, one after the other, so that a machine that gets slower gets
slower for all; what is reported is the median of the rounds' ratios. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, cast

from worker.engine.machine import cores, default_threads, settle_threads
from worker.engine.thread_choice import thread_numbers

if TYPE_CHECKING:
    from worker.engine.contenders import Contender, Job, LlorchEngine, Run

OTHERS = ("generate", "transformers-cb", "vllm")


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs by shape: `batch` of them, prompts and answers with lengths drawn from the ranges."""

    name: str
    batch: int
    prompt: tuple[int, int]
    answer: tuple[int, int]

    def jobs(self, vocab_size: int, seed: int) -> list[Job]:
        """The same lengths every time; tokens depend on the seed."""
        from worker.engine.contenders import Job

        lengths = random.Random(1)
        tokens = random.Random(seed)
        jobs: list[Job] = []
        for _ in range(self.batch):
            prompt = [tokens.randrange(3, vocab_size) for _ in range(lengths.randint(*self.prompt))]
            jobs.append(Job(prompt, lengths.randint(*self.answer)))
        return jobs


WORKLOADS = (
    Workload("batch 1", 1, (64, 64), (32, 32)),
    Workload("batch 8", 8, (64, 64), (32, 32)),
    Workload("batch 32", 32, (64, 64), (32, 32)),
    Workload("mixed 32", 32, (8, 512), (8, 128)),
    Workload("long prompt 16", 16, (768, 768), (32, 32)),
)


_LONG_RUN_S = 2.0
NEWCOMER_BESIDE, NEWCOMER_PROMPT, NEWCOMER_CONTEXT = 16, 64, 500
"""The newcomer's prompt, and how many decode beside it, each behind a prompt of that length."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; exits with 2 and a message on a mistake."""
    parser = argparse.ArgumentParser(prog="llorch-worker bench", description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder; default: 33M random weights, made on the spot")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--against", default="generate,transformers-cb", help=f"any of {', '.join(OTHERS)}, or none")
    parser.add_argument("--workloads", default=",".join(w.name for w in WORKLOADS), help="by name, comma-separated")
    parser.add_argument("--plot", type=Path, help="write a PNG (needs matplotlib)")
    args = parser.parse_args(argv)
    known = {w.name for w in WORKLOADS}
    wanted = [name.strip() for name in args.workloads.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--workloads: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    args.against = [name.strip() for name in args.against.split(",") if name.strip() not in ("", "none")]
    if unknown := [name for name in args.against if name not in OTHERS]:
        parser.error(f"--against: unknown {', '.join(unknown)}; known are {', '.join(OTHERS)}")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    args.workloads = [w for w in WORKLOADS if w.name in wanted]
    return args


def main(argv: list[str]) -> int:
    """Measure, print a table and a JSON line. Returns the exit code."""
    args = parse(argv)
    threads = args.threads or default_threads(cores())
    settle_threads(threads, os.environ)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or _random_model(Path(scratch))
        contenders, absent = _contenders(folder, args)
        try:
            rows = [_measure(contenders, workload, args.rounds, threads) for workload in args.workloads]
            newcomer = _newcomer(cast("LlorchEngine", contenders[0]), args.rounds)
        finally:
            for contender in contenders:
                contender.close()
    report: dict[str, Any] = {
        "model": str(args.model) if args.model else "33M random weights",
        "threads": threads,
        "rounds": args.rounds,
        "machine": f"{platform.machine()}, {cores()} cores",
        "torch": torch.__version__,
        "absent": absent,
        "workloads": rows,
        "newcomer": newcomer,
    }
    _print_table(report)
    if args.plot is not None:
        _plot(report, args.plot)
    _say(json.dumps(report))
    return 0


def _random_model(scratch: Path) -> Path:
    from worker.engine.contenders import write_random_model

    write_random_model(scratch / "model")
    return scratch / "model"


def _contenders(folder: Path, args: argparse.Namespace) -> tuple[list[Contender], dict[str, str]]:
    """Those that run here, ours first, and why the others don't."""
    from worker.engine import contenders as c
    from worker.engine.assemble import EngineOptions
    from worker.engine.newcomer import TOKENS_A_NEWCOMER

    slots = max(NEWCOMER_BESIDE + 1, *(w.batch for w in args.workloads))
    newcomers = NEWCOMER_CONTEXT + (args.rounds + 2) * TOKENS_A_NEWCOMER
    context = max(newcomers, *(w.prompt[1] + w.answer[1] for w in args.workloads))
    options = EngineOptions(model_dir=folder, device="cpu", slots=slots, max_model_len=context + 1)
    ready: list[Contender] = [c.LlorchEngine(options)]
    absent: dict[str, str] = {}
    for name in args.against:
        try:
            match name:
                case "generate":
                    ready.append(c.PaddedGenerate(c.reference_model(folder)))
                case "transformers-cb":
                    model = c.reference_model(folder)
                    ready.append(c.TransformersContinuousBatching(model, context_tokens=context, slots=slots))
                case _:
                    ready.append(c.Vllm(folder, context_tokens=context, slots=slots))
        except Exception as error:  # another engine may fail in any way; the comparison goes on without it
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return ready, absent


def _measure(contenders: list[Contender], workload: Workload, rounds: int, threads: int) -> dict[str, Any]:
    ours = cast("LlorchEngine", contenders[0])
    vocab_size = ours.ready.vocab_size
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    threads_of = {c.name: _warm_up(c, workload.jobs(vocab_size, seed=0), threads) for c in contenders}
    for round_number in range(1, rounds + 1):
        jobs = workload.jobs(vocab_size, seed=round_number)
        for contender in contenders:
            runs[contender.name].append(_timed(contender, jobs, threads_of[contender.name]))
    mine = runs[ours.name]
    return {
        "name": workload.name,
        "tokens_per_second": {name: round(median(r.tokens / r.seconds for r in rs), 1) for name, rs in runs.items()},
        "ratio_to": _ratios(runs, mine, lambda run: run.seconds),
        "ratio_quartiles": _quartiles(runs, mine),
        "threads_of_others": {name: number for name, number in threads_of.items() if name != ours.name},
        "cpu_ratio_to": _ratios(runs, mine, lambda run: run.cpu_seconds),
        "first_token_ms": _median_ms([t for r in mine for t in r.first_token_s]),
        "between_tokens_ms": _median_ms([t for r in mine for t in r.between_tokens_s]),
    }


def _warm_up(contender: Contender, jobs: list[Job], threads: int) -> int:
    """Run it with each number of threads; the one to measure it with. Ours chooses for each step by itself."""
    if contender.name == "llorch":
        for _ in range(2):
            contender.run(jobs)
        return threads
    seconds: dict[int, float] = {}
    for number in thread_numbers(threads):
        seconds[number] = _timed(contender, jobs, number).seconds
        if seconds[number] < _LONG_RUN_S:  # a short first run is mostly its own warm-up
            seconds[number] = _timed(contender, jobs, number).seconds
    return min(seconds, key=lambda number: seconds[number])


def _timed(contender: Contender, jobs: list[Job], threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    cpu = time.process_time()
    run = contender.run(jobs)
    run.cpu_seconds = time.process_time() - cpu
    return run


def _newcomer(ours: LlorchEngine, rounds: int) -> dict[str, Any]:
    """Medians over the rounds of how long a newcomer waits for its first token while others decode a long text."""
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(3, ours.ready.vocab_size) for _ in range(length)]

    beside = [prompt(NEWCOMER_CONTEXT) for _ in range(NEWCOMER_BESIDE)]
    runs = ours.newcomers(beside, [prompt(NEWCOMER_PROMPT) for _ in range(rounds + 1)])[1:]  # the first one warms up
    return {
        "beside": NEWCOMER_BESIDE,
        "prompt": NEWCOMER_PROMPT,
        "steps": max(run.steps for run in runs),
        "first_token_ms": _median_ms([run.first_token_s for run in runs]),
        "others_step_ms": _median_ms([run.others_step_s for run in runs]),
        "alone_ms": _median_ms([run.alone_s for run in runs]),
        "share_of_allowed": round(median(run.first_token_s / run.allowed_s for run in runs), 3),
    }


def _quartiles(runs: dict[str, list[Run]], mine: list[Run]) -> dict[str, list[float]]:
    """First and third quartile of the paired ratios of times."""
    found: dict[str, list[float]] = {}
    for name, rs in runs.items():
        if rs is not mine:
            ratios = [theirs.seconds / own.seconds for own, theirs in zip(mine, rs, strict=True)]
            low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
            found[name] = [round(low, 3), round(high, 3)]
    return found


def _ratios(runs: dict[str, list[Run]], mine: list[Run], cost: Callable[[Run], float]) -> dict[str, float]:
    """Median over the rounds of (their cost / our cost); above 1 we are cheaper."""
    return {
        name: round(median(cost(theirs) / cost(own) for own, theirs in zip(mine, rs, strict=True)), 3)
        for name, rs in runs.items()
        if rs is not mine
    }


def _median_ms(seconds: list[float]) -> float:
    return round(1000 * median(seconds), 2) if seconds else 0.0


def _print_table(report: dict[str, Any]) -> None:
    names = list(report["workloads"][0]["tokens_per_second"])
    _say(f"{report['model']}, {report['threads']} threads, {report['machine']}, torch {report['torch']}")
    _say(f"tokens/s, medians of {report['rounds']} rounds; x: paired ratio of times, above 1 we are faster")
    head = "".join(f"{name:>{30 if index else 10}}" for index, name in enumerate(names))
    _say(f"{'workload':<16}{head}{'first token':>14}{'between':>10}")
    for row in report["workloads"]:
        cells = ""
        for name in names:
            ratio = row["ratio_to"].get(name)
            cells += f"{row['tokens_per_second'][name]:>10}"
            cells += "" if ratio is None else _ratio_cell(ratio, row["cpu_ratio_to"][name])
        _say(f"{row['name']:<16}{cells}{row['first_token_ms']:>11} ms{row['between_tokens_ms']:>7} ms")
    newcomer = report["newcomer"]
    _say(
        f"a newcomer of {newcomer['prompt']} tokens beside {newcomer['beside']}: first token after {newcomer['steps']} "
        f"step(s), {newcomer['first_token_ms']} ms; three steps and its prefill are "
        f"{3 * newcomer['others_step_ms'] + newcomer['alone_ms']:.2f} ms"
    )
    for name, reason in report["absent"].items():
        _say(f"not measured: {name} ({reason})")


def _ratio_cell(wall: float, cpu: float) -> str:
    return f"({wall:.2f}x, cpu {cpu:.2f}x)".rjust(20)


def _plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["workloads"]
    names = list(rows[0]["tokens_per_second"])
    figure, axes = plt.subplots(figsize=(9, 4))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place + index * width for place in range(len(rows))]
        axes.bar(places, [row["tokens_per_second"][name] for row in rows], width, label=name)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(rows))], [row["name"] for row in rows])
    axes.set_ylabel("tokens per second")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
