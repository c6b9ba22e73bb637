"""The registry of pools: two writers lose nothing, addresses are told apart from options and shell words."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llorch.errors import CliError, UsageProblem
from llorch.fleet.pools import Pool, Pools, check_pool_name, parse_address


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gpu1", ("", "gpu1", 0)),
        ("me@gpu1.example.org:2222", ("me", "gpu1.example.org", 2222)),
        ("[fd00::1]:22", ("", "fd00::1", 22)),
        ("fd00::1", ("", "fd00::1", 0)),
        ("domain\\me@host", ("domain\\me", "host", 0)),
        ("me@corp@host", ("me@corp", "host", 0)),
        ("[fd00::1]", ("", "fd00::1", 0)),
        ("fe80::1%eth0", ("", "fe80::1%eth0", 0)),
    ],
)
def test_addresses(text: str, found: tuple[str, str, int]) -> None:
    assert parse_address(text) == found


NO_ADDRESSES = [
    "", "-oProxyCommand=id", "a b", "host:", "host:0", "host:x", "me@", "@host", "$(id)", "h;id", "h\n", "-l@h",
    "[fd00::1", "[fd00::1]22", "[fd00::1]:", "[a]b", "[a:1]", "[]:1", "[[a]]:1", "h:" + "9" * 5000, "fd00:1:",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageProblem):
        parse_address(text)


HOSTS = st.from_regex(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]{0,20}", fullmatch=True)
USERS = st.just("") | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.@\\-]{0,9}", fullmatch=True)


@given(user=USERS, host=HOSTS, port=st.integers(0, 65535))
def test_an_address_is_read_back_as_it_was_shown(user: str, host: str, port: int) -> None:
    try:
        parse_address(f"[{host}]:1")
    except UsageProblem:
        assume(False)
    assert parse_address(Pool(name="a", host=host, user=user, port=port).address) == (user, host, port)


def test_the_plain_ssh_command_can_be_typed() -> None:
    assert Pool(name="a", host="gpu1").ssh_command == "ssh gpu1"
    pool = Pool(name="a", host="fd00::1", user="corp\\me", port=22, identity_file="/my keys/k")
    assert pool.ssh_command == "ssh -p 22 -i '/my keys/k' 'corp\\me@fd00::1'"
    assert pool.address == "corp\\me@[fd00::1]:22"


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "..", "x" * 65, "a\n"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UsageProblem):
        check_pool_name(name)


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=Pools(tmp_path).put, args=(Pool(name=f"p{number}", host="h"),)) for number in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(Pools(tmp_path).all()) == 20
    assert Pools(tmp_path).file.stat().st_mode & 0o077 == 0


def test_targets(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    with pytest.raises(UsageProblem, match="no pool is known"):
        pools.chosen([], False)
    pools.put(Pool(name="a", host="h"))
    assert [pool.name for pool in pools.chosen([], False)] == ["a"]
    pools.put(Pool(name="b", host="h"))
    with pytest.raises(UsageProblem, match="which pool"):
        pools.chosen([], False)
    assert [pool.name for pool in pools.chosen(["b", "a", "b"], False)] == ["b", "a"]
    assert [pool.name for pool in pools.chosen([], True)] == ["a", "b"]


def test_a_pin_replaces_the_old_one_and_leaves_others(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    pools.pin("llorch-pool-a", ["ssh-ed25519 AAA"])
    pools.pin("llorch-pool-ab", ["ssh-ed25519 CCC"])
    pools.pin("llorch-pool-a", ["ssh-ed25519 BBB"])
    assert sorted(pools.known_hosts.read_text().splitlines()) == [
        "llorch-pool-a ssh-ed25519 BBB",
        "llorch-pool-ab ssh-ed25519 CCC",
    ]
    pools.put(Pool(name="a", host="h", host_key="SHA256:x"))
    pools.remove("a")
    assert pools.known_hosts.read_text() == "llorch-pool-ab ssh-ed25519 CCC\n" and pools.all() == {}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting"),
        ("\xff", "Expecting"),
        ("[]", "an object `pools`"),
        ('{"pools": []}', "an object `pools`"),
        ('{"pools": {"a": 1}}', r"pools\.a must be an object"),
        ('{"pools": {"a": {"name": "a"}}}', r"pools\.a\.host is missing"),
        ('{"pools": {"a": {"name": "a", "host": null}}}', r"pools\.a\.host must be a string"),
        ('{"pools": {"a": {"name": "a", "host": "h", "port": "22"}}}', r"pools\.a\.port must be a number"),
        ('{"pools": {"a": {"name": "a", "host": "h", "port": true}}}', r"pools\.a\.port must be a number"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str, reason: str) -> None:
    pools = Pools(tmp_path)
    pools.file.write_text(content)
    with pytest.raises(CliError, match=rf"pools\.json can't be read: .*{reason}"):
        pools.all()


def test_a_file_that_a_newer_version_wrote_is_read(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    pools.put(Pool(name="a", host="h", port=22, identity_file="/ä", added_at_ms=7))
    content = pools.file.read_text(encoding="utf-8")
    pools.file.write_text(content.replace('"name"', '"colour": ["red"],\n"name"'), encoding="utf-8")
    assert pools.all() == {"a": Pool(name="a", host="h", port=22, identity_file="/ä", added_at_ms=7)}
    pools.update("a", version="2")
    assert '"colour"' not in pools.file.read_text(encoding="utf-8") and pools.get("a").version == "2"


def test_reading_it_takes_no_import_that_the_other_side_could_wait_for() -> None:
    code = "import sys, llorch.cli, llorch.fleet.head_start; assert not {'msgspec', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
