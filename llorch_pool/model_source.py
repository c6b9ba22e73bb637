"""Where the bytes of a model come from: the Hub, a folder, or another pool. Read `Source` first.

huggingface_hub answers what there is (revision, sizes, digests); the bytes are fetched here, because the library can't
go on in another process with what a cut download left, and checks sizes only.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from llorch_pool import model_ref
from llorch_pool.context import Context
from llorch_pool.errors import PoolError
from llorch_pool.hub_endpoint import Endpoint, endpoint, without_password
from llorch_pool.model_ref import ModelRef

HUB = "https://huggingface.co"
READ_TIMEOUT_S = 20.0
CHUNK_BYTES = 1 << 20
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, None)


@dataclass(frozen=True)
class SourceFile:
    """One file to bring. `sha256` of its bytes, or `git_sha1` of the git blob, or neither is known beforehand."""

    path: str
    size: int
    sha256: str = ""
    git_sha1: str = ""


class TransientError(Exception):
    """This try failed, another may work. `retry_after_s` is what the server asked for."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Readable(Protocol):
    """What is asked of an open file."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""
        ...


@dataclass
class Reading:
    """An open file. `offset` is where it really starts: 0 when the source could not honour the one asked for."""

    offset: int
    validator: str
    stream: Readable


class Source(Protocol):
    """What `fetch` needs of any source."""

    ref: str
    revision: str
    identity: str
    """What a download under way is recognised by: bytes of another identity are not gone on with."""
    files: list[SourceFile]

    def open(self, file: SourceFile, offset: int, validator: str) -> contextlib.AbstractContextManager[Reading]:
        """Start reading at `offset` if `validator` (from an earlier try, "" for none) still fits.

        Raises TransientError or PoolError. Reading from the stream may raise OSError or HTTPException.
        """
        ...


class FolderSource:
    """A folder on this machine."""

    def __init__(self, ref: ModelRef) -> None:
        folder = Path(ref.target)
        if not folder.is_dir():
            raise PoolError(f"there is no folder {folder}", next_step="Give file: the folder that holds config.json.")
        self.ref = self.identity = str(ref)
        self.revision = ""
        self._folder = folder
        names = [path.name for path in folder.iterdir() if path.is_file()]
        self.files = [SourceFile(name, (folder / name).stat().st_size) for name in model_ref.wanted(names)]

    @contextlib.contextmanager
    def open(self, file: SourceFile, offset: int, validator: str) -> Generator[Reading]:
        """Copy from the folder; a file that changed since the last try starts again."""
        path = self._folder / file.path
        stat = path.stat()
        mark = f"{stat.st_mtime_ns}-{stat.st_size}"
        with path.open("rb") as stream:
            start = offset if validator == mark else 0
            stream.seek(start)
            yield Reading(start, mark, stream)


class HubSource:
    """A repository at a commit."""

    def __init__(self, ref: ModelRef, revision: str, files: list[SourceFile], at: Endpoint, token: str | None) -> None:
        self.ref = str(ModelRef("hf", ref.target, ref.revision))
        self.revision = revision
        self.identity = f"hf:{ref.target}@{revision}"
        self.files = files
        # The address alone, without a user and password in it: urllib would take them for a part of the host's name.
        self._base = f"{at.shown}/{ref.target}/resolve/{revision}"
        self._authorization = at.basic or (f"Bearer {token}" if token else "")
        self._opener = urllib.request.build_opener(_Redirects())

    @contextlib.contextmanager
    def open(self, file: SourceFile, offset: int, validator: str) -> Generator[Reading]:
        """GET with Range and If-Range (RFC 9110, sections 13.1.5 and 14.2)."""
        request = urllib.request.Request(f"{self._base}/{quote(file.path)}")
        request.add_header("Accept-Encoding", "identity")
        request.add_header("User-Agent", "llorch-pool")
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        if offset and validator and not validator.startswith("W/"):
            request.add_header("Range", f"bytes={offset}-")
            request.add_header("If-Range", validator)
        try:
            response = self._opener.open(request, timeout=READ_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(file, error.code, error.headers) from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", "") or error or type(error).__name__)
            raise TransientError(without_password(reason)) from error
        with response:
            start = offset if response.status == 206 and _range_start(response.headers) == offset else 0
            yield Reading(start, response.headers.get("ETag", ""), response)

    def _refused(self, file: SourceFile, status: int, headers: Message) -> Exception:
        if status == 416:
            return TransientError("the part that was there did not fit")
        if status in (408, 429) or status >= 500:
            after = headers.get("Retry-After", "")
            return TransientError(f"HTTP {status}", min(60.0, float(after)) if after.isdigit() else 0.0)
        return hub_refusal(status, f"{file.path}", self._base.partition("/resolve/")[0])


def _range_start(headers: Message) -> int:
    """First byte of a 206 answer, -1 when the header doesn't say."""
    unit, _, rest = headers.get("Content-Range", "").partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else -1


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects; the token goes along only to the host that it was meant for."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None:
            old, new = urlsplit(req.full_url), urlsplit(newurl)
            token = req.unredirected_hdrs.get("Authorization")
            if token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
                following.add_unredirected_header("Authorization", token)
        return following


def hub_refusal(status: int, what: str, page: str) -> PoolError:
    """A permanent refusal by the Hub in words."""
    if status == 401:
        return PoolError(
            f"{what}: the Hub wants a token (HTTP 401): the repository is private, gated, or does not exist",
            next_step="Check the name; for a private or gated model set HF_TOKEN (`llorch model download` hands yours "
            "over with --hf-token).",
            code="hub_auth",
        )
    if status == 403:
        return PoolError(
            f"{what}: this token has no access to the model (HTTP 403): it is gated",
            next_step=f"Ask for access at {page} with the token's account, then run it again.",
            code="hub_gated",
        )
    if status == 404:
        return PoolError(f"{what}: not found on the Hub (HTTP 404)", next_step="Check name and revision.", code="hub")
    return PoolError(f"{what}: the Hub refuses with HTTP {status}", next_step=f"Look at {page}.", code="hub")


def hub_source(context: Context, ref: ModelRef, address: str | None, token: str | None) -> HubSource:
    """Ask the Hub what the repository holds at `ref`'s revision, and pin it. Raises PoolError."""
    at = endpoint(address or context.environ.get("HF_ENDPOINT") or HUB)  # before the library, whose import takes long
    from huggingface_hub import HfApi, get_token

    token = token or context.environ.get("HF_TOKEN") or get_token()
    # False switches the library's own search for a token off: the one above is the one to use.
    info = _ask(context, HfApi(endpoint=at.whole, token=token or False), ref, f"{at.shown}/{ref.target}")
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    files: list[SourceFile] = []
    for path in model_ref.wanted(siblings):
        sibling = siblings[path]
        lfs = sibling.lfs
        size = lfs.size if lfs else sibling.size
        if size is None:
            raise PoolError(f"{ref}: the Hub does not say how large {path} is", next_step="Try again later.")
        files.append(SourceFile(path, size, lfs.sha256 if lfs else "", "" if lfs else sibling.blob_id or ""))
    return HubSource(ref, str(info.sha), files, at, token)


def _ask(context: Context, api: Any, ref: ModelRef, page: str) -> Any:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for pause in _PAUSES_S:
        context.check()
        try:
            return api.model_info(
                ref.target, revision=ref.revision or None, files_metadata=True, timeout=READ_TIMEOUT_S
            )
        except OfflineModeIsEnabled:
            raise PoolError(
                "HF_HUB_OFFLINE is set: the Hub may not be asked",
                next_step="Unset it, or use a model that is here (`llorch-pool model list`).",
            ) from None
        except RevisionNotFoundError:
            raise PoolError(
                f"{ref.target} has no revision {ref.revision!r}", next_step=f"Look at {page}.", code="hub_revision"
            ) from None
        except GatedRepoError as error:
            raise hub_refusal(_status(error, 403), ref.target, page) from None
        except RepositoryNotFoundError as error:
            raise hub_refusal(_status(error, 404), ref.target, page) from None
        except HfHubHTTPError as error:
            status = _status(error, 0)
            if status < 500 and status not in (0, 408, 429):
                raise hub_refusal(status, ref.target, page) from None
            reason = f"HTTP {status}"
        except Exception as error:  # the library's HTTP client differs between its releases, and so do its exceptions
            if isinstance(error, PoolError | ValueError | TypeError | AttributeError):
                raise
            reason = without_password(str(error)) or type(error).__name__
        if pause is None:
            raise PoolError(
                f"the Hub at {page} can't be reached: {reason}",
                next_step="Check the network and HF_ENDPOINT; `llorch model copy` brings a model from another pool.",
                code="hub_unreachable",
            )
        context.log(f"the Hub does not answer ({reason}); trying again in {pause:g} s", "warning")
        context.wait(pause)
    raise AssertionError("unreachable")


def _status(error: Any, default: int) -> int:
    response = getattr(error, "response", None)
    return int(getattr(response, "status_code", default))


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write where `folder` is (or will be)."""
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
