from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestratord.planner import Plan, PlanMemory, PlanPolicy, free_for, plan
from orchestratord.routing import suitable
from orchestratord.store.types import PlacementSpec, Snapshot
from tests.unit.orchestratord.makers import NOW, queued, running, snapshot, worker

POLICY = PlanPolicy()


def full(worker_id: str = "w1", slots: int = 2) -> Any:
    return worker(worker_id, slots_total=slots, slots_used=slots)


def test_slots_are_filled_in_order_and_no_further() -> None:
    waiting = [queued(f"t{n}", n) for n in range(6)]
    decided = plan(snapshot(waiting, [worker("w1", slots_total=2), worker("w2", slots_total=2)]), POLICY)
    assert [a.task_id for a in decided.assignments] == ["t0", "t1", "t2", "t3"]
    assert Counter(a.worker_id for a in decided.assignments) == {"w1": 2, "w2": 2}
    assert decided.preemptions == ()


def test_measured_lengths_replace_the_guess() -> None:
    waiting = [queued("t", max_tokens=10_000)]
    assert plan(snapshot(waiting), POLICY).assignments[0].charge == 266.0
    assert plan(snapshot(waiting), POLICY, PlanMemory(mean_tokens_out=50.0)).assignments[0].charge == 60.0


def test_an_unplaceable_head_does_not_block_the_others() -> None:
    stuck = queued("stuck", 1, placement=PlacementSpec(mode="pin", pin_worker="gone"))
    assert [a.task_id for a in plan(snapshot([stuck, queued("t", 2)]), POLICY).assignments] == ["t"]


def test_batch_yields_the_least_advanced_first() -> None:
    busy = [running("old", tokens_logged=50), running("young", tokens_logged=2)]
    decided = plan(snapshot([queued("i")], [full()], busy), POLICY)
    assert [task.task_id for task in decided.preemptions] == ["young"]


def test_nobody_yields_when_it_would_not_help() -> None:
    cases: list[tuple[Snapshot, PlanMemory]] = [
        (snapshot([queued("b", priority="batch")], [full()], [running("r")]), PlanMemory()),
        (snapshot([queued("i")], [worker("w1")], [running("r")]), PlanMemory()),
        (snapshot([queued("i")], [full()], [running("r", priority="interactive")]), PlanMemory()),
        (snapshot([queued("i")], [full()], [running("r", claimed_at_ms=NOW - 90, attempt=2)]), PlanMemory()),
        (snapshot([queued("i")], [full()], [running("r")]), PlanMemory(pending={("r", 1)})),
        (snapshot([queued("i")], [full()], [running("r")]), PlanMemory(idle_preemptions={"r": 3})),
        (
            snapshot(
                [queued("i", placement=PlacementSpec(mode="pin", pin_worker="w2"))],
                [full("w1"), full("w2")],
                [running("r")],
            ),
            PlanMemory(),
        ),
    ]
    for view, memory in cases:
        assert plan(view, POLICY, memory).preemptions == ()
    off = PlanPolicy(preempt=False)
    assert plan(snapshot([queued("i")], [full()], [running("r")]), off) == Plan()


def test_one_yields_for_each_that_waits_up_to_the_bound() -> None:
    busy = [running(f"r{n:02}") for n in range(20)]
    waiting = [queued(f"i{n}", n) for n in range(3)]
    assert len(plan(snapshot(waiting, [full(slots=20)], busy), POLICY).preemptions) == 3
    crowd = [queued(f"i{n}", n) for n in range(15)]
    assert len(plan(snapshot(crowd, [full(slots=20)], busy), POLICY).preemptions) == POLICY.max_preemptions_per_plan
    pending = PlanMemory(pending={("r00", 1), ("r01", 1)})
    assert len(plan(snapshot(waiting, [full(slots=20)], busy), POLICY, pending).preemptions) == 1


def test_one_slot_a_batch_backlog_and_interactive_work_do_not_fight_over_it() -> None:
    """A batch task that just yielded once took the slot back at once, being old, and interactive work starved."""
    backlog = [queued(f"b{n}", n, priority="batch", waiting_since_ms=NOW - 3_600_000) for n in range(5)]
    yielded = queued("y", 0, priority="batch", attempt=1, tokens_kept=9, waiting_since_ms=NOW - 5)
    waiting = [yielded, *backlog, queued("i", 100)]
    decided = plan(snapshot(waiting, [worker("w1", slots_total=1)]), POLICY)
    assert [a.task_id for a in decided.assignments] == ["i"]


def test_batch_leaves_room_for_the_interactive_work_that_comes_and_goes() -> None:
    waiting = [queued(f"b{n}", n, priority="batch") for n in range(8)]
    busy = [running(f"i{n}", priority="interactive") for n in range(4)]
    shared = snapshot(waiting, [worker("w1", slots_total=12, slots_used=4)], busy)
    assert len(plan(shared, POLICY).assignments) == 6
    assert len(plan(snapshot(waiting, [worker("w1", slots_total=8)]), POLICY).assignments) == 8
    lone = snapshot(waiting, [worker("w1", slots_total=3, slots_used=1)], busy[:1])
    assert len(plan(lone, POLICY).assignments) == 2, "too few slots to keep one back"


def test_batch_makes_room_before_interactive_work_has_to_wait_for_it() -> None:
    people = [running(f"i{n}", priority="interactive") for n in range(4)]
    machines = [running(f"b{n}", tokens_logged=n) for n in range(8)]

    def asked(used: int, busy: list[Any], **memory: Any) -> list[str]:
        view = snapshot([queued("b", priority="batch")], [worker("w1", slots_total=12, slots_used=used)], busy)
        return [task.task_id for task in plan(view, POLICY, PlanMemory(**memory)).preemptions]

    assert asked(12, people + machines) == ["b0"], "two slots are to be free, and one less than that is borne"
    assert asked(11, people + machines[:7]) == []
    assert asked(12, people + machines, pending={("b5", 1)}) == []
    assert asked(12, machines) == [], "nobody has come for a while"
    assert asked(12, machines, interactive_lately=4.0) == ["b0"]
    young = [running("b0", claimed_at_ms=NOW - 50), *machines[1:]]
    assert asked(12, people + young) == ["b1"]


def test_a_batch_task_that_had_to_wait_long_runs_for_a_while() -> None:
    """Ageing brought it on: if it yielded at once, the batch class would starve after all."""
    for run_ms, yields in ((1_000, False), (2_500, True)):
        aged = running("r", claimed_at_ms=NOW - run_ms, waiting_since_ms=NOW - run_ms - 31_000)
        decided = plan(snapshot([queued("i")], [full()], [aged]), POLICY)
        assert bool(decided.preemptions) is yields


PLACEMENTS = st.sampled_from(
    [
        PlacementSpec(),
        PlacementSpec(mode="pin", pin_worker="w1"),
        PlacementSpec(mode="pin", pin_pool="p2"),
        PlacementSpec(mode="prefer", prefer_pools=("p1",)),
        PlacementSpec(mode="prefer", prefer_pools=("p1",), allow_fallback=False),
        PlacementSpec(avoid_pools=("p1",)),
    ]
)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    workers = [
        worker(
            f"w{n}",
            pool=draw(st.sampled_from(["p1", "p2"])),
            slots_total=draw(st.integers(1, 4)),
            slots_used=draw(st.integers(0, 5)),
            state=draw(st.sampled_from(["ready", "ready", "ready", "lost", "draining"])),
            model_digest=draw(st.sampled_from(["d", "e"])),
        )
        for n in range(draw(st.integers(0, 4)))
    ]
    waiting = [
        queued(
            f"t{n}",
            n,
            priority=draw(st.sampled_from(["interactive", "batch"])),
            tenant=draw(st.sampled_from(["a", "b", "c"])),
            placement=draw(PLACEMENTS),
            required_digest=draw(st.sampled_from([None, None, "d"])),
            session_worker=draw(st.sampled_from([None, "w0", "w9"])),
            avoid_worker=draw(st.sampled_from([None, "w0"])),
            waiting_since_ms=NOW - draw(st.sampled_from([0, 1_000, 60_000])),
            prefix_hashes=draw(st.sampled_from([(), ("x",), ("x", "y")])),
        )
        for n in range(draw(st.integers(0, 14)))
    ]
    busy = [
        running(f"r{n}", f"w{draw(st.integers(0, 4))}", priority=draw(st.sampled_from(["interactive", "batch"])))
        for n in range(draw(st.integers(0, 8)))
    ]
    return snapshot(waiting, workers, busy, prefix_workers={"x": ("w1",), "y": ("w0", "w2")})


@given(snapshots())
def test_whatever_the_house_looks_like_a_plan_keeps_the_rules(view: Snapshot) -> None:
    decided = plan(view, POLICY)
    assert decided == plan(view, POLICY), "the same house, the same plan"
    workers = {each.worker_id: each for each in view.workers}
    tasks = {task.task_id: task for task in view.waiting}
    assigned = [a.task_id for a in decided.assignments]
    assert len(set(assigned)) == len(assigned)
    for worker_id, taken in Counter(a.worker_id for a in decided.assignments).items():
        assert workers[worker_id].slots_used + taken <= workers[worker_id].slots_total
    for assignment in decided.assignments:
        assert suitable(tasks[assignment.task_id], workers[assignment.worker_id])
        assert assignment.charge > 0
    left = {w: each.slots_total - each.slots_used for w, each in workers.items() if each.state == "ready"}
    for assignment in decided.assignments:
        left[assignment.worker_id] -= 1
    for task in view.waiting:
        spared = task.priority == "batch" and any(each.priority == "interactive" for each in view.running)
        if task.task_id not in assigned and task.avoid_worker is None and not spared:
            assert not any(free > 0 and suitable(task, workers[w]) for w, free in left.items()), "a slot was wasted"
    assert all(task.priority == "batch" for task in decided.preemptions)
    assert len(set(decided.preemptions)) == len(decided.preemptions) <= POLICY.max_preemptions_per_plan
    waits = [t for t in view.waiting if t.priority == "interactive" and t.task_id not in assigned]
    slots = sum(each.slots_total for each in workers.values() if each.state == "ready")
    assert len(decided.preemptions) <= (len(waits) or slots // 4)


def test_what_a_class_can_have_at_once() -> None:
    busy = [running("b"), running("i", priority="interactive"), running("lost", "w9")]
    view = snapshot([], [worker("w1", slots_total=8, slots_used=4)], busy)
    assert free_for("interactive", view) == 5
    assert free_for("interactive", view, preempt=False) == 4
    assert free_for("batch", view) == 3
    assert free_for("batch", snapshot([], [worker("w1", slots_total=8, slots_used=8)], busy)) == 0
