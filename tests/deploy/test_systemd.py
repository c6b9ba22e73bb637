"""The units are what systemd understands, as closed as they say, and start the programs as those want to be started."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from orchestratord import settings as orchestrator_settings
from tests.deploy.units import UNITS, Unit, read_env_file
from worker import settings as worker_settings

INSTALLED = "/opt/llorch/bin"
SERVICES = ["orchestratord.service", "llorch-worker@.service"]
SPECIFIERS = {"S": "/var/lib", "C": "/var/cache", "t": "/run", "H": "box", "i": "chat"}


@pytest.fixture
def analyze(missing_service: Callable[[str], NoReturn]) -> str:
    found = shutil.which("systemd-analyze")
    return found or missing_service("systemd-analyze (apt-get install systemd)")


def test_systemd_finds_nothing_wrong(analyze: str, tmp_path: Path) -> None:
    for path in UNITS.glob("*.service"):
        text = path.read_text().replace(INSTALLED, str(Path(sys.executable).parent))
        (tmp_path / path.name).write_text(text.replace("/usr/bin/nvidia-modprobe", "/bin/true"))
    done = subprocess.run(
        [analyze, "verify", *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("name", "bound"), [("orchestratord.service", 1.4), ("llorch-worker@.service", 1.9)])
def test_a_unit_is_as_closed_as_it_says(analyze: str, name: str, bound: float) -> None:
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", str(UNITS / name)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    score = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert score is not None, done.stdout + done.stderr
    assert float(score[1]) <= bound, done.stdout
    assert f"scores this unit {score[1]} " in (UNITS / name).read_text(), "the unit's own comment states another score"


def test_accounts_and_folders_come_to_be(missing_service: Callable[[str], NoReturn], tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None:
        missing_service("systemd-sysusers (apt-get install systemd)")
    (tmp_path / "etc").mkdir()
    run = {"check": True, "timeout": 60, "capture_output": True}
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", str(UNITS / "llorch.sysusers")], **run)
    accounts = (tmp_path / "etc" / "passwd").read_text()
    assert re.search(r"^llorch:.*:/var/lib/llorch:.*nologin$", accounts, re.MULTILINE), accounts
    subprocess.run(["systemd-tmpfiles", f"--root={tmp_path}", "--create", str(UNITS / "llorch.tmpfiles")], **run)
    assert (tmp_path / "var/lib/llorch/models").stat().st_mode & 0o777 == 0o750
    unit = Unit(UNITS / "llorch-worker@.service")
    groups = {line.split(":")[0] for line in (tmp_path / "etc" / "group").read_text().splitlines()}
    assert {unit.value("Group"), *unit.value("SupplementaryGroups").split()} <= groups


@pytest.mark.parametrize(
    ("service", "fields", "parse"),
    [
        ("orchestratord.service", orchestrator_settings.Settings.model_fields, "orchestratord"),
        ("llorch-worker@.service", worker_settings.Settings.model_fields, "worker"),
    ],
)
def test_flags_and_variables_are_known(service: str, fields: dict[str, object], parse: str) -> None:
    unit = Unit(UNITS / service)
    program, *flags = unit.command(SPECIFIERS)
    assert program == f"{INSTALLED}/{'orchestratord' if parse == 'orchestratord' else 'llorch-worker'}"
    assert {flag.removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")} <= set(fields)
    if parse == "orchestratord":
        samples, known = ["orchestratord.env"], {f"LLORCH_{name.upper()}" for name in fields}
    else:
        samples = ["worker.env", "worker-chat.env"]
        known = {f"LLORCH_WORKER_{name.upper()}" for name in fields} | {
            variable for variable, _ in worker_settings.SHARED.values()
        }
    named = set[str]().union(*(read_env_file(UNITS / sample, commented=True) for sample in samples))
    assert named and named <= known, named - known


def test_a_sample_without_keys_is_refused_with_words() -> None:
    with pytest.raises(orchestrator_settings.SettingsError, match="LLORCH_API_KEYS and LLORCH_WORKER_KEY"):
        orchestrator_settings.load({}, environ=read_env_file(UNITS / "orchestratord.env"), cwd=Path("/nonexistent"))
    with pytest.raises(worker_settings.SettingsError, match="LLORCH_WORKER_KEY"):
        environ = read_env_file(UNITS / "worker.env") | read_env_file(UNITS / "worker-chat.env")
        worker_settings.load({}, environ=environ, cwd=Path("/nonexistent"))


def test_systemd_waits_for_a_graceful_stop() -> None:
    from orchestratord.app import SERVER_GRACE_S
    from orchestratord.embedded_redis import STOP_S
    from orchestratord.jobs.runner import CLOSE_S
    from worker.runtime import FLUSH_DEADLINE_S
    from worker.supervisor import EXIT_DEADLINE_S

    drain_s = orchestrator_settings.Settings().drain_timeout_ms / 1000
    orchestrator = Unit(UNITS / "orchestratord.service")
    assert float(orchestrator.value("TimeoutStopSec")) >= drain_s + SERVER_GRACE_S + CLOSE_S + STOP_S + 5
    worker = Unit(UNITS / "llorch-worker@.service")
    drain_s = worker_settings.Settings(model="demo").drain_timeout
    assert float(worker.value("TimeoutStopSec")) >= drain_s + FLUSH_DEADLINE_S + EXIT_DEADLINE_S + 5


@pytest.mark.parametrize("service", SERVICES)
def test_only_the_main_process_is_told_to_stop(service: str) -> None:
    unit = Unit(UNITS / service)
    assert unit.value("KillMode") == "mixed", "the embedded Redis and the engine end after their parent's last word"
    assert unit.value("RestartPreventExitStatus") == "2", "a wrong setting stays wrong"
