from __future__ import annotations

from pathlib import Path

import pytest

from llorch.config import Settings, config_home, data_home
from llorch.errors import UsageProblem


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_flag_beats_environment_beats_files_beats_default(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    home_file = write(tmp_path / "xdg/llorch/config.toml", 'url = "http://home:1"\n')
    assert Settings(environ, tmp_path).get("url")[1:] == ("http://home:1", str(home_file))
    here = write(tmp_path / "llorch.toml", 'url = "http://here:1"\n[orchestratord]\nport = 9\n')
    assert Settings(environ, tmp_path).get("url")[1:] == ("http://here:1", str(here))
    environ["LLORCH_URL"] = "http://env:1"
    assert Settings(environ, tmp_path).get("url")[1:] == ("http://env:1", "environment LLORCH_URL")
    assert Settings(environ, tmp_path).get("url", "http://flag:1")[1:] == ("http://flag:1", "flag --url")


def test_defaults_and_empty_variables(tmp_path: Path) -> None:
    settings = Settings({"HOME": "/home/u", "LLORCH_URL": ""}, tmp_path)
    assert settings.get("url")[1:] == ("http://127.0.0.1:8080", "default")
    assert settings.get("api_key").value is None
    with pytest.raises(UsageProblem) as raised:
        settings.value("api_key")
    assert raised.value.next_step == "export LLORCH_API_KEY=..."


def test_xdg_folders_ignore_relative_paths() -> None:
    environ = {"HOME": "/home/u", "XDG_CONFIG_HOME": "relative", "XDG_DATA_HOME": "/data"}
    assert config_home(environ) == Path("/home/u/.config/llorch")
    assert data_home(environ) == Path("/data/llorch")


@pytest.mark.parametrize("text", ["url = \n", "url = [1]", "url = true", 'url = ""', b"\xff".decode("latin-1")])
def test_a_bad_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "llorch.toml").write_text(text, encoding="latin-1")
    with pytest.raises(UsageProblem, match=r"llorch\.toml"):
        Settings({"HOME": str(tmp_path)}, tmp_path).get("url")


def test_numbers_are_taken_as_text(tmp_path: Path) -> None:
    write(tmp_path / "llorch.toml", "timeout = 12.5\n")
    assert Settings({"HOME": str(tmp_path)}, tmp_path).value("timeout") == "12.5"
