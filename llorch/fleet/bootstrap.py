"""`llorch pool bootstrap`: a matching llorch-pool on a machine that has nothing but ssh, without root, inside $HOME.

    probe (sh) ─▶ plan: Python, torch build, what is downloaded where ─▶ agree ─▶ payload (tar) ─▶ install ─▶ remember

Read `bootstrap_pools` first; the decisions are in `bootstrap_plan`.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sysconfig
import tarfile
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from llorch.errors import CliError
from llorch.fleet import carry, failures, fanout, remote_scripts, ssh
from llorch.fleet.bootstrap_plan import Options, Plan, Probe, parse_probe, plan
from llorch.fleet.fanout import Outcome
from llorch.fleet.live import Live
from llorch.fleet.pools import Pool, Pools
from llorch.fleet.targets import confirm
from llorch.output import Column, say, size
from llorch_wire import pool as wire

PROBE_S = 60.0

COLUMNS = (
    Column("POOL", "pool"),
    Column("VERSION", "version"),
    Column("PYTHON", "python"),
    Column("TORCH", "torch"),
    Column("COMMAND", "command"),
)


def bootstrap_pools(
    registry: Pools, pools: Sequence[Pool], options: Options, *, dry_run: bool, yes: bool, timeout_s: float
) -> list[Outcome[Any]]:
    """Probe all, show the plans, ask once, install on all side by side."""

    def look(pool: Pool, live: Live, cancel: threading.Event) -> Plan:
        live.set(pool.name, "looking", phase="looking")
        return plan(pool, probe_pool(registry, pool, cancel, options.python), options)

    planned = fanout.run(pools, look)
    plans = {outcome.pool.name: outcome.value for outcome in planned if outcome.value is not None}
    for name, found in plans.items():
        for line in found.lines:
            say(f"{name}: {line}")
    failed = [outcome for outcome in planned if not outcome.ok]
    if dry_run or not plans:
        rows = [{"version": wire.VERSION, "python": p.python_version, "torch": p.torch_build} for p in plans.values()]
        done = [Outcome[Any](registry.get(name), _Row(**row)) for name, row in zip(plans, rows, strict=True)]
        return [*done, *failed]
    confirm(f"install on {', '.join(plans)}?", yes=yes)

    with tempfile.TemporaryDirectory(prefix="llorch-bootstrap-") as folder:
        payloads = _payloads(Path(folder), plans, options)

        def install(pool: Pool, live: Live, cancel: threading.Event) -> _Row:
            return _install(registry, pool, payloads[pool.name], live, cancel, timeout_s)

        installed = fanout.run([pool for pool in pools if pool.name in plans], install)
    return [*installed, *failed]


class _Row(msgspec.Struct, kw_only=True):
    version: str
    python: str
    torch: str
    command: str = ""


def probe_pool(registry: Pools, pool: Pool, cancel: threading.Event, python: str = "") -> Probe:
    """Ask a machine what it is, and what the Python at the path `python` is there. Raises CliError."""
    lines: list[str] = []
    with tempfile.NamedTemporaryFile(prefix="llorch-probe-") as wanted:
        wanted.write(python.encode() + b"\n")
        wanted.flush()
        status, stderr = ssh.run_script(
            pool,
            registry,
            remote_scripts.PROBE,
            Path(wanted.name),
            timeout_s=PROBE_S,
            on_line=lines.append,
            cancel=cancel,
        )
    try:
        return parse_probe(lines)
    except ValueError:
        raise failures.transport(pool, status, stderr) from None


def _payloads(folder: Path, plans: dict[str, Plan], options: Options) -> dict[str, Path]:
    """The archive for each pool; those that need the same dependencies share the work of finding them."""
    wheel = carry.pack(folder)
    pip = _pip_wheel(folder)
    payloads: dict[str, Path] = {}
    made: dict[tuple[Any, ...], list[Path]] = {}
    for name, found in plans.items():
        wheels: list[Path] = []
        if found.carried:
            kind = (found.python_version, found.machine, tuple(found.platforms), found.torch_index)
            if kind not in made:
                made[kind] = _dependencies(folder / f"wheels-{len(made)}", wheel, found, options)
            wheels = made[kind]
        payloads[name] = folder / f"{name}.payload"
        write_archive(payloads[name], [wheel, pip], wheels, _bringing_python(folder, found), found, options)
    return payloads


def _bringing_python(folder: Path, found: Plan) -> Path | None:
    """What the pool gets where it has no Python that will do: a packed one, or uv, which downloads one there."""
    if found.python:
        return None
    place = folder / found.machine
    place.mkdir(exist_ok=True)
    made = place / ("python.tar.gz" if found.carried else "uv")
    if made.exists():
        return made
    if not found.carried:
        return carry.uv_binary(place, found.machine)
    say("downloading the Python that is carried over")
    return carry.python_archive(place, found.machine)


def _dependencies(folder: Path, wheel: Path, found: Plan, options: Options) -> list[Path]:
    if options.wheels is not None:
        return sorted(options.wheels.glob("*.whl"))
    folder.mkdir()
    say("downloading the dependencies that are carried over")
    extras = "" if options.system_packages else options.extras
    return carry.download(
        wheel,
        folder,
        extras=extras,
        python_version=found.python_version,
        platforms=found.platforms,
        torch_index=found.torch_index,
    )


def _pip_wheel(folder: Path) -> Path:
    """pip's wheel: the one that Python brings for its own virtual environments, or a downloaded one."""
    places = (Path(sysconfig.get_path("stdlib")) / "ensurepip" / "_bundled", Path("/usr/share/python-wheels"))
    for place in places:
        found = sorted(place.glob("pip-*.whl"))
        if found:
            return found[-1]
    return carry.download_pip(folder)


def write_archive(
    target: Path, own: Sequence[Path], wheels: Sequence[Path], python: Path | None, found: Plan, options: Options
) -> None:
    """Write what goes over: the archive's size in bytes on a line, then the archive.

    `own`: llorch's wheel and pip's. `python`: what brings a Python, a packed one or uv.
    """
    mark = hashlib.sha256(own[0].read_bytes())
    mark.update(json.dumps([options.extras, options.system_packages, found.torch_build, found.python]).encode())
    args = {
        "venv": f"{wire.VERSION}-{mark.hexdigest()[:12]}",
        "extras": options.extras,
        "carried": found.carried,
        "torch_index": found.torch_index,
        "system_packages": options.system_packages,
    }
    plain = target.with_suffix(".tar")
    with tarfile.open(plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        _add(tar, "args.json", json.dumps(args).encode())
        _add(tar, "python", found.python.encode())
        _add(tar, "run.sh", remote_scripts.RUN.encode())
        _add(tar, "install.py", Path(__file__).with_name("remote_install.py").read_bytes())
        for path in own:
            tar.add(path, path.name)
        for path in wheels:
            if path.name != own[0].name:
                tar.add(path, f"wheels/{path.name}")
        if python is not None:
            tar.add(python, python.name)
    with target.open("wb") as stream, plain.open("rb") as source:
        stream.write(f"{plain.stat().st_size}\n".encode())
        shutil.copyfileobj(source, stream, 1 << 20)
    plain.unlink()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    tar.addfile(entry, io.BytesIO(data))


def _install(registry: Pools, pool: Pool, payload: Path, live: Live, cancel: threading.Event, timeout_s: float) -> _Row:
    """Send the archive, follow the installation, remember how llorch-pool is started there."""
    ends: list[wire.End] = []
    results: list[Any] = []

    def line(text: str) -> None:
        match wire.decode_event(text.encode()):
            case wire.Progress() | wire.Log() as event:
                live.event(pool.name, event)
            case wire.Result(value=value):
                results.append(value)
            case wire.End() as end:
                ends.append(end)
            case _:
                pass

    live.set(pool.name, f"sending {size(payload.stat().st_size)}", phase="sending")
    status, stderr = ssh.run_script(
        pool, registry, remote_scripts.STAGE, payload, timeout_s=timeout_s, on_line=line, cancel=cancel
    )
    if ends and ends[-1].rc == 0 and results:
        row = msgspec.convert(results[-1], _Row)
        registry.update(pool.name, command=row.command, version=row.version)
        return row
    if ends:
        raise failures.remote(pool, ends[-1].rc, ends[-1].failure)
    if status in (73, 74):
        raise CliError(
            f"{pool.name}: can't unpack there: {stderr.strip()[-300:]}",
            next_step="it needs tar, head and a writable /tmp (or TMPDIR)",
        )
    last = (stderr.strip().splitlines() or [f"status {status}"])[-1]
    raise CliError(f"{pool.name}: the installation ended early: {last[:300]}", next_step="run it again")
