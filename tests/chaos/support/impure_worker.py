"""A scripted worker whose tokens are its own: another would continue a text otherwise, as another kind of GPU may.

Same command line as `tests.support.scripted_worker`. With such workers there is no reference text, but the log and its
readers must still agree on every token.
"""

from __future__ import annotations

import sys
import zlib
from typing import Any

from llorch_wire.events import TokenEvent
from llorch_wire.worker import ExecuteRequest
from tests.chaos.support.replacing import replace
from tests.support import scripted_worker
from tests.support.scripted_worker import Generation, ScriptedWorker, main


def spoil() -> None:
    """Tokens depend on the worker too, and kept tokens are taken as they come."""
    own = zlib.crc32(" ".join(sys.argv).encode())
    token = scripted_worker.token
    begin = ScriptedWorker._begin

    def own_token(seed: int, index: int, last: int, ends_by_eos: bool) -> TokenEvent:
        return token(seed ^ own, index, last, ends_by_eos)

    def begin_with_any(self: ScriptedWorker, body: ExecuteRequest) -> Generation:
        kept = body.resume_token_ids
        generation = begin(self, body.model_copy(update={"resume_token_ids": []}))
        generation.first_index = generation.next_index = len(kept)
        return generation

    scripted_worker.token = own_token
    replace(ScriptedWorker, _begin=begin_with_any)


def _run() -> Any:
    spoil()
    return main()


if __name__ == "__main__":
    sys.exit(_run())
