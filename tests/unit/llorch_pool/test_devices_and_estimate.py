"""What a model needs, what a device has, and the figures in a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llorch_pool import devices, estimate
from llorch_pool.errors import PoolError
from llorch_pool.estimate import GIB, Need
from llorch_wire.pool import DeviceInfo
from tests.unit.llorch_pool.conftest import write_model, write_safetensors


def gpu(index: int, free_gib: float, promised_gib: float = 0) -> DeviceInfo:
    return DeviceInfo(
        device=f"GPU-{index}",
        kind="cuda",
        index=index,
        name="NVIDIA H100",
        memory_total_bytes=80 * GIB,
        memory_free_bytes=int(free_gib * GIB),
        promised_bytes=int(promised_gib * GIB),
    )


CPU = DeviceInfo(
    device="cpu", kind="cpu", index=0, name="EPYC", memory_total_bytes=64 * GIB, memory_free_bytes=60 * GIB
)
SMALL = Need(weights_bytes=10 * GIB, kv_bytes_per_token=0, kv_tokens=0, logits_bytes=0)


def test_need_is_the_sum_that_the_headers_and_config_give(tmp_path: Path) -> None:
    need = estimate.estimate(write_model(tmp_path / "m", numbers=1000), slots=8)
    assert need.weights_bytes == 2 * 4 * 1000
    assert need.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # K and V, layers, KV heads, head size, float32
    assert need.kv_tokens == 4096  # 8 slots of 512; the context of 2048 is less
    assert need.logits_bytes == 8 * 1000 * 4
    assert need.total("cuda") == need.total("cpu") + GIB - GIB // 4
    assert "4096 tokens of 0.5 KiB" in need.lines("cpu")[0]


def test_a_model_without_shapes_in_its_config_says_what_is_left_out(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", numbers=1000)
    (folder / "config.json").write_text("{}")
    assert "not in this sum" in "\n".join(estimate.estimate(folder, None).lines("cpu"))


def test_a_text_model_inside_a_larger_one_is_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", numbers=1000)
    inner = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], "text_config": inner}))
    assert estimate.estimate(folder, 1).kv_bytes_per_token == 512


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, b"\x10\0\0\0\0\0\0\0not json here!!!"])
def test_a_damaged_weights_file_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(PoolError, match=r"model\.safetensors is not a whole"):
        estimate.read_weights(tmp_path)


def test_a_weights_file_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": [100]})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PoolError, match="not a whole"):
        estimate.read_weights(tmp_path)


def test_the_gpu_with_the_most_unpromised_memory_is_chosen() -> None:
    assert devices.choose([gpu(0, 70, 50), gpu(1, 40), gpu(2, 30), CPU], SMALL, None).index == 1


def test_a_gpu_is_preferred_to_a_cpu_with_more_memory() -> None:
    assert devices.choose([gpu(0, 12), CPU], SMALL, None).kind == "cuda"
    assert devices.choose([CPU], SMALL, None).kind == "cpu"


@pytest.mark.parametrize(
    ("wanted", "device"), [("cpu", "cpu"), ("cuda:1", "GPU-1"), ("1", "GPU-1"), ("gpu-0", "GPU-0")]
)
def test_a_device_can_be_named(wanted: str, device: str) -> None:
    assert devices.choose([gpu(0, 70), gpu(1, 40), CPU], SMALL, wanted).device == device


def test_cuda_alone_means_the_best_gpu() -> None:
    assert devices.choose([gpu(0, 30), gpu(1, 40), CPU], SMALL, "cuda").index == 1


def test_an_unknown_device_lists_those_that_there_are() -> None:
    with pytest.raises(PoolError) as caught:
        devices.choose([gpu(0, 30), CPU], SMALL, "cuda:7")
    assert "cuda:0 (NVIDIA H100), cpu" in caught.value.next_step and caught.value.rc == 2


def test_what_can_not_fit_is_refused_with_figures_and_can_be_forced() -> None:
    places = [gpu(0, 20, 15), gpu(1, 8), CPU]
    with pytest.raises(PoolError) as caught:
        devices.choose(places, SMALL, None)
    assert caught.value.code == "no_memory" and "11.0 GiB" in caught.value.message
    assert "weights 10.0 GiB" in caught.value.detail and "cuda:0 (NVIDIA H100): 5.0 GiB usable" in caught.value.detail
    assert devices.choose(places, SMALL, None, force=True).index == 1
