"""What a bootstrap will do on a machine: which Python, which build of torch, what is downloaded where. Pure.

Read `plan` first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llorch.errors import CliError, UsageProblem
from llorch.fleet import remote_scripts
from llorch.fleet.pools import Pool
from llorch.output import size
from llorch_wire import pool as wire

TORCH_INDEX = "https://download.pytorch.org/whl"
OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)
# CUDA 13 needs driver 580; CUDA 12.6 runs from 525 on by minor version compatibility (NVIDIA, CUDA compatibility).
TORCH_BUILDS = ((580, "cu130", 3 << 30), (525, "cu126", 3 << 30))
CPU_TORCH_BYTES = 200 << 20
NEEDS_FREE_BYTES = {"cpu": 3 << 30, "cuda": 10 << 30, "none": 300 << 20}


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
        if python and (not re.match(r"/|[A-Za-z0-9_][^/]*$", python) or not python.isprintable()):
            raise UsageProblem(
                f"--python {python!r} is neither a path from / on nor a program's name",
                next_step="give --python /usr/bin/python3.12, say, as it is on the pool",
            )
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
    wanted: tuple[str, str] = ("", "")
    """(version, path) of the Python that --python names."""
    wanted_problem: str = ""
    """Why that one can't be used."""


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
    wanted = values.get("wanted", "").partition(" ")
    return Probe(
        system=values.get("system", ""),
        machine=values.get("machine", ""),
        glibc=values.get("glibc", ""),
        driver=values.get("driver", ""),
        free_bytes=int(free) * 1024 if free.isdigit() else 0,
        pythons=pythons,
        wanted=(wanted[0], wanted[2]),
        wanted_problem=values.get("wanted_problem", ""),
    )


def plan(pool: Pool, probe: Probe, options: Options) -> Plan:
    """What to do on that machine. Raises CliError for one that can't run workers. Pure."""
    if probe.system != "Linux" or probe.machine not in ("x86_64", "aarch64"):
        raise CliError(
            f"{pool.name}: {probe.system or 'unknown system'} on {probe.machine or 'unknown machine'} is not supported",
            next_step="pools are Linux machines, x86_64 or aarch64",
        )
    version, path = _python(pool, probe, options)
    build = _torch_build(pool, probe, options)
    carried = options.source == "carry" or (options.source == "auto" and options.wheels is not None)
    brought = f"Python 3.12, about 30 MiB, {'carried over' if carried else 'brought by uv'}: there is none from 3.11 on"
    lines = [
        f"Python {version} at {path}" if path else brought,
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


def _python(pool: Pool, probe: Probe, options: Options) -> tuple[str, str]:
    """(full version, path) of the Python to use; ("3.12", "") when uv has to bring one. Raises UsageProblem."""
    if not options.python:
        return next(((version, path) for version, path in probe.pythons if _is_usable(version)), ("3.12", ""))
    version, path = probe.wanted
    if version and not probe.wanted_problem and _is_usable(version):
        return version, path
    range_ = " to ".join(".".join(str(part) for part in bound) for bound in (OLDEST_PYTHON, NEWEST_PYTHON))
    problem = probe.wanted_problem or (f"is Python {version}" if version else "is not there")
    raise UsageProblem(
        f"{pool.name}: --python {options.python} {problem}; it must be Python {range_}",
        next_step="give the path of one on that machine, or leave --python out: one is found or brought",
    )


def _is_usable(version: str) -> bool:
    found = re.fullmatch(r"(\d+)\.(\d+)\.\d+", version)
    return found is not None and OLDEST_PYTHON <= (int(found[1]), int(found[2])) <= NEWEST_PYTHON


def _torch_build(pool: Pool, probe: Probe, options: Options) -> str:
    if not options.extras or options.torch != "auto":
        return options.torch if options.torch != "auto" else "cpu"
    if not probe.driver:
        return "cpu"
    if not re.fullmatch(r"\d+(\.\d+)*", probe.driver):  # nvidia-smi says on stdout what is wrong
        raise CliError(
            f"{pool.name}: its NVIDIA driver does not answer: {probe.driver[:200]}",
            next_step="`nvidia-smi` there shows why (often a reboot is due); --torch cpu runs on its CPU",
        )
    major = int(probe.driver.partition(".")[0])
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
