"""Real Redis-compatible servers for tests: a plain one, a Sentinel trio with a replica, a cluster.

Each is a context manager over a temporary folder; every process is reaped at its end, and dies with the test process.
Read `redis_server` first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import redis

from orchestratord.redis_server import find_server

READY_S = 20.0


class RedisServer:
    """One server process that can be killed, stopped, continued and started again on its data."""

    def __init__(self, folder: Path, options: dict[str, str], *, config: Path | None = None) -> None:
        self.folder = folder
        self.options = options
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        if "unixsocket" in self.options:
            return f"unix://{self.options['unixsocket']}"
        return f"redis://127.0.0.1:{self.options['port']}/0"

    @property
    def port(self) -> int:
        return int(self.options["port"])

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=5)

    def await_replica(self) -> None:
        """Until a replica has everything written so far: replication is asynchronous, and a kill may undo the last."""
        with contextlib.closing(redis.Redis.from_url(self.url, socket_timeout=30)) as client:
            client.ping()  # WAIT counts from its own connection's last command
            assert client.execute_command("WAIT", 1, 20_000) >= 1, "no replica has caught up"

    def start(self) -> None:
        """Starts the process and waits until it answers."""
        arguments = [part for name, value in self.options.items() for part in (f"--{name}", value)]
        if self._config is not None:
            arguments = [str(self._config), "--sentinel"]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [find_server(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                preexec_fn=_die_with_parent(),
            )
        wait_until(self._answers, f"the server in {self.folder} answers")

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            words = (self.folder / "server.log").read_text(errors="replace")[-1500:]
            raise RuntimeError(f"the server ended with {self._process.returncode}: {words}")
        with contextlib.closing(self.client()) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    def kill(self) -> None:
        """SIGKILL, and waits for the process to be gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)

    def pause(self) -> None:
        """SIGSTOP: sockets stay open and nothing comes."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """SIGKILL and a new start on the same data."""
        self.kill()
        self.start()


@contextlib.contextmanager
def folder() -> Generator[Path]:
    """A temporary folder whose path is short enough for a unix socket."""
    path = Path(tempfile.mkdtemp(prefix="llorch-test-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def redis_server(*, port: bool = False, durable: bool = False, **options: str) -> Generator[RedisServer]:
    """A plain server, on a unix socket or on a free loopback port. `durable` is the embedded server's policy. Options
    are its own, with underscores for dashes."""
    with folder() as path:
        settings = {"dir": str(path), "save": "", "maxmemory-policy": "noeviction"}
        settings |= {"port": str(free_port())} if port else {"port": "0", "unixsocket": str(path / "redis.sock")}
        if durable:
            settings |= {"appendonly": "yes", "appendfsync": "always"}
        settings |= {name.replace("_", "-"): value for name, value in options.items()}
        server = RedisServer(path, settings)
        try:
            server.start()
            yield server
        finally:
            server.kill()


class SentinelGroup:
    """A master, a replica and three Sentinels. `url` is what a store connects to."""

    service = "llorch"

    def __init__(self, data: list[RedisServer], sentinels: list[RedisServer]) -> None:
        self.data = data
        self.sentinels = sentinels

    @property
    def url(self) -> str:
        nodes = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{nodes}/{self.service}/0"

    def master(self) -> RedisServer:
        """The server that the Sentinels name as master now."""
        with contextlib.closing(self.sentinels[0].client()) as client:
            _, port = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
        return next(server for server in self.data if server.port == int(port))

    def fail_over(self) -> None:
        """Kills the master and waits until another is master; the old one is started again as its replica."""
        old = self.master()
        old.kill()
        wait_until(lambda: self.master() is not old and _role(self.master()) == "master", "a failover")
        new = self.master()
        old.options["replicaof"] = f"127.0.0.1 {new.port}"
        new.options.pop("replicaof", None)
        old.start()


@contextlib.contextmanager
def sentinel_group() -> Generator[SentinelGroup]:
    """Master, replica and three Sentinels that fail over after a second."""
    with folder() as path, contextlib.ExitStack() as stack:
        data = [_member(path / f"data{index}", appendonly="yes") for index in range(2)]
        data[1].options["replicaof"] = f"127.0.0.1 {data[0].port}"
        for server in data:
            stack.callback(server.kill)
            server.start()
        sentinels: list[RedisServer] = []
        for index in range(3):
            home = path / f"sentinel{index}"
            home.mkdir()
            port = free_port()
            config = home / "sentinel.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {home}\n"
                f"sentinel monitor {SentinelGroup.service} 127.0.0.1 {data[0].port} 2\n"
                f"sentinel down-after-milliseconds {SentinelGroup.service} 1000\n"
                f"sentinel failover-timeout {SentinelGroup.service} 5000\n"
            )
            sentinels.append(RedisServer(home, {"port": str(port)}, config=config))
            stack.callback(sentinels[-1].kill)
            sentinels[-1].start()
        group = SentinelGroup(data, sentinels)
        wait_until(lambda: all(_knows_group(sentinel) for sentinel in sentinels), "the Sentinels know each other")
        yield group


class ClusterGroup:
    """A cluster of masters, each with as many replicas. `url` is what a store connects to."""

    def __init__(self, nodes: list[RedisServer]) -> None:
        self.nodes = nodes

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def holder(self, key: str) -> RedisServer:
        """The master that holds a key's slot."""
        with contextlib.closing(self.nodes[0].client()) as client:
            slot = client.execute_command("CLUSTER", "KEYSLOT", key)
            for first, last, master in _slot_ranges(client):
                if first <= slot <= last:
                    return next(node for node in self.nodes if node.port == master)
        raise LookupError(key)


@contextlib.contextmanager
def cluster_group(masters: int = 3, replicas: int = 0) -> Generator[ClusterGroup]:
    """A cluster with all slots served; node failures are noticed after a second."""
    with folder() as path, contextlib.ExitStack() as stack:
        nodes: list[RedisServer] = []
        for index in range(masters * (1 + replicas)):
            node = _member(
                path / f"node{index}",
                **{"cluster-enabled": "yes", "cluster-node-timeout": "1000", "cluster-port": str(free_port())},
                appendonly="yes",
            )
            nodes.append(node)
            stack.callback(node.kill)
            node.start()
        _form_cluster(nodes, masters)
        yield ClusterGroup(nodes)


def _form_cluster(nodes: list[RedisServer], masters: int) -> None:
    clients = [node.client() for node in nodes]
    with contextlib.ExitStack() as stack:
        for client in clients:
            stack.callback(client.close)
        share = 16384 // masters
        for index, client in enumerate(clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            if index < masters:
                last = 16383 if index == masters - 1 else (index + 1) * share - 1
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", index * share, last)
        for node in nodes[1:]:
            bus = node.options["cluster-port"]
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        wait_until(lambda: all(_cluster_size(client) == len(nodes) for client in clients), "the nodes know each other")
        ids = [client.execute_command("CLUSTER", "MYID").decode() for client in clients]
        for index in range(masters, len(nodes)):
            clients[index].execute_command("CLUSTER", "REPLICATE", ids[index % masters])
        wait_until(lambda: all(_cluster_ok(client, masters) for client in clients), "the cluster is up")


def _cluster_size(client: redis.Redis) -> int:
    return int(_cluster_info(client)["cluster_known_nodes"])


def _cluster_info(client: redis.Redis) -> dict[str, str]:
    lines = client.execute_command("CLUSTER", "INFO").decode().split()
    return dict(line.split(":", 1) for line in lines)


def _cluster_ok(client: redis.Redis, masters: int) -> bool:
    info = _cluster_info(client)
    return info["cluster_state"] == "ok" and int(info["cluster_size"]) == masters


def _slot_ranges(client: redis.Redis) -> list[tuple[int, int, int]]:
    slots = client.execute_command("CLUSTER", "SLOTS")
    return [(first, last, master[1]) for first, last, master, *_ in slots]


def _member(home: Path, **options: str) -> RedisServer:
    home.mkdir()
    settings = {
        "port": str(free_port()),
        "bind": "127.0.0.1",
        "dir": str(home),
        "save": "",
        "repl-diskless-sync": "yes",
    }
    settings["repl-diskless-sync-delay"] = "0"
    return RedisServer(home, settings | {"maxmemory-policy": "noeviction"} | options)


def _role(server: RedisServer) -> str:
    with contextlib.closing(server.client()) as client:
        try:
            return client.execute_command("ROLE")[0].decode()
        except redis.RedisError:
            return "down"


def _knows_group(sentinel: RedisServer) -> bool:
    with contextlib.closing(sentinel.client()) as client:
        try:
            state = client.sentinel_master(SentinelGroup.service)
        except redis.RedisError:
            return False
    return state["num-other-sentinels"] == 2 and state["num-slaves"] == 1


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = READY_S) -> None:
    """Polls a condition; TimeoutError names what was waited for."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.02)


def _die_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGKILL, 0, 0, 0)
