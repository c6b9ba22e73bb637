"""What a worker could run on here: GPUs as NVML reports them, and the CPU. Read `choose` first.

`promised_bytes` is memory that a starting worker has been given but doesn't hold yet; what a ready worker holds is
missing from `memory_free_bytes` already.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from llorch_pool.errors import PoolError, usage_error
from llorch_pool.estimate import Need, gib
from llorch_wire.pool import DeviceInfo

CPU = "cpu"


def list_devices() -> list[DeviceInfo]:
    """GPUs in NVML's order, then the CPU. No NVML or no driver means no GPU."""
    return [*_gpus(), _cpu()]


def _gpus() -> list[DeviceInfo]:
    try:
        import pynvml
    except ImportError:
        return []
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        return [_gpu(nvml, index, driver) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise PoolError(
            f"the NVIDIA driver answers with an error: {error}",
            next_step="`nvidia-smi` on that machine should show it too; reload the driver or reboot.",
        ) from error
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, driver: str) -> DeviceInfo:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return DeviceInfo(
        device=_text(nvml.nvmlDeviceGetUUID(handle)),
        kind="cuda",
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_total_bytes=int(memory.total),
        memory_free_bytes=int(memory.free),
        driver=driver,
        compute_capability=f"{major}.{minor}",
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cpu() -> DeviceInfo:
    total, free = _memory()
    return DeviceInfo(
        device=CPU, kind="cpu", index=0, name=_cpu_name(), memory_total_bytes=total, memory_free_bytes=free
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> tuple[int, int]:
    """(total, free) bytes of main memory, within the cgroup's limit where there is one."""
    try:
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
        total, free = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    except (OSError, KeyError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def with_promises(
    devices: Iterable[DeviceInfo], promised: Mapping[str, int], workers: Mapping[str, list[str]]
) -> list[DeviceInfo]:
    """Devices with what is promised on each, and which workers are there."""
    return [
        msgspec.structs.replace(
            device, promised_bytes=promised.get(device.device, 0), workers=workers.get(device.device, [])
        )
        for device in devices
    ]


def find(devices: list[DeviceInfo], wanted: str) -> DeviceInfo:
    """The device that `--device` names: a UUID, `cpu`, `cuda`, `cuda:N`, `gpu:N` or N. Raises a usage error."""
    text = wanted.strip().lower()
    gpus = [device for device in devices if device.kind == "cuda"]
    for device in devices:
        if text == device.device.lower():
            return device
    if text in ("cuda", "gpu") and gpus:
        return max(gpus, key=lambda gpu: gpu.memory_free_bytes - gpu.promised_bytes)
    number = re.fullmatch(r"(?:(?:cuda|gpu):)?(\d{1,3})", text)
    if number:
        for gpu in gpus:
            if gpu.index == int(number.group(1)):
                return gpu
    there = ", ".join([f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus] + [CPU])
    raise usage_error(f"no device {wanted!r} on this machine", f"There is: {there}.")


def choose(devices: list[DeviceInfo], need: Need, wanted: str | None, *, force: bool = False) -> DeviceInfo:
    """The device with the most memory that is free and not promised; a GPU where there is one, else the CPU.

    Raises PoolError with the figures when the model can't fit; `force` starts it all the same.
    """
    gpus = [device for device in devices if device.kind == "cuda"]
    candidates = [find(devices, wanted)] if wanted and wanted != "auto" else gpus or devices
    best = max(candidates, key=lambda device: device.memory_free_bytes - device.promised_bytes)
    if force or best.memory_free_bytes - best.promised_bytes >= need.total(best.kind):
        return best
    raise PoolError(
        f"the model needs about {gib(need.total(best.kind))} and no device here has that much",
        detail="\n".join([*need.lines(best.kind), *(_line(device) for device in candidates)]),
        next_step="Stop a worker (`llorch-pool worker list`), choose a smaller model, fewer --slots, another --device, "
        "or start it all the same with --force.",
        code="no_memory",
    )


def _line(device: DeviceInfo) -> str:
    left = device.memory_free_bytes - device.promised_bytes
    shown = device.device if device.kind == "cpu" else f"cuda:{device.index}"
    return (
        f"{shown} ({device.name}): {gib(left)} usable of {gib(device.memory_total_bytes)} "
        f"({gib(device.memory_free_bytes)} free, {gib(device.promised_bytes)} promised)"
    )
