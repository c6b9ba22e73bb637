"""The safetensors files of a model: whole, readable, and what config.json says they are. Reads headers, no weights.

Read `check_weight_files`, `check_layers` and `check_shapes`; only `first_not_finite` reads the weights themselves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from worker.engine.load_error import NEXT_STEP, LoadError, read_json

_MAX_HEADER_BYTES = 100 * 2**20
_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.")


def check_weight_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each weight by name.

    Raises LoadError unless every safetensors file of the model is there and as long as its header says.
    """
    names = _file_names(folder)
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
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        shapes |= _shapes_in(folder / name)
    return shapes


def check_layers(folder: Path, shapes: Mapping[str, tuple[int, ...]], num_hidden_layers: int) -> None:
    """Raise LoadError unless the weights are of as many layers as config.json says: more would be left out."""
    found = {int(match[1]) for name in shapes if (match := _LAYER.match(name)) is not None}
    if found and max(found) + 1 != num_hidden_layers:
        raise LoadError(
            "WEIGHTS_MISMATCH",
            f"config.json: `num_hidden_layers` is {num_hidden_layers}, but the weights in {folder} have "
            f"{max(found) + 1} layers; {NEXT_STEP}.",
        )


def check_shapes(folder: Path, shapes: Mapping[str, tuple[int, ...]], described: Mapping[str, tuple[int, ...]]) -> None:
    """Raise LoadError for the first weight of another shape than config.json describes, before memory is allocated.

    Names that stand on one side only are left to the loading itself, which joins some weights under new names.
    """
    for name, wanted in described.items():
        if name in shapes and shapes[name] != wanted:
            raise wrong_shape(folder, name, shapes[name], wanted)
    there, needed = (sum(map(math.prod, sizes.values())) for sizes in (shapes, described))
    if needed > 2 * there:
        raise LoadError(
            "WEIGHTS_MISMATCH",
            f"config.json describes a model of {needed} parameters, but the weights in {folder} have {there}: they "
            f"don't belong together; {NEXT_STEP}.",
        )


def wrong_shape(folder: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> LoadError:
    """For a weight that doesn't fit config.json."""
    return LoadError(
        "WEIGHTS_MISMATCH",
        f"the weight `{name}` in {folder} is {_size(found)}, but by config.json it must be {_size(wanted)}: they don't "
        f"belong together; {NEXT_STEP}.",
    )


def first_not_finite(folder: Path) -> tuple[Path, str] | None:
    """File and name of the first weight that holds anything but finite numbers, as stored; None if there is none."""
    for name in _file_names(folder):
        with safe_open(folder / name, framework="pt") as file:
            for key in sorted(file.keys()):
                weight = file.get_tensor(key)
                if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                    return folder / name, key
    return None


def _file_names(folder: Path) -> list[str]:
    index = read_json(folder / "model.safetensors.index.json")
    if index is None:
        return ["model.safetensors"]
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        path = folder / "model.safetensors.index.json"
        raise LoadError("WEIGHTS_CORRUPT", f"{path} has no usable `weight_map`; download the model again.")
    return sorted(set(names.values()))


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    size = path.stat().st_size
    broken = LoadError("WEIGHTS_CORRUPT", f"{path} is truncated or corrupt; delete it and download the model again.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise broken
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max(entry["data_offsets"][1] for entry in entries.values())
            shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise broken from error
    if 8 + length + end != size:
        raise broken
    return shapes


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
