"""`llorch up` on stand-ins for its parts (stub_part): `python -m tests.support.stub_stack DATA READY PORT MODE`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from llorch.errors import CliError
from llorch.up.datadir import DataDir
from llorch.up.plan import PartPlan, UpOptions
from llorch.up.report import Reporter
from llorch.up.stack import Plans, Stack

STUB = str(Path(__file__).with_name("stub_part.py"))


def main() -> int:
    data_dir, ready_file, port, mode = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    folder = data_dir.with_name("registered")
    folder.mkdir(exist_ok=True)

    def redis(_data_dir: Path, url_file: Path) -> PartPlan:
        return PartPlan("redis", "redis", [sys.executable, STUB, "redis", str(url_file)], {})

    def orchestratord(_options: UpOptions, port: int, _redis_url: str, _keys: dict[str, str]) -> PartPlan:
        argv = [sys.executable, STUB, "orchestratord", str(port), str(folder)]
        return PartPlan("orchestratord", "orchestratord", argv, {})

    def worker(_options: UpOptions, worker_id: str, port: int, _url: str, _keys: dict[str, str]) -> PartPlan:
        argv = [sys.executable, STUB, "worker", worker_id, str(port), str(folder), mode]
        return PartPlan("worker", worker_id, argv, {})

    def release(_prefix: str) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", ""]

    options = UpOptions(data_dir=data_dir, workers=2, port=port, ready_file=ready_file)
    plans = Plans(redis, orchestratord, worker, release)
    try:
        with DataDir(data_dir).open() as data:

            async def life() -> int:
                return await Stack(options, data, {}, None, Reporter(as_json=False), plans).run()

            return asyncio.run(life())
    except CliError as error:
        print(f"error: {error.message}\nnext: {error.next_step}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
