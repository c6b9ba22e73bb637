"""Between bytes and types."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch_wire.events import TokenEvent, TopLogprob
from orchestratord.store import codec
from orchestratord.store.scripts import load
from orchestratord.store.types import NewTask, PlacementSpec

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
LOGPROBS = st.floats(max_value=0, allow_nan=False, allow_infinity=False)
TOPS = st.lists(st.builds(TopLogprob, id=st.integers(0, 2**31), t=TEXT, logprob=LOGPROBS), max_size=3).map(tuple)


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(TEXT, st.integers(0, 2**31), st.none() | LOGPROBS, st.none() | TOPS), min_size=1, max_size=6),
)
def test_tokens_come_back(first: int, rows: list[tuple[str, int, float | None, tuple[TopLogprob, ...] | None]]) -> None:
    tokens = tuple(
        TokenEvent(t=text, i=first + offset, id=token_id, logprob=logprob, top=top)
        for offset, (text, token_id, logprob, top) in enumerate(rows)
    )
    encoded = codec.encode_tokens(tokens)
    assert codec.decode_tokens(encoded) == tokens
    assert codec.decode_token_ids(encoded) == (first, [token.id for token in tokens])


def test_plain_tokens_are_small() -> None:
    tokens = tuple(TokenEvent(t=" word", i=index, id=30_000 + index) for index in range(1000))
    assert len(codec.encode_tokens(tokens)) < 16 * 1024


@pytest.mark.parametrize(
    ("placement", "lane"),
    [
        (PlacementSpec(), ""),
        (PlacementSpec(mode="prefer", prefer_pools=("a",)), ""),
        (PlacementSpec(mode="prefer", prefer_pools=("b", "a"), allow_fallback=False), "only=a&b"),
        (PlacementSpec(mode="pin", pin_pool="p"), "pool=p"),
        (PlacementSpec(mode="pin", pin_worker="w"), "worker=w"),
        (PlacementSpec(mode="pin", pin_pool="p", pin_worker="w"), "pool=p,worker=w"),
        (PlacementSpec(avoid_pools=("x",)), "avoid=x"),
    ],
)
def test_what_restricts_a_task_gives_it_a_lane_of_its_own(placement: PlacementSpec, lane: str) -> None:
    assert codec.lane(placement) == lane


def test_a_pin_that_is_not_in_force_is_not_checked() -> None:
    task = NewTask(
        task_id="t",
        tenant="a",
        model="m",
        priority="batch",
        payload=b"",
        seed=1,
        max_tokens=1,
        prompt_tokens_estimate=1,
        body_hash="h",
        placement=PlacementSpec(mode="auto", pin_pool="p"),
    )
    assert "pin_pool" not in codec.task_fields(task)


@pytest.mark.parametrize("name", ["admit", "append", "audit_tasks"])
def test_a_script_is_whole(name: str) -> None:
    script = load(name)
    assert "local function key" in script.text and len(script.sha) == 40
    with pytest.raises(FileNotFoundError):
        load("no_such_script")
