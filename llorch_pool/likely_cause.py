"""From the last lines of a worker's log to the likely cause and what to do. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple


class Cause(NamedTuple):
    """What probably happened, and the next step."""

    text: str
    next_step: str


_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"CUDA out of memory|OutOfMemoryError|VRAM_OOM|CUBLAS_STATUS_ALLOC_FAILED",
        "the device ran out of memory",
        "Use fewer --slots, stop another worker there (`llorch-pool device list`), or choose another --device.",
    ),
    (
        r"MemoryError|Cannot allocate memory|oom_kill|signal 9|SIGKILL|status -9",
        "the machine ran out of main memory and the kernel ended the process",
        "Free memory on the machine or choose a smaller model.",
    ),
    (
        r"No module named '?(torch|transformers|tokenizers|safetensors|numpy)",
        "the worker's libraries are not installed on this machine",
        "Install them: `llorch pool bootstrap NAME` from your machine, or `pip install 'llorch[worker]'` here.",
    ),
    (
        r"No module named '?worker",
        "the installation on this machine is not whole",
        "Run `llorch pool bootstrap NAME` from your machine.",
    ),
    (
        r"Address already in use|EADDRINUSE|errno 98",
        "the port is in use",
        "Leave --port out to take a free one, or stop what listens there.",
    ),
    (
        r"Cannot assign requested address|errno 99",
        "the address to bind is not one of this machine's",
        "Give --host an address of this machine.",
    ),
    (
        r"No space left on device|errno 28",
        "the disk is full",
        "Free space on the machine.",
    ),
    (
        r"driver version is insufficient|no CUDA-capable device|CUDA driver|NVIDIA driver|forward compatibility",
        "the GPU driver is missing, or too old for the installed torch",
        "Update the driver, or bootstrap again: it picks the torch build by the driver's version.",
    ),
    (
        r"not supported|unsupported architecture|is not in the allow-list",
        "the engine does not support this model",
        "Choose a model of a supported architecture (docs/engine.md lists them).",
    ),
    (
        r"No such option|unrecognized arguments|Got unexpected extra argument",
        "worker and llorch-pool are of different versions",
        "Run `llorch pool bootstrap NAME` from your machine.",
    ),
    (
        r"\b(401|403)\b|refuses the worker key|Unauthorized",
        "the orchestrator refuses the worker key",
        "Set the same LLORCH_WORKER_KEY where you run llorch and at orchestratord.",
    ),
)


def explain(log_tail: str) -> Cause | None:
    """The first cause whose words stand in the log's last lines, None when nothing is recognised."""
    for pattern, text, next_step in _CAUSES:
        if re.search(pattern, log_tail, re.IGNORECASE):
            return Cause(text, next_step)
    return None
