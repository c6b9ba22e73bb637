"""Settings: who wins, what is refused and how, and that keys show nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from llorch_wire.layers import SettingsError
from orchestratord import cli
from orchestratord.settings import Settings, Tenant, is_loopback_host, load, parse_api_keys, redacted_url

KEY = "a-secret-key-1"


def test_flag_beats_environment_beats_files_beats_default(tmp_path: Path) -> None:
    home = tmp_path / "config"
    (home / "llorch").mkdir(parents=True)
    (home / "llorch" / "config.toml").write_text("[orchestratord]\nport = 1\nlog_level = 'debug'\nmax_queued = 5\n")
    (tmp_path / "llorch.toml").write_text(
        "redis_url = 'redis://x'\n[orchestratord]\nport = 2\nmax_failures = 9\n[up]\na = 1\n"
    )
    environ = {"XDG_CONFIG_HOME": str(home), "LLORCH_PORT": "3", "LLORCH_MAX_FAILURES": "8", "LLORCH_HOST": ""}

    def read(**flags: object) -> Settings:
        return load(flags, environ=environ, cwd=tmp_path)

    assert read(port="4").port == 4
    assert read(port=None).port == 3
    assert read().max_failures == 8
    assert read().log_level == "debug" and read().max_queued == 5
    assert read().host == "127.0.0.1", "an empty variable counts as unset"
    url = read().redis_url
    assert url is not None and url.get_secret_value() == "redis://x"


def test_keys_parse_with_weights() -> None:
    keys = parse_api_keys(f"acme:2.5={KEY}, other=bbbbbbbb,acme=cccccccc,")
    assert [entry.tenant for entry in keys] == [Tenant("acme", 2.5), Tenant("other", 1.0), Tenant("acme", 2.5)]
    assert keys[0].key.get_secret_value() == KEY
    settings = Settings.model_validate({"api_keys": f"acme:2={KEY}", "worker_key": "worker-key-1"})
    assert settings.tenants() == (Tenant("acme", 2.0),)
    assert Settings().tenants() == (Tenant("default", 1.0),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (KEY, "entry 1"),
        (f"={KEY}", "entry 1"),
        (f"a b={KEY}", "entry 1"),
        ("acme=short", "entry 1 (tenant acme)"),
        (f"acme={KEY},other={KEY}", "twice"),
        (f"acme:0={KEY}", "above 0"),
        (f"acme:-1={KEY}", "above 0"),
        (f"acme:nan={KEY}", "above 0"),
        (f"acme:x={KEY}", "weight"),
        (f"acme:1={KEY},acme:2=other-key-1", "two weights"),
        ("acme=kéy-with-an-accent", "printable"),
    ],
)
def test_bad_keys_are_refused_without_being_quoted(text: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({}, environ={"LLORCH_API_KEYS": text}, cwd=Path("/nonexistent"))
    message = str(caught.value)
    assert message.startswith("LLORCH_API_KEYS:") and says in message
    assert KEY not in message and "short" not in message


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"LLORCH_PORT": "99999"}, "LLORCH_PORT:"),
        ({"LLORCH_PORT": "http"}, "LLORCH_PORT:"),
        ({"LLORCH_WORKER_KEY": "short"}, "LLORCH_WORKER_KEY:"),
        ({"LLORCH_LOG_FORMAT": "xml"}, "LLORCH_LOG_FORMAT:"),
        ({"LLORCH_ADVERTISE_URL": "host:1"}, "LLORCH_ADVERTISE_URL:"),
        ({"LLORCH_REPLICA_LEASE_MS": "600"}, "--replica-renew-ms"),
        ({"LLORCH_WORKER_KEY": KEY, "LLORCH_API_KEYS": f"a={KEY}"}, "LLORCH_WORKER_KEY:"),
    ],
)
def test_a_bad_value_names_where_it_came_from(environ: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({}, environ=environ, cwd=Path("/nonexistent"))
    assert str(caught.value).startswith(says), caught.value
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[orchestratord]\nprot = 1\n", "unknown setting `prot`"),
        ("x = [", "not valid TOML"),
        ("orchestratord = 1", "table"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "llorch.toml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load({}, environ={}, cwd=tmp_path)
    assert str(tmp_path / "llorch.toml") in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.com"])
@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ({}, "LLORCH_API_KEYS and LLORCH_WORKER_KEY"),
        ({"LLORCH_API_KEYS": f"a={KEY}"}, "LLORCH_WORKER_KEY"),
        ({"LLORCH_WORKER_KEY": KEY}, "LLORCH_API_KEYS"),
    ],
)
def test_the_network_needs_keys(host: str, keys: dict[str, str], missing: str) -> None:
    with pytest.raises(SettingsError, match=f"Set {missing} ") as caught:
        load({"host": host}, environ=keys, cwd=Path("/nonexistent"))
    assert KEY not in str(caught.value)
    both = {"LLORCH_API_KEYS": f"a={KEY}", "LLORCH_WORKER_KEY": "worker-key-1"}
    assert load({"host": host}, environ=both, cwd=Path("/nonexistent")).host == host


def test_client_keys_need_a_worker_key_on_loopback_too() -> None:
    """A worker is sent the prompts of every client."""
    keys = {"LLORCH_API_KEYS": f"a={KEY}"}
    with pytest.raises(SettingsError, match=r"^LLORCH_WORKER_KEY: .*openssl rand -hex 24") as caught:
        load({}, environ=keys, cwd=Path("/nonexistent"))
    assert KEY not in str(caught.value)
    assert load({}, environ=keys, cwd=Path("/nonexistent"), serves=False).api_keys, "the embedded Redis alone"
    assert load({}, environ={**keys, "LLORCH_WORKER_KEY": "worker-key-1"}, cwd=Path("/nonexistent")).api_keys
    assert load({}, environ={"LLORCH_WORKER_KEY": "worker-key-1"}, cwd=Path("/nonexistent")).worker_key


def test_loopback_is_known_by_name_and_number() -> None:
    assert all(
        map(is_loopback_host, ("localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"))
    )
    assert not any(map(is_loopback_host, ("", "localhost.evil.com", "0.0.0.0", "10.0.0.1", "::", "127.0.0.1.evil.com")))


def test_keys_show_nowhere() -> None:
    settings = Settings.model_validate(
        {
            "api_keys": f"a={KEY}",
            "worker_key": "worker-key-1",
            "redis_url": "redis://u:secret-pw@h/0",
            "webhook_secret": KEY + "2",
        }
    )
    shown = f"{settings!r} {settings} {settings.api_keys!r} {settings.model_dump()}"
    assert not any(secret in shown for secret in (KEY, "worker-key-1", "secret-pw"))
    assert redacted_url("redis://u:secret-pw@h:1/0?password=x") == "redis://h:1/0"


def test_the_command_line_refuses_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LLORCH_API_KEYS", "LLORCH_WORKER_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["--host", "0.0.0.0"]) == 2
    assert "LLORCH_API_KEYS" in capsys.readouterr().err
    assert cli.main(["--port", "x"]) == 2
    assert "--port" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("orchestratord ")
    for unknown in (["--prot", "1"], ["--api-keys", "a=b"], ["--worker-key", "x"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(unknown)
        assert caught.value.code == 2
        capsys.readouterr()
