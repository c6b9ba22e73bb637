"""Which pool has a worker, when its name alone was typed. Read `owners_of` first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llorch.errors import CliError, PartialFailure, UsageProblem
from llorch.fleet.targets import ask
from llorch.output import say
from llorch_wire import pool as wire

if TYPE_CHECKING:
    from llorch.fleet.fanout import Outcome
    from llorch.fleet.pools import Pool, Pools


def owners_of(registry: Pools, workers: Sequence[str], names: list[str], everywhere: bool) -> dict[str, list[str]]:
    """Which pool has which of the workers. Raises UsageProblem for one that nobody has, as `_nowhere` says."""
    pools = registry.chosen(names, everywhere and not names)
    if len(pools) == 1:
        return {pools[0].name: list(dict.fromkeys(workers))}
    outcomes = ask(pools, registry, wire.WorkerList(), timeout_s=30.0, quiet=True)
    owners = _listed(outcomes, workers)
    lost = [worker_id for worker_id in dict.fromkeys(workers) if not any(worker_id in ids for ids in owners.values())]
    if lost:
        raise _nowhere(lost, outcomes)
    return owners


def _listed(outcomes: Sequence[Outcome[Any]], workers: Sequence[str]) -> dict[str, list[str]]:
    owners: dict[str, list[str]] = {}
    for outcome in outcomes:
        found: list[Any] = outcome.value or []
        here = [info.worker_id for info in found if info.worker_id in workers]
        if here:
            owners[outcome.pool.name] = here
    return owners


def _nowhere(lost: Sequence[str], outcomes: Sequence[Outcome[Any]]) -> CliError:
    """What it comes to that no pool which answered has these workers.

    A mistake (exit 2) only if all were asked; a pool that was silent may have them (exit 3). When every pool was, why
    they were is what there is to say, and it is raised here.
    """
    silent = [outcome for outcome in outcomes if not outcome.ok]
    if not silent:
        return UsageProblem(f"no pool has {', '.join(lost)}", next_step="llorch worker list --all")
    if len(silent) == len(outcomes):
        from llorch.fleet.fanout import settle

        settle(silent)
    for outcome in silent:
        if outcome.error is not None:
            say(f"error: {outcome.error.message}")
            say(f"next:  {outcome.error.next_step}")
    names = [outcome.pool.name for outcome in silent]
    return PartialFailure(
        f"no pool that answered has {', '.join(lost)}; {', '.join(names)} could not be asked",
        next_step="llorch pool doctor -p " + " -p ".join(names),
    )


def pools_with_log(registry: Pools, worker: str, names: list[str]) -> list[Pool]:
    """The pools that list the worker; where none does (it ended), those that still have its log."""
    from llorch.fleet.fanout import Outcome

    pools = registry.chosen(names, not names)
    if len(pools) == 1:
        return pools
    listing = ask(pools, registry, wire.WorkerList(), timeout_s=30.0, quiet=True)
    owners = [registry.get(name) for name in _listed(listing, [worker])]
    answering = [outcome.pool for outcome in listing if outcome.ok]
    if owners:
        return owners
    if not answering:
        raise _nowhere([worker], listing)
    silent = [outcome for outcome in listing if not outcome.ok]
    tried = ask(answering, registry, wire.WorkerLogs(worker_id=worker, lines=0), timeout_s=30.0, quiet=True)
    owners = [outcome.pool for outcome in tried if outcome.ok]
    if owners:
        return owners
    # "usage" is how a pool says that it has no such worker and no log of one.
    failed = [outcome for outcome in tried if outcome.error is not None and outcome.error.kind != "usage"]
    without = [Outcome(outcome.pool, ()) for outcome in tried if outcome not in failed]
    raise _nowhere([worker], [*silent, *failed, *without])
