"""From a model folder to a model in memory, or to one sentence that says why not.

Read `load_model` first. Checks come before the (slow) reading of weights: config.json, the safetensors headers against
the sizes of the files and against config.json, the tokenizer's vocabulary against the model's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from worker.engine.architectures import UnsupportedModelError, check_supported
from worker.engine.config_check import check_config
from worker.engine.load_error import NEXT_STEP, LoadError, read_json, wrong_field
from worker.engine.weight_files import check_layers, check_shapes, check_weight_files, first_not_finite, wrong_shape

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and what its files say about it."""

    model: PreTrainedModel
    architecture: str
    dtype: torch.dtype
    vocab_size: int
    max_positions: int
    eos_token_ids: frozenset[int]


def load_model(
    folder: Path, *, device: torch.device, dtype: str, attention_name: str, experts_name: str | None = None
) -> LoadedModel:
    """Read a Hugging Face folder onto `device`. Raises LoadError with what to do."""
    config = read_json(folder / "config.json")
    if config is None:
        raise LoadError("CONFIG_MISSING", f"{folder / 'config.json'} does not exist; is this a model folder?")
    try:
        architecture = check_supported(config)
    except UnsupportedModelError as error:
        raise LoadError("UNSUPPORTED_MODEL", str(error)) from error
    check_config(config)
    _check_names(config)
    shapes = check_weight_files(folder)
    vocab_size, max_positions = config["vocab_size"], config["max_position_embeddings"]
    _check_tokenizer(folder, vocab_size)
    chosen = choose_dtype(dtype, config, device)
    described = _read_config(folder)
    _check_weights(folder, described, shapes)
    experts = experts_name if "num_experts_per_tok" in config else None
    model = _read_weights(folder, described, device, chosen, attention_name, experts)
    _check_finite(folder, model, chosen)
    return LoadedModel(
        model=model,
        architecture=architecture,
        dtype=chosen,
        vocab_size=vocab_size,
        max_positions=max_positions,
        eos_token_ids=_eos_token_ids(folder, config, vocab_size),
    )


def choose_dtype(name: str, config: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """`auto`: float32 on a CPU (exact, and faster there), the checkpoint's own on an accelerator."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.bfloat16)


def _check_names(config: Mapping[str, Any]) -> None:
    """Fields that name something of torch's or transformers'."""
    for key in ("hidden_act", "hidden_activation"):
        name = config.get(key)
        if name is not None and not (isinstance(name, str) and name in ACT2FN):
            raise wrong_field(key, name, "an activation that transformers knows, silu for instance")
    for key in ("dtype", "torch_dtype"):
        name = config.get(key)
        if name is not None and not (isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)):
            raise wrong_field(key, name, "a dtype of torch, bfloat16 for instance")


def _check_tokenizer(folder: Path, vocab_size: int) -> None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return  # prompts may come as token ids; the HTTP process says what it needs
    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise LoadError("TOKENIZER_CORRUPT", f"{path} can't be read; download the model again.") from error
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise LoadError(
            "VOCABULARY_MISMATCH",
            f"{path} has token id {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
            "the tokenizer belongs to another model.",
        )


def _read_config(folder: Path) -> PreTrainedConfig:
    """transformers' view of config.json. Raises LoadError that names the field."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its checks raise anything, from KeyError to the hub's own
        raise LoadError("CONFIG_CORRUPT", f"config.json can't be used: {_reason(error)}; {NEXT_STEP}.") from error


def _check_weights(folder: Path, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise LoadError unless config.json describes the weights in the files. Allocates nothing."""
    check_layers(folder, shapes, config.num_hidden_layers)
    try:
        with torch.device("meta"):
            described = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a field that passed every check may still be one that no model can be built from
        raise LoadError("CONFIG_CORRUPT", f"config.json can't be used: {_reason(error)}; {NEXT_STEP}.") from error
    check_shapes(folder, shapes, {name: tuple(weight.shape) for name, weight in described.named_parameters()})


def _read_weights(
    folder: Path,
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention_name: str,
    experts_name: str | None,
) -> PreTrainedModel:
    options: dict[str, Any] = {"experts_implementation": experts_name} if experts_name else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention_name,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told by `info`, with names and shapes
            **options,
        )
        model, info = loaded
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise LoadError("OUT_OF_MEMORY", "the weights don't fit on the device; use a smaller model.") from error
    except MemoryError as error:
        raise LoadError("OUT_OF_MEMORY", "the weights don't fit in memory; use a smaller model.") from error
    except Exception as error:  # a config or weights that don't fit raise anything, from KeyError to the hub's own
        raise LoadError("WEIGHTS_CORRUPT", f"{folder} can't be loaded: {_reason(error)}; {NEXT_STEP}.") from error
    for name, found, wanted in sorted(info["mismatched_keys"], key=str):
        raise wrong_shape(folder, name, tuple(found), tuple(wanted))
    for name in sorted(info["missing_keys"]):
        raise LoadError(
            "WEIGHTS_INCOMPLETE",
            f"{folder} has no usable weight `{name}`: config.json and the weights don't belong together; {NEXT_STEP}.",
        )
    return model


def _check_finite(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise LoadError where a weight isn't a number: every answer would fail, or some would, by the token."""
    for weight in model.parameters():
        total = float(weight.detach().sum(dtype=torch.float32))
        if not math.isfinite(total) and not bool(weight.detach().isfinite().all()):
            raise not_finite(folder, dtype)


def not_finite(folder: Path, dtype: torch.dtype) -> LoadError:
    """Why the model's numbers aren't finite: weights that are corrupt themselves, or a dtype that they overflow."""
    found = first_not_finite(folder)
    if found is not None:
        return LoadError(
            "WEIGHTS_CORRUPT",
            f"{found[0]} is corrupt: its weight `{found[1]}` holds values that aren't finite numbers. "
            "`llorch-pool model verify NAME` compares the files with their digests; download the model again.",
        )
    name = str(dtype).removeprefix("torch.")
    if dtype is torch.float32:
        return LoadError(
            "NOT_FINITE",
            f"{folder}: the weights are finite, but what the model computes from them isn't, in float32: they don't "
            "belong to this config.json, or are corrupt. `llorch-pool model verify NAME` compares the files with "
            "their digests; download the model again.",
        )
    other = "--dtype bfloat16 or --dtype float32" if dtype is torch.float16 else "--dtype float32"
    return LoadError("NOT_FINITE", f"{folder}: the model's numbers overflow in {name}; try {other}.")


def _eos_token_ids(folder: Path, config: Mapping[str, Any], vocab_size: int) -> frozenset[int]:
    generation = read_json(folder / "generation_config.json") or {}
    for source in (generation, config):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found = frozenset(i for i in ids if isinstance(i, int) and 0 <= i < vocab_size)
        if found:
            return found
    return frozenset()


def _reason(error: BaseException) -> str:
    """One line of an exception: where strict dataclasses name the field first and say the reason below, both."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].endswith(":") and len(lines) > 1:
        field = re.search(r"[Vv]alidation error for field '(\w+)'", lines[0])
        reason = re.sub(r"^\w+(Error|Exception): ", "", lines[1]).partition(". Errors:")[0]
        return (f"`{field[1]}`: {reason}" if field else reason).rstrip(".")[:300]
    return (f"{type(error).__name__}: " if len(lines[0]) < 20 else "") + lines[0].rstrip(".")[:300]
