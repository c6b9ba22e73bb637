"""Servers that run deploy/redis' samples: filled in by render.sh, moved into a folder, and otherwise as they stand."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Generator
from pathlib import Path

import redis

from orchestratord.redis_server import find_server
from tests.deploy.units import ROOT
from tests.support.redis_server import RedisServer, _die_with_parent, folder, free_port, wait_until

SAMPLES = ROOT / "deploy" / "redis"
PASSWORDS = {
    f"{name}_PASSWORD": f"{name.lower()}-password-0123" for name in ("ORCHESTRATORD", "OPERATOR", "REPLICA", "SENTINEL")
}


def render(*samples: str, check: bool = True, **values: str) -> str:
    """Samples, one after the other, through render.sh."""
    text = "".join((SAMPLES / sample).read_text() for sample in samples)
    done = subprocess.run(
        ["sh", str(SAMPLES / "render.sh")],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": os.environ["PATH"], **PASSWORDS, **values},
    )
    if not check:
        return done.stderr if done.returncode else done.stdout
    assert done.returncode == 0, done.stderr
    return done.stdout


class SampleServer(RedisServer):
    """A server over a configuration file, asked as user `operator`."""

    def __init__(
        self, home: Path, config: str, *, acl: str | None, sentinel: bool = False, replica_of: int = 0
    ) -> None:
        home.mkdir()
        super().__init__(home, {"port": str(free_port())})
        self.sentinel = sentinel
        if acl is not None:
            (home / "users.acl").write_text(acl)
        (home / "redis.conf").write_text(_moved((SAMPLES / "redis.conf").read_text(), home))
        text = _moved(config, home) + f"\nport {self.port}\n" + ("" if sentinel else "maxmemory 256mb\n")
        (home / "own.conf").write_text(text + (f"replicaof 127.0.0.1 {replica_of}\n" if replica_of else ""))

    def client(self, user: str = "operator") -> redis.Redis:
        """A client as one of the users; at a Sentinel as nobody."""
        if self.sentinel:
            return redis.Redis(port=self.port, socket_timeout=5)
        password = PASSWORDS[f"{user.upper()}_PASSWORD"]
        return redis.Redis(port=self.port, username=user, password=password, socket_timeout=5, decode_responses=True)

    def url_for(self, user: str) -> str:
        """As LLORCH_REDIS_URL names it."""
        return f"redis://{user}:{PASSWORDS[f'{user.upper()}_PASSWORD']}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [find_server(), str(self.folder / "own.conf"), *(["--sentinel"] if self.sentinel else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                preexec_fn=_die_with_parent(),
            )
        wait_until(self._answers, f"the server in {self.folder} answers")


def _moved(config: str, home: Path) -> str:
    return re.sub(r"/(etc|var/lib)/redis\b", str(home), config)


@contextlib.contextmanager
def single() -> Generator[SampleServer]:
    """redis.conf with users.acl."""
    with folder() as path:
        server = SampleServer(path / "one", render("redis.conf"), acl=render("users.acl"))
        try:
            server.start()
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def highly_available() -> Generator[tuple[list[SampleServer], list[SampleServer]]]:
    """redis-ha.conf twice, master and replica, and sentinel.conf three times."""
    with folder() as path, contextlib.ExitStack() as stack:
        config, acl = render("redis-ha.conf"), render("users.acl", "users-ha.acl")
        master = SampleServer(path / "a", config, acl=acl)
        replica = SampleServer(path / "b", config, acl=acl, replica_of=master.port)
        watching = render("sentinel.conf", MASTER_HOST="127.0.0.1", MASTER_PORT=str(master.port))
        sentinels = [SampleServer(path / f"s{index}", watching, acl=None, sentinel=True) for index in range(3)]
        for server in (master, replica, *sentinels):
            stack.callback(server.kill)
            server.start()
        yield [master, replica], sentinels
