"""`llorch up`: flags and settings, checked before anything is started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llorch.config import Settings, data_home
from llorch.errors import UsageProblem

if TYPE_CHECKING:
    from llorch.up.plan import UpOptions

MAX_WORKERS = 256


def up(
    workers: Annotated[int, typer.Option("--workers", min=1, max=MAX_WORKERS, help="How many workers.")] = 1,
    model: Annotated[
        str, typer.Option("--model", help="demo, a folder, hf:org/name[@revision], or a downloaded model's name.")
    ] = "demo",
    host: Annotated[
        str, typer.Option("--host", help="Address to bind; one that others reach makes a key if none is set.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of the API; 0 takes a free one.")] = 8080,
    data_dir: Annotated[
        str | None, typer.Option("--data-dir", help="Where everything is kept [$XDG_DATA_HOME/llorch/up].")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option("--redis-url", help="Use this Redis instead of an embedded one.")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option("--ready-file", help="Write URLs and pids here, as JSON, once work is taken.")
    ] = None,
    slots: Annotated[int | None, typer.Option("--slots", min=1, help="Generations at a time in each worker.")] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, max=1024, help="CPU threads of each worker [cores - 1, divided]."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cuda:N, cpu or mps.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say what happens as JSON, one event a line.")] = False,
) -> int:
    """Run the whole stack here, in the foreground: Redis, orchestratord and workers. Ctrl-C stops it.

    What dies is started again at the same address. The same data folder goes on where it stopped.
    """
    from llorch.up.model import resolve
    from llorch.up.plan import UpOptions, is_wildcard, threads_per_worker
    from llorch.up.ports import outward_address

    settings = Settings()
    folder = settings.get("data_dir", data_dir).value
    options = UpOptions(
        data_dir=Path(folder).expanduser().absolute() if folder else data_home(os.environ) / "up",
        workers=workers,
        model=resolve(model, os.environ),
        host=host.strip(),
        port=port,
        redis_url=settings.get("redis_url", redis_url).value,
        ready_file=None if ready_file is None else checked_ready_file(ready_file),
        slots=slots,
        threads=threads or asked_threads(os.environ) or threads_per_worker(usable_cores(), workers),
        device=device,
        advertised_host=outward_address() if is_wildcard(host.strip()) else None,
    )
    set_keys = {name: settings.get(name).value for name in ("api_keys", "worker_key")}
    return run(options, set_keys, as_json=as_json)


def run(options: UpOptions, set_keys: dict[str, str | None], *, as_json: bool) -> int:
    """Run the stack on its data folder. Returns the exit code."""
    import asyncio

    from llorch.up.datadir import DataDir, keys_for
    from llorch.up.plan import is_loopback
    from llorch.up.report import Reporter
    from llorch.up.stack import Stack

    with DataDir(options.data_dir).open() as data:
        open_to_network = not is_loopback(options.host)
        keys, key_file = keys_for(data, open_to_network=open_to_network, set_keys=set_keys)
        report = Reporter(as_json=as_json)

        async def main() -> int:
            return await Stack(options, data, keys, key_file, report).run()

        return asyncio.run(main())


def checked_ready_file(path: Path) -> Path:
    """An absolute path in a folder that exists. Raises UsageProblem otherwise."""
    path = path.expanduser().absolute()
    if not path.parent.is_dir():
        raise UsageProblem(f"the folder of --ready-file {path} is not there", next_step=f"mkdir -p {path.parent}")
    if path.is_dir():
        raise UsageProblem(f"--ready-file {path} is a folder", next_step=f"llorch up --ready-file {path}/ready.json")
    return path


def asked_threads(environ: Mapping[str, str]) -> int | None:
    """What OMP_NUM_THREADS says, if it is a number."""
    text = environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isascii() and text.isdigit() and 0 < int(text) <= 1024 else None


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
