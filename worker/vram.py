"""How much memory a GPU has in all, asked of NVML, so that this process never touches CUDA.

Read `total_bytes` first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping


def total_bytes(device: str, environ: Mapping[str, str] | None = None) -> int:
    """Memory of `cuda` or `cuda:N`, N as CUDA_VISIBLE_DEVICES numbers them; 0 for other devices and without NVML.

    Blocking for some milliseconds.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return 0
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: every NVML error says the same here
        return 0
    try:
        name = visible_device(int(number or 0), os.environ if environ is None else environ)
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(name.encode())
        )
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except (pynvml.NVMLError, ValueError):
        return 0
    finally:
        pynvml.nvmlShutdown()


def visible_device(number: int, environ: Mapping[str, str]) -> str:
    """Index or UUID of the `number`-th device that CUDA_VISIBLE_DEVICES lets through."""
    listed = [part.strip() for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return listed[number] if number < len(listed) else str(number)
