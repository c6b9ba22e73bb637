"""The wheels that a bootstrap carries over: llorch itself, packed from what runs here, and its dependencies.

`pack` needs neither a build tool nor a network: a wheel is a zip of the packages with a few text files (PEP 427). So
the pool gets exactly the code that talks to it, from a checkout as from an installation.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from llorch.errors import CliError
from llorch_wire.pool import VERSION

PACKAGES = ("orchestratord", "worker", "llorch", "llorch_pool", "llorch_wire", "llorch_demo")
_LEFT_OUT = {"__pycache__", ".DS_Store"}
_EPOCH = (2020, 1, 1, 0, 0, 0)  # same content, same bytes
DOWNLOAD_TIMEOUT_S = 1800


def pack(folder: Path) -> Path:
    """Write the wheel of the running llorch into `folder`. Raises CliError when a part isn't there."""
    name = f"llorch-{VERSION}"
    target = folder / f"{name}-py3-none-any.whl"
    info = f"{name}.dist-info"
    records: list[tuple[str, bytes]] = []
    for package in PACKAGES:
        root = _root(package)
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root.parent)
            if path.is_file() and not _LEFT_OUT & set(relative.parts) and path.suffix != ".pyc":
                records.append((relative.as_posix(), path.read_bytes()))
    records.append((f"{info}/METADATA", _metadata().encode()))
    wheel = f"Wheel-Version: 1.0\nGenerator: llorch {VERSION}\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    records.append((f"{info}/WHEEL", wheel.encode()))
    records.append((f"{info}/entry_points.txt", _entry_points().encode()))
    listing = "".join(f"{path},sha256={_digest(data)},{len(data)}\n" for path, data in records)
    records.append((f"{info}/RECORD", f"{listing}{info}/RECORD,,\n".encode()))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in records:
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return target


def _root(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CliError(f"this installation has no {package}", next_step="pip install --force-reinstall llorch")
    return Path(next(iter(spec.submodule_search_locations)))


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _metadata() -> str:
    try:
        text = metadata.distribution("llorch").read_text("METADATA")
    except metadata.PackageNotFoundError:
        text = None
    if not text:
        raise CliError("llorch is not installed as a package here", next_step="pip install -e .")
    return text


def _entry_points() -> str:
    scripts = metadata.distribution("llorch").entry_points.select(group="console_scripts")
    return "[console_scripts]\n" + "".join(f"{script.name} = {script.value}\n" for script in scripts)


def download(
    wheel: Path, folder: Path, *, extras: str, python_version: str, platforms: Iterable[str], torch_index: str
) -> list[Path]:
    """Dependency wheels for the pool's Python and platform, with this machine's pip. Raises CliError with pip's words.

    `python_version` is like "3.12.4"; `platforms` are wheel tags from the newest on; `torch_index` "" takes torch from
    where everything else comes from.
    """
    requirement = f"{wheel}[{extras}]" if extras else str(wheel)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(folder), "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python_version]
    for platform in platforms:
        command += ["--platform", platform]
    if torch_index and extras:
        _pip([*command, "--no-deps", "--index-url", torch_index, "torch"])
        command += ["--find-links", str(folder), "--extra-index-url", torch_index]
    _pip([*command, requirement])
    _complete(command, wheel, folder, extras, python_version, next(iter(platforms)))
    return sorted(folder.glob("*.whl"))


def _complete(command: list[str], wheel: Path, folder: Path, extras: str, python_version: str, platform: str) -> None:
    """Add what the pool's Python needs and ours does not: pip judges markers by the Python that it runs on itself.

    (async-timeout, say, is needed before Python 3.11.3 alone.)
    """
    for _ in range(5):
        wanted = missing(wheel, folder, extras, python_version, platform.rpartition("_2_")[2].partition("_")[2])
        if not wanted:
            return
        _pip([*command, *sorted(wanted)])


def missing(wheel: Path, folder: Path, extras: str, python_version: str, machine: str) -> set[str]:
    """Requirements of the wheels in `folder` that no wheel there fulfils, for a Linux machine with that Python."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

    environment = {
        "python_version": ".".join(python_version.split(".")[:2]),
        "python_full_version": python_version if python_version.count(".") > 1 else f"{python_version}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": machine,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    there: set[str] = set()
    requirements: list[tuple[str, str]] = []
    for path in (wheel, *folder.glob("*.whl")):
        try:
            there.add(parse_wheel_filename(path.name)[0])
        except InvalidWheelFilename:
            continue
        requirements += [(line, extras if path == wheel else "") for line in _requires(path)]
    found: set[str] = set()
    for line, extra in requirements:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        needed = requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})
        if needed and canonicalize_name(requirement.name) not in there:
            requirement.marker = None
            found.add(str(requirement))
    return found


def _requires(wheel: Path) -> list[str]:
    """The Requires-Dist lines of a wheel (core metadata specification)."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode("utf-8", "replace").partition("\n\n")[0]
    return [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("Requires-Dist:")]


def _pip(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise CliError(f"pip download took more than {DOWNLOAD_TIMEOUT_S} s", next_step="give --wheels") from None
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise CliError(
            f"pip could not download the dependencies: {lines[-1][:300] if lines else 'no reason given'}",
            next_step="run it where pip reaches an index, or give a folder of wheels with --wheels",
        )


def uv_binary(folder: Path, machine: str = "") -> Path:
    """The `uv` program for a Linux machine (x86_64, aarch64), or for this one, out of its wheel. Raises CliError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(folder), "--only-binary=:all:", "--no-deps"]
    if machine:
        command += ["--python-version", "3.12"]
        for tag in (f"manylinux_2_17_{machine}", f"manylinux2014_{machine}", f"manylinux_2_28_{machine}"):
            command += ["--platform", tag]
    _pip([*command, "uv"])
    for path in folder.glob("uv-*.whl"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/scripts/uv"):
                    target = folder / "uv"
                    target.write_bytes(archive.read(name))
                    target.chmod(0o700)
                    path.unlink()
                    return target
    raise CliError("there is no uv for that machine", next_step="install Python 3.11 or newer on it")


def python_archive(folder: Path, machine: str) -> Path:
    """`python.tar.gz`: a relocatable CPython 3.12 for a Linux machine, downloaded and checked by uv here.

    It holds one folder, named as uv names it. UV_PYTHON_INSTALL_MIRROR is honoured. Raises CliError.
    """
    import os
    import shutil
    import tarfile

    uv = shutil.which("uv") or str(uv_binary(folder))
    environ = {**os.environ, "UV_NO_CONFIG": "1", "UV_NO_PROGRESS": "1", "UV_CACHE_DIR": str(folder / "uv-cache")}
    wanted = f"cpython-3.12-linux-{machine}-gnu"
    command = [uv, "python", "install", "--no-bin", "--install-dir", str(folder / "pythons"), wanted]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, stdin=subprocess.DEVNULL, env=environ
    )
    brought = sorted(path for path in (folder / "pythons").glob("cpython-3.12.*") if not path.is_symlink())
    if done.returncode or not brought:
        said = " ".join([line.strip() for line in done.stderr.splitlines() if line.strip()][-2:]) or "no reason given"
        raise CliError(
            f"uv could not download a Python to carry over: {said[:300]}",
            next_step="run it where that works (UV_PYTHON_INSTALL_MIRROR names a mirror), or install Python 3.11 there",
        )
    target = folder / "python.tar.gz"
    with tarfile.open(target, "w:gz", compresslevel=6) as tar:
        tar.add(brought[0], brought[0].name)
    return target


def download_pip(folder: Path) -> Path:
    """pip's own wheel, for machines whose Python has none. Raises CliError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    _pip([*command, "--dest", str(folder), "--no-deps", "--only-binary=:all:", "pip"])
    return next(folder.glob("pip-*.whl"))
