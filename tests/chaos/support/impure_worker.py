"""A scripted worker whose tokens are its own: another would continue a text otherwise, as another kind of GPU may.

Same command line as `tests.support.scripted_worker`. With such workers there is no reference text, but the log and its
readers must still agree on every token.
"""

from __future__ import annotations

import sys
import zlib

from llorch_wire.events import TokenEvent
from llorch_wire.worker import ExecuteRequest
from tests.support.scripted_engine import Generation
from tests.support.scripted_worker import ScriptedWorker, main

OWN = zlib.crc32(" ".join(sys.argv).encode())


class ImpureWorker(ScriptedWorker):
    """Tokens depend on the worker too, and kept tokens are taken as they come."""

    def token(self, seed: int, index: int, last: int, ends_by_eos: bool) -> TokenEvent:
        """Another worker's would differ."""
        return super().token(seed ^ OWN, index, last, ends_by_eos)

    def begin(self, body: ExecuteRequest) -> Generation:
        """Go on after kept tokens, whoever made them."""
        generation = super().begin(body.model_copy(update={"resume_token_ids": []}))
        generation.first_index = generation.next_index = len(body.resume_token_ids)
        return generation


if __name__ == "__main__":
    main(ImpureWorker)
