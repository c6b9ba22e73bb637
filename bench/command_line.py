"""What a fleet command costs, beside plain `ssh HOST true` over the same kind of connection, in turns.

Starts sshd on loopback with an operator of its own (nothing of the user's ~/.ssh is read), adds machines as pools, and
measures: a warm command, the help of a command, and a listing over many machines.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.report import last_line, table, where, write_section
from tests.support.sshd import Machine, Operator, free_port, missing_tools, operator

LLORCH = str(Path(sys.executable).parent / "llorch")


@contextlib.contextmanager
def fleet(count: int) -> Iterator[tuple[Operator, list[Machine]]]:
    """An operator who knows `count` machines on loopback, with connections that are up."""
    folder = Path(tempfile.mkdtemp(prefix="lb", dir="/tmp"))
    machines: list[Machine] = []
    try:
        with operator(folder / "op") as op:
            for number in range(count):
                machines.append(Machine(folder / f"m{number}", "127.0.0.1", free_port(), op.key).start())
                op.add(f"m{number}", machines[-1])
            yield op, machines
    finally:
        for machine in machines:
            machine.stop()
            machine.kill_everything()
        shutil.rmtree(folder, ignore_errors=True)


def run(op: Operator, arguments: Sequence[str]) -> None:
    """One command to its end."""
    subprocess.run(arguments, env=op.environ, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)


def wall_ms(work: Callable[[], None]) -> float:
    """Milliseconds that pass."""
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


def cpu_ms(work: Callable[[], None]) -> float:
    """Milliseconds of CPU, of the processes that `work` waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


def plain_ssh(op: Operator, machine: Machine) -> list[str]:
    """`ssh HOST COMMAND` with a shared connection of its own, set up as llorch's is."""
    path = op.folder / "tmp" / "plain"
    options = ["ControlMaster=auto", f"ControlPath={path}", "ControlPersist=60", "BatchMode=yes"]
    options += ["StrictHostKeyChecking=accept-new", f"UserKnownHostsFile={op.folder}/plain_hosts"]
    words = [word for option in options for word in ("-o", option)]
    return ["ssh", "-T", *words, "-p", str(machine.port), f"{machine.user}@{machine.host}"]


def measure(op: Operator, machines: Sequence[Machine], rounds: int) -> dict[str, Any]:
    """Medians over rounds; in each round every way is taken once."""
    ssh = plain_ssh(op, machines[0])
    ways = {
        "ssh": [*ssh, "true"],
        "ssh, llorch-pool rpc": [*ssh, "llorch-pool rpc </dev/null; true"],
        "llorch": [LLORCH, "worker", "list", "-p", "m0"],
        "help": [LLORCH, "status", "--help"],
        "fleet": [LLORCH, "worker", "list", "--all"],
    }
    for arguments in ways.values():
        run(op, arguments)  # connections and compiled files are there from now on
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: list[float] = []
    for _ in range(rounds):
        for name, arguments in ways.items():
            if name != "fleet" or len(walls[name]) < 5:
                walls[name].append(wall_ms(lambda arguments=arguments: run(op, arguments)))
        cpus.append(cpu_ms(lambda: run(op, ways["help"])))
    result = {name: round(statistics.median(found), 1) for name, found in walls.items()}
    return {**result, "help cpu": round(statistics.median(cpus), 1), "warm p90": percentile(walls["llorch"], 0.9)}


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all don't exceed."""
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)


def section(result: dict[str, Any], hosts: int, rounds: int) -> str:
    """The page's section."""
    rows = [
        ["`ssh HOST true`, connection up", f"{result['ssh']:.0f}", ""],
        ["the same with `llorch-pool rpc`: what the far side costs", f"{result['ssh, llorch-pool rpc']:.0f}", ""],
        [
            f"`llorch worker list -p POOL`, connection up (p90 {result['warm p90']:.0f})",
            f"{result['llorch']:.0f} ({result['llorch'] / result['ssh']:.1f} × ssh)",
            "150",
        ],
        [f"`llorch worker list --all`, {hosts} machines on loopback", f"{result['fleet']:.0f}", "3000"],
        ["`llorch status --help`, CPU", f"{result['help cpu']:.0f}", "200"],
    ]
    return (
        "## Command line\n\n"
        f"`python -m bench.command_line`: sshd on loopback, both ends on this machine, medians of {rounds} rounds in\n"
        "which every way is taken in turn. A warm command starts its far side while it still loads itself.\n\n"
        f"{table(['what', 'ms', 'at most'], rows)}\n\n{where()}"
    )


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hosts", type=int, default=32)
    parser.add_argument("--dry-run", action="store_true", help="don't write docs/benchmarks.md")
    asked = parser.parse_args()
    if reason := missing_tools():
        print(reason, file=sys.stderr)
        return 1
    with fleet(asked.hosts) as (op, machines):
        result = measure(op, machines, asked.rounds)
    if not asked.dry_run:
        write_section("command-line", section(result, asked.hosts, asked.rounds))
    last_line(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
