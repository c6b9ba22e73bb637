"""How `llorch up` ends: what asks for it, and the order in which the parts go.

Read `Stopper.stop_parts` first. Workers drain and end, then orchestratord hands over and ends, then Redis, which has
everything that is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Generator, Sequence

from llorch.up.part import Part
from llorch.up.plan import WORKER_DRAIN_S
from llorch.up.report import Reporter

GRACE_S: dict[str, float] = {"worker": WORKER_DRAIN_S + 8.0, "orchestratord": 10.0, "redis": 15.0}
POLL_S = 0.1


class Stopper:
    """Knows whether a stop was asked for (`stopping`), and whether it has to be at once (`hurry`)."""

    def __init__(self, report: Reporter) -> None:
        self.stopping = asyncio.Event()
        self.hurry = asyncio.Event()
        self._report = report

    @contextlib.contextmanager
    def signals(self) -> Generator[None]:
        """Ctrl-C, SIGTERM and a closed terminal stop in order; a second Ctrl-C stops at once."""
        loop = asyncio.get_running_loop()
        handled = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means it
            handled.append(signal.SIGHUP)
        for number in handled:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self.stopping.is_set():
            text = f"stopping: what runs has {WORKER_DRAIN_S:.0f} s to end, the rest goes on at the next start"
            self._report.say("stopping", f"{text} (Ctrl-C again: at once)", signal=number.name)
            self.stopping.set()
        elif number == signal.SIGINT and not self.hurry.is_set():
            self._report.say("killing", "stopping at once")
            self.hurry.set()

    async def stop_parts(self, parts: Sequence[Part]) -> None:
        """End every part, each kind within its grace; what is then left is killed."""
        for kind, grace_s in GRACE_S.items():
            stage = [part for part in parts if part.kind == kind]
            for part in stage:
                part.release()
                part.signal(signal.SIGTERM)
            await self._gone(stage, grace_s)
            left = [part for part in stage if part.is_running]
            for part in left:
                if not self.hurry.is_set():
                    self._report.say("killed", f"{part.name} didn't end within {grace_s:.0f} s: killed", part=part.name)
                part.kill()
            await self._gone(left, grace_s, even_in_a_hurry=True)

    async def _gone(self, parts: Sequence[Part], grace_s: float, *, even_in_a_hurry: bool = False) -> None:
        """Until none of them runs, at most for the grace."""
        deadline = time.monotonic() + grace_s
        while any(part.is_running for part in parts) and time.monotonic() < deadline:
            if self.hurry.is_set():
                if not even_in_a_hurry:
                    return
                await asyncio.sleep(POLL_S / 10)
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.hurry.wait(), POLL_S)
