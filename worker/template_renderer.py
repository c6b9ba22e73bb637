"""Asks the template process to render chats, one at a time, and replaces it when it dies.

Read `TemplateRenderer.render` first.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from worker.chat_template import ChatTemplateError
from worker.launch import child_command, child_environment

ANSWER_DEADLINE_S = 15.0
"""Wall time; the process' own CPU limit is 2 s. The rest is for a machine that is busy with other things."""
MAX_DEATHS = 3
MAX_ANSWER_BYTES = 128 * 2**20


class TemplateRenderer:
    """Owns at most one template process. A template that killed its process three times is not tried again."""

    def __init__(self, template: str, variables: Mapping[str, str]) -> None:
        self._opening = {"template": template, "variables": dict(variables)}
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._deaths = 0

    async def warm_up(self) -> None:
        """Start the process, so that the first chat doesn't wait for it. A bad template is reported by `render`."""
        async with self._lock:
            if self._process is None:
                with suppress(ChatTemplateError):
                    await self._start()

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Rendered chat. Raises ChatTemplateError when the template refuses, fails or goes over its bounds."""
        async with self._lock:
            if self._deaths >= MAX_DEATHS:
                raise ChatTemplateError(
                    f"the model's chat template went over its time or memory bound {MAX_DEATHS} times and is switched "
                    "off; send `prompt` or `prompt_token_ids` instead"
                )
            if self._process is None:
                await self._start()
            return await self._ask({"messages": [dict(message) for message in messages]})

    async def aclose(self) -> None:
        """End the process and wait for it."""
        async with self._lock:
            await self._stop()

    async def _start(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *child_command("worker.template_process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=child_environment(os.environ),
                limit=MAX_ANSWER_BYTES,
            )
        except OSError as error:
            raise ChatTemplateError(f"the process for chat templates can't be started: {error.strerror}") from error
        try:
            await self._ask(self._opening)
        except ChatTemplateError:
            await self._stop()  # it ends by itself after refusing the template
            raise

    async def _ask(self, request: object) -> str:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        line = b""
        answered = False
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
            answered = line.endswith(b"\n")
        except (TimeoutError, ConnectionError, ValueError):
            pass
        finally:
            # Also when the caller is cancelled: the answer to a question nobody waits for must not meet the next one.
            if not answered:
                await self._stop()
        if not answered:
            self._deaths += 1
            raise ChatTemplateError("the model's chat template took too long or too much memory for these messages")
        answer = json.loads(line)
        if "error" in answer:
            raise ChatTemplateError(answer["error"])
        return str(answer["text"])

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.wait()
