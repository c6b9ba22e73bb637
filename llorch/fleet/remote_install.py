"""Runs on a pool machine during `llorch pool bootstrap`, with that machine's Python, standard library only.

It is carried over as a file and started in a folder that holds:  args.json · llorch-*.whl · pip-*.whl · wheels/
It builds a virtual environment under the user's data folder and, once that works, makes it the current one:

    $XDG_DATA_HOME/llorch/pool/venvs/<version>-<digest>/      complete: the marker that it was built whole
                              /current -> venvs/<...>         replaced in one step; running workers keep the old one
    ~/.local/bin/llorch-pool  -> .../current/bin/llorch-pool  for people who log in

What it says on stdout are the events of llorch_wire.pool, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

KEEP_LINES = 15


def say(event: str, **fields: Any) -> None:
    """One event."""
    print(json.dumps({"event": event, **fields}), flush=True)


def fail(message: str, next_step: str, detail: str = "") -> NoReturn:
    """End with a failure."""
    failure = {"code": "bootstrap", "message": message, "next_step": next_step, "detail": detail}
    say("end", rc=1, failure=failure)
    sys.exit(1)


def main() -> None:
    """Build, check, switch over."""
    args: dict[str, Any] = json.loads(Path("args.json").read_text())
    home = Path(os.environ.get("XDG_DATA_HOME") or "")
    base = (home if home.is_absolute() else Path.home() / ".local" / "share") / "llorch" / "pool"
    target = base / "venvs" / args["venv"]
    alone = lock(base)
    if (target / "complete").exists():
        say("log", text="the same version is installed already")
    else:
        build(target, args)
    version, torch = check(target, args)
    switch(base, target)
    say(
        "result",
        value={
            "command": str(base / "current" / "bin" / "llorch-pool"),
            "version": version,
            "python": sys.version.split()[0],
            "torch": torch,
        },
    )
    prune(base, target)
    say("end", rc=0)
    os.close(alone)


def lock(base: Path) -> int:
    """Wait until no other bootstrap works here: two would build, or prune, in each other's folders. The lock's handle.

    The kernel frees it with its holder; how long it may take is up to the caller, whose leaving ends this program.
    """
    try:
        base.mkdir(parents=True, exist_ok=True)
        handle = os.open(base / "bootstrap.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        fail(f"can't write to {base}: {error.strerror}", "free space there, or set XDG_DATA_HOME on the pool")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("progress", phase="waiting", text="another bootstrap works on this machine")
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def build(target: Path, args: dict[str, Any]) -> None:
    """Make the virtual environment; nothing counts until its marker is written."""
    shutil.rmtree(target, ignore_errors=True)
    say("progress", phase="creating", text=f"virtual environment with Python {sys.version.split()[0]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        venv.create(target, with_pip=False, symlinks=True, system_site_packages=args["system_packages"])
        wheel = next(Path.cwd().glob("llorch-*.whl"))
        wanted = f"llorch[{args['extras']}] @ {wheel.as_uri()}" if args["extras"] else str(wheel)
        if args["carried"]:
            pip(target, ["--no-index", "--find-links", str(Path("wheels").resolve()), wanted])
        else:
            if args["extras"] and args["torch_index"]:
                pip(target, ["--index-url", args["torch_index"], "torch"])
            announce(target, wanted)
            pip(target, [wanted])
        (target / "complete").write_text("\n")
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        fail(f"can't write to {target.parent}: {error.strerror}", "free space there, or set XDG_DATA_HOME on the pool")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def pip_command(target: Path) -> list[str]:
    """pip runs out of its own wheel: many machines have a Python without pip and ensurepip."""
    wheel = next(Path.cwd().glob("pip-*.whl"))
    return [str(target / "bin" / "python"), str(wheel / "pip")]


def pip(target: Path, what: Sequence[str]) -> None:
    """`pip install`, with its output as progress. Ends the program with pip's words when it fails."""
    command = [
        *pip_command(target),
        "install",
        "--no-input",
        "--disable-pip-version-check",
        "--no-warn-script-location",
    ]
    process = subprocess.Popen(
        [*command, "--progress-bar", "off", *what],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
    )
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        text = line.strip()
        if text:
            lines = [*lines, text][-KEEP_LINES:]
        if text.startswith(("Collecting", "Downloading", "Processing", "Installing", "Successfully", "Using cached")):
            say("progress", phase="installing", text=in_short(text))
    if process.wait():
        shutil.rmtree(target, ignore_errors=True)
        said = next((line for line in reversed(lines) if "ERROR" in line), (lines or ["no reason given"])[-1])
        fail(
            f"pip failed on the pool: {said[:300]}",
            next_step_after(said, carried="--no-index" in what),
            "\n".join(lines),
        )


def in_short(text: str) -> str:
    """A line of pip's: what a package is needed for is left out, and a list of packages is counted."""
    text = re.sub(r" \(from .*", "", text)
    listed = re.match(r"(Installing collected packages:|Successfully installed) (.*)", text)
    if listed:
        count = len(listed.group(2).split())
        text = f"{count} packages" if text.startswith("Installing") else f"{count} packages are installed"
    return text[:120]


def next_step_after(said: str, *, carried: bool) -> str:
    """What helps when pip failed with these words."""
    if "No space left" in said or "Disk quota" in said:
        return "free space there (in $HOME, and in $TMPDIR), or set XDG_DATA_HOME on the pool"
    if carried:
        return "the wheels don't fit this machine or are not all there: leave --wheels out, and llorch finds them"
    return "without a package index there: llorch pool bootstrap --source carry"


def announce(target: Path, wanted: str) -> None:
    """Say what will be downloaded, with sizes where the index tells them. Best effort: pip itself decides."""
    command = [*pip_command(target), "install", "--dry-run", "--quiet", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--report", "-", wanted], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600
    )
    if done.returncode:
        return  # the installation will fail in the same way, and say why
    with contextlib.suppress(ValueError, KeyError):
        items = json.loads(done.stdout)["install"]
        urls = [item["download_info"]["url"] for item in items]
        with ThreadPoolExecutor(8) as threads:
            sizes = list(threads.map(size_of, urls))
        names = " ".join(f"{item['metadata']['name']} {item['metadata']['version']}," for item in items).rstrip(",")
        known = sum(sizes)
        say("log", text=f"downloads {len(items)} packages, {known / 2**20:.0f} MiB: {names}")


def size_of(url: str) -> int:
    """Content-Length of a download, 0 where it isn't told."""
    if not url.startswith("http"):
        return 0
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.headers.get("Content-Length") or 0)
    except (OSError, ValueError):
        return 0


def check(target: Path, args: dict[str, Any]) -> tuple[str, str]:
    """(version of llorch-pool, version of torch with its device) of what was built; it must really start."""
    done = subprocess.run(
        [str(target / "bin" / "llorch-pool"), "--version"], capture_output=True, text=True, timeout=60
    )
    found = re.search(r"llorch-pool (\S+)", done.stdout)
    if done.returncode or not found:
        shutil.rmtree(target, ignore_errors=True)
        fail("what was installed does not start", "report this with the lines above", done.stderr[-2000:])
    torch = ""
    if args["extras"]:
        say("progress", phase="checking", text="torch")
        code = "import torch; print(torch.__version__, 'cuda' if torch.cuda.is_available() else 'cpu')"
        tried = subprocess.run(
            [str(target / "bin" / "python"), "-c", code], capture_output=True, text=True, timeout=300
        )
        torch = tried.stdout.strip()
        if tried.returncode:
            said = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
            fail(f"torch can't be imported on the pool: {said}", "try another build with --torch", tried.stderr[-2000:])
    return found.group(1), torch


def switch(base: Path, target: Path) -> None:
    """Make `target` the current environment in one step, and put llorch-pool on people's PATH."""
    replace_link(base / "current", target)
    shortcut = Path.home() / ".local" / "bin" / "llorch-pool"
    if shortcut.is_symlink() or not shortcut.exists():
        with contextlib.suppress(OSError):
            shortcut.parent.mkdir(parents=True, exist_ok=True)
            replace_link(shortcut, base / "current" / "bin" / "llorch-pool")


def replace_link(link: Path, target: Path) -> None:
    """Point a symbolic link somewhere else, without a moment in which it isn't there."""
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def prune(base: Path, target: Path) -> None:
    """Remove older environments that no process uses any more."""
    used = ""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            used += path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace") + "\n"
    for old in (base / "venvs").iterdir():
        if old != target and f"{old}/" not in used:
            shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    main()
