"""The command tree: what is imported, what is printed where, and the exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

from llorch import cli
from llorch.command_tree import COMMANDS, Entry, Source
from llorch.errors import AccessProblem, CliError, ExitCode, PartialFailure, TimedOut, Unreachable, UsageProblem

HEAVY = {"plumbum", "httpx", "aiohttp", "rich", "asyncio", "pydantic", "torch", "redis", "ssl"}
HELPS = (
    ["--help"],
    ["up", "--help"],
    ["run", "--help"],
    ["status", "--help"],
    ["task", "list", "--help"],
    ["queue", "show", "--help"],
    ["worker", "drain", "--help"],
    ["config", "show", "--help"],
    ["completion", "show", "--help"],
)


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """Once a help took as long as everything it could have imported; the CPU time itself is measured in bench/."""
    code = (
        "import sys; from llorch.cli import main; rc = main(sys.argv[1:]);"
        "import json; print(json.dumps(sorted(sys.modules)), file=sys.stderr); sys.exit(rc)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: llorch")
    loaded = {name.partition(".")[0] for name in json.loads(done.stderr)}
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", [*HELPS, ["worker", "--help"], ["task", "-h"]], ids=" ".join)
def test_help_goes_to_stdout(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: llorch") and not err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("llorch 0.")


@pytest.mark.parametrize(
    ("arguments", "message", "next_step"),
    [
        (["tsk"], "no such command 'tsk'. Did you mean 'task'?", "llorch --help"),
        (["run"], "missing argument", "llorch run --help"),
        (["run", "hi", "--temperature", "9"], "9.0 is not in the range", "llorch run --help"),
        (["run", "hi", "--priority", "urgent"], "no priority 'urgent'", "llorch run --help"),
        (["run", ""], "the prompt is empty", "llorch run"),
        (["run", "--raw", "--system", "s", "hi"], "no place in a --raw prompt", "leave one of them out"),
        (["task", "list", "--status", "done"], "no status 'done'", "llorch task list --help"),
        (["task", "list", "-o", "xml"], "'xml' is not one of", "llorch task list --help"),
        (["up", "--model", "./nowhere"], "the model folder nowhere is not there", "llorch up --model demo"),
        (["up", "--workers", "0"], "0 is not in the range", "llorch up --help"),
        (["status", "--url", "ftp://x"], "is not a URL", "--url"),
        (["status", "--url", "http://u:p@x"], "must not hold a password", "LLORCH_API_KEY"),
        (["pool", "add", "a", "h", "--orchestrator", "x y"], "--orchestrator is not a URL", "pool add --help"),
        (["pool", "add", "a", "h", "--orchestrator", "ftp://x"], "--orchestrator is not a URL", "pool add --help"),
        (["pool", "add", "a", "h", "--orchestrator", "http://u:p@x"], "--orchestrator is not a", "pool add --help"),
        (["pool", "add", "a", "h", "--orchestrator", "http://"], "--orchestrator is not a URL", "pool add --help"),
        (["pool", "add", "a", "h", "--use-known-hosts", "--fingerprint", "x"], "exclude each other", "leave one"),
        (["completion", "show", "tcsh"], "completion is for bash", "llorch completion -h"),
    ],
)
def test_what_is_typed_wrongly_is_exit_2(
    arguments: list[str], message: str, next_step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == ExitCode.USAGE
    out, err = capsys.readouterr()
    first, last = err.splitlines()[0], err.splitlines()[-1]
    assert not out
    assert first.startswith("error: ") and message in first
    assert last.startswith("next:  ") and next_step in last


@pytest.mark.parametrize("group", ["", "task", "queue", "worker", "config", "completion"])
def test_a_group_alone_shows_its_help_on_stderr(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(group.split()) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert not out and err.startswith("Usage: llorch") and "Commands:" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CliError("x", next_step="y"), 1),
        (UsageProblem("x", next_step="y"), 2),
        (PartialFailure("x", next_step="y"), 3),
        (AccessProblem("x", next_step="y"), 4),
        (Unreachable("x", next_step="y"), 5),
        (TimedOut("x", next_step="y"), 124),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    module = ModuleType("failing_command")
    module.fail = fail
    monkeypatch.setitem(sys.modules, "failing_command", module)
    monkeypatch.setitem(COMMANDS, "fail", Entry("Fails.", (Source("failing_command:fail"),)))
    assert cli.main(["fail"]) == code


def test_plural_names_work() -> None:
    assert cli.main(["tasks", "list", "--help"]) == 0
    assert cli.main(["workers", "list", "--help"]) == 0


def test_a_group_of_two_sources(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first source that has a subcommand provides it, unless an earlier one is reserved for other names."""
    apps = {}
    for name in ("first", "second"):
        apps[name] = typer.Typer(add_completion=False, rich_markup_mode=None)
        for command in ("list", "drain"):
            apps[name].command(command)(lambda who=name: print(who))
    apps["second"].command("spawn")(lambda: print("spawned"))
    module = ModuleType("two_apps")
    module.first, module.second = apps["first"], apps["second"]
    monkeypatch.setitem(sys.modules, "two_apps", module)
    sources = (
        Source("two_apps:second", ("drain",)),
        Source("two_apps:first"),
        Source("two_apps:second"),
    )
    monkeypatch.setitem(COMMANDS, "worker", Entry("Workers.", sources, "workers"))
    for command in ("list", "drain", "spawn"):
        assert cli.main(["worker", command]) == 0
    assert capsys.readouterr().out == "first\nsecond\nspawned\n"
    assert cli.main(["worker", "--help"]) == 0
    assert "spawn" in capsys.readouterr().out


def test_config_show_never_shows_a_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLORCH_API_KEY", "s3cret-value")
    monkeypatch.setenv("LLORCH_REDIS_URL", "redis://:s3cret-value@h")
    assert cli.main(["config", "show", "--origin", "--json"]) == 0
    out = capsys.readouterr().out
    assert "s3cret" not in out
    shown = {row["setting"]: row for row in json.loads(out)}
    assert shown["api_key"]["value"] == "(set)"
    assert shown["api_key"]["origin"] == "environment LLORCH_API_KEY"
    assert shown["url"] == {
        "setting": "url",
        "value": "http://127.0.0.1:8080",
        "environment": "LLORCH_URL",
        "help": "orchestratord's address",
        "origin": "default",
    }


def test_completion_lists_commands_without_importing_them() -> None:
    environment = {"_LLORCH_COMPLETE": "complete_bash", "COMP_WORDS": "llorch t", "COMP_CWORD": "1", "PATH": ""}
    code = "import sys; sys.argv = ['llorch']; from llorch.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.split()) == (0, ["task"]), done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.main(["completion", "show", shell]))
    assert not ended.value.code
    assert "_LLORCH_COMPLETE" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_said_in_words() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llorch", "config", "show"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr and "next:" in done.stderr and "Traceback" not in done.stderr


def test_closed_streams_are_no_reason_to_fail() -> None:
    command = f"{sys.executable} -m llorch config show <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 0


def test_a_question_with_stdin_closed_is_asked_of_nobody() -> None:
    registry = Path(os.environ["XDG_CONFIG_HOME"]) / "llorch" / "pools.json"
    registry.parent.mkdir(parents=True)
    registry.write_text('{"pools": {"a": {"name": "a", "host": "h"}}}')
    command = f"{sys.executable} -m llorch pool remove a <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Nobody is there to answer" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pool", "add", "a\udcff", "h"], r"the argument 'a\xff' is not valid UTF-8"),
        (["worker", "list", "-p", "\udcff"], r"the argument '\xff' is not valid UTF-8"),
        (["task", "show", "\udcff"], r"the argument '\xff' is not valid UTF-8"),
        (["\udcff"], r"the argument '\xff' is not valid UTF-8"),
        (["run", "secret\udcff"], "the prompt is not valid UTF-8"),
        (["run", "--", "secret\udcff"], "the prompt is not valid UTF-8"),
        (["run", "--system", "secret\udcff", "hi"], "--system is not valid UTF-8"),
        (["run", "--stop", "secret\udcff", "hi"], "what follows --stop is not valid UTF-8"),
        (["run", "--stop=secret\udcff", "hi"], "what follows --stop is not valid UTF-8"),
        (["run", "-m", "secret\udcff", "hi"], "what follows -m is not valid UTF-8"),
    ],
)
def test_arguments_that_are_not_utf_8(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == ExitCode.USAGE
    _, err = capsys.readouterr()
    assert err.startswith(f"error: {message}\n") and "secret" not in err


@pytest.mark.parametrize(
    ("variable", "arguments"),
    [
        ("LLORCH_API_KEY", ["task", "list"]),
        ("LLORCH_WORKER_KEY", ["worker", "spawn", "demo", "-p", "a", "--alone"]),
        ("HF_TOKEN", ["model", "download", "hf:a/b", "-p", "a", "--hf-token"]),
    ],
)
def test_secrets_that_are_not_utf_8_are_named_and_not_shown(
    variable: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Path(os.environ["XDG_CONFIG_HOME"]) / "llorch" / "pools.json"
    registry.parent.mkdir(parents=True)
    registry.write_text('{"pools": {"a": {"name": "a", "host": "h"}}}')
    monkeypatch.setenv(variable, "secret\udcff")
    assert cli.main(arguments) == ExitCode.USAGE
    _, err = capsys.readouterr()
    assert err.startswith(f"error: {variable} is not valid UTF-8\n") and "secret" not in err


@pytest.mark.parametrize("module", ["llorch.cli", "llorch.errors"])
def test_ctrl_c_while_the_program_itself_loads(module: str) -> None:
    code = (
        "import runpy, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "runpy.run_module('llorch', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("place", ["_prepare_streams", "_fail"])
def test_ctrl_c_at_the_edges_of_main(place: str) -> None:
    code = (
        "import sys; sys.argv = ['llorch', 'tsk']; from llorch import cli\n"
        "def interrupt(*_): raise KeyboardInterrupt\n"
        f"cli.{place} = interrupt; cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["config", "show"], 0), (["pool", "list"], 0), (["pool", "add", "a", "no-such-host.invalid", "-y"], 5)],
)
def test_the_current_folder_may_be_gone(arguments: list[str], code: int, tmp_path: Path) -> None:
    if code and shutil.which("ssh") is None:
        pytest.skip("no ssh here")  # that command's other failure, no ssh at all, would hide what is tested
    gone = tmp_path / "gone"
    gone.mkdir()
    command = ["sh", "-c", 'cd "$1" && rmdir "$1" && shift && exec "$@"', "sh", str(gone)]
    environ = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [*command, sys.executable, "-m", "llorch", *arguments], capture_output=True, text=True, timeout=60, env=environ
    )
    assert done.returncode == code, done.stderr


def test_the_reader_of_a_pipe_may_leave() -> None:
    command = f"{sys.executable} -m llorch --help | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("Usage: llorch") and done.stderr == ""
