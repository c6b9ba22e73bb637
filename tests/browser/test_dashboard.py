"""The dashboard in a real browser: it shows what is there, streams a prompt, and its console stays silent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.browser.chromium import Chromium, Page
from tests.support.scripted_tokens import expected

pytestmark = pytest.mark.e2e

ADMIN_KEY, WORKER_KEY = "admin-key-0123456789", "worker-key-0123456789"
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"

OpenHouse = Callable[..., Any]


async def picture(page: Page, name: str) -> None:
    """Keeps a screenshot where LLORCH_SCREENSHOTS names a folder."""
    if folder := os.environ.get("LLORCH_SCREENSHOTS"):
        await page.screenshot(Path(folder) / f"{name}.png")


async def test_it_shows_queue_and_workers_and_streams_a_prompt(chromium: Chromium, open_house: OpenHouse) -> None:
    async with open_house() as house:
        page = await chromium.open(house.url)
        await page.until("document.querySelector('#state').textContent === 'ready'")
        assert await page.until("document.querySelector('#workers').innerText.includes('w1')")
        assert "ready" in await page.text("#workers") and await page.text("#slots") == "0/8"
        await page.until("document.querySelector('#events').children.length > 0")
        assert await page.run("document.querySelector('#problem').hidden")
        assert await page.run("document.querySelector('#model').value") == "scripted"

        await page.type("#prompt", "Tell me <b>a story</b>")
        await page.type("#max_tokens", "60")
        await page.type("#seed", "3")
        await page.click("#run")
        await page.until("document.querySelector('#progress').textContent.includes('tokens in')")
        tokens, reason = expected(3, 60)
        assert await page.text("#output") == "".join(token.t for token in tokens)
        assert (await page.text("#progress")).startswith(f"{reason}: {len(tokens)} tokens in ")
        assert await page.run("document.querySelector('#stop').disabled && !document.querySelector('#run').disabled")
        await picture(page, "dashboard")
        assert page.complaints == []
        asked = {"/".join(url.split("/")[:3]) for url in page.requests if not url.startswith("data:")}
        assert asked == {house.url}, "nothing comes from elsewhere"


async def test_a_waiting_queue_is_shown_and_a_stream_is_stopped(chromium: Chromium, open_house: OpenHouse) -> None:
    async with open_house(token_ms=50) as house:
        page = await chromium.open(house.url)
        await page.until("document.querySelector('#model').value === 'scripted'")
        await page.type("#max_tokens", "2000")
        await page.click("#run")
        await page.until("document.querySelector('#output').textContent.length > 20")
        body = {"model": "scripted", "prompt": "x", "max_tokens": 500, "ignore_eos": True}
        async with aiohttp.ClientSession() as http:
            for _ in range(14):
                async with http.post(f"{house.url}/v2/tasks", json=body) as reply:
                    assert reply.status == 202
        await page.until("Number(document.querySelector('#depth').textContent) > 0")
        await page.until("document.querySelector('#slots').textContent === '8/8'")
        assert "scripted" in await page.text("#queue") and "interactive" in await page.text("#queue")
        await picture(page, "busy")
        await page.click("#stop")
        await page.until("document.querySelector('#progress').textContent.startsWith('CANCELLED')")
        assert page.complaints == []


async def test_a_lost_worker_is_said(chromium: Chromium, open_house: OpenHouse) -> None:
    async with open_house() as house:
        page = await chromium.open(house.url)
        await page.until("document.querySelector('#workers').innerText.includes('w1')")
        await house.worker.die()
        await page.until("document.querySelector('#problem').textContent.includes('w1')")
        await page.until("document.querySelector('#events').innerText.includes('worker w1 lost: ')")
        assert "worker w1 registered: scripted in pool local" in await page.text("#events")
        await picture(page, "lost")
        assert page.complaints == []


async def test_a_key_opens_it(chromium: Chromium, open_house: OpenHouse) -> None:
    async with open_house(keys=f"acme=client-key-0123456789,admin={ADMIN_KEY}", worker_key=WORKER_KEY) as house:
        page = await chromium.open(house.url)
        await page.until("!document.querySelector('#problem').hidden")
        assert await page.text("#problem") == "This server needs a key: type it above."
        assert await page.run("document.querySelector('#run').disabled")
        await page.type("#key", "wrong-key-0123456789")
        await page.until("document.querySelector('#problem').textContent === \"The server doesn't know this key.\"")
        assert await page.text("#workers") == ""
        await picture(page, "no-key")

        await page.type("#key", "client-key-0123456789")
        await page.until("document.querySelector('#problem').textContent.includes('tenant admin')")
        await page.type("#prompt", "Hello")
        await page.click("#run")
        await page.until("document.querySelector('#progress').textContent.includes('tokens in')")

        await page.type("#key", ADMIN_KEY)
        await page.until("document.querySelector('#workers').innerText.includes('w1')")
        await page.until("document.querySelector('#problem').hidden")
        await page.until("document.querySelector('#events').children.length > 0")
        assert await page.run("document.cookie + JSON.stringify(localStorage)") == "{}", "the key ends with the tab"
        assert not [url for url in page.requests if ADMIN_KEY in url], "a key never stands in a URL"
        # The browser itself reports refused requests; anything else would be ours.
        assert [line for line in page.complaints if not line.startswith("network: Failed to load resource")] == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_it_fits_a_phone(chromium: Chromium, open_house: OpenHouse, dark: bool) -> None:
    async with open_house() as house:
        page = await chromium.open(house.url, width=380, height=800)
        await page.resize(380, 800, dark=dark)
        await page.until("document.querySelector('#workers').innerText.includes('w1')")
        await page.click("#run")
        await page.until("document.querySelector('#progress').textContent.includes('tokens in')")
        await picture(page, f"phone-{'dark' if dark else 'light'}")
        assert await page.run(FITS), "the page itself never scrolls sideways"
        outside = (
            "[...document.querySelectorAll('header *, section, input, select, textarea, button')].filter(e => "
            "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.id || e.tagName)"
        )
        assert await page.run(outside) == []
        await page.call("Page.navigate", url=f"{house.url}/docs")
        await page.until("document.querySelectorAll('details').length > 5")
        await picture(page, f"phone-docs-{'dark' if dark else 'light'}")
        assert await page.run(FITS)
        assert page.complaints == []


async def test_the_reference_is_drawn(chromium: Chromium, open_house: OpenHouse) -> None:
    async with open_house() as house:
        page = await chromium.open(f"{house.url}/docs")
        await page.until("document.querySelectorAll('details').length > 5")
        assert "/v2/tasks" in await page.run("document.body.innerText")
        await picture(page, "docs")
        await page.run("document.querySelectorAll('details').forEach(e => { e.open = true; })")
        assert await page.run(FITS)
        assert page.complaints == []


async def test_a_seed_keeps_all_its_digits(chromium: Chromium, open_house: OpenHouse) -> None:
    seed = 2**63 - 1  # a number in JavaScript has 53 bits
    async with open_house() as house:
        page = await chromium.open(house.url)
        await page.until("!document.querySelector('#run').disabled")
        await page.type("#seed", "1e3")
        await page.click("#run")
        assert await page.text("#progress") == "", "refused by the page itself"
        await page.type("#seed", str(seed))
        await page.run(
            "window.seen = ''; new MutationObserver(() => { window.seen += progress.textContent + ';'; })"
            ".observe(document.getElementById('progress'), {childList: true})"
        )
        await page.click("#run")
        await page.until("document.querySelector('#progress').textContent.includes('tokens in')")
        assert f"seed {seed};" in await page.run("window.seen")
        tokens, _ = expected(seed, 200)
        assert await page.text("#output") == "".join(token.t for token in tokens)
        assert page.complaints == []
