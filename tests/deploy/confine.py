"""Starts a command under what a systemd unit forbids, without systemd: `confine.py UNIT WRITABLE_DIR… -- COMMAND`.

Taken from the unit and enforced by the kernel: SystemCallFilter (expanded by `systemd-analyze syscall-filter`),
RestrictAddressFamilies, MemoryDenyWriteExecute, NoNewPrivileges; as root also CapabilityBoundingSet and ProtectSystem.
Read `main` first. Not covered: device rules, ProtectProc, PrivateUsers.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.deploy.units import Unit

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
NOT_EQUAL, EQUAL, MASKED_EQUAL = 1, 4, 7
PROT_WRITE, PROT_EXEC = 2, 4
CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_BIND = 0x20000, 0x4000, 0x40000, 0x1000
SYS_MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38


class Comparison(ctypes.Structure):
    """libseccomp's struct scmp_arg_cmp."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


class MountAttr(ctypes.Structure):
    """The kernel's struct mount_attr (mount_setattr(2))."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd"))


def calls_of(name: str) -> set[str]:
    """System calls of a name or of a @group, groups in it included."""
    if not name.startswith("@"):
        return {name}
    text = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], check=True, capture_output=True, text=True, timeout=30
    ).stdout
    found: set[str] = set()
    for line in text.splitlines()[1:]:
        word = line.strip()
        if word and not word.startswith("#"):
            found |= calls_of(word)
    return found


def allowed_calls(unit: Unit) -> set[str]:
    """What SystemCallFilter leaves: an allow list, from which `~` lines take away; @default always stays."""
    allowed: set[str] = set()
    for line in unit.values("SystemCallFilter"):
        named = set[str]().union(*(calls_of(word) for word in line.removeprefix("~").split()))
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed | calls_of("@default")


class Filter:
    """A seccomp filter under construction."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libseccomp.so.2", use_errno=True)
        self._lib.seccomp_init.restype = ctypes.c_void_p
        self._lib.seccomp_init.argtypes = [ctypes.c_uint32]
        self._lib.seccomp_rule_add_array.argtypes = [
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.POINTER(Comparison),
        ]
        self._lib.seccomp_load.argtypes = [ctypes.c_void_p]
        self._context = self._lib.seccomp_init(ERRNO | errno.EPERM)
        assert self._context

    def allow(self, call: str, *comparisons: Comparison) -> None:
        """Lets a call through, where its arguments compare; names that this machine doesn't have are passed over."""
        number = self._lib.seccomp_syscall_resolve_name(call.encode())
        if number < 0:
            return
        array = (Comparison * len(comparisons))(*comparisons)
        result = self._lib.seccomp_rule_add_array(self._context, ALLOW, number, len(comparisons), array)
        assert result == 0, (call, result)

    def load(self) -> None:
        """From here on it holds, for every child too."""
        result = self._lib.seccomp_load(self._context)
        assert result == 0, result


def confine_calls(unit: Unit) -> None:
    """SystemCallFilter, RestrictAddressFamilies and MemoryDenyWriteExecute of the unit."""
    built = Filter()
    calls = allowed_calls(unit)
    families = unit.value("RestrictAddressFamilies").split()
    calls.discard("socket")
    for family in families:
        built.allow("socket", Comparison(0, EQUAL, getattr(socket, family), 0))
    if unit.values("MemoryDenyWriteExecute") == ["yes"]:
        calls -= {"mmap", "mprotect", "pkey_mprotect", "shmat"}
        built.allow("mmap", Comparison(2, MASKED_EQUAL, PROT_EXEC, 0))
        built.allow("mmap", Comparison(2, MASKED_EQUAL, PROT_EXEC | PROT_WRITE, PROT_EXEC))
        built.allow("mprotect", Comparison(2, MASKED_EQUAL, PROT_EXEC, 0))
    for call in sorted(calls):
        built.allow(call)
    built.load()


def confine_files(libc: ctypes.CDLL, writable: list[str]) -> None:
    """ProtectSystem=strict: everything read-only but /dev, /proc, /sys, /tmp and the unit's own folders."""
    assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    assert libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
    for folder in writable:
        assert libc.mount(folder.encode(), folder.encode(), None, MS_BIND, None) == 0, folder
    read_only = MountAttr(MOUNT_ATTR_RDONLY, 0, 0, 0)
    read_write = MountAttr(0, MOUNT_ATTR_RDONLY, 0, 0)

    def change(folder: str, attr: MountAttr, flags: int) -> None:
        result = libc.syscall(
            SYS_MOUNT_SETATTR, AT_FDCWD, folder.encode(), flags, ctypes.byref(attr), ctypes.sizeof(attr)
        )
        assert result == 0, (folder, os.strerror(ctypes.get_errno()))

    change("/", read_only, AT_RECURSIVE)
    for folder in ("/dev", "/proc", *writable):
        change(folder, read_write, 0)


def main() -> None:
    """Confine this process and become the command."""
    unit_path, *rest = sys.argv[1:]
    split = rest.index("--")
    writable, command = rest[:split], rest[split + 1 :]
    unit = Unit(Path(unit_path))
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        assert unit.value("ProtectSystem") == "strict" and unit.value("CapabilityBoundingSet") == ""
        confine_files(libc, writable)
        for capability in range(64):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # those that this kernel lacks are refused
    assert unit.value("NoNewPrivileges") == "yes"
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    confine_calls(unit)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
