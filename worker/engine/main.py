"""The engine process: `python -m worker.engine.main --fd N --model-dir DIR ...`. Started by the worker's supervisor.

Nothing that imports torch may be imported before the number of threads is in the environment; hence the imports inside
`main`. Exit codes: 0 shut down or the parent is gone, 70 the device failed (start another), 71 a bug, 78 can't load.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from worker.engine.machine import cores, default_threads, settle_threads

if TYPE_CHECKING:
    from worker.engine.channel import EngineChannel

EXIT_DEVICE_FAULT = 70
EXIT_BUG = 71
EXIT_LOAD_FAILED = 78


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; exits with 2 and a message on a mistake."""
    parser = argparse.ArgumentParser(prog="python -m worker.engine.main", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="socket that speaks worker/engine/protocol.py")
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--device", type=_device, default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--slots", type=_at_least(0), default=0, help="sequences decoded together; 0: by device")
    parser.add_argument("--max-model-len", type=_at_least(0), default=0, help="0: what the model and the memory allow")
    parser.add_argument("--kv-memory", type=_at_least(0), default=0, metavar="BYTES", help="0: measured")
    parser.add_argument("--attention", default="auto", help="auto, or one by name and no other")
    parser.add_argument("--max-batch-tokens", type=_at_least(0), default=0, help="tokens in one step; 0: by device")
    parser.add_argument("--threads", type=_at_least(0), default=0, help="most CPU threads of a step; 0: all cores")
    parser.add_argument("--deterministic", action="store_true", help="start only if results don't depend on the batch")
    parser.add_argument("--no-prefix-cache", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Load, report, serve. Returns the exit code."""
    args = parse(argv)
    threads = args.threads or default_threads(cores())
    settle_threads(threads, os.environ)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from worker.engine.channel import ChannelClosedError, EngineChannel

    channel = EngineChannel(args.fd)
    try:
        return serve(args, threads, channel)
    except ChannelClosedError:
        return 0
    finally:
        channel.close()


def serve(args: argparse.Namespace, threads: int, channel: EngineChannel) -> int:
    """Build the engine, say that it is ready or why it never will be, run it. Returns the exit code."""
    import torch

    from worker.engine.assemble import EngineOptions, build_engine
    from worker.engine.loader import LoadError
    from worker.engine.loop import DeviceFaultError, log_to_stderr, logger
    from worker.engine.protocol import EngineLoadFailed, EngineLoading

    log_to_stderr()
    torch.set_num_threads(threads)
    options = EngineOptions(
        model_dir=args.model_dir,
        device=args.device,
        dtype=args.dtype,
        slots=args.slots,
        max_model_len=args.max_model_len,
        kv_memory_bytes=args.kv_memory,
        attention=args.attention,
        max_batch_tokens=args.max_batch_tokens,
        threads=threads,
        deterministic=args.deterministic,
        prefix_cache=not args.no_prefix_cache,
    )
    try:
        engine = build_engine(
            options, channel, lambda phase, fraction: channel.send(EngineLoading(phase=phase, fraction=fraction))
        )
    except LoadError as error:
        logger.error("%s", error)
        channel.send(EngineLoadFailed(code=error.code, message=str(error), permanent=True))
        return EXIT_LOAD_FAILED
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError) as error:
        # What no device and no moment is to blame for: the next start would fail just so.
        logger.exception("the engine can't be built")
        channel.send(
            EngineLoadFailed(code="MODEL_UNUSABLE", message=_unusable(options.model_dir, error), permanent=True)
        )
        return EXIT_LOAD_FAILED
    channel.send(engine.ready)
    try:
        engine.loop.run()
    except DeviceFaultError as error:
        logger.error("the device failed: %s", error)
        return EXIT_DEVICE_FAULT
    except RuntimeError:
        logger.exception("the engine's state is broken; another must be started")
        return EXIT_BUG
    return 0


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, mps, cuda, cuda:N")
    return text


def _unusable(model_dir: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return (
        f"no engine can be built from {model_dir} ({type(error).__name__}: {reason}). Compare its config.json with the "
        "model's source, or download the model again; if it is right, report this with the traceback in the log."
    )


def _at_least(low: int):
    def convert(text: str) -> int:
        value = int(text)
        if value < low:
            raise ValueError(text)
        return value

    convert.__name__ = f"number >= {low}"
    return convert


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
