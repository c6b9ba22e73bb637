from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.events import (
    EndEvent,
    MigratedEvent,
    QueuedEvent,
    StartedEvent,
    TokenEvent,
    encode_data,
    parse_position,
    start_position,
    terminal_position,
    token_position,
)
from orchestratord.cursor import Cursor, open_cursor
from orchestratord.store.types import LogEntry

TERMINAL = 2**64 - 1


def token(index: int) -> TokenEvent:
    return TokenEvent(t=f"t{index}", i=index, id=index)


def log(draw: st.DrawFn) -> tuple[list[LogEntry], int]:
    """A log as the store may hold it: several attempts, batches of any size, overlaps within an attempt."""
    queued = QueuedEvent(task_id="t", queue_position=1)
    entries = [LogEntry(position="0-1", kind="queued", data=encode_data(queued))]
    index = 0
    attempts = draw(st.integers(1, 3))
    for attempt in range(1, attempts + 1):
        if attempt == 1:
            started = StartedEvent(
                task_id="t", worker_id="w", model="m", model_digest="d", seed=1, attempt=1, determinism="exact",
                started_at_ms=1,
            )  # fmt: skip
            entries.append(LogEntry(position=start_position(1), kind="started", data=encode_data(started)))
        else:
            moved = MigratedEvent(task_id="t", worker_id="w", attempt=attempt, reason="worker_lost", tokens_kept=index)
            entries.append(LogEntry(position=start_position(attempt, index), kind="migrated", data=encode_data(moved)))
        first = index
        for size in draw(st.lists(st.integers(1, 5), max_size=5)):
            overlap = draw(st.integers(0, min(2, index - first)))
            batch = tuple(token(i) for i in range(index - overlap, index + size))
            index += size
            entries.append(LogEntry(position=token_position(attempt, index - 1), kind="tokens", tokens=batch))
    end = EndEvent(stop_reason="EOS", tokens_in=1, tokens_out=index)
    entries.append(LogEntry(position=terminal_position(attempts), kind="end", data=encode_data(end)))
    return entries, index


logs = st.composite(log)()


@given(logs, st.data())
def test_from_any_cursor_a_reader_gets_exactly_the_rest(made: tuple[list[LogEntry], int], data: st.DataObject) -> None:
    entries, total = made
    whole = Cursor().fresh(entries)
    assert [item.event.i for item in whole if isinstance(item.event, TokenEvent)] == list(range(total))
    positions = [item.position for item in whole]
    assert positions == sorted(positions, key=lambda position: parse_position(position or ""))
    split = data.draw(st.integers(0, len(whole) - 1))
    at = whole[split].position
    cursor = open_cursor(at, "0-1", entries[-1].position, True, total, 9)
    rest: list[object] = []
    beyond = [entry for entry in entries if parse_position(entry.position) > parse_position(at or "")]
    while beyond:
        page = data.draw(st.integers(1, len(beyond)))
        rest += cursor.fresh(beyond[:page])
        beyond = beyond[page:]
    assert rest == whole[split + 1 :]
    assert cursor.finished


@given(logs)
def test_what_was_seen_is_not_seen_again(made: tuple[list[LogEntry], int]) -> None:
    entries, _ = made
    cursor = Cursor()
    whole = cursor.fresh(entries)
    assert cursor.fresh(entries) == []
    other = Cursor()
    assert other.fresh_items(whole) == whole
    assert other.fresh_items(whole) == []


@given(logs, st.integers(0, 40))
def test_a_rolled_back_log_repeats_no_index(made: tuple[list[LogEntry], int], held: int) -> None:
    """The client had got `held` tokens of attempt 1 that a failover took back; they are generated again."""
    entries, _ = made
    cursor = Cursor((1, held), held) if held else Cursor((1, 0), 0)
    indices = [item.event.i for item in cursor.fresh(entries) if isinstance(item.event, TokenEvent)]
    assert indices == list(range(indices[0], indices[0] + len(indices))) if indices else True
    assert all(index >= held for index in indices)


def moved(attempt: int, kept: int) -> LogEntry:
    event = MigratedEvent(task_id="t", worker_id="w", attempt=attempt, reason="worker_lost", tokens_kept=kept)
    return LogEntry(position=start_position(attempt, kept), kind="migrated", data=encode_data(event))


def tokens(attempt: int, *indices: int) -> LogEntry:
    batch = tuple(token(index) for index in indices)
    return LogEntry(position=token_position(attempt, indices[-1]), kind="tokens", tokens=batch)


def ended(attempt: int, count: int) -> LogEntry:
    event = EndEvent(stop_reason="EOS", tokens_in=1, tokens_out=count)
    return LogEntry(position=terminal_position(attempt), kind="end", data=encode_data(event))


def test_a_move_that_keeps_fewer_tokens_than_the_reader_has_is_kept_from_it() -> None:
    """Resuming from such a move, on a new connection, the client got the tokens between a second time."""
    entries = [moved(2, 3), tokens(2, 3, 4, 5), ended(2, 6)]
    for take in (Cursor((1, 5), 5).fresh, lambda log: Cursor((1, 5), 5).fresh_items(Cursor((1, 3), 3).fresh(log))):
        assert [item.position for item in take(entries)] == ["2-6", f"2-{TERMINAL}"]
    assert next(item.position for item in Cursor((1, 3), 3).fresh(entries)) == "2-3"


def test_a_move_that_was_undone_is_a_place_to_go_on_from() -> None:
    """Its id didn't say how many tokens had come before it, and all those that the log had lost came a second time."""
    undone_log = [moved(3, 1), tokens(3, 1, 2), tokens(3, 3, 4, 5), ended(3, 6)]
    cursor = open_cursor("2-4", "0-1", "1-1", False, 1, 1)
    assert [item.position for item in cursor.fresh(undone_log)] == ["3-5", "3-6", f"3-{TERMINAL}"]


@pytest.mark.parametrize("beyond", [moved(3, 6), ended(2, 6)])
def test_nothing_is_taken_across_a_hole(beyond: LogEntry) -> None:
    """Log and reader had parted in a failover: the token between was never sent, and nobody noticed."""
    cursor = Cursor((2, 5), 5)
    assert cursor.fresh([beyond, tokens(3, 6)]) == []
    assert cursor.parted and cursor.position == (2, 5)
    other = Cursor((2, 5), 5)
    assert other.fresh_items(Cursor((2, 0), None).fresh([beyond])) == []
    assert other.parted


@pytest.mark.parametrize("text", ["banana", "", "1", "1-", "-1", "1-2-3", "1.5-2", "1-18446744073709551616", "٣-1"])
def test_what_is_no_position(text: str) -> None:
    with pytest.raises(ApiError) as raised:
        open_cursor(text, "0-1", "1-5", False, 5, 1)
    assert (raised.value.code, raised.value.param) == (ErrorCode.INVALID_PARAMS, "Last-Event-ID")


def test_trimmed_ahead_and_waiting() -> None:
    with pytest.raises(ApiError) as gone:
        open_cursor("1-3", "1-10", f"1-{TERMINAL}", True, 20, 1)
    assert gone.value.code is ErrorCode.GONE
    with pytest.raises(ApiError) as from_start:
        open_cursor(None, "1-10", "1-20", False, 20, 1)
    assert from_start.value.code is ErrorCode.GONE
    for ahead in ("2-20", "1-21", f"2-{TERMINAL}"):
        with pytest.raises(ApiError) as conflict:
            open_cursor(ahead, "0-1", f"1-{TERMINAL}", True, 20, 1)
        assert conflict.value.code is ErrorCode.CONFLICT
    for made_up in ("3-0", f"1-{TERMINAL}", f"2-{TERMINAL}"):
        with pytest.raises(ApiError) as conflict:
            open_cursor(made_up, "0-1", "1-5", False, 5, 1)
        assert conflict.value.code is ErrorCode.CONFLICT
    assert open_cursor("2-7", "0-1", "1-5", False, 5, 1).position == (2, 7)
    assert open_cursor(f"1-{TERMINAL}", "0-1", f"1-{TERMINAL}", True, 20, 1).finished


def test_an_end_after_fewer_tokens_than_the_reader_has_is_not_passed() -> None:
    """Whoever resumed from an id that the task never reached got the end, as if the tokens before had been its."""
    cursor = Cursor((1, 5000), 5000)
    assert cursor.fresh([ended(1, 100)]) == []
    assert cursor.parted
