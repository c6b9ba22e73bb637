"""Downloads against a server that speaks the Hub's protocol, with the real huggingface_hub client."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llorch_pool import fetch, model_source, models
from llorch_pool.context import Context
from llorch_pool.errors import AbortedError, PoolError
from llorch_wire.pool import ModelDownload
from tests.support.hub import Hub, commit_of
from tests.unit.llorch_pool.conftest import Events, write_model

REF = "hf:acme/tiny"


def ranges(hub: Hub) -> list[str]:
    return [request.range for request in hub.requests if request.path.startswith("/cdn/") and request.range]


def test_brings_only_what_a_worker_needs_and_records_it(context: Context, hub: Hub, repo: Path, events: Events) -> None:
    info = models.download(context, ModelDownload(ref=REF))
    assert (info.name, info.ref, info.revision) == ("tiny", REF, commit_of(repo))
    assert sorted(file.path for file in info.files) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert info.format == "safetensors" and info.architecture == "LlamaForCausalLM" and info.context_length == 2048
    folder = context.paths.models / "tiny"
    for file in info.files:
        assert (folder / file.path).read_bytes() == (repo / file.path).read_bytes()
    stored = json.loads((folder / "model.json").read_text())
    assert stored["digest"] == info.digest and stored["revision"] == info.revision and stored["bytes"] == info.bytes
    assert models.verify(context, "tiny").ok
    last = events.progress()[-1]
    assert any(event.done == event.total == info.bytes and event.unit == "bytes" for event in events.progress()), last
    assert not list(context.paths.partial.glob("tiny/*"))


def test_digest_is_the_one_that_a_worker_computes(context: Context, hub: Hub, repo: Path) -> None:
    worker_files = pytest.importorskip("worker.model_files")
    info = models.download(context, ModelDownload(ref=REF))
    assert worker_files.digest(repo).value == info.digest
    assert worker_files.digest(Path(info.path)).value == info.digest


def test_a_cut_connection_is_gone_on_with(context: Context, hub: Hub, events: Events) -> None:
    hub.faults.cut_after, hub.faults.cuts = 300_000, 3
    info = models.download(context, ModelDownload(ref=REF))
    assert models.verify(context, "tiny").ok and info.bytes > 2_000_000
    assert len(ranges(hub)) == 3
    assert "going on at byte" in events.logs()


def test_an_interrupted_download_goes_on_in_the_next_command(
    new_context: Callable[..., Context], hub: Hub, repo: Path
) -> None:
    first = new_context()
    hub.faults.cut_after, hub.faults.hold = 300_000, True

    def abort_when_some_has_come() -> None:
        part = first.paths.partial / "tiny" / "model-00001-of-00002.safetensors.part"
        while not (part.exists() and part.stat().st_size >= 300_000):
            if first.aborted:
                return
            threading.Event().wait(0.01)
        first.abort("interrupted")

    watcher = threading.Thread(target=abort_when_some_has_come)
    watcher.start()
    with pytest.raises(AbortedError):
        models.download(first, ModelDownload(ref=REF))
    first.abort("over")
    watcher.join(5)
    assert not (first.paths.models / "tiny").exists()
    hub.faults.hold = False  # for what is asked from now on; the first command's connections stay as they are
    hub.requests.clear()
    second = new_context()
    models.download(second, ModelDownload(ref=REF))
    assert models.verify(second, "tiny").ok
    assert any(int(text.removeprefix("bytes=").rstrip("-")) >= 300_000 for text in ranges(hub))
    assert all(request.if_range for request in hub.requests if request.range)


def test_a_part_that_no_longer_fits_is_started_again(new_context: Callable[..., Context], hub: Hub, repo: Path) -> None:
    """If-Range: the file changed on the server between two tries, so the old bytes must not stay."""
    context = new_context()
    source = model_source.hub_source(context, models.model_ref.parse(REF), None, None)
    folder = context.paths.partial / "tiny"
    folder.mkdir(parents=True)
    part = folder / "model-00001-of-00002.safetensors.part"
    part.write_bytes(b"old" * 1000)
    part.with_suffix(".etag").write_text('"another"')
    (context.paths.partial / "tiny.source").write_text(source.identity)
    models.download(context, ModelDownload(ref=REF))
    assert models.verify(context, "tiny").ok


def test_bytes_damaged_on_the_way_are_noticed_and_brought_again(context: Context, hub: Hub, events: Events) -> None:
    hub.faults.corrupt = 1
    models.download(context, ModelDownload(ref=REF))
    assert models.verify(context, "tiny").ok
    assert "does not match its digest" in events.logs()


def test_bytes_damaged_every_time_fail_and_leave_no_model(context: Context, hub: Hub) -> None:
    hub.faults.corrupt = 1000
    with pytest.raises(PoolError, match="does not match the digest"):
        models.download(context, ModelDownload(ref=REF))
    assert models.list_models(context) == []


def test_503_is_waited_out(context: Context, hub: Hub, events: Events) -> None:
    hub.faults.unavailable = 2
    models.download(context, ModelDownload(ref=REF))
    assert "503" in events.logs()


def test_gated_model_names_the_page(context: Context, hub: Hub) -> None:
    hub.faults.gated = True
    with pytest.raises(PoolError, match="403") as caught:
        models.download(context, ModelDownload(ref=REF))
    assert f"{hub.url}/acme/tiny" in caught.value.next_step


def test_private_model_wants_a_token_and_takes_it(
    context: Context, hub: Hub, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", environ["HOME"])
    hub.faults.token = "hf_secret"
    with pytest.raises(PoolError, match="401") as caught:
        models.download(context, ModelDownload(ref=REF, token="hf_wrong"))
    assert "HF_TOKEN" in caught.value.next_step and "hf_wrong" not in str(caught.value)
    models.download(context, ModelDownload(ref=REF, token="hf_secret"))
    assert all("hf_secret" not in path.read_text(errors="replace") for path in context.paths.models.rglob("*.json"))


def test_the_token_does_not_follow_a_redirect_to_another_host(context: Context, hub: Hub) -> None:
    """urllib sends every header on; a token in one would reach whatever host a redirect names."""
    handler = model_source._Redirects()
    request = model_source.urllib.request.Request("https://hub.example/a")
    request.add_unredirected_header("Authorization", "Bearer hf_secret")
    for target, kept in (
        ("https://cdn.example/b", False),
        ("https://hub.example/b", True),
        ("http://hub.example/b", False),
    ):
        following: Any = handler.redirect_request(request, None, 302, "", {}, target)
        assert ("Authorization" in following.unredirected_hdrs) is kept
        assert "Authorization" not in following.headers


def test_wrong_revision_and_unknown_repository(context: Context, hub: Hub) -> None:
    with pytest.raises(PoolError, match="no revision 'v9'"):
        models.download(context, ModelDownload(ref=f"{REF}@v9"))
    with pytest.raises(PoolError, match="does not exist"):
        models.download(context, ModelDownload(ref="hf:acme/nothing"))


def test_unreachable_hub_says_so(context: Context, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    monkeypatch.setattr(Context, "wait", lambda self, seconds: self.check())
    with pytest.raises(PoolError, match="can't be reached"):
        models.download(Context(lambda _: None, environ=environ), ModelDownload(ref=REF))


@pytest.mark.parametrize(
    ("gone", "words"),
    [("tokenizer.json", "no tokenizer.json"), ("config.json", "no config.json"), ("*.safetensors", "pickled")],
)
def test_a_model_that_no_worker_could_start_is_refused_before_it_is_downloaded(
    context: Context, hub: Hub, repo: Path, gone: str, words: str
) -> None:
    for path in repo.glob(gone):
        path.unlink()
    with pytest.raises(PoolError, match=words):
        models.download(context, ModelDownload(ref=REF))
    assert not [request for request in hub.requests if request.path.startswith("/cdn/")]


def test_two_downloads_at_once_do_it_once(new_context: Callable[..., Context], hub: Hub, repo: Path) -> None:
    failures: list[BaseException] = []

    def one() -> None:
        try:
            models.download(new_context(), ModelDownload(ref=REF))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    large = [path for path in repo.iterdir() if path.suffix == ".safetensors" or path.name == "tokenizer.json"]
    assert len([request for request in hub.requests if request.path.startswith("/cdn/")]) == len(large)


def test_a_moved_branch_brings_the_new_revision(context: Context, hub: Hub, repo: Path) -> None:
    first = models.download(context, ModelDownload(ref=REF))
    write_model(repo, seed=7)
    assert models.download(context, ModelDownload(ref=REF, offline=True)).revision == first.revision
    pinned = models.download(context, ModelDownload(ref=f"{REF}@{first.revision}"))
    assert pinned.revision == first.revision
    second = models.download(context, ModelDownload(ref=REF))
    assert second.revision != first.revision and second.digest != first.digest
    assert models.verify(context, "tiny").ok


def test_offline_refuses_what_is_not_here(context: Context, hub: Hub) -> None:
    with pytest.raises(PoolError, match="--offline"):
        models.download(context, ModelDownload(ref=REF, offline=True))
    assert not hub.requests


def test_a_name_is_not_taken_over_by_another_repository(context: Context, hub: Hub, tmp_path: Path) -> None:
    models.download(context, ModelDownload(ref=REF))
    write_model(tmp_path / "hub" / "other" / "tiny", seed=3)
    with pytest.raises(PoolError, match="name tiny is taken"):
        models.download(context, ModelDownload(ref="hf:other/tiny"))
    assert models.download(context, ModelDownload(ref="hf:other/tiny", name="tiny-2")).name == "tiny-2"


def test_no_room_is_said_before_a_byte_is_brought(context: Context, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "free_bytes", lambda _: 1 << 20)
    with pytest.raises(PoolError, match="no room") as caught:
        models.download(context, ModelDownload(ref=REF))
    assert "MiB to come" in str(caught.value) and caught.value.code == "disk_full"
    assert not [request for request in hub.requests if request.path.startswith("/cdn/")]


def test_a_disk_that_fills_up_on_the_way_ends_clearly(
    context: Context, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: object, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetch, "_write_all", full)
    with pytest.raises(PoolError, match="no space left"):
        models.download(context, ModelDownload(ref=REF))
    assert models.list_models(context) == []


def test_damage_on_the_disk_is_found_by_verify(context: Context, hub: Hub) -> None:
    info = models.download(context, ModelDownload(ref=REF))
    path = Path(info.path) / "model-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (Path(info.path) / "extra.bin").write_bytes(b"x")
    (Path(info.path) / "config.json").unlink()
    problems = "\n".join(models.verify(context, "tiny").problems)
    assert "its bytes have changed" in problems and "config.json: missing" in problems and "extra.bin" in problems


def test_a_folder_is_copied_and_copied_again_when_it_changed(context: Context, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine")
    first = models.download(context, ModelDownload(ref=f"file:{folder}"))
    assert first.name == "mine" and models.verify(context, "mine").ok
    again = models.download(context, ModelDownload(ref=f"file:{folder}"))
    assert again == first
    write_model(folder, seed=9, numbers=1000)
    assert models.download(context, ModelDownload(ref=f"file:{folder}")).digest != first.digest


def test_remove_deletes_and_names_what_is_there(context: Context, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine", numbers=1000)
    models.download(context, ModelDownload(ref=f"file:{folder}"))
    with pytest.raises(PoolError, match="there is: mine"):
        models.remove(context, "other", force=False)
    models.remove(context, "mine", force=False)
    assert models.list_models(context) == [] and not (context.paths.models / "mine").exists()
