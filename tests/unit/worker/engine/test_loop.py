"""The loop under faults: whoever causes one pays for it, and nobody else's tokens change."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.worker.engine.fake_engine import EOS, VOCAB, FakeEngine, alone
from tests.unit.worker.engine.makers import request
from worker.engine.loop import DeviceFaultError
from worker.engine.protocol import AddSequence
from worker.engine.scheduler import Chunk
from worker.engine.sequence import Sequence

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="llorch.engine")


def crowd(count: int = 6, *, max_tokens: int = 10, shared: int = 0) -> list[AddSequence]:
    """Requests of different lengths, greedy and seeded in turns; the first `shared` prompt tokens are the same."""
    return [
        request(
            f"s{n}",
            [7] * shared + [(3 * n + i) % VOCAB for i in range(2 + 3 * n)],
            max_tokens=max_tokens,
            temperature=float(n % 2),
            seed=n,
            ignore_eos=True,
        )
        for n in range(count)
    ]


def expect_others(engine: FakeEngine, requests: list[AddSequence], *culprits: str) -> None:
    """Everybody but the culprits ended by itself with the tokens it gets alone, and no block is lost."""
    for asked in requests:
        if asked.sequence_id not in culprits:
            assert engine.ends[asked.sequence_id].reason == "MAX_TOKENS"
            assert engine.ids(asked.sequence_id) == alone(asked)
    assert engine.blocks.num_available == engine.blocks.num_blocks
    assert not engine.loop._sequences


def failing_for(name: str, error: Exception, *, after: int = 0) -> Callable[[list[Chunk]], None]:
    """Raises whenever the named sequence is in the step and has at least `after` output tokens."""

    def before(chunks: list[Chunk]) -> None:
        if any(c.sequence.sequence_id == name and c.sequence.num_output_tokens >= after for c in chunks):
            raise error

    return before


def test_tokens_do_not_depend_on_who_else_runs() -> None:
    engine, requests = FakeEngine(num_blocks=20, budget=9, slots=3), crowd()
    engine.run(*requests)
    expect_others(engine, requests)


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("name", ["s0", "s3", "s5"])
def test_a_failing_step_is_narrowed_to_the_culprit(name: str, after: int) -> None:
    engine, requests = FakeEngine(), crowd(shared=9)
    engine.runner.before = failing_for(name, ValueError("a secret of the prompt"), after=after)
    engine.run(*requests)
    end = engine.ends[name]
    assert (end.reason, end.error_code) == ("ERROR", "INTERNAL")
    assert end.error is not None and "ValueError" in end.error and "secret" not in end.error
    assert len(engine.ids(name)) == after
    assert engine.ids(name) == alone(next(r for r in requests if r.sequence_id == name))[:after]
    expect_others(engine, requests, name)
    assert engine.loop.stats().step_failures == 2  # the step, then the culprit's own


def test_a_failing_sampler_is_narrowed_too() -> None:
    engine, requests = FakeEngine(), crowd()

    def before(sequences: list[Sequence]) -> None:
        if any(sequence.sequence_id == "s2" and sequence.num_output_tokens == 3 for sequence in sequences):
            raise IndexError("out of range")

    engine.sampler.before = before
    engine.run(*requests)
    assert engine.ends["s2"].error_code == "INTERNAL"
    assert len(engine.ids("s2")) == 3
    expect_others(engine, requests, "s2")


def test_a_fault_that_passes_costs_nobody_anything() -> None:
    """A step fails once and each chunk then succeeds alone."""
    engine, requests = FakeEngine(), crowd()
    faults = [ValueError("once")]

    def before(chunks: list[Chunk]) -> None:
        if len(chunks) > 2 and faults:
            raise faults.pop()

    engine.runner.before = before
    engine.run(*requests)
    expect_others(engine, requests)
    assert engine.loop.stats().step_failures == 1


@pytest.mark.parametrize("after", [0, 4])
@pytest.mark.parametrize("shared", [0, 9])
def test_numbers_that_are_not_finite_cost_their_own_sequence(after: int, shared: int) -> None:
    """With a shared beginning too: the blocks that others read stay, only the culprit's own are scrubbed.

    Scrubbing used to take every block of the culprit, shared ones included, and the others' tokens changed.
    """
    engine, requests = FakeEngine(), crowd(shared=shared)
    engine.inbox.append(requests[0])
    engine.step()  # its beginning can be found from here on
    engine.runner.spoils = lambda s: s.sequence_id == "s3" and s.num_output_tokens >= after
    engine.run(*requests[1:])
    assert engine.ends["s3"].error_code == "INTERNAL"
    assert "dtype" in (engine.ends["s3"].error or "")
    assert len(engine.ids("s3")) == after
    expect_others(engine, requests, "s3")
    assert bool(engine.cache.pool.isfinite().all()), "nothing that isn't finite stays in the cache"


def test_what_a_spoiled_sequence_computed_is_not_found_again() -> None:
    engine = FakeEngine()
    engine.runner.spoils = lambda s: s.sequence_id == "bad" and s.num_computed >= 8
    engine.run(request("bad", [5] * 8, max_tokens=30, temperature=0.0, ignore_eos=True))
    assert engine.ends["bad"].reason == "ERROR"
    good = request("good", [5] * 9, max_tokens=5, temperature=0.0)
    engine.run(good)
    assert engine.ends["good"].cached_tokens == 0
    assert engine.ids("good") == alone(good)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("most", [1, 3])
def test_out_of_memory_makes_the_youngest_wait(error: Exception, most: int) -> None:
    """Memory for `most` chunks at a time, for good: fewer run together, all finish with their own tokens.

    The preempted sequence used to be admitted again by the very next step, which failed like the one before, for ever.
    """
    engine, requests = FakeEngine(), crowd()

    def before(chunks: list[Chunk]) -> None:
        if len(chunks) > most:
            raise error

    engine.runner.before = before
    engine.run(*requests)
    expect_others(engine, requests)
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_no_memory_for_one_alone_fails_that_one(error: Exception) -> None:
    engine, requests = FakeEngine(), crowd()
    engine.runner.before = failing_for("s4", error, after=2)
    engine.run(*requests)
    end = engine.ends["s4"]
    assert (end.reason, end.error_code) == ("ERROR", "VRAM_OOM")
    assert "--kv-memory" in (end.error or "")
    assert len(engine.ids("s4")) == 2
    expect_others(engine, requests, "s4")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), torch.AcceleratorError("gone")],
)
def test_an_error_of_the_device_ends_the_process(error: Exception) -> None:
    engine = FakeEngine()
    engine.runner.before = failing_for("s1", error)
    with pytest.raises(DeviceFaultError) as caught:
        engine.run(*crowd())
    assert "\n" not in str(caught.value)


def test_a_duplicate_id_is_dropped_and_the_first_goes_on() -> None:
    engine = FakeEngine()
    first = request("twin", [1, 2, 3], max_tokens=6, temperature=0.0, ignore_eos=True)
    engine.inbox.append(first)
    engine.step()
    engine.run(request("twin", [9, 9], max_tokens=50, temperature=0.0))
    assert engine.ids("twin") == alone(first)
    assert engine.ends["twin"].reason == "MAX_TOKENS"
    engine.ends.clear(), engine.tokens.clear()
    assert engine.run(first)["twin"] == alone(first), "an id is free again after its end"


BAD = [
    request("bad", []),
    request("bad", [VOCAB]),
    request("bad", [-1]),
    request("bad", [1], [VOCAB]),
    request("bad", [1] * 256),
    request("bad", [1], temperature=float("nan")),
    request("bad", [1], temperature=-1.0),
    request("bad", [1], top_p=0.0),
    request("bad", [1], min_p=float("inf")),
    request("bad", [1], repetition_penalty=0.0),
    request("bad", [1], logit_bias={VOCAB: 1.0}),
    request("bad", [1], logit_bias={1: float("nan")}),
    request("bad", [1], stop_token_ids=(-1,)),
    request("bad", [1], max_tokens=0),
    request("bad", [1], seed=2**64),
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_request_that_cannot_run_is_refused_alone(bad: AddSequence) -> None:
    engine, requests = FakeEngine(), crowd(3)
    engine.run(*requests[:2], bad, requests[2])
    assert engine.ends["bad"].reason == "ERROR"
    assert engine.ends["bad"].error_code in ("INVALID_PARAMS", "CONTEXT_LENGTH_EXCEEDED")
    assert engine.ids("bad") == []
    expect_others(engine, requests)


def test_ten_thousand_stop_ids_and_a_prompt_one_short_of_the_context_run() -> None:
    engine = FakeEngine()
    many = tuple(n % VOCAB for n in range(10_000))
    engine.run(
        request("stops", [1], stop_token_ids=many, min_tokens=3, max_tokens=9, temperature=0.0),
        request("long", [n % VOCAB for n in range(255)], max_tokens=1, temperature=0.0),
        request("longer", [n % VOCAB for n in range(250)], max_tokens=1000, temperature=0.0, ignore_eos=True),
    )
    # Every token is a stop token: while they are muted nothing is left to choose from, and the answer still goes on.
    assert len(engine.ids("stops")) == 3
    assert engine.ends["stops"].reason in ("EOS", "STOP_TOKEN")
    assert (len(engine.ids("long")), engine.ends["long"].reason) == (1, "MAX_TOKENS")
    assert (len(engine.ids("longer")), engine.ends["longer"].reason) == (6, "MAX_TOKENS")


def test_cancel_at_every_step_gives_exactly_one_end() -> None:
    for steps in range(16):
        engine, requests = FakeEngine(num_blocks=24, budget=9, slots=3), crowd()
        engine.inbox.extend(requests)
        for _ in range(steps):
            engine.step()
        for asked in requests[::2]:
            engine.cancel(asked.sequence_id)
            engine.cancel(asked.sequence_id)
        engine.cancel("nobody")
        had = {name: len(line) for name, line in engine.tokens.items()}
        engine.run()
        assert set(engine.ends) == {asked.sequence_id for asked in requests}
        for asked in requests[::2]:
            if engine.ends[asked.sequence_id].reason == "CANCELLED":
                assert len(engine.ids(asked.sequence_id)) == had.get(asked.sequence_id, 0), "nothing after a cancel"
                assert engine.ids(asked.sequence_id) == alone(asked)[: had.get(asked.sequence_id, 0)]
        cancelled = [name for name, end in engine.ends.items() if end.reason == "CANCELLED"]
        expect_others(engine, requests, *cancelled)


def test_cancel_with_the_request_and_after_the_end() -> None:
    engine = FakeEngine()
    asked = request("quick", [1, 2], max_tokens=2, temperature=0.0, ignore_eos=True)
    engine.inbox.append(asked)
    engine.cancel("quick")
    engine.run()
    assert engine.ends["quick"].reason == "CANCELLED"
    assert engine.runner.computed == 0
    other = request("other", [1, 2], max_tokens=2, temperature=0.0, ignore_eos=True)
    engine.run(other)
    engine.cancel("other")
    engine.run()
    assert engine.ends["other"].reason == "MAX_TOKENS"


def test_cancel_of_a_preempted_sequence() -> None:
    engine = FakeEngine(num_blocks=6, budget=16, slots=3)
    first = request("first", [1] * 6, max_tokens=12, temperature=0.0, ignore_eos=True)
    engine.inbox.extend([first, request("second", [2] * 6, max_tokens=12, temperature=0.0, ignore_eos=True)])
    while not engine.scheduler.num_preemptions:
        assert engine.step()
    assert engine.scheduler.num_waiting == 1
    engine.cancel("second")
    engine.run()
    assert engine.ends["second"].reason == "CANCELLED"
    assert engine.ids("first") == alone(first)


@pytest.mark.parametrize(
    ("output", "spec", "reason"),
    [
        ([3, 4], {"max_tokens": 2}, "MAX_TOKENS"),
        ([3, EOS], {}, "EOS"),
        ([3, 5], {"stop_token_ids": (5,)}, "STOP_TOKEN"),
        ([3] * 253, {"max_tokens": 1000}, "MAX_TOKENS"),
    ],
)
def test_resuming_what_was_complete_computes_nothing(output: list[int], spec: dict[str, object], reason: str) -> None:
    engine = FakeEngine()
    engine.run(request("done", [1, 2, 3], output, **spec))
    assert engine.ends["done"].reason == reason
    assert engine.ids("done") == []
    assert engine.runner.computed == 0
    assert engine.scheduler.num_preemptions == engine.loop.stats().steps == 0


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_a_resume_at_every_token_goes_on_the_same(sampling: dict[str, float], penalty: float) -> None:
    def asked(name: str, output: list[int]) -> AddSequence:
        spec = {"max_tokens": 12, "ignore_eos": True, "frequency_penalty": penalty, "min_tokens": 4, **sampling}
        return request(name, [4, 8, 15, 16], output, **spec)

    whole = alone(asked("whole", []))
    engine = FakeEngine()
    for cut in range(12):
        engine.run(asked(f"cut{cut}", whole[:cut]))
        assert engine.ids(f"cut{cut}") == whole[cut:]
        assert engine.tokens[f"cut{cut}"][0].index == cut


def test_cached_tokens_and_statistics() -> None:
    engine = FakeEngine()
    engine.run(request("a", [6] * 13, max_tokens=3, temperature=0.0, ignore_eos=True))
    engine.run(request("b", [6] * 13, max_tokens=3, temperature=0.0, ignore_eos=True))
    engine.run(request("c", [6] * 13, max_tokens=3, temperature=0.0, ignore_eos=True, salt="another tenant"))
    assert [engine.ends[name].cached_tokens for name in "abc"] == [0, 12, 0]
    stats = engine.loop.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_free) == (0, 0, 64)
    assert stats.cached_prompt_tokens == 12
    assert stats.prefill_tokens + stats.decode_tokens == engine.runner.computed == 13 + 1 + 13 + 3 * 2


EVENT = st.tuples(
    st.sampled_from(["add", "add", "cancel", "step", "step", "fault", "spoil", "memory"]), st.integers(0, 99)
)


@settings(max_examples=120, deadline=None)
@given(
    events=st.lists(EVENT, max_size=40),
    num_blocks=st.integers(8, 24),
    slots=st.integers(1, 5),
    spare=st.integers(0, 10),
    contiguous=st.booleans(),
)
def test_whatever_happens_each_gets_one_end_and_its_own_tokens(
    events: list[tuple[str, int]], num_blocks: int, slots: int, spare: int, contiguous: bool
) -> None:
    engine = FakeEngine(num_blocks=num_blocks, slots=slots, budget=slots + spare, contiguous=contiguous)
    requests: dict[str, AddSequence] = {}
    faulty: dict[str, str] = {}

    def before(chunks: list[Chunk]) -> None:
        kinds = {faulty.get(c.sequence.sequence_id) for c in chunks}
        if "memory" in kinds:
            raise torch.OutOfMemoryError("no memory")
        if "fault" in kinds:
            raise ValueError("no")

    engine.runner.before = before
    engine.runner.spoils = lambda s: faulty.get(s.sequence_id) == "spoil"
    for kind, number in events:
        if kind == "add":
            asked = request(
                f"s{len(requests)}",
                [number % 2] * (number % 14 + 1),
                salt=str(number % 3),
                max_tokens=number % 7 + 1,
                temperature=float(number % 2),
                seed=number,
            )
            requests[asked.sequence_id] = asked
            engine.inbox.append(asked)
        elif kind == "step":
            if engine.inbox or engine.scheduler.has_work:
                engine.step()
        elif kind == "cancel":
            engine.cancel(f"s{number % (len(requests) + 1)}")
        elif requests:
            faulty.setdefault(f"s{number % len(requests)}", kind)
    engine.run()
    assert set(engine.ends) == set(requests)
    for name, asked in requests.items():
        expected, reason = alone(asked), engine.ends[name].reason
        assert engine.ids(name) == expected[: len(engine.ids(name))]
        if reason not in ("CANCELLED", "ERROR"):
            assert engine.ids(name) == expected
        assert reason != "ERROR" or name in faulty, "only who was at fault fails"
    assert engine.blocks.num_available == num_blocks
    assert bool(engine.cache.pool.isfinite().all())
