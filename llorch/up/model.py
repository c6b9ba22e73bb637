"""Which model folder `llorch up --model` means. Read `resolve` first.

    demo                        the bundled model             a folder, file:/path    that folder
    a downloaded model's name   that one                      hf:org/name, an alias   downloaded now, if it isn't there

References are llorch-pool's: it is run as a child, with its progress on this terminal.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from llorch.config import data_home
from llorch.errors import CliError, ExitCode, UsageProblem
from llorch.output import clean, say
from llorch.up.part import child_environment, tied
from llorch.up.plan import module

RESOLVE = ("llorch_pool", "model", "resolve")
USE_DEMO = "llorch up --model demo"


def resolve(model: str, environ: Mapping[str, str], pool: Sequence[str] | None = None) -> str:
    """What to give to a worker as `--model`: `demo` or an absolute path.

    Raises UsageProblem for a path without a model, CliError when a download fails. `pool` is the command that the
    reference is appended to; tests put another one in.
    """
    if not model or not model.isprintable():
        raise UsageProblem("--model must name a model", next_step=USE_DEMO)
    if model == "demo":
        return model
    path = Path(model.removeprefix("file:")).expanduser()
    if model.startswith(("file:", "~", ".", "/")) or path.is_dir():
        return _folder(path)
    kept = models_home(environ) / model
    if "/" not in model and (kept / "config.json").is_file():
        return str(kept.absolute())
    if "/" in model and not model.startswith("hf:"):
        raise UsageProblem(
            f"the model folder {path} is not there", next_step=f"llorch up --model hf:{model}    (downloads it)"
        )
    say(f"model {model}: asking llorch-pool for it")
    return _asked(model, environ, module(*RESOLVE) if pool is None else pool)


def _folder(path: Path) -> str:
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is not there"
        raise UsageProblem(f"the model folder {path} {what}", next_step=USE_DEMO)
    return str(path.absolute())


def _asked(model: str, environ: Mapping[str, str], command: Sequence[str]) -> str:
    with subprocess.Popen(
        tied([*command, "--", model]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=child_environment(environ, {}),
    ) as child:
        out, _ = child.communicate()
    if child.returncode != 0:
        raise _failed(model, child.returncode)
    try:
        path = Path(str(json.loads(out)["path"]))
    except (ValueError, KeyError, TypeError):
        raise CliError(f"llorch-pool did not say where {model} is", next_step="llorch-pool model list") from None
    return _folder(path)


def _failed(model: str, status: int) -> CliError:
    error = CliError(
        f"the model {clean(model)} could not be brought here",
        next_step=f"llorch-pool model download {shlex.quote(clean(model))}",
    )
    if status in set(ExitCode):
        error.exit_code = ExitCode(status)
    return error


def models_home(environ: Mapping[str, str]) -> Path:
    """Where downloaded models are: `$LLORCH_MODELS`, or `llorch/models` in the data home."""
    configured = environ.get("LLORCH_MODELS")
    return Path(configured).expanduser() if configured else data_home(environ) / "models"
