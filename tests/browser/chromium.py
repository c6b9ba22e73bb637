"""A headless Chromium, driven over its DevTools protocol. Read `Page` first.

async with browser(folder) as chromium:
    page = await chromium.open(url)
    await page.until("document.title === 'llorch'")
    assert page.complaints == []
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

START_S = 60.0
ANSWER_S = 30.0
CONDITION_S = 30.0
FLAGS = [
    "--headless",
    "--no-sandbox",  # tests run as root in CI
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--remote-debugging-port=0",
]


def find() -> str | None:
    """Path of a Chromium or Chrome, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Page:
    """One tab. `complaints` collects what its console said: errors, warnings, exceptions, policy violations."""

    def __init__(self, chromium: Chromium, session: str) -> None:
        self._chromium = chromium
        self.session = session
        self.complaints: list[str] = []
        self.requests: list[str] = []
        """URL of every request."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command."""
        return await self._chromium.call(method, self.session, **parameters)

    async def run(self, expression: str) -> Any:
        """Value of a JavaScript expression; promises are awaited."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until an expression is truthy; its value."""
        try:
            async with asyncio.timeout(CONDITION_S):
                while not (value := await self.run(expression)):
                    await asyncio.sleep(0.03)
                return value
        except TimeoutError:
            shown = await self.run("document.body.innerText")
            raise AssertionError(f"never: {expression}\nconsole: {self.complaints}\npage:\n{shown}") from None

    async def text(self, selector: str) -> str:
        """Text of an element."""
        return await self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    async def click(self, selector: str) -> None:
        """A real click at the middle of an element, which must be visible there."""
        found = f"document.querySelector({json.dumps(selector)})"
        place = await self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            "const x = r.x + r.width / 2, y = r.y + r.height / 2;"
            f"return {{x, y, hit: e.contains(document.elementFromPoint(x, y))}}; }})({found})"
        )
        assert place["hit"], f"{selector} is covered"
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent", type=kind, x=place["x"], y=place["y"], button="left", clickCount=1
            )

    async def type(self, selector: str, text: str) -> None:
        """Focus a field, replace what stands in it and leave it by Tab."""
        await self.click(selector)
        await self.run(f"document.querySelector({json.dumps(selector)}).select()")
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)

    async def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Width and height in CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)

    async def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def take(self, method: str, parameters: dict[str, Any]) -> None:
        """An event of this tab."""
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(part.get("value", part)) for part in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            entry = parameters["entry"]
            self.complaints.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}".strip())
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])


class Chromium:
    """A running browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._last = 0

    async def open(self, url: str, *, width: int = 1100, height: int = 900) -> Page:
        """A new tab at a URL, in a profile of its own."""
        context = await self.call("Target.createBrowserContext")
        target = await self.call("Target.createTarget", url="about:blank", browserContextId=context["browserContextId"])
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, attached["sessionId"])
        self._pages[page.session] = page
        for domain in ("Runtime", "Log", "Page", "Network"):
            await page.call(f"{domain}.enable")
        await page.resize(width, height)
        answer = await page.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        await page.until("document.readyState === 'complete'")
        return page

    async def call(self, method: str, session: str | None = None, /, **parameters: Any) -> dict[str, Any]:
        """One command; AssertionError when the browser refuses it."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        future = self._waiting[self._last] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(message)
        async with asyncio.timeout(ANSWER_S):
            answer = await future
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def listen(self) -> None:
        """Hands answers and events on, until the browser ends."""
        async for message in self._socket:
            content = json.loads(message.data)
            if "id" in content:
                if not (future := self._waiting.pop(content["id"])).done():
                    future.set_result(content)
            elif (page := self._pages.get(content.get("sessionId", ""))) is not None:
                page.take(content["method"], content["params"])


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Chromium]:
    """A browser with a profile in `folder`; all of its processes are gone at the end."""
    program = find()
    assert program is not None
    profile = folder / "profile"
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)},
            start_new_session=True,
        )
    try:
        port, path = await _port_of(process, profile, folder / "chromium.log")
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"ws://127.0.0.1:{port}{path}", max_msg_size=2**27) as socket,
            asyncio.TaskGroup() as group,
        ):
            chromium = Chromium(socket)
            listening = group.create_task(chromium.listen())
            try:
                yield chromium
            finally:
                listening.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


async def _port_of(process: subprocess.Popen[bytes], profile: Path, log: Path) -> tuple[str, str]:
    """Port and path of the DevTools socket, from the file in which Chromium tells them."""
    told = profile / "DevToolsActivePort"
    async with asyncio.timeout(START_S):
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            if told.exists() and len(lines := told.read_text().split()) == 2:
                return lines[0], lines[1]
            await asyncio.sleep(0.05)
