"""From a model folder to a model in memory, or to one sentence that says why not.

Read `load_model` first. Checks come before the (slow) reading of weights: config.json, the safetensors headers against
the sizes of the files, the tokenizer's vocabulary against the model's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from worker.engine.architectures import UnsupportedModelError, check_supported

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class LoadError(Exception):
    """The model can't be loaded; nothing changes by trying again. `code` is a short name for the kind of problem."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


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
    config = _read_json(folder / "config.json")
    if config is None:
        raise LoadError("CONFIG_MISSING", f"{folder / 'config.json'} does not exist; is this a model folder?")
    try:
        architecture = check_supported(config)
    except UnsupportedModelError as error:
        raise LoadError("UNSUPPORTED_MODEL", str(error)) from error
    check_weight_files(folder)
    vocab_size, max_positions = _positive(config, "vocab_size"), _positive(config, "max_position_embeddings")
    _check_tokenizer(folder, vocab_size)
    chosen = choose_dtype(dtype, config, device)
    model = _read_weights(
        folder, device, chosen, attention_name, experts_name if "num_experts_per_tok" in config else None
    )
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


def check_weight_files(folder: Path) -> None:
    """Raise LoadError unless every safetensors file of the model is there and as long as its header says."""
    index = _read_json(folder / "model.safetensors.index.json")
    names = ["model.safetensors"] if index is None else sorted(set(index.get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise LoadError(
                "PICKLED_WEIGHTS",
                f"{folder} holds its weights as pickles ({pickles[0]}), which can run code when they are opened; "
                "get the safetensors version of the model.",
            )
        raise LoadError("WEIGHTS_MISSING", f"{folder} lacks {', '.join(missing[:3])}; download the model again.")
    for name in names:
        _check_safetensors(folder / name)


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    broken = LoadError("WEIGHTS_CORRUPT", f"{path} is truncated or corrupt; delete it and download the model again.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 * 2**20):
            raise broken
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise broken from error
    if not ends or 8 + length + max(ends) != size:
        raise broken


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


def _read_weights(
    folder: Path, device: torch.device, dtype: torch.dtype, attention_name: str, experts_name: str | None
) -> PreTrainedModel:
    options: dict[str, Any] = {"experts_implementation": experts_name} if experts_name else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention_name,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        model, info = loaded
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise LoadError("OUT_OF_MEMORY", "the weights don't fit on the device; use a smaller model.") from error
    except MemoryError as error:
        raise LoadError("OUT_OF_MEMORY", "the weights don't fit in memory; use a smaller model.") from error
    except Exception as error:  # a config or weights that don't fit raise anything, from KeyError to the hub's own
        raise LoadError("WEIGHTS_CORRUPT", f"{folder} can't be loaded: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        name = missing[0] if missing else next(iter(info["mismatched_keys"]))[0]
        raise LoadError(
            "WEIGHTS_INCOMPLETE",
            f"{folder} has no usable weight `{name}`: config.json and the weights don't belong together.",
        )
    return model


def _eos_token_ids(folder: Path, config: Mapping[str, Any], vocab_size: int) -> frozenset[int]:
    generation = _read_json(folder / "generation_config.json") or {}
    for source in (generation, config):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found = frozenset(i for i in ids if isinstance(i, int) and 0 <= i < vocab_size)
        if found:
            return found
    return frozenset()


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise LoadError("CONFIG_CORRUPT", f"{path} is not valid JSON; download the model again.") from error
    if not isinstance(value, dict):
        raise LoadError("CONFIG_CORRUPT", f"{path} is not a JSON object; download the model again.")
    return value


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise LoadError("CONFIG_CORRUPT", f"config.json has no usable `{key}`; download the model again.")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
