from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llorch.errors import CliError, UsageProblem
from llorch.up.model import resolve

# Stands for `llorch-pool model resolve`: says where the model is, or ends as it is told.
POOL = """
import json, pathlib, sys
separator, ref = sys.argv[2:]
assert separator == "--"
if ref.startswith("hf:fail/"):
    sys.exit(int(ref.rpartition("/")[2]))
print(json.dumps({"path": sys.argv[1]}) if ref != "hf:odd/answer" else "[]")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def pool(folder: Path) -> list[str]:
    return [sys.executable, "-c", POOL, str(folder)]


@pytest.mark.parametrize("text", ["m", "./m", "file:{}", "{}"])
def test_a_folder(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve(text.format(folder), {}) == str(folder)


def test_demo_and_a_downloaded_model(folder: Path) -> None:
    assert resolve("demo", {}) == "demo"
    assert resolve("m", {"LLORCH_MODELS": str(folder.parent)}) == str(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name a model"),
        ("a\nb", "must name a model"),
        ("./x", "is not there"),
        ("file:/nowhere", "is not there"),
        ("org/name", "is not there"),
        (".", "has no config.json"),
    ],
)
def test_what_is_no_model(text: str, message: str) -> None:
    with pytest.raises(UsageProblem, match=message):
        resolve(text, {})


@pytest.mark.parametrize("ref", ["hf:org/name", "hf:org/name@main", "an-alias", "hf:o/$(touch x); 'y'"])
def test_a_reference_is_downloaded(folder: Path, ref: str) -> None:
    assert resolve(ref, {"HOME": str(folder)}, pool(folder)) == str(folder)


@pytest.mark.parametrize(("status", "code"), [(4, 4), (5, 5), (124, 124), (77, 1)])
def test_a_failed_download_keeps_its_exit_code(folder: Path, status: int, code: int) -> None:
    with pytest.raises(CliError) as raised:
        resolve(f"hf:fail/{status}", {}, pool(folder))
    assert raised.value.exit_code == code
    assert raised.value.next_step.startswith("llorch-pool model download hf:fail/")


def test_an_odd_answer(folder: Path) -> None:
    with pytest.raises(CliError, match="did not say where"):
        resolve("hf:odd/answer", {}, pool(folder))
