"""The stack of `llorch up`: parent of Redis, orchestratord and the workers. Read `Stack.run` first.

Who wins?
    a part dies / a stop begins          the stop: a released part isn't started again, a pause before a restart ends
    a part dies while it starts again    its own task does both, one after the other
    ready file / a pid changes           the file is written anew after every start, once it has been written at all
    first Ctrl-C / second                the second: SIGKILL to all, whatever the stop was waiting for
    this process is killed               the kernel kills every child (see `part`), and each of those its own
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llorch.errors import CliError, ExitCode
from llorch.up.datadir import DataDir, write_json
from llorch.up.logs import Highlights, LogFile
from llorch.up.part import Part, child_environment, describe_exit, tied
from llorch.up.plan import (
    PartPlan,
    UpOptions,
    is_loopback,
    local_url,
    log_file,
    orchestratord_plan,
    redis_plan,
    release_command,
    restart_delay_s,
    worker_plan,
)
from llorch.up.readiness import Questions, WorkerState, redis_url
from llorch.up.report import Reporter, Summary, announcement
from llorch.up.stop import Stopper

READY_POLL_S = 0.2
LOG_POLL_S = 0.5
REDIS_START_DEADLINE_S = 300.0
"""Redis, which may have much to read. A worker bounds its loading by itself."""
RELEASE_DEADLINE_S = 10.0
OWN_EXITS_BEFORE_READY = 2
USAGE_EXIT = 2


@dataclass(frozen=True)
class Plans:
    """How parts are started. Tests put other programs in."""

    redis: Callable[[Path, Path], PartPlan] = redis_plan
    orchestratord: Callable[[UpOptions, int, str, dict[str, str]], PartPlan] = orchestratord_plan
    worker: Callable[[UpOptions, str, int, str, dict[str, str]], PartPlan] = worker_plan
    release: Callable[[str], list[str]] = release_command


class Stack:
    """One life of `llorch up` on an opened data folder."""

    def __init__(
        self,
        options: UpOptions,
        data: DataDir,
        keys: dict[str, str],
        key_file: Path | None,
        report: Reporter,
        plans: Plans | None = None,
    ) -> None:
        self._options = options
        self._data = data
        self._keys = keys
        self._key_file = key_file
        self._report = report
        self._plans = plans or Plans()
        self._port = data.port(options.host, options.port)
        self._url = local_url(options.host, self._port)
        self._questions = Questions(self._url, keys.get("LLORCH_WORKER_KEY"))
        self._redis_file = data.path / "redis-ready.json"
        self._redis_url = options.redis_url
        self._parts: list[Part] = []
        self._model = options.model
        self._is_up = False
        self._stopper = Stopper(report)
        self._changed = asyncio.Event()
        self._failure: CliError | None = None

    async def run(self) -> int:
        """Start everything, keep it running, stop it in order. Returns the exit code once nothing is left.

        Raises CliError when the stack can't be brought up.
        """
        if self._options.ready_file is not None:
            self._options.ready_file.unlink(missing_ok=True)
        try:
            with self._stopper.signals():
                async with asyncio.TaskGroup() as group:
                    helpers = [group.create_task(self._bring_up(group)), group.create_task(self._watch_logs())]
                    await self._stopper.stopping.wait()
                    for helper in helpers:
                        helper.cancel()
                    await self._stopper.stop_parts(self._parts)
                    await asyncio.to_thread(self._release_workers)
        finally:
            for part in self._parts:
                part.kill()
            if self._options.ready_file is not None:
                self._options.ready_file.unlink(missing_ok=True)
        if self._failure is not None:
            raise self._failure
        self._report.say("stopped", "llorch: stopped; `llorch up` goes on from here")
        return ExitCode.INTERRUPTED if self._stopper.hurry.is_set() else ExitCode.OK

    # ---- starting ----------------------------------------------------------------------------------------------------

    async def _bring_up(self, group: asyncio.TaskGroup) -> None:
        """Workers first, since loading a model takes longest; they register once orchestratord is there."""
        options = self._options
        ids, ports = self._data.worker_ids(options.workers), self._data.worker_ports(options.workers)
        workers = [
            self._part(self._plans.worker(options, name, port, self._url, self._keys), f"http://127.0.0.1:{port}")
            for name, port in zip(ids, ports, strict=True)
        ]
        for part in workers:
            group.create_task(self._keep_running(part))
        if self._redis_url is None:
            redis = self._part(self._plans.redis(self._data.path, self._redis_file), "")
            group.create_task(self._keep_running(redis))
            self._redis_url = redis.url = await self._url_of_redis(redis)
            redis.ready = redis.was_ready = True
        plan = self._plans.orchestratord(options, self._port, self._redis_url, self._keys)
        group.create_task(self._keep_running(self._part(plan, self._url)))
        await self._watch_readiness()

    def _part(self, plan: PartPlan, url: str) -> Part:
        part = Part(plan, url, LogFile(log_file(self._data.path, plan.name)))
        self._parts.append(part)
        return part

    async def _url_of_redis(self, part: Part) -> str:
        """The embedded Redis' URL, once it says so. One that never does ends the start."""
        deadline = time.monotonic() + REDIS_START_DEADLINE_S
        while (url := redis_url(self._redis_file)) is None:
            if time.monotonic() > deadline:
                self._give_up(part, f"wasn't ready within {REDIS_START_DEADLINE_S:.0f} s")
            self._report.progress({part.name: "starting" for part in self._parts})
            await asyncio.sleep(READY_POLL_S)
        return url

    async def _keep_running(self, part: Part) -> None:
        """Start a part, wait for its end, start it again, until it is released."""
        while part.wanted:
            if part.kind == "redis":
                self._redis_file.unlink(missing_ok=True)
            try:
                part.spawn()
            except OSError as error:
                self._give_up(part, f"can't be started: {error.strerror}")
                return
            self._pids_changed()
            status = await part.exited()
            self._changed.set()
            if part.wanted:
                await self._after_death(part, status)

    async def _after_death(self, part: Part, status: int) -> None:
        """Say that a part died and pause before it is started again; give up on one that never worked."""
        how = describe_exit(status)
        hopeless = not part.was_ready and (part.own_exits >= OWN_EXITS_BEFORE_READY or status == USAGE_EXIT)
        if hopeless and not self._is_up:
            self._give_up(part, how)
            return
        delay_s = restart_delay_s(part.deaths, time.monotonic())
        when = f"starting it again in {delay_s:.0f} s" if delay_s else "starting it again at once"
        pid = part.pid
        self._report.say(
            "restarting",
            f"{part.name} (pid {pid}) {how}; {when}, same address",
            part=part.name, pid=pid, status=status, delay_s=delay_s,
        )  # fmt: skip
        if status > 0:
            for line in part.log.tail(3):
                self._report.say("log", f"  {part.name}: {line}", part=part.name, line=line)
        if delay_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(part.released.wait(), delay_s)

    def _give_up(self, part: Part, how: str) -> None:
        """End the start: the failure is raised by `run` after everything was stopped."""
        tail = "\n".join(f"    {line}" for line in part.log.tail())
        message = f"{part.name} {how}" + (f"; the end of its log:\n{tail}" if tail else "")
        if self._failure is None:
            self._failure = CliError(message, next_step=f"less {part.log.path}")
        self._stopper.stopping.set()

    def _release_workers(self) -> None:
        """Take our workers off llorch-pool's record. One that can't be taken off shows there as ended."""
        if any(part.kind == "worker" and part.pid for part in self._parts):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    tied(self._plans.release(self._data.prefix())),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=child_environment(os.environ, {}),
                    start_new_session=True,
                    timeout=RELEASE_DEADLINE_S,
                )

    # ---- ready -------------------------------------------------------------------------------------------------------

    async def _watch_readiness(self) -> None:
        """Ask the parts until all take work; then again whenever one has died."""
        while True:
            self._changed.clear()
            states = await self._look()
            if all(part.ready for part in self._parts):
                if not self._is_up:
                    self._announce()
                    kept = {part.name for part in self._parts}
                    await self._questions.forget_others(self._data.prefix(), kept)
                await self._changed.wait()
            else:
                if not self._is_up:
                    self._report.progress(states)
                await asyncio.sleep(READY_POLL_S)

    async def _look(self) -> dict[str, str]:
        """Ask every part, note those that have begun to take work, and return where each stands, in words."""
        states: dict[str, str] = {}
        workers = {part.name: part.url for part in self._parts if part.kind == "worker"}
        trouble, found = await asyncio.gather(self._questions.orchestratord(), self._questions.workers(workers))
        for part in self._parts:
            if not part.is_running:
                states[part.name] = "down"
            elif part.kind == "redis":
                states[part.name] = "ready" if redis_url(self._redis_file) else "starting"
            elif part.kind == "orchestratord":
                states[part.name] = trouble or "ready"
            else:
                states[part.name] = self._worker_words(part, found[part.name])
            takes_work = states[part.name] == "ready" or states[part.name].startswith("drained")
            if takes_work and not part.ready:
                self._now_ready(part)
        return states

    def _worker_words(self, part: Part, state: WorkerState) -> str:
        self._model = state.model or self._model
        if state.is_drained:
            if not part.ready:
                text = f"{part.name} is drained, as it was left; to give it tasks: llorch worker undrain {part.name}"
                self._report.say("drained", text, part=part.name)
            return "drained"
        return "ready" if state.takes_work else state.text

    def _now_ready(self, part: Part) -> None:
        again = part.was_ready
        part.ready = part.was_ready = True
        seconds = time.monotonic() - part.begun
        if self._is_up and again:
            text = f"{part.name} (pid {part.pid}) is back after {seconds:.1f} s"
            self._report.say("ready", text, part=part.name, pid=part.pid, seconds=round(seconds, 3))

    def _announce(self) -> None:
        self._is_up = True
        self._pids_changed()
        options = self._options
        summary = Summary(
            url=self._url,
            model=self._model,
            workers=options.workers,
            data_dir=self._data.path,
            key_file=self._key_file,
            needs_key="LLORCH_API_KEYS" in self._keys,
            network_url=None
            if is_loopback(options.host)
            else local_url(options.advertised_host or options.host, self._port),
        )
        self._report.say("up", announcement(summary), model=self._model, **self._addresses())

    def _network_url(self) -> str | None:
        host = self._options.host
        return None if is_loopback(host) else local_url(self._options.advertised_host or host, self._port)

    def _pids_changed(self) -> None:
        """Write down who runs: for the next `up`, and for whoever reads the ready file."""
        self._data.record_running([part.pid for part in self._parts if part.is_running and part.pid])
        if self._is_up and self._options.ready_file is not None:
            write_json(self._options.ready_file, self._addresses())

    def _addresses(self) -> dict[str, Any]:
        """The content of the ready file."""
        by_kind = {part.kind: part for part in self._parts if part.kind != "worker"}
        redis = by_kind.get("redis")
        return {
            "orchestratord": {"url": self._url, "pid": by_kind["orchestratord"].pid},
            "redis": {
                "url": without_password(self._redis_url or ""),
                "pid": None if redis is None else redis.pid,
            },
            "workers": [
                {"worker_id": part.name, "url": part.url, "pid": part.pid}
                for part in self._parts
                if part.kind == "worker"
            ],
        }

    # ---- logs --------------------------------------------------------------------------------------------------------

    async def _watch_logs(self) -> None:
        """Show what the parts warn of, and keep their files within bounds."""
        highlights = Highlights()
        while True:
            for part in list(self._parts):
                for line in highlights.choose(part.name, part.log.new_lines()):
                    self._report.say("log", f"{part.name}: {line}", part=part.name, line=line)
                part.log.rotate()
            await asyncio.sleep(LOG_POLL_S)


def without_password(url: str) -> str:
    """A Redis URL without what only its owner should know."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if separator and "@" in rest else url
