"""`llorch pool bootstrap`: a matching llorch-pool on a machine that has nothing but ssh, without root, inside $HOME.

    probe (sh) ─▶ plan: Python, torch build, what is downloaded where ─▶ agree ─▶ payload (tar) ─▶ install ─▶ remember

Read `bootstrap_pools` and `plan` (pure) first.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sysconfig
import tarfile
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from llorch.errors import CliError, UsageProblem
from llorch.fleet import carry, failures, fanout, remote_scripts, ssh
from llorch.fleet.fanout import Outcome
from llorch.fleet.live import Live
from llorch.fleet.pools import Pool, Pools
from llorch.fleet.targets import confirm
from llorch.output import Column, say, size
from llorch_wire import pool as wire

PROBE_S = 60.0
TORCH_INDEX = "https://download.pytorch.org/whl"
OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)
# CUDA 13 needs driver 580; CUDA 12.6 runs from 525 on by minor version compatibility (NVIDIA, CUDA compatibility).
TORCH_BUILDS = ((580, "cu130", 3 << 30), (525, "cu126", 3 << 30))
CPU_TORCH_BYTES = 200 << 20
NEEDS_FREE_BYTES = {"cpu": 3 << 30, "cuda": 10 << 30, "none": 300 << 20}

COLUMNS = (
    Column("POOL", "pool"),
    Column("VERSION", "version"),
    Column("PYTHON", "python"),
    Column("TORCH", "torch"),
    Column("COMMAND", "command"),
)


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    source: str
    extras: str
    torch: str
    torch_index: str
    wheels: Path | None
    system_packages: bool
    python: str

    @classmethod
    def checked(
        cls,
        *,
        source: str,
        extras: str,
        torch: str,
        torch_index: str,
        wheels: str,
        system_packages: bool,
        python: str,
    ) -> Options:
        """Raises UsageProblem that names the option."""
        if source not in ("auto", "index", "carry"):
            raise UsageProblem(f"--source {source!r} is not auto, index or carry", next_step="leave it out for auto")
        if extras not in ("worker", "none"):
            raise UsageProblem(f"--extras {extras!r} is not worker or none", next_step="leave it out for worker")
        if torch not in ("auto", "cpu", "default") and not re.fullmatch(r"cu\d{2,3}", torch):
            raise UsageProblem(
                f"--torch {torch!r} is not auto, cpu, default or a build such as cu130", next_step="leave it out"
            )
        folder = Path(wheels) if wheels else None
        if folder is not None and not list(folder.glob("*.whl")):
            raise UsageProblem(f"--wheels: there is no wheel in {folder}", next_step="pip download -d FOLDER ...")
        index = torch_index or TORCH_INDEX
        if not re.fullmatch(r"https?://[^\s\"']+", index):
            raise UsageProblem("--torch-index must be a http(s) URL", next_step="leave it out for the default")
        return cls(source, extras.replace("none", ""), torch, index.rstrip("/"), folder, system_packages, python)


@dataclass(frozen=True)
class Probe:
    """What a machine said about itself."""

    system: str
    machine: str
    glibc: str
    driver: str
    free_bytes: int
    pythons: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """(version, path), the best first."""


@dataclass(frozen=True)
class Plan:
    """What will be done on one machine. `torch_index` "" means: where everything else comes from."""

    python: str
    python_version: str
    torch_build: str
    torch_index: str
    platforms: list[str]
    carried: bool
    machine: str
    lines: list[str]


def parse_probe(lines: Sequence[str]) -> Probe:
    """Probe from the script's output, banners ignored. Raises ValueError when it isn't whole."""
    values: dict[str, str] = {}
    pythons: list[tuple[str, str]] = []
    for line in lines:
        mark, _, rest = line.partition(remote_scripts.MARK)
        name, separator, value = rest.partition("=")
        if mark or not separator:
            continue
        if name == "python":
            version, _, path = value.partition(" ")
            pythons.append((version, path))
        values[name] = value.strip()
    if "end" not in values:
        raise ValueError("the probe did not come to its end")
    free = values.get("free_kib", "")
    return Probe(
        system=values.get("system", ""),
        machine=values.get("machine", ""),
        glibc=values.get("glibc", ""),
        driver=values.get("driver", ""),
        free_bytes=int(free) * 1024 if free.isdigit() else 0,
        pythons=pythons,
    )


def plan(pool: Pool, probe: Probe, options: Options) -> Plan:
    """What to do on that machine. Raises CliError for one that can't run workers. Pure."""
    if probe.system != "Linux" or probe.machine not in ("x86_64", "aarch64"):
        raise CliError(
            f"{pool.name}: {probe.system or 'unknown system'} on {probe.machine or 'unknown machine'} is not supported",
            next_step="pools are Linux machines, x86_64 or aarch64",
        )
    version, path = _python(probe, options)
    build = _torch_build(pool, probe, options)
    lines = [
        f"Python {version} at {path}" if path else "Python 3.12: brought by uv, about 30 MiB, since there is none",
        f"llorch-pool {wire.VERSION} and its dependencies, about 25 MiB",
    ]
    if options.extras and not options.system_packages:
        about = CPU_TORCH_BYTES if build == "cpu" else 3 << 30
        why = f"driver {probe.driver}" if probe.driver else "no GPU driver"
        lines.append(f"torch ({build}: {why}), about {size(about)}, and transformers, about 100 MiB")
    kind = "none" if not options.extras else "cpu" if build == "cpu" else "cuda"
    if probe.free_bytes and probe.free_bytes < NEEDS_FREE_BYTES[kind]:
        raise CliError(
            f"{pool.name}: {size(probe.free_bytes)} free in $HOME, {size(NEEDS_FREE_BYTES[kind])} are needed",
            next_step="free space there, or set XDG_DATA_HOME on the pool",
        )
    index = "" if build == "default" or options.system_packages else f"{options.torch_index}/{build}"
    carried = options.source == "carry" or (options.source == "auto" and options.wheels is not None)
    lines.append("everything is carried over from here" if carried else "the pool downloads from its package index")
    return Plan(
        python=path,
        python_version=version,
        torch_build=build,
        torch_index=index,
        platforms=_platforms(probe),
        carried=carried,
        machine=probe.machine,
        lines=lines,
    )


def _python(probe: Probe, options: Options) -> tuple[str, str]:
    """(full version, path) of the Python to use; ("3.12", "") when uv has to bring one."""
    usable = [
        (version, path)
        for version, path in probe.pythons
        if OLDEST_PYTHON <= tuple(int(part) for part in version.split(".")[:2]) <= NEWEST_PYTHON
    ]
    if options.python:
        return next((item for item in usable if item[1] == options.python), ("3.12", options.python))
    return usable[0] if usable else ("3.12", "")


def _torch_build(pool: Pool, probe: Probe, options: Options) -> str:
    if not options.extras or options.torch != "auto":
        return options.torch if options.torch != "auto" else "cpu"
    if not probe.driver:
        return "cpu"
    major = int(probe.driver.partition(".")[0]) if probe.driver.partition(".")[0].isdigit() else 0
    for oldest, build, _ in TORCH_BUILDS:
        if major >= oldest:
            return build
    raise CliError(
        f"{pool.name}: its NVIDIA driver {probe.driver} is too old for torch (525 is the oldest)",
        next_step="update the driver, or run on its CPU with --torch cpu",
    )


def _platforms(probe: Probe) -> list[str]:
    """Wheel tags that the machine takes, the newest first (PEP 600)."""
    major, _, minor = probe.glibc.partition(".")
    newest = int(minor) if major == "2" and minor.isdigit() else 17
    tags = [f"manylinux_2_{number}_{probe.machine}" for number in range(newest, 16, -1)]
    return [*tags, f"manylinux2014_{probe.machine}", f"linux_{probe.machine}"]


def bootstrap_pools(
    registry: Pools, pools: Sequence[Pool], options: Options, *, dry_run: bool, yes: bool, timeout_s: float
) -> list[Outcome[Any]]:
    """Probe all, show the plans, ask once, install on all side by side."""

    def look(pool: Pool, live: Live, cancel: threading.Event) -> Plan:
        live.set(pool.name, "looking", phase="looking")
        return plan(pool, probe_pool(registry, pool, cancel), options)

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


def probe_pool(registry: Pools, pool: Pool, cancel: threading.Event) -> Probe:
    """Ask a machine what it is. Raises CliError."""
    lines: list[str] = []
    status, stderr = ssh.run_script(
        pool, registry, remote_scripts.PROBE, timeout_s=PROBE_S, on_line=lines.append, cancel=cancel
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
        uv = None
        if not found.python:
            (folder / found.machine).mkdir(exist_ok=True)
            uv = carry.uv_binary(folder / found.machine, found.machine)
        payloads[name] = folder / f"{name}.payload"
        write_archive(payloads[name], [wheel, pip], wheels, uv, found, options)
    return payloads


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
    target: Path, own: Sequence[Path], wheels: Sequence[Path], uv: Path | None, found: Plan, options: Options
) -> None:
    """Write what goes over: the archive's size in bytes on a line, then the archive. `own`: llorch's, pip's."""
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
        if uv is not None:
            tar.add(uv, "uv")
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
