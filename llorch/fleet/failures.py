"""From ssh's exit status and stderr to what went wrong and what to do. Pure.

ssh says 255 for all of its own failures; which one it was stands only in its words (OpenSSH 7 to 10).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from llorch.errors import AccessProblem, CliError, TimedOut, Unreachable
from llorch.fleet.pools import Pool
from llorch_wire.pool import RC_AUTH, RC_TIMEOUT, RC_UNREACHABLE, RC_USAGE, Failure


@dataclass(frozen=True)
class Words:
    """What a transport failure is called, what it is in words, and the exit code's exception."""

    kind: str
    pattern: str
    text: str
    next_step: str
    error: type[CliError]


# The order counts: a changed host key also ends in "Host key verification failed".
_TABLE = (
    Words(
        "host-key-changed",
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|POSSIBLE DNS SPOOFING|Host key for .* has changed",
        "its host key is not the one that was pinned: the machine was set up anew, or somebody is in between",
        "if it was set up anew: llorch pool add --replace {name} {address}",
        AccessProblem,
    ),
    Words(
        "host-key-unknown",
        r"Host key verification failed|No \S+ host key is known|host key is not cached",
        "its host key is not known",
        "llorch pool add --replace {name} {address}    (shows the key's fingerprint)",
        AccessProblem,
    ),
    Words(
        "auth",
        r"Permission denied|Too many authentication failures|no mutual signature|Load key .*: bad permissions",
        "it accepts none of the keys that ssh offers",
        "try `{ssh}`; load a key into the agent, or give --identity to `llorch pool add --replace`",
        AccessProblem,
    ),
    Words(
        "refused",
        r"Connection refused",
        "nothing listens there (connection refused)",
        "check the port and that sshd runs: {ssh}",
        Unreachable,
    ),
    Words(
        "unknown-host",
        r"Could not resolve hostname|Name or service not known|nodename nor servname",
        "its name is not known",
        "check the host name: llorch pool list",
        Unreachable,
    ),
    Words(
        "timeout",
        r"timed out|Timeout, server|Operation timed out",
        "it does not answer",
        "check that it is up and the network: {ssh}",
        Unreachable,
    ),
    Words(
        "no-route",
        r"No route to host|Network is unreachable|Host is down|Permission denied to connect",
        "there is no way to it through the network",
        "check the network or the VPN: {ssh}",
        Unreachable,
    ),
    Words(
        "dropped",
        r"kex_exchange_identification|Connection (closed|reset)|Broken pipe|client_loop|Connection to .* closed"
        r"|ssh_exchange_identification|banner exchange|mux_client",
        "the connection was dropped",
        "try again; where many connect at once, sshd's MaxStartups is the limit",
        Unreachable,
    ),
)


def missing(pool: Pool) -> CliError:
    """llorch-pool isn't there."""
    error = CliError(
        f"{pool.name}: there is no llorch-pool on it (`{pool.command}` is not found)",
        next_step=f"llorch pool bootstrap {pool.name}",
    )
    return _named(error, "missing")


def transport(pool: Pool, status: int | None, stderr: str, *, answered: bool = False) -> CliError:
    """Why a connection failed or ended before the answer was whole. `status` None: it was given up.

    `answered`: llorch-pool has said hello, so that it is there.
    """
    address = shlex.quote(pool.address)
    for words in _TABLE:
        if status == 255 and re.search(words.pattern, stderr):
            detail = _detail(words.kind, stderr)
            text = f"{pool.name} ({pool.address}): {words.text}" + (f" [{detail}]" if detail else "")
            step = words.next_step.format(name=pool.name, address=address, ssh=pool.ssh_command)
            return _named(words.error(text, next_step=step), words.kind)
    if not answered and (status in (126, 127) or (status != 255 and _csh_lacks(pool.command, stderr))):
        return missing(pool)
    said = _last_line(stderr)
    text = f"{pool.name}: the connection ended before the answer" + (f": {said}" if said else f" (status {status})")
    return _named(Unreachable(text, next_step=f"{pool.ssh_command}    (shows what is wrong)"), "broken")


def _detail(kind: str, stderr: str) -> str:
    """The line of ssh that says more than the words for `kind` do."""
    if kind == "auth" and (found := re.search(r"Identity file .* not accessible.*", stderr)):
        return found[0][:200]
    return _last_line(stderr) if kind in ("auth", "dropped", "timeout") else ""


def _csh_lacks(command: str, stderr: str) -> bool:
    """csh ends with 1 where other shells end with 127."""
    return re.search(rf"^{re.escape(command)}: Command not found\.", stderr, re.MULTILINE) is not None


def silent(pool: Pool, seconds: float) -> CliError:
    """Nothing of llorch-pool was heard before our own deadline."""
    text = f"{pool.name} ({pool.address}): it does not answer [not a word within {seconds:g} s]"
    step = f"check that it is up and the network: {pool.ssh_command}    (or give it more time with --timeout)"
    return _named(Unreachable(text, next_step=step), "timeout")


def too_slow(pool: Pool, seconds: float) -> CliError:
    """Our own deadline passed."""
    error = TimedOut(f"{pool.name}: no answer within {seconds:g} s", next_step="give it more time with --timeout")
    return _named(error, "deadline")


def remote(pool: Pool, rc: int, failure: Failure | None) -> CliError:
    """What llorch-pool itself answered, with its exit code kept."""
    if failure is None:
        return _named(CliError(f"{pool.name}: failed with status {rc}", next_step="llorch pool doctor"), "failed")
    text = f"{pool.name}: {from_afar(failure.message, pool)}"
    if failure.detail:
        text += "\n" + "\n".join(f"  {line}" for line in failure.detail.splitlines())
    step = from_afar(failure.next_step, pool) or f"llorch pool doctor -p {pool.name}"
    if rc == RC_USAGE:
        from llorch.errors import UsageProblem

        return _named(UsageProblem(text, next_step=step), failure.code)
    kinds: dict[int, type[CliError]] = {RC_AUTH: AccessProblem, RC_UNREACHABLE: Unreachable, RC_TIMEOUT: TimedOut}
    return _named(kinds.get(rc, CliError)(text, next_step=step), failure.code)


_HERE_TOO = "(?:model (?:download|list|show|verify|remove)|worker (?:spawn|list|stop-all|stop|logs|cleanup))"
"""Commands of llorch-pool that llorch has too."""


def from_afar(text: str, pool: Pool) -> str:
    """A pool names commands as they are typed on it; here they are typed with its name."""
    text = re.sub(rf"`llorch-pool ({_HERE_TOO} [^`]+|{_HERE_TOO})`", rf"`llorch \1 -p {pool.name}`", text)
    text = re.sub(rf"(?<!`)\bllorch-pool ({_HERE_TOO}(?: (?!then\b)[^\s`,;]+)*)", rf"llorch \1 -p {pool.name}", text)
    return text.replace("llorch pool bootstrap NAME", f"llorch pool bootstrap {pool.name}")


def kind_of(error: CliError) -> str:
    """What a failure made here is called: auth, host-key-changed, refused, timeout, missing, version, ..."""
    return error.kind


def _named(error: CliError, kind: str) -> CliError:
    error.kind = kind
    return error


def _last_line(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith(("@", "*"))]
    return lines[-1][:200] if lines else ""
