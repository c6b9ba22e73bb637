"""Renders a model's chat template, as transformers does, in a sandbox. The template comes from the model: not trusted.

Read `ChatTemplate.render` first. It is bounded in output only; time and memory are bounded by the process that it runs
in (`template_process`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from llorch_wire.errors import LlorchError

MAX_RENDERED_CHARS = 16 * 2**20
MAX_MESSAGE_CHARS = 500


class ChatTemplateError(LlorchError):
    """The template can't be compiled, refused these messages, or went over a bound; the message says which."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. Raises ChatTemplateError where it isn't valid Jinja."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """`variables` are the tokenizer's named tokens (`bos_token`, ...)."""
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template isn't valid: {_short(error)}") from error

    def render(self, messages: Sequence[Mapping[str, str]], *, max_chars: int = MAX_RENDERED_CHARS) -> str:
        """Text of the chat with the generation prompt at its end.

        Raises ChatTemplateError when the template refuses the messages, fails, or writes more than `max_chars`.
        """
        parts: list[str] = []
        total = 0
        try:
            for part in self._template.generate(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
            ):
                total += len(part)
                if total > max_chars:
                    raise ChatTemplateError(f"the model's chat template wrote more than {max_chars} characters")
                parts.append(part)
        except jinja2.exceptions.SecurityError as error:
            raise ChatTemplateError(
                f"the model's chat template tried what a template may not: {_short(error)}"
            ) from error
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refused the messages: {_short(error)}") from error
        except (MemoryError, RecursionError) as error:
            raise ChatTemplateError("the model's chat template needs too much memory for these messages") from error
        except ChatTemplateError:
            raise
        except Exception as error:  # a template can raise nearly anything
            raise ChatTemplateError(
                f"the model's chat template failed on these messages ({type(error).__name__})"
            ) from error
        return "".join(parts)


def _short(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "…"


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    helpers: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(helpers)
    return environment


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a model expects it: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
