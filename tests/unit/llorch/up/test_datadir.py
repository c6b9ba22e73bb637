from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llorch.errors import CliError, UsageProblem
from llorch.up import datadir
from llorch.up.command import checked_ready_file
from llorch.up.datadir import DataDir, keys_for
from llorch.up.ports import choose_port, port_is_free
from llorch.up.processes import is_alive, kill_if, start_time


def test_names_and_ports_stay(tmp_path: Path) -> None:
    with DataDir(tmp_path / "d").open() as data:
        ids, ports, port = data.worker_ids(2), data.worker_ports(2), data.port("127.0.0.1", 0)
    assert len(set(ids)) == 2 and len({*ports, port}) == 3
    with DataDir(tmp_path / "d").open() as data:
        assert data.worker_ids(3)[:2] == ids
        assert data.worker_ports(3)[:2] == ports
        assert data.worker_ports(1) == ports[:1]
        assert data.port("127.0.0.1", 0) == port
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o700


def test_a_taken_port_is_replaced_by_another(tmp_path: Path) -> None:
    with DataDir(tmp_path).open() as data:
        ports = data.worker_ports(2)
        with socket.create_server(("127.0.0.1", ports[0])):
            changed = data.worker_ports(2)
        assert changed[0] != ports[0] and changed[1] == ports[1]


def test_the_holder_is_named_and_its_death_frees_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datadir, "LOCK_WAIT_S", 0.05)
    code = (
        "import sys, pathlib; from llorch.up.datadir import DataDir\n"
        "with DataDir(pathlib.Path(sys.argv[1])).open(): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CliError, match=rf"pid {holder.pid}\) uses the data folder"), DataDir(tmp_path).open():
            pass
        holder.kill()
        with DataDir(tmp_path).open():
            assert (tmp_path / "up.lock").read_text() == str(os.getpid())


def test_children_of_the_last_life_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that outlived its `up` once held the port of the next one."""
    monkeypatch.setattr(datadir, "LEFTOVER_WAIT_S", 0.2)
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as left:
        with DataDir(tmp_path).open() as data:
            data.record_running([left.pid])
        with DataDir(tmp_path).open():
            assert not is_alive(left.pid)
        left.wait(10)


def test_a_reused_pid_is_left_alone(tmp_path: Path) -> None:
    record = [{"pid": os.getpid(), "start_time": "1"}, {"pid": "x"}]
    (tmp_path / "running.json").write_text(json.dumps(record[:1]))
    with DataDir(tmp_path).open():
        pass
    kill_if(os.getpid(), "1")
    assert start_time(os.getpid()) != "1"


def test_damaged_files_are_as_good_as_none(tmp_path: Path) -> None:
    for text in ("", "{", "[1, {}]", '"x"', '[{"pid": "x", "start_time": 3}, {"pid": -1}]'):
        for name in ("up.json", "running.json"):
            (tmp_path / name).write_text(text)
        with DataDir(tmp_path).open() as data:
            assert data.worker_ids(1)


def test_a_folder_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageProblem, match="can't be used"), DataDir(tmp_path / "file").open():
        pass


def test_keys_are_made_where_the_network_gets_in(tmp_path: Path) -> None:
    with DataDir(tmp_path).open() as data:
        none: dict[str, str | None] = {"api_keys": None, "worker_key": None}
        assert keys_for(data, open_to_network=False, set_keys=none) == ({}, None)
        made, file = keys_for(data, open_to_network=True, set_keys=none)
        assert file == tmp_path / "api-key" and file.stat().st_mode & 0o777 == 0o600
        assert made["LLORCH_API_KEYS"] == "admin=" + file.read_text().strip()
        assert made["LLORCH_WORKER_KEY"] != file.read_text().strip()
        assert keys_for(data, open_to_network=True, set_keys=none)[0] == made
        given: dict[str, str | None] = {"api_keys": "t=12345678", "worker_key": None}
        found, file = keys_for(data, open_to_network=False, set_keys=given)
        assert file is None and found["LLORCH_API_KEYS"] == "t=12345678" and found["LLORCH_WORKER_KEY"]


def test_ports(tmp_path: Path) -> None:
    port = choose_port(set())
    with socket.create_server(("127.0.0.1", port)):
        assert not port_is_free("127.0.0.1", port)
        with DataDir(tmp_path).open() as data, pytest.raises(CliError, match=f"port {port} on 127.0.0.1 is in use"):
            data.port("127.0.0.1", port)
    assert port_is_free("127.0.0.1", port)
    with pytest.raises(UsageProblem, match="not an address of this machine"):
        port_is_free("192.0.2.1", port)
    with pytest.raises(UsageProblem, match="is not an address or a known name"):
        port_is_free("no such host", port)


def test_ready_file_paths(tmp_path: Path) -> None:
    assert checked_ready_file(tmp_path / "r.json") == tmp_path / "r.json"
    for path in (tmp_path / "no" / "r.json", tmp_path):
        with pytest.raises(UsageProblem):
            checked_ready_file(path)
