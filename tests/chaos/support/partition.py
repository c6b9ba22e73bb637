"""A network that can be cut: replicas and workers in namespaces of their own, each on one or two cables. Read `cabled`.

    llchaos-d  10.218.1.0/24   clients (this namespace) · replicas · workers
    llchaos-r  10.218.2.0/24   Redis (this namespace) · replicas

A cut cable is silent: nothing gets through, no connection breaks, nobody is told. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path

from tests.chaos.support.redis_sets import RedisSet, plain
from tests.chaos.support.town import Place
from tests.support.namespaces import ip

DATA, REDIS = "d", "r"
SUBNETS = {DATA: "10.218.1", REDIS: "10.218.2"}
PREFIX = "llchaos-"


class Cables:
    """Which cables there are, and cutting them."""

    def __init__(self) -> None:
        self.cut_now: set[tuple[str, str]] = set()

    def cut(self, name: str, network: str) -> None:
        """Nothing goes between this machine and the network any more."""
        ip("link", "set", link_of(name, network), "nomaster")
        self.cut_now.add((name, network))

    def mend(self, name: str, network: str) -> None:
        """As before."""
        ip("link", "set", link_of(name, network), "master", PREFIX + network)
        self.cut_now.discard((name, network))


class PartitionedSet(RedisSet):
    """One Redis, with replicas and workers on cables."""

    name = "partition"

    def __init__(self, redis: RedisSet, places: dict[str, Place], cables: Cables) -> None:
        super().__init__(redis.servers, redis.url)
        self.places, self.cables = places, cables


def link_of(name: str, network: str) -> str:
    """This end of a cable (15 characters at most)."""
    return f"llc{network}-{name}"


@contextlib.contextmanager
def partitioned(replicas: int = 3, workers: int = 4) -> Generator[PartitionedSet]:
    """A durable Redis on the Redis network, and places for everything else."""
    names = [f"replica{number}" for number in range(replicas)], [f"worker{number}" for number in range(workers)]
    with cabled(*names) as (places, cables), plain(f"{SUBNETS[REDIS]}.1") as redis:
        yield PartitionedSet(redis, places, cables)


@contextlib.contextmanager
def cabled(replicas: Sequence[str], workers: Sequence[str]) -> Generator[tuple[dict[str, Place], Cables]]:
    """Namespaces with cables; taken away at the end. A lock keeps two runs from using the same addresses."""
    with (Path(tempfile.gettempdir()) / "llorch-chaos-network.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep()
        try:
            for network, subnet in SUBNETS.items():
                ip("link", "add", PREFIX + network, "type", "bridge")
                ip("addr", "add", f"{subnet}.1/24", "dev", PREFIX + network)
                ip("link", "set", PREFIX + network, "up")
            places: dict[str, Place] = {}
            for number, name in enumerate([*replicas, *workers], start=11):
                ip("netns", "add", PREFIX + name)
                ip("-n", PREFIX + name, "link", "set", "lo", "up")
                for network in (DATA, REDIS) if name in replicas else (DATA,):
                    _plug(name, network, f"{SUBNETS[network]}.{number}")
                places[name] = Place(f"{SUBNETS[DATA]}.{number}", ("ip", "netns", "exec", PREFIX + name))
            yield places, Cables()
        finally:
            _sweep()


def _plug(name: str, network: str, address: str) -> None:
    link = link_of(name, network)
    ip("link", "add", link, "type", "veth", "peer", "name", f"eth-{network}", "netns", PREFIX + name)
    ip("link", "set", link, "master", PREFIX + network)
    ip("link", "set", link, "up")
    ip("-n", PREFIX + name, "addr", "add", f"{address}/24", "dev", f"eth-{network}")
    ip("-n", PREFIX + name, "link", "set", f"eth-{network}", "up")


def _sweep() -> None:
    """Also what a run that was killed has left."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10).stdout
    for line in listed.splitlines():
        if line.startswith(PREFIX):
            ip("netns", "del", line.split()[0], check=False)
    for network in SUBNETS:
        ip("link", "del", PREFIX + network, check=False)
