"""What `make run` starts: `llorch up`, then one prompt streamed to this terminal, then up until Ctrl-C.

It only runs the two commands that a user would type, and says which.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

PROMPT = "Tell me a story about a fox and a lantern."
START_DEADLINE_S = 300.0
PR_SET_PDEATHSIG = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", default="8080")
    parser.add_argument("--data-dir", default="./data")
    parser.add_argument("--prompt", default=PROMPT)
    args = parser.parse_args()
    llorch = str(Path(sys.executable).with_name("llorch"))
    with tempfile.TemporaryDirectory(prefix="llorch-run-") as folder:
        ready_file = Path(folder) / "ready.json"
        command = [llorch, "up", "--model", "demo", "--port", args.port, "--data-dir", args.data_dir]
        print("llorch: $ llorch " + " ".join(command[1:]), flush=True)
        libc = ctypes.CDLL(None)
        stack = subprocess.Popen(
            [*command, "--ready-file", str(ready_file)],
            preexec_fn=(lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)) if sys.platform == "linux" else None,
        )

        def forward(signum: int, _frame: FrameType | None) -> None:
            # Ctrl-C reaches `llorch up` by itself, through the terminal's process group; a kill of this one doesn't.
            if signum == signal.SIGTERM and stack.poll() is None:
                stack.terminate()

        signal.signal(signal.SIGTERM, forward)
        signal.signal(signal.SIGINT, forward)
        if not wait_for(ready_file, stack):
            return stack.wait() or 1
        url = json.loads(ready_file.read_text())["orchestratord"]["url"]
        print(f'\nllorch: $ llorch run --url {url} "{args.prompt}"\n', flush=True)
        environment = {**os.environ, "LLORCH_URL": url}
        told = subprocess.run([llorch, "run", "--url", url, "--max-tokens", "400", args.prompt], env=environment)
        if told.returncode != 0 and stack.poll() is None:
            print(f"llorch: the prompt failed with exit code {told.returncode}; the stack stays up", file=sys.stderr)
        if stack.poll() is None:
            print(
                f"\nllorch: the stack is up until Ctrl-C.\n"
                f"  API        {url}/v2/tasks and {url}/v1 (OpenAI)\n"
                f"  API docs   {url}/docs\n"
                f"  dashboard  {url}/\n"
                f'  again      .venv/bin/llorch run --url {url} "Once upon a time"',
                flush=True,
            )
        return stack.wait()


def wait_for(ready_file: Path, stack: subprocess.Popen[bytes]) -> bool:
    """True once the stack says it takes work; False when it ended first."""
    deadline = time.monotonic() + START_DEADLINE_S
    while stack.poll() is None:
        if ready_file.exists():
            return True
        if time.monotonic() > deadline:
            print(f"llorch: the stack wasn't ready within {START_DEADLINE_S:.0f} s; stopping it", file=sys.stderr)
            stack.terminate()
            return False
        time.sleep(0.05)
    return False


if __name__ == "__main__":
    sys.exit(main())
