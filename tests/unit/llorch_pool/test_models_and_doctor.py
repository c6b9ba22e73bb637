"""Models that are symbolic links, models that can't be read, and what the doctor says of folders and models."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llorch_pool import doctor, models
from llorch_pool.context import Context
from llorch_pool.errors import PoolError, refused_by_the_system
from llorch_wire.pool import Finding, ModelDownload
from tests.unit.llorch_pool.conftest import write_model


@pytest.fixture
def linked(context: Context, tmp_path: Path) -> Path:
    """The folder of a model that stands on another disk; in the models folder is a link to it."""
    source = write_model(tmp_path / "elsewhere" / "source", numbers=100)
    info = models.download(context, ModelDownload(ref=f"file:{source}", name="tiny"))
    other = tmp_path / "other-disk"
    Path(info.path).rename(other)
    Path(info.path).symlink_to(other)
    return other


@pytest.mark.parametrize("force", [False, True])
def test_removing_a_linked_model_removes_the_link(context: Context, linked: Path, force: bool) -> None:
    models.remove(context, "tiny", force=force)
    assert not os.path.lexists(context.paths.models / "tiny") and (linked / "model.json").exists()
    assert list(context.paths.partial.iterdir()) == []


def test_a_link_to_nothing_is_removed_with_force(context: Context, linked: Path) -> None:
    linked.rename(linked.with_name("gone"))
    with pytest.raises(PoolError, match="no model 'tiny'"):
        models.remove(context, "tiny", force=False)
    models.remove(context, "tiny", force=True)
    assert not os.path.lexists(context.paths.models / "tiny") and list(context.paths.partial.iterdir()) == []


def test_a_new_download_takes_the_place_of_a_link(context: Context, linked: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "source" / "config.json").write_text('{"architectures": ["X"], "changed": 1}')
    models.download(context, ModelDownload(ref=f"file:{tmp_path}/elsewhere/source", name="tiny"))
    assert not (context.paths.models / "tiny").is_symlink() and (linked / "model.json").exists()
    assert list(context.paths.partial.iterdir()) == []


def of(found: list[Finding], subject: str) -> list[Finding]:
    return [finding for finding in found if finding.subject == subject]


@pytest.mark.parametrize("damage", ["not json", "folder"])
def test_a_model_that_can_not_be_read_is_a_finding(context: Context, linked: Path, damage: str) -> None:
    if damage == "folder":
        (linked / "model.json").unlink()
        (linked / "model.json").mkdir()
    else:
        (linked / "model.json").write_text("{")
    [finding] = of(doctor.check(context, fix=False), "model tiny")
    assert finding.level == "error" and "can't be read" in finding.text
    assert finding.repair.startswith("llorch-pool model remove --force tiny")


def test_a_full_disk_is_found_though_files_can_be_made_on_it(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert [finding.level for finding in of(doctor.check(context, fix=False), "state folder")] == ["ok"]
    monkeypatch.setattr(doctor.os, "fsync", full)
    [finding] = of(doctor.check(context, fix=False), "state folder")
    assert finding.level == "error" and "No space left" in finding.text and "Free space" in finding.repair


def test_what_one_section_can_not_do_does_not_hide_the_others(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/models")

    monkeypatch.setattr(models, "scan", refused)
    found = doctor.check(context, fix=False)
    assert [finding.text for finding in of(found, "models")] == ["/models: Permission denied"]
    assert of(found, "python")


@pytest.mark.parametrize(
    ("error", "message", "step"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied", "access"),
        (OSError(errno.EROFS, "Read-only file system", "/a", None, "/b"), "/a -> /b: Read-only file system", "LLORCH"),
        (OSError(errno.ENOSPC, "No space left on device", b"/a"), "no space left on the disk that holds /a", "Free"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk", "Free"),
        (TimeoutError("timed out"), "the system refuses: timed out", "doctor"),
        (OSError(errno.EIO, "Input/output error", 7), "the system refuses: Input/output error", "doctor"),
    ],
)
def test_what_the_system_refuses_in_words(error: OSError, message: str, step: str) -> None:
    said = refused_by_the_system(error)
    assert said.message == message and step in said.next_step and said.rc == 1
