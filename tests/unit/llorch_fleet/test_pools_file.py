"""The registry's files as people, other programs and other locales leave them: read in full, or refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llorch.errors import CliError
from llorch.fleet.pools import Pool, Pools


def one(**fields: Any) -> str:
    """A registry with the pool `a`, some of its fields changed."""
    return json.dumps({"pools": {"a": {"name": "a", "host": "h", **fields}}})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        (one(name="b"), r"pools\.a\.name can't be 'b'"),
        (json.dumps({"pools": {"../a": {"name": "../a", "host": "h"}}}), r"'\.\./a' can't be the name of a pool"),
        (one(host=""), r"pools\.a\.host"),
        (one(host="-oProxyCommand=id"), r"pools\.a\.host"),
        (one(host="h i"), r"pools\.a\.host"),
        (one(host="h:1"), r"pools\.a\.host"),
        (one(user="-l"), r"pools\.a\.user"),
        (one(port=70000), r"pools\.a\.port"),
        (one(port=-1), r"pools\.a\.port"),
        (one(command="x\0"), r"pools\.a\.command"),
        (one(identity_file="/k\udcff"), r"pools\.a\.identity_file"),
    ],
)
def test_what_no_command_would_have_written_is_named(tmp_path: Path, content: str, reason: str) -> None:
    pools = Pools(tmp_path)
    pools.file.write_text(content)
    with pytest.raises(CliError, match=rf"pools\.json can't be read: .*{reason}") as raised:
        pools.all()
    assert raised.value.next_step == f"correct or remove {pools.file}"


def test_only_a_file_is_read(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    os.mkfifo(pools.file)
    with pytest.raises(CliError, match="not a regular file"):
        pools.all()
    pools.file.unlink()
    pools.file.mkdir()
    with pytest.raises(CliError, match=r"pools\.json can't be read"):
        pools.all()
    pools.file.rmdir()
    os.mkfifo(pools.known_hosts)
    with pytest.raises(CliError, match=r"known_hosts can't be read: it is not a regular file"):
        pools.pin("llorch-pool-a", ["ssh-ed25519 AAA"])


def test_a_removal_that_can_not_forget_the_key_keeps_the_pool(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    pools.put(Pool(name="a", host="h"))
    pools.known_hosts.mkdir()
    with pytest.raises(CliError, match="known_hosts"):
        pools.remove("a")
    assert list(pools.all()) == ["a"]
    pools.known_hosts.rmdir()
    assert pools.remove("a").name == "a" and not pools.all()


def test_foreign_bytes_among_the_host_keys_stay_as_they_are(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    foreign = b"# caf\xe9 \xff\x85 \xe2\x80\xa8\n"
    pools.known_hosts.write_bytes(foreign)
    pools.put(Pool(name="a", host="h"))
    pools.pin("llorch-pool-a", ["ssh-ed25519 AAA"])
    assert pools.known_hosts.read_bytes() == foreign + b"llorch-pool-a ssh-ed25519 AAA\n"
    pools.remove("a")
    assert pools.known_hosts.read_bytes() == foreign


def test_a_link_is_written_through(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    pools = Pools(tmp_path / "llorch")
    (tmp_path / "llorch").mkdir()
    for path in (pools.file, pools.known_hosts):
        path.symlink_to(kept / path.name)
    pools.put(Pool(name="a", host="h"))
    pools.pin("llorch-pool-a", ["ssh-ed25519 AAA"])
    assert pools.file.is_symlink() and pools.known_hosts.is_symlink()
    assert Pools(kept).all() == pools.all() and list(pools.all()) == ["a"]
    assert sorted(path.name for path in kept.iterdir()) == ["known_hosts", "pools.json"]


def test_the_locale_does_not_matter(tmp_path: Path) -> None:
    """ISO-8859-1 is simulated: not every machine has such a locale, but all have the C locale without UTF-8 mode."""
    pools = Pools(tmp_path)
    pools.put(Pool(name="a", host="h", identity_file="/ключ ☃"))
    code = (
        "import sys; from pathlib import Path; from llorch.fleet.pools import Pool, Pools;"
        "import locale; assert 'UTF' not in locale.getpreferredencoding(False).upper();"
        "pools = Pools(Path(sys.argv[1])); pools.update('a', version='2'); pools.put(Pool(name='b', host='h'));"
        "pools.pin('llorch-pool-a', ['ssh-ed25519 AAA'])"
    )
    environ = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60, env=environ)
    assert pools.get("a") == Pool(name="a", host="h", identity_file="/ключ ☃", version="2")
    assert sorted(pools.all()) == ["a", "b"]
