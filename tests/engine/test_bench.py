"""`llorch-worker bench` runs, compares and ends with a line of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from worker import bench


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def test_it_measures_and_plots(tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--threads", "1", "--rounds", "1", "--against", "generate,vllm", "--workloads", "batch 1,batch 8"]
    plot = tmp_path / "plot.png"
    assert bench.main(["--model", str(tiny_model("llama3")), "--plot", str(plot), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert [row["name"] for row in report["workloads"]] == ["batch 1", "batch 8"]
    for row in report["workloads"]:
        assert row["tokens_per_second"].keys() == {"llorch", "generate"}
        assert row["ratio_to"]["generate"] > 0
        assert row["first_token_ms"] > 0
        low, high = row["ratio_quartiles"]["generate"]
        assert low <= row["ratio_to"]["generate"] <= high
        assert row["threads_of_others"] == {"generate": 1}
    assert report["newcomer"]["steps"] == 1
    assert report["newcomer"]["first_token_ms"] > 0
    assert any("a newcomer of" in line for line in lines)
    assert "vllm" in report["absent"]
    assert any(line.startswith("not measured: vllm") for line in lines)
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    "options", [["--workloads", "batch 7"], ["--against", "everybody"], ["--rounds", "0"], ["--threads", "x"]]
)
def test_mistakes_are_named(options: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        bench.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err
