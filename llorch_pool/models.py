"""The models on this machine. Read `download` first.

lock the name ─▶ here already? ─▶ ask the source ─▶ room on the disk? ─▶ fetch into .partial/<name>
             ─▶ model.json with every digest ─▶ rename to <name>: a model is there whole or not at all
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from llorch_pool import estimate, model_ref
from llorch_pool.context import Context
from llorch_pool.errors import PoolError, usage_error
from llorch_pool.fetch import PARALLEL_FILES, fetch, sha256_of
from llorch_pool.files import locked, remove_tree, sync_folder, write_atomic
from llorch_pool.lifecycle import list_workers
from llorch_pool.model_ref import ModelRef
from llorch_pool.model_source import FolderSource, Source, free_bytes, hub_source
from llorch_pool.paths import check_name
from llorch_pool.registry import Registry
from llorch_wire.pool import FileRecord, ModelDownload, ModelInfo, PartialFile, Progress, VerifyReport

SPARE_BYTES = 64 << 20
"""Kept free beside a download."""


def download(context: Context, request: ModelDownload) -> ModelInfo:
    """Bring a model here, or go on with it; at once if it is here. Raises PoolError."""
    aliases = model_ref.load_aliases(context.paths.config)
    ref = model_ref.parse(request.ref, aliases)
    name = check_name(request.name or _name_of(request.ref, ref, aliases), "model", "--name")
    with _name_locked(context, name):
        here = _find(context, name)
        if here is not None and (done := _good_enough(context, here, ref, offline=request.offline)):
            return done
        if request.offline and ref.kind == "hf":
            raise PoolError(
                f"{ref} is not on this machine and --offline forbids to fetch it",
                next_step="`llorch-pool model list` shows what is here; leave --offline out to download.",
                code="offline",
            )
        source: Source = (
            FolderSource(ref) if ref.kind == "file" else hub_source(context, ref, request.endpoint, request.token)
        )
        if here is not None and here.revision == source.revision and ref.kind == "hf":
            context.log(f"{name} is here already, at {here.revision}")
            return here
        return bring(context, source, name)


def _name_of(text: str, ref: ModelRef, aliases: dict[str, str]) -> str:
    """An alias is a name already; otherwise the last part of the repository or folder."""
    return text if text in aliases or text == model_ref.DEMO else ref.default_name()


def _name_locked(context: Context, name: str) -> AbstractContextManager[None]:
    context.paths.models.mkdir(parents=True, exist_ok=True)
    context.paths.partial.mkdir(parents=True, exist_ok=True)
    return locked(
        context.paths.partial / f"{name}.lock",
        context,
        what=f"model {name}",
        waiting=f"another command brings {name}; waiting for it",
        keep=lambda: False,  # most names that are typed wrong would leave one for good
    )


def _good_enough(context: Context, here: ModelInfo, ref: ModelRef, *, offline: bool) -> ModelInfo | None:
    """The model under this name if it is certainly the one that is meant. Raises PoolError if it is another one."""
    have = model_ref.parse(here.ref)
    if (have.kind, have.target) != (ref.kind, ref.target):
        raise PoolError(
            f"the name {here.name} is taken here by {here.ref}",
            next_step="Give this one another name with --name, or remove the other (`llorch-pool model remove NAME`).",
            code="name_taken",
        )
    pinned = bool(ref.revision) and ref.revision in (here.revision, have.revision) and (ref.pinned or offline)
    if pinned or offline or (ref.kind == "file" and not _changed(here, ref)):
        context.log(f"{here.name} is here already" + (f", at {here.revision}" if here.revision else ""))
        return here
    return None


def _changed(here: ModelInfo, ref: ModelRef) -> bool:
    """Whether the folder that was copied has other files, sizes or newer times than the copy."""
    source = FolderSource(ref)
    then = {record.path: record.size for record in here.files}
    newest = max((Path(ref.target) / file.path).stat().st_mtime for file in source.files)
    return {file.path: file.size for file in source.files} != then or newest * 1000 > here.downloaded_at_ms


def take_in(context: Context, source: Source, name: str, wanted_digest: str) -> ModelInfo:
    """Put a model in place that another pool sends, one file after the other. Raises PoolError."""
    with _name_locked(context, name):
        here = _find(context, name)
        if here is not None and here.digest == wanted_digest:
            return here
        if here is not None and here.ref != source.ref:
            raise PoolError(
                f"the name {name} is taken here by {here.ref}",
                next_step="Remove it first (`llorch-pool model remove NAME`), or copy under another name.",
                code="name_taken",
            )
        return bring(context, source, name, parallel=1)


def bring(context: Context, source: Source, name: str, *, parallel: int = PARALLEL_FILES) -> ModelInfo:
    """Fetch everything of `source` and put it in place as `name`. The name's lock is held. Raises PoolError."""
    partial = context.paths.partial / name
    origin = source.identity.encode()
    mark = context.paths.partial / f"{name}.source"
    if partial.exists() and (not mark.exists() or mark.read_bytes() != origin):
        remove_tree(partial)
    partial.mkdir(exist_ok=True)
    write_atomic(mark, origin, mode=0o644)
    _check_room(context, source, partial)
    context.progress(Progress(phase="downloading", text=name, done=0, unit="bytes"), force=True)
    records = fetch(context, source, partial, name, parallel)
    info = describe(partial, name, source.ref, source.revision, records)
    _drop_others(partial, {record.path for record in records})
    write_atomic(partial / "model.json", encode(info), mode=0o644)
    target = context.paths.models / name
    old = context.paths.partial / f"{name}.old"
    remove_tree(old)
    if target.exists() or target.is_symlink():
        target.rename(old)
    partial.rename(target)
    sync_folder(context.paths.models)
    with contextlib.suppress(OSError):  # the model is in place; what is left of the old one goes with the next one
        remove_tree(old)
    mark.unlink(missing_ok=True)
    return msgspec.structs.replace(info, path=str(target))


def _check_room(context: Context, source: Source, partial: Path) -> None:
    total = sum(file.size for file in source.files)
    have = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = free_bytes(context.paths.models)
    if total - have + SPARE_BYTES > free:
        raise PoolError(
            f"no room in {context.paths.models}: {estimate.gib(total - have)} to come, {estimate.gib(free)} free",
            next_step="Remove a model (`llorch-pool model list`), or set LLORCH_MODELS to a larger disk.",
            code="disk_full",
        )


def _drop_others(folder: Path, keep: set[str]) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in keep:
            path.unlink()


def encode(info: ModelInfo) -> bytes:
    """Content of model.json."""
    return msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(info, path="")))


def describe(folder: Path, name: str, ref: str, revision: str, files: list[FileRecord]) -> ModelInfo:
    """What is known of a model from its files. Raises PoolError when a worker could not read them."""
    config, weights = estimate.read_config(folder), estimate.read_weights(folder)
    architectures = config.get("architectures")
    return ModelInfo(
        name=name,
        ref=ref,
        revision=revision,
        digest=digest(files),
        bytes=sum(file.size for file in files),
        format="safetensors",
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        context_length=estimate.context_length(config),
        dtype=weights.dtype,
        files=files,
        downloaded_at_ms=round(time.time() * 1000),
        path=str(folder),
    )


_DIGEST_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def digest(files: Iterable[FileRecord]) -> str:
    """One digest over everything that decides what a model answers: config, tokenizer, template and weights.

    The same formula as a worker uses on a folder without model.json (of up to 2 GiB), so that both agree:
    sha256("llorch model v1\\0" + for each file its name, a zero byte and its binary sha256), weights last, by name.
    """
    by_path = {file.path: file.sha256 for file in files}
    names = [name for name in _DIGEST_FILES if name in by_path]
    names += sorted(path for path in by_path if path.endswith(".safetensors"))
    whole = hashlib.sha256(b"llorch model v1\0")
    for name in names:
        whole.update(name.encode() + b"\0" + bytes.fromhex(by_path[name]))
    return "sha256:" + whole.hexdigest()


def _find(context: Context, name: str) -> ModelInfo | None:
    folder = context.paths.models / name
    try:
        info = msgspec.json.decode((folder / "model.json").read_bytes(), type=ModelInfo)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (msgspec.MsgspecError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PoolError(
            f"{folder / 'model.json'} can't be read: {why}",
            next_step=f"Remove it with `llorch-pool model remove --force {name}` and download it again.",
            code="damaged",
        ) from error
    return msgspec.structs.replace(info, path=str(folder))


def list_models(context: Context) -> list[ModelInfo]:
    """Every whole model here, by name; a damaged one is left out with a warning."""
    found, damaged = scan(context)
    for error in damaged.values():
        context.log(error.message, "warning")
    return found


def scan(context: Context) -> tuple[list[ModelInfo], dict[str, PoolError]]:
    """Every whole model here, and what is wrong with each that can't be read; by name."""
    found: list[ModelInfo] = []
    damaged: dict[str, PoolError] = {}
    if context.paths.models.is_dir():
        for folder in sorted(context.paths.models.iterdir()):
            if folder.name.startswith("."):
                continue
            try:
                info = _find(context, folder.name)
            except PoolError as error:
                damaged[folder.name] = error
                continue
            if info is not None:
                found.append(info)
    return found, damaged


def show(context: Context, name: str) -> ModelInfo:
    """One model. Raises a usage error naming those that are here."""
    info = _find(context, check_name(name, "model", "the model"))
    if info is None:
        there = ", ".join(model.name for model in list_models(context)) or "none"
        raise usage_error(
            f"no model {name!r} on this machine (there is: {there})", "`llorch-pool model download REF` brings one."
        )
    return info


def resolve(context: Context, text: str, *, fetch_missing: bool = True) -> ModelInfo:
    """The model that a name or a reference means, downloaded first if it is a reference to one that isn't here."""
    if ":" not in text:
        try:
            info = _find(context, check_name(text, "model", "--model"))
        except PoolError as error:
            if error.code != "usage":
                raise
            info = None
        if info is not None:
            return info
    aliases = model_ref.load_aliases(context.paths.config)
    if ":" not in text and text not in aliases and text != model_ref.DEMO:
        return show(context, text)
    ref = model_ref.parse(text, aliases)
    for info in list_models(context):
        have = model_ref.parse(info.ref)
        if (have.kind, have.target) == (ref.kind, ref.target) and ref.revision in ("", have.revision, info.revision):
            return info
    if ref.kind == "file":
        return _in_place(ref, _name_of(text, ref, aliases))
    if not fetch_missing:
        raise usage_error(f"{ref} is not on this machine", f"Bring it first: `llorch-pool model download {text}`.")
    context.log(f"{ref} is not here yet: downloading it")
    return download(context, ModelDownload(ref=text))


def _in_place(ref: ModelRef, name: str) -> ModelInfo:
    """A folder used where it is, without a copy and without recorded digests."""
    source = FolderSource(ref)
    files = [FileRecord(path=file.path, size=file.size, sha256="") for file in source.files]
    info = describe(Path(ref.target), check_name(name, "model", "--model"), str(ref), "", files)
    return msgspec.structs.replace(info, digest="", downloaded_at_ms=0)


def verify(context: Context, name: str) -> VerifyReport:
    """Read every byte and compare with what was recorded when it came."""
    info = show(context, name)
    folder, problems, done = Path(info.path), list[str](), 0
    for file in info.files:
        path = folder / file.path
        context.progress(
            Progress(phase="verifying", text=file.path, done=done, total=info.bytes, unit="bytes"), force=True
        )
        done += file.size
        if not path.is_file():
            problems.append(f"{file.path}: missing")
        elif path.stat().st_size != file.size:
            problems.append(f"{file.path}: {path.stat().st_size} bytes instead of {file.size}")
        elif sha256_of(context, path) != file.sha256:
            problems.append(f"{file.path}: its bytes have changed (sha256 differs)")
    known = {file.path for file in info.files} | {"model.json"}
    extra = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    problems += [f"{path}: was not part of the download" for path in extra if path not in known]
    return VerifyReport(name=name, ok=not problems, bytes=info.bytes, problems=problems)


def remove(context: Context, name: str, *, force: bool) -> ModelInfo:
    """Delete a model. Refused while a worker on record uses it, unless `force`. Raises PoolError."""
    check_name(name, "model", "the model")
    with _name_locked(context, name):
        folder = context.paths.models / name
        if force and (folder.is_dir() or folder.is_symlink()):
            info = ModelInfo(
                name=name, ref="", revision="", digest="", bytes=0, format="", architecture="", context_length=0
            )
        else:
            info = show(context, name)
        using = [
            worker.worker_id
            for worker in list_workers(Registry(context.paths.workers))
            if worker.model == name and worker.state not in ("exited", "pid-reused")
        ]
        if using and not force:
            raise PoolError(
                f"{name} is used by {', '.join(using)}",
                next_step="Stop them first (`llorch-pool worker stop`), or remove it all the same with --force.",
                code="in_use",
            )
        going = context.paths.partial / f"{name}.old"
        remove_tree(going)
        folder.rename(going)  # a model is there whole or not at all; of a symbolic link, only the link goes
        remove_tree(going)
        remove_tree(context.paths.partial / name)
        (context.paths.partial / f"{name}.source").unlink(missing_ok=True)
    return info


def partial(context: Context, name: str, wanted_digest: str) -> list[PartialFile]:
    """What is here of a model that is about to be copied in; everything when it is here whole."""
    check_name(name, "model", "the model")
    info = _find(context, name)
    if info is not None and info.digest == wanted_digest:
        return [PartialFile(path=file.path, have_bytes=file.size, whole=True) for file in info.files]
    folder = context.paths.partial / name
    mark = context.paths.partial / f"{name}.source"
    if not folder.is_dir() or not mark.exists() or mark.read_text() != wanted_digest:
        return []
    found: list[PartialFile] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".etag":
            relative = str(path.relative_to(folder))
            whole = not relative.endswith(".part")
            found.append(PartialFile(path=relative.removesuffix(".part"), have_bytes=path.stat().st_size, whole=whole))
    return found
