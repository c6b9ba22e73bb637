"""Precedence of the sources, and messages that name the source and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from llorch_wire.layers import SettingsError
from worker.engine.main import parse
from worker.settings import is_loopback_host, load, reachable_host


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_flag_before_environment_before_files_before_default(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    where = {"environ": environ, "cwd": tmp_path}
    flags: dict[str, object] = {"model": "demo"}
    assert load(flags, **where).slots is None
    write(tmp_path / "xdg" / "llorch" / "config.toml", "[worker]\nslots = 1\npool = 'xdg'\n")
    assert (load(flags, **where).slots, load(flags, **where).pool) == (1, "xdg")
    write(tmp_path / "llorch.toml", "[worker]\nslots = 2\n")
    assert (load(flags, **where).slots, load(flags, **where).pool) == (2, "xdg")
    environ["LLORCH_WORKER_SLOTS"] = "3"
    assert load(flags, **where).slots == 3
    assert load({**flags, "slots": "4"}, **where).slots == 4


def test_shared_names(tmp_path: Path) -> None:
    write(tmp_path / "llorch.toml", "worker_key = 'from-the-file'\norchestrator = 'http://file:1'\n")
    environ = {"LLORCH_ORCHESTRATOR": "http://a:1/, https://b:2", "LLORCH_HOST": "0.0.0.0", "LLORCH_PORT": "8080"}
    settings = load({"model": "demo"}, environ=environ, cwd=tmp_path)
    assert settings.orchestrator == ("http://a:1", "https://b:2")
    assert settings.key is not None and settings.key.get_secret_value() == "from-the-file"
    assert (settings.host, settings.port) == ("127.0.0.1", 0), "LLORCH_HOST and LLORCH_PORT are orchestratord's"
    assert "from-the-file" not in repr(settings)


def test_sizes_and_engine_arguments(tmp_path: Path) -> None:
    flags: dict[str, object] = {"model": "m", "kv_memory": "2GiB", "slots": "8", "deterministic": True, "device": "cpu"}
    settings = load(flags, environ={}, cwd=tmp_path)
    assert settings.engine_arguments() == [
        "--device",
        "cpu",
        "--slots",
        "8",
        "--kv-memory",
        str(2 * 2**30),
        "--deterministic",
    ]
    for text, expected in (("1.5MB", 1_500_000), ("512k", 512 * 1024), ("2048", 2048), ("3MiB", 3 * 2**20)):
        assert load({"model": "m", "max_body_bytes": text}, environ={}, cwd=tmp_path).max_body_bytes == expected


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:12"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_engine_takes_every_device_and_dtype_that_the_settings_take(
    tmp_path: Path, device: str, dtype: str
) -> None:
    flags: dict[str, object] = {"model": "m", "device": device, "dtype": dtype}
    arguments = load(flags, environ={}, cwd=tmp_path).engine_arguments()
    parsed = parse(["--fd", "3", "--model-dir", "m", *arguments])
    assert (parsed.device, parsed.dtype) == (device, dtype)


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        ({}, {}, "--model is missing"),
        ({"model": "m", "slots": "many"}, {}, "--slots"),
        ({"model": "m", "kv_memory": "lots"}, {}, "--kv-memory: must be a size"),
        ({"model": "m", "device": "cuda:one"}, {}, "--device: must be auto, cpu, mps, cuda or cuda:N"),
        ({"model": "m", "device": ""}, {}, "--device: must be"),
        ({"model": "m"}, {"LLORCH_WORKER_DEVICE": "gpu0"}, "LLORCH_WORKER_DEVICE: must be"),
        ({"model": "m", "dtype": "bf16"}, {}, "--dtype: must be one of auto, float32, bfloat16, float16"),
        ({"model": "m", "orchestrator": "http://user:pw@x"}, {}, "--orchestrator: must be http"),
        ({"model": "m"}, {"LLORCH_WORKER_PORT": "99999"}, "LLORCH_WORKER_PORT"),
        ({"model": "m"}, {"LLORCH_WORKER_KEY": "short"}, "LLORCH_WORKER_KEY: must be 8 to 512"),
        ({"model": "m", "host": "0.0.0.0"}, {}, "LLORCH_WORKER_KEY"),
        ({"model": "m", "host": "10.0.0.1"}, {}, "--host 10.0.0.1: refused"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, flags: dict[str, object], environ: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError) as error:
        load(flags, environ=environ, cwd=tmp_path)
    assert words in str(error.value)
    assert "pw@" not in str(error.value)


@pytest.mark.parametrize("text", ["[worker]\nslotz = 1", "worker = 3", "not toml at all", "[worker]\nslots = 'x'"])
def test_files_are_named(tmp_path: Path, text: str) -> None:
    write(tmp_path / "llorch.toml", text)
    with pytest.raises(SettingsError, match=r"llorch\.toml"):
        load({"model": "m"}, environ={}, cwd=tmp_path)


def test_hosts() -> None:
    assert all(map(is_loopback_host, ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]", "a.localhost"]))
    assert not any(map(is_loopback_host, ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"]))


def test_the_host_that_others_reach(tmp_path: Path) -> None:
    environ = {"LLORCH_WORKER_KEY": "correct-horse-battery"}
    for host, expected in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("10.1.2.3", "10.1.2.3")):
        assert reachable_host(load({"model": "m", "host": host}, environ=environ, cwd=tmp_path)) == expected
    flags: dict[str, object] = {"model": "m", "host": "0.0.0.0", "orchestrator": "http://127.0.0.1:8080"}
    assert reachable_host(load(flags, environ=environ, cwd=tmp_path)) == "127.0.0.1"
