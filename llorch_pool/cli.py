"""Entry point of `llorch-pool`.

`rpc`, `stream` and what supervisors use take a short way in, without the command line's libraries.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run a command; exits with its code."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("rpc", "stream"):
        import gc

        from llorch_wire.quick_start import import_msgspec

        gc.set_threshold(50_000)  # what is imported stays: looking for garbage meanwhile only takes time
        import_msgspec()
    if command == "rpc":
        from llorch_pool.rpc import main as serve

        _leave(serve())
    if command == "stream":
        from llorch_pool.transfer import main as stream

        _leave(stream())
    if command in ("worker", "model"):
        from llorch_pool.foreground import is_meant
        from llorch_pool.foreground import main as supervised

        if is_meant(sys.argv[1:]):
            _leave(supervised(sys.argv[1:]))
    from llorch_pool.app import run

    run()


def _leave(rc: int) -> None:
    """Exit at once: a thread that still waits for a dead socket must not hold the process."""
    import os

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(rc)


if __name__ == "__main__":
    main()
