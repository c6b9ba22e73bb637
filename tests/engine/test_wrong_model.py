"""A config.json or weights with a mistake in them: refused for good, with the field or the weight and the next step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.test_loader import edit, failure
from worker.engine import loader, main
from worker.engine.protocol import EngineLoadFailed


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama3"), tmp_path / "model"))


@pytest.fixture
def experts(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "model"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 0}, ["`num_attention_heads`", "0", "at least 1"]),
        ({"num_attention_heads": True}, ["`num_attention_heads`", "true", "at least 1"]),
        ({"num_hidden_layers": 0}, ["`num_hidden_layers`", "0", "at least 1"]),
        ({"num_hidden_layers": 10**9}, ["`num_hidden_layers`", "1000000000", "at most"]),
        ({"hidden_size": "64"}, ["`hidden_size`", '"64"']),
        ({"num_key_value_heads": 3}, ["`num_key_value_heads`", "3", "`num_attention_heads`, 4"]),
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": None}, ["`num_attention_heads`", "6", "64"]),
        ({"hidden_act": "nope"}, ["`hidden_act`", '"nope"']),
        ({"dtype": "floaty"}, ["`dtype`", '"floaty"']),
        ({"pad_token_id": 10**7}, ["`pad_token_id`", "10000000", "199"]),
        ({"eos_token_id": "x"}, ["`eos_token_id`", "'x'", "int"]),
        ({"rms_norm_eps": "x"}, ["`rms_norm_eps`", "'x'", "float"]),
        ({"head_dim": 7}, ["`head_dim`", "7", "even"]),
        ({"max_position_embeddings": 1}, ["`max_position_embeddings`", "1", "at least 2"]),
        ({"rope_parameters": 5}, ["`rope_parameters`", "5", "dict"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["`rope_parameters`", "yarn", "factor"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, ["`rope_parameters.factor`", '"x"']),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, ["`rope_parameters.factor`", "-1"]),
    ],
)
def test_a_field_of_config_json_that_is_wrong(folder: Path, changes: dict[str, Any], words: list[str]):
    edit(folder, **changes)
    error = failure(folder)
    assert error.code == "CONFIG_CORRUPT"
    for word in ["config.json", *words, "correct config.json, or download the model again"]:
        assert word in str(error), str(error)


def test_a_rope_type_that_is_no_string(folder: Path):
    edit(folder, rope_parameters={"rope_type": ["x"]})
    error = failure(folder)
    assert error.code == "UNSUPPORTED_MODEL"
    assert "`rope_type` in `rope_parameters` is not a string" in str(error)


@pytest.mark.parametrize("layers", [1, 2, 4, 9999])
def test_weights_of_more_or_fewer_layers_than_config_json_says(folder: Path, layers: int):
    edit(folder, num_hidden_layers=layers)
    error = failure(folder)
    assert error.code == "WEIGHTS_MISMATCH"
    assert f"`num_hidden_layers` is {layers}, but" in str(error)
    assert "have 3 layers" in str(error)


def test_other_weights_that_the_model_has_no_place_for_are_allowed(folder: Path):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["vision_tower.encoder.layers.7.weight"] = torch.ones(3)
    save_file(weights, path, metadata={"format": "pt"})
    edit(folder, hidden_size=128)
    assert "model.embed_tokens.weight" in str(failure(folder)), "it got as far as the shapes"
    edit(folder, hidden_size=64)
    loader.load_model(folder, device=torch.device("cpu"), dtype="float32", attention_name="eager")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 4096}, ["`model.embed_tokens.weight`", "199 x 64", "4096 x 64"]),
        ({"hidden_size": 10**9}, ["`model.embed_tokens.weight`", "199 x 64", "199 x 1000000000"]),
        ({"num_key_value_heads": 4}, ["`model.layers.0.self_attn.k_proj.weight`", "32 x 64", "64 x 64"]),
    ],
)
def test_weights_of_another_shape(folder: Path, changes: dict[str, Any], words: list[str]):
    edit(folder, **changes)
    error = failure(folder)
    assert error.code == "WEIGHTS_MISMATCH"
    for word in [*words, "correct config.json, or download the model again"]:
        assert word in str(error), str(error)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # Experts are stored one by one and joined while loading.
        ({"moe_intermediate_size": 24}, ["experts.down_proj`", "8 x 64 x 48", "8 x 64 x 24"]),
        ({"moe_intermediate_size": 10**9}, ["3072000122368 parameters"]),
    ],
)
def test_experts_of_another_shape(experts: Path, changes: dict[str, Any], words: list[str]):
    edit(experts, **changes)
    error = failure(experts)
    assert error.code == "WEIGHTS_MISMATCH"
    assert all(word in str(error) for word in words), str(error)


@pytest.mark.parametrize("key", ["decoder_sparse_step", "num_experts_per_tok"])
def test_sizes_of_experts(experts: Path, key: str):
    edit(experts, **{key: 0})
    assert f"`{key}` is 0" in str(failure(experts))
    edit(experts, **{key: 1, "num_experts_per_tok": 9})
    assert "`num_experts_per_tok` is 9, but must be at most `num_experts`, 8" in str(failure(experts))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bytes_that_are_no_numbers(folder: Path, dtype: str):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 4 * 4
    data[middle : middle + 4000] = b"\xff" * 4000
    path.write_bytes(data)
    error = failure(folder, dtype=dtype)
    assert error.code == "WEIGHTS_CORRUPT"
    broken = next(name for name, weight in sorted(load_file(path).items()) if not weight.isfinite().all())
    assert f"`{broken}`" in str(error)
    assert "llorch-pool model verify NAME" in str(error) and "download the model again" in str(error)


def test_one_number_of_a_token_that_may_never_come(tiny_model: Callable[[str], Path], tmp_path: Path):
    folder = Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))
    _scale(folder, "model.embed_tokens.weight", lambda weight: weight[190].fill_(float("inf")))
    error = failure(folder)
    assert error.code == "WEIGHTS_CORRUPT"
    assert "`model.embed_tokens.weight`" in str(error)


def test_weights_that_float16_cannot_hold(folder: Path):
    _scale(folder, "model.layers.1.mlp.down_proj.weight", lambda weight: weight.mul_(1e6))
    error = failure(folder, dtype="float16")
    assert error.code == "NOT_FINITE"
    assert "overflow in float16; try --dtype bfloat16 or --dtype float32" in str(error)


def test_a_model_that_overflows_in_float16(folder: Path):
    """Every weight fits; what is computed from them doesn't."""
    _scale(folder, "model.layers.1.mlp.down_proj.weight", lambda weight: weight.mul_(2e4))
    error = failure(folder, dtype="float16")
    assert error.code == "NOT_FINITE"
    assert "--dtype bfloat16" in str(error)


def test_a_model_that_overflows_in_float32(folder: Path):
    _scale(folder, "model.layers.1.mlp.down_proj.weight", lambda weight: weight.mul_(1e37))
    error = failure(folder)
    assert error.code == "NOT_FINITE"
    assert "llorch-pool model verify NAME" in str(error)


def _scale(folder: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights[name])
    save_file(weights, path, metadata={"format": "pt"})


def test_a_context_without_room_for_an_answer(folder: Path):
    error = failure(folder, max_model_len=1)
    assert error.code == "CONTEXT_TOO_SHORT"
    assert "--max-model-len 1" in str(error) and "at least 2" in str(error)


class _Channel:
    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, message: object) -> None:
        self.sent.append(message)


def _serve(monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[int, EngineLoadFailed]:
    def fail(*_args: object) -> None:
        raise error

    monkeypatch.setattr("worker.engine.assemble.build_engine", fail)
    monkeypatch.setattr("worker.engine.loop.log_to_stderr", lambda: None)
    channel = _Channel()
    status = main.serve(main.parse(["--fd", "0", "--model-dir", "m"]), 1, cast("Any", channel))
    (sent,) = channel.sent
    assert isinstance(sent, EngineLoadFailed)
    return status, sent


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), TypeError("a"), KeyError("a"), IndexError("a"), ZeroDivisionError("a")]
)
def test_what_nobody_thought_of_is_a_permanent_failure_too(monkeypatch: pytest.MonkeyPatch, error: Exception):
    """A message with the next step, instead of a traceback at every start."""
    status, sent = _serve(monkeypatch, error)
    assert (status, sent.code, sent.permanent) == (main.EXIT_LOAD_FAILED, "MODEL_UNUSABLE", True)
    assert type(error).__name__ in sent.message and "download the model again" in sent.message


def test_an_error_that_may_be_the_moments_fault_ends_the_process(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match="CUDA"):
        _serve(monkeypatch, RuntimeError("CUDA error: unknown"))
