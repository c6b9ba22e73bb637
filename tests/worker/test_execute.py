"""/execute and its companions over a real process: start, resume, re-attach, fence, cancel, acknowledge."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from tests.support import tokenizers as small
from tests.support.scripted_engine_process import EOS_AT_5, ERROR, token_at
from tests.support.worker_process import Stream, WorkerProcess, execute, health, post, request, until_health

TOKENIZER = small.byte_level()


def expected_ids(seed: int, count: int) -> list[int]:
    return [token_at(seed, index) for index in range(count)]


def all_free(state: dict[str, Any]) -> bool:
    return state["slots_free"] == state["slots_total"]


async def test_a_generation_from_start_to_end(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    stream = await execute(session, scripted.url, request(prompt="hello", seed=3, max_tokens=20))
    stream.check()
    assert stream.started["tokens_in"] == 1
    assert stream.started["determinism"] == "exact"
    assert stream.ids == expected_ids(3, 20)
    assert stream.text == TOKENIZER.decode(stream.ids, skip_special_tokens=True)
    assert stream.end == {
        "stop_reason": "MAX_TOKENS",
        "tokens_in": 1,
        "tokens_out": 20,
        "cached_tokens": 3,
        "queue_time_ms": 0,
        "prefill_time_ms": 2,
        "decode_time_ms": 7,
        "stop_sequence_matched": None,
        "determinism": "exact",
    }
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    assert stream.headers["Cache-Control"] == "no-cache"
    assert stream.headers["X-Accel-Buffering"] == "no"


async def test_every_way_to_give_a_prompt(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    by_ids = await execute(session, scripted.url, request(prompt_token_ids=[5, 6, 7]))
    assert by_ids.started["tokens_in"] == 3
    chat = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    by_chat = await execute(session, scripted.url, request(messages=chat))
    rendered = "<user>hi\n<assistant>"
    assert by_chat.started["tokens_in"] == len(TOKENIZER.encode(rendered, add_special_tokens=False).ids)


async def test_resume_at_every_n_is_the_same_answer(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    body = {"seed": 11, "max_tokens": 12, "stop": ["never this"]}
    whole = await execute(session, scripted.url, request(**body))
    for n in range(len(whole.ids) + 1):
        rest = await execute(session, scripted.url, request(**body, resume_token_ids=whole.ids[:n]))
        rest.check(first_index=n)
        assert whole.tokens[:n] + rest.tokens == whole.tokens
        assert rest.end["stop_reason"] == "MAX_TOKENS"
        assert rest.end["tokens_out"] == 12


async def test_held_back_text_survives_a_move(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    """Text that the first worker held for a stop string must come from the second, once."""
    texts = {token: TOKENIZER.decode([token]) for token in range(3, 259)}

    def plain(seed: int, n: int) -> bool:
        return all(
            texts[token_at(seed, n + k)].isascii() and texts[token_at(seed, n + k)].isprintable() for k in (-1, 0, 1)
        )

    seed, n = next((seed, n) for seed in range(1, 200) for n in range(8, 36) if plain(seed, n))
    whole = await execute(session, scripted.url, request(seed=seed, max_tokens=40))
    # A stop string that starts to match at token n and then doesn't.
    stop = whole.tokens[n]["t"] + "\x01never"
    undisturbed = await execute(session, scripted.url, request(seed=seed, max_tokens=40, stop=[stop]))
    assert undisturbed.text == whole.text
    assert undisturbed.tokens[n]["t"] == ""
    for cut in (n, n + 1, n + 2):
        resumed = whole.ids[:cut]
        rest = await execute(
            session, scripted.url, request(seed=seed, max_tokens=40, stop=[stop], resume_token_ids=resumed)
        )
        assert undisturbed.tokens[:cut] + rest.tokens == undisturbed.tokens


async def test_stop_string_ends_the_answer_before_it(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    whole = await execute(session, scripted.url, request(seed=5, max_tokens=60))
    n = next(n for n in range(10, 50) if whole.tokens[n]["t"].isascii() and whole.tokens[n]["t"].isprintable())
    stop = whole.text[: len("".join(t["t"] for t in whole.tokens[: n + 1]))][-2:]
    stream = await execute(session, scripted.url, request(seed=5, max_tokens=60, stop=["\x01\x02", stop]))
    stream.check()
    assert stream.end["stop_reason"] == "STOP_SEQUENCE"
    assert stream.end["stop_sequence_matched"] == stop
    assert stream.text == whole.text[: whole.text.index(stop)]
    assert stream.end["tokens_out"] == len(stream.tokens)
    assert stream.end["cached_tokens"] == 1, "the engine's own figures come with the end"
    done = await execute(
        session, scripted.url, request(seed=5, max_tokens=60, stop=[stop], resume_token_ids=stream.ids)
    )
    assert done.end["stop_reason"] == "STOP_SEQUENCE" and not done.tokens
    assert done.end["stop_sequence_matched"] == stop
    await until_health(session, scripted.url, all_free)


async def test_complete_continuations_compute_nothing(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    for body, reason in (
        ({"max_tokens": 3, "resume_token_ids": expected_ids(1, 3)}, "MAX_TOKENS"),
        ({"resume_token_ids": [10, 11, 2]}, "EOS"),
        ({"resume_token_ids": [10, 11], "stop_token_ids": [11]}, "STOP_SEQUENCE"),
    ):
        stream = await execute(session, scripted.url, request(**body))
        assert not stream.tokens
        assert stream.end["stop_reason"] == reason
        assert stream.end["tokens_out"] == len(body["resume_token_ids"])


async def test_eos_is_a_token_with_no_text(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    stream = await execute(session, scripted.url, request(seed=EOS_AT_5))
    assert [token["i"] for token in stream.tokens] == [0, 1, 2, 3, 4, 5]
    assert stream.tokens[5]["id"] == 2
    assert stream.end["stop_reason"] == "EOS"
    assert stream.end["tokens_out"] == 6
    ignoring = await execute(session, scripted.url, request(seed=EOS_AT_5, ignore_eos=True))
    assert ignoring.end["stop_reason"] == "MAX_TOKENS"


async def test_logprobs_and_alternatives_have_texts(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    stream = await execute(session, scripted.url, request(logprobs=2, max_tokens=2))
    token = stream.tokens[0]
    assert token["logprob"] == -0.5
    assert [top["id"] for top in token["top"]] == [token["id"], 4]
    assert token["top"][1]["t"] == TOKENIZER.decode([4])
    only_chosen = await execute(session, scripted.url, request(logprobs=0, max_tokens=1))
    assert only_chosen.tokens[0]["logprob"] == -0.5 and "top" not in only_chosen.tokens[0]


async def test_max_tokens_is_clipped_to_the_context(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    for max_tokens in (None, 100_000):
        stream = await execute(session, scripted.url, request(prompt_token_ids=[9] * 250, max_tokens=max_tokens))
        assert stream.end["tokens_out"] == 6
    last = await execute(session, scripted.url, request(prompt_token_ids=[9] * 255, max_tokens=1))
    assert last.end["tokens_out"] == 1


async def test_attach_again_from_any_token(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    body = request(seed=21, max_tokens=200)
    first = await execute(session, scripted.url, body, stop_after=10)
    instance = first.started["instance_id"]
    again = await execute(session, scripted.url, body, after=4)
    again.check(first_index=5)
    assert again.ids == expected_ids(21, 200)[5:]
    assert again.started["instance_id"] == instance
    # After its end, and without the prompt: attach only.
    attach = {"task_id": body["task_id"], "attempt": 1, "attach_instance_id": instance}
    late = await execute(session, scripted.url, attach, after=198)
    assert late.ids == expected_ids(21, 200)[199:]
    nothing = await execute(session, scripted.url, attach, after=199)
    assert nothing.tokens == [] and nothing.end["tokens_out"] == 200
    ahead = await execute(session, scripted.url, attach, after=200)
    assert ahead.status == 409
    # Acknowledged: forgotten, and not to be started again by a late duplicate.
    assert await post(session, scripted.url, "/ack", {"task_id": body["task_id"], "attempt": 1}) == (
        200,
        {"found": True},
    )
    assert (await execute(session, scripted.url, attach)).status == 404
    assert (await execute(session, scripted.url, body)).status == 409


async def test_a_start_that_is_read_from_beyond_its_beginning_starts_nothing(
    scripted: WorkerProcess, session: aiohttp.ClientSession
) -> None:
    body = request(seed=21, max_tokens=250, resume_token_ids=expected_ids(21, 3))
    ahead = await execute(session, scripted.url, body, after=3)
    assert (ahead.status, ahead.refusal["code"], ahead.refusal["errors"][0]["field"]) == (409, "CONFLICT", "after")
    assert "at most 2" in ahead.refusal["message"]
    assert all_free(await health(session, scripted.url))
    attach = {"task_id": body["task_id"], "attempt": 1, "attach_instance_id": "any"}
    assert (await execute(session, scripted.url, attach)).status == 404, "the attempt isn't known afterwards"
    taken = await execute(session, scripted.url, body, after=2)
    assert taken.ids == expected_ids(21, 250)[3:]


async def test_an_attempt_that_a_failover_has_undone_gives_way(
    scripted: WorkerProcess, session: aiohttp.ClientSession
) -> None:
    """Its number was handed out again, by a log that ends earlier or to a task that was admitted anew."""
    whole = expected_ids(21, 200)
    undone = request(seed=21, max_tokens=200, resume_token_ids=whole[:9])
    first = await execute(session, scripted.url, undone, stop_after=5)
    attach = {"task_id": undone["task_id"], "attempt": 1, "attach_instance_id": first.started["instance_id"]}
    for after in (-1, 3):
        assert (await execute(session, scripted.url, {**attach, "seed": 21}, after=after)).status == 404
    again = await execute(session, scripted.url, {**undone, "resume_token_ids": whole[:4]}, after=3)
    again.check(first_index=4)
    assert again.ids == whole[4:]
    other = await execute(session, scripted.url, {**undone, "seed": 22, "resume_token_ids": []})
    assert other.ids == expected_ids(22, 200)
    assert all_free(await health(session, scripted.url))


async def test_two_histories_of_one_attempt_at_a_time_never_mix(
    scripted: WorkerProcess, session: aiohttp.ClientSession
) -> None:
    """A chat is rendered in another process: both are being prepared when the first one starts."""
    body = request(messages=[{"role": "user", "content": "hi"}], max_tokens=200)
    streams = await asyncio.gather(*(execute(session, scripted.url, {**body, "seed": seed}) for seed in (31, 32)))
    for seed, stream in zip((31, 32), streams, strict=True):
        stream.check()
        assert stream.ids == expected_ids(seed, 200)[: len(stream.ids)]
    assert any(len(stream.ids) == 200 for stream in streams)
    assert all_free(await health(session, scripted.url))


async def test_attach_only_never_starts_work(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    unknown = request(attach_instance_id="some-other-instance", prompt="hello")
    assert (await execute(session, scripted.url, unknown)).status == 404
    body = request()
    await execute(session, scripted.url, body)
    other = await execute(session, scripted.url, {**body, "attach_instance_id": "another"})
    assert other.status == 404
    assert other.refusal["code"] == "NOT_FOUND"


async def test_several_readers_get_the_same(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    body = request(seed=33, max_tokens=100)
    streams = await asyncio.gather(*(execute(session, scripted.url, body) for _ in range(5)))
    for stream in streams:
        stream.check()
        assert stream.ids == expected_ids(33, 100)
        assert stream.end["stop_reason"] == "MAX_TOKENS"


async def test_a_higher_attempt_fences_the_lower_one(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    body = request(seed=8, max_tokens=200)
    lower = asyncio.create_task(execute(session, scripted.url, body))
    await until_health(session, scripted.url, lambda state: state["slots_free"] == 3)
    higher = await execute(session, scripted.url, {**body, "attempt": 2, "max_tokens": 5})
    assert higher.end["tokens_out"] == 5
    name, data = (await lower).terminal
    assert name == "preempted" and data["tokens_out"] == len((await lower).tokens)
    assert (await execute(session, scripted.url, {**body, "attempt": 1, "task_id": body["task_id"]})).status == 200
    assert (await execute(session, scripted.url, {**body, "attempt": 0})).status == 400
    await post(session, scripted.url, "/ack", {"task_id": body["task_id"], "attempt": 1})
    assert (await execute(session, scripted.url, body)).status == 409


@pytest.mark.parametrize("reason", ["cancel", "preempt", "deadline", "fenced"])
async def test_cancel_at_every_point_frees_the_slot(
    scripted: WorkerProcess, session: aiohttp.ClientSession, reason: str
) -> None:
    for count in (0, 1, 7):
        body = request(seed=4, max_tokens=250)
        reached = asyncio.Event()
        seen = 0

        def count_tokens(
            name: str, _data: dict[str, Any], count: int = count, reached: asyncio.Event = reached
        ) -> None:
            nonlocal seen
            seen += name == "token"
            if seen >= count:
                reached.set()

        running = asyncio.create_task(execute(session, scripted.url, body, on_event=count_tokens))
        await asyncio.wait_for(reached.wait(), 30)
        ref = {"task_id": body["task_id"], "attempt": 1, "reason": reason}
        status, reply = await post(session, scripted.url, "/cancel", ref)
        assert (status, reply["found"]) == (200, True)
        assert (await health(session, scripted.url))["slots_free"] == 4, "the slot is free when the answer comes"
        stream = await running
        stream.check()
        name, data = stream.terminal
        assert data["tokens_out"] == len(stream.tokens) == reply["tokens_out"]
        if reason in ("preempt", "fenced"):
            assert name == "preempted"
        else:
            assert (name, data["stop_reason"]) == ("end", "CANCELLED")
        again = await post(session, scripted.url, "/cancel", ref)
        assert again == (200, {"found": True, "tokens_out": reply["tokens_out"]})


async def test_a_cancel_that_overtakes_its_execute(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    body = request(attempt=3)
    status, reply = await post(session, scripted.url, "/cancel", {"task_id": body["task_id"], "attempt": 3})
    assert (status, reply["found"]) == (200, False)
    for attempt in (1, 3):
        late = await execute(session, scripted.url, {**body, "attempt": attempt})
        assert (late.status, late.refusal["code"]) == (409, "CONFLICT")
    assert (await execute(session, scripted.url, {**body, "attempt": 4})).end["tokens_out"] == 16


async def test_no_slot_means_503_at_once(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    bodies = [request(seed=n, max_tokens=250) for n in range(4)]
    running = [asyncio.create_task(execute(session, scripted.url, body)) for body in bodies]
    await until_health(session, scripted.url, lambda state: state["slots_free"] == 0)
    refused = await execute(session, scripted.url, request())
    assert (refused.status, refused.refusal["code"]) == (503, "OVERLOADED")
    assert int(refused.headers["Retry-After"]) >= 1
    assert "retry after retry_after_ms" in refused.refusal["message"] and "--slots" in refused.refusal["message"]
    assert refused.refusal["retry_after_ms"] >= 1000
    attached = await execute(session, scripted.url, bodies[0], after=0, stop_after=1)
    assert attached.status == 200, "attaching needs no slot"
    for body in bodies:
        await post(session, scripted.url, "/cancel", {"task_id": body["task_id"], "attempt": 1})
    await asyncio.gather(*running)
    await until_health(session, scripted.url, all_free)


async def test_one_failing_sequence_fails_alone(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    other = asyncio.create_task(execute(session, scripted.url, request(seed=9, max_tokens=100)))
    failing = await execute(session, scripted.url, request(seed=ERROR))
    name, data = failing.terminal
    assert (name, data["code"], data["retriable"]) == ("error", "INTERNAL", True)
    assert (await other).ids == expected_ids(9, 100)


async def test_a_generation_that_nobody_reads_yields_after_its_grace(
    scripted: WorkerProcess, session: aiohttp.ClientSession
) -> None:
    body = request(seed=2, max_tokens=None, prompt_token_ids=[9])
    slow = {**body, "resume_token_ids": []}
    first = await execute(session, scripted.url, slow, stop_after=1)
    await until_health(session, scripted.url, all_free)
    again = await execute(session, scripted.url, body)
    assert again.terminal[0] in ("end", "preempted")
    assert again.ids[:1] == first.ids[:1]


async def test_two_hundred_dropped_connections_leak_nothing(
    scripted: WorkerProcess, session: aiohttp.ClientSession
) -> None:
    async def drop(number: int) -> Stream:
        return await execute(session, scripted.url, request(seed=number, max_tokens=250), stop_after=1 + number % 3)

    served = 0
    for start in range(0, 200, 20):
        streams = await asyncio.gather(*(drop(start + n) for n in range(20)))
        assert {stream.status for stream in streams} <= {200, 503}
        served += sum(stream.status == 200 for stream in streams)
        await until_health(session, scripted.url, all_free)
    assert served >= 20
    async with session.get(f"{scripted.url}/metrics") as reply:
        lines = (await reply.text()).splitlines()
    assert "worker_streams_open 0.0" in lines
    assert "worker_generations_running 0.0" in lines
    assert "worker_slots_used 0.0" in lines


async def test_silence_is_filled_with_comments(scripted: WorkerProcess, session: aiohttp.ClientSession) -> None:
    """The orchestrator takes 2.5 s without a byte for a stall."""
    body = request(seed=77, max_tokens=250)
    raw = b""
    async with session.post(f"{scripted.url}/execute", json=body) as reply:
        async for chunk in reply.content.iter_any():
            raw += chunk
    assert b"event: token" in raw and raw.endswith(b"\n\n")
    metrics = [line for line in raw.split(b"\n") if line.startswith(b'data: {"tokens_per_second"')]
    assert len(metrics) <= 3, "at most one a second"
    for line in metrics:
        assert json.loads(line.removeprefix(b"data: "))["tokens_per_second"] > 0
