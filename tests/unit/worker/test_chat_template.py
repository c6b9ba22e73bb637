"""Templates render as transformers renders them, in a sandbox, and hostile ones end in an error."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from llorch_demo import MODEL_DIR
from worker.chat_template import ChatTemplate, ChatTemplateError
from worker.template_renderer import MAX_DEATHS, TemplateRenderer

CHAT = [
    {"role": "system", "content": "Be brief. <b>&amp;</b>"},
    {"role": "user", "content": "Hi é😀 \n  there"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "  A 'quoted' \"thing\"  "},
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "llama2": """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' '  + message['content'] + eos_token }}
{% endif %}
{% endfor %}""",
    "chatml": """{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "namespaces": """{% set ns = namespace(n=0) %}{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m | tojson }}{{ m.content[::-1] }}{% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}{{ messages | tojson(indent=2) }}{{ dict(a=1)['a'] }}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}""",
    "date": "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "demo": (MODEL_DIR / "chat_template.jinja").read_text(),
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_equal_to_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template([CHAT], chat_template=TEMPLATES[name], add_generation_prompt=True, **VARIABLES)
    assert ChatTemplate(TEMPLATES[name], VARIABLES).render(CHAT) == expected[0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "isn't valid"),
        ("{{ messages.append(1) }}", "may not"),
        ("{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}", "may not"),
        ("{{ messages[0].nothing.more }}", "refused"),
        ("{{ 1 / 0 }}", "failed"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "memory"),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "more than"),
        ("{{ range(10 ** 9) }}", "failed"),
    ],
)
def test_a_template_that_fails_says_so(source: str, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        ChatTemplate(source, VARIABLES).render(CHAT)


@pytest_asyncio.fixture
async def renderer() -> AsyncIterator[Callable[[str], TemplateRenderer]]:
    made: list[TemplateRenderer] = []

    def make(template: str) -> TemplateRenderer:
        made.append(TemplateRenderer(template, VARIABLES))
        return made[-1]

    yield make
    for each in made:
        await each.aclose()


async def test_the_process_renders_many(renderer: Callable[[str], TemplateRenderer]) -> None:
    one = renderer(TEMPLATES["chatml"])
    expected = ChatTemplate(TEMPLATES["chatml"], VARIABLES).render(CHAT)
    assert await asyncio.gather(*(one.render(CHAT) for _ in range(5))) == [expected] * 5


@pytest.mark.parametrize(
    "hostile",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 11 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 10 ** (messages | length * 10 ** 9) }}",
        "{% set ns = namespace(s='x') %}{% for a in range(90) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    ],
    ids=["loops", "memory", "power", "late-power", "doubling"],
)
async def test_hostile_templates_cost_bounded_time_and_memory(
    renderer: Callable[[str], TemplateRenderer], hostile: str
) -> None:
    with pytest.raises(ChatTemplateError):
        await renderer(hostile).render(CHAT)


async def test_a_template_that_keeps_dying_is_switched_off(renderer: Callable[[str], TemplateRenderer]) -> None:
    one = renderer("{% if messages[0].content == 'die' %}{{ 10 ** (messages | length * 10 ** 10) }}{% endif %}fine")
    assert await one.render([{"role": "user", "content": "live"}]) == "fine"
    for _ in range(MAX_DEATHS):
        with pytest.raises(ChatTemplateError, match="too long"):
            await one.render([{"role": "user", "content": "die"}])
    with pytest.raises(ChatTemplateError, match="switched off"):
        await one.render([{"role": "user", "content": "live"}])


async def test_an_invalid_template_is_refused_each_time(renderer: Callable[[str], TemplateRenderer]) -> None:
    one = renderer("{% for %}")
    await one.warm_up()
    for _ in range(MAX_DEATHS + 2):
        with pytest.raises(ChatTemplateError, match="isn't valid"):
            await one.render(CHAT)


async def test_no_secret_reaches_the_process(
    renderer: Callable[[str], TemplateRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLORCH_WORKER_KEY", "correct-horse-battery")
    one = renderer("x")
    await one.warm_up()
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    environments: list[bytes] = []
    for pid in children:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # an earlier test's, just ended
            environments.append(Path(f"/proc/{pid}/environ").read_bytes())
    assert any(environments) and not any(b"correct-horse" in environment for environment in environments)
