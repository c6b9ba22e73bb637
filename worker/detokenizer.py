"""Turns token ids into text one by one, in whole characters. Knows nothing about stops, streams or requests.

Read `Detokenizer.step` first. The texts of all steps and the flush, joined, are what decoding all ids at once gives
(`skip_special_tokens=True`).

    ids      E2   82   AC   |  FF   "a"  |  <eos>
    text     ""   ""   "€"  |  ""   "�a" |  ""        bytes that don't make up a character yet are held back
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"
PRIMING_TOKENS = 8
# A character has at most four bytes. More tokens than this without any text is a run of broken bytes, which the
# decode stream would decode again and again from its start.
MAX_PENDING = 16


class Detokenizer:
    """Incremental decoder of one answer.

    `prompt_token_ids` primes it: decoders that treat the start of a text specially (Metaspace) then see that the
    answer goes on in the middle. A prompt that ends inside a character can't prime it and is ignored.

    With byte fallback (Llama 2, Gemma) an invalid byte turns the whole run of bytes around it into U+FFFD when all ids
    are decoded at once; characters of such a run that were already shown stay as they are.
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int], prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        tail = [token for token in prompt_token_ids[-PRIMING_TOKENS:] if token not in special_ids]
        text = self._decode(tail)
        if not text or text.endswith(REPLACEMENT):
            tail = []
        self._shown = tail  # ids whose text stands before the pending ones
        self._pending: list[int] = []
        self._stream = self._new_stream()

    def step(self, token_id: int) -> str:
        """Text that this token completes; empty while it holds back part of a character, and for special tokens."""
        if token_id in self._special_ids:
            return ""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # "Invalid prefix encountered": the decoder rewrote text that was already shown.
            return self._restart_after(len(self._pending))
        if text is not None:
            self._shown, self._pending = self._pending, []
            return text
        if len(self._pending) > MAX_PENDING:
            return self._restart_after(self._clean_cut())
        return ""

    def flush(self) -> str:
        """Text of what is still held back, broken bytes as U+FFFD: nothing follows."""
        text = self._text_of(self._pending)
        self._shown, self._pending = [], []
        self._stream = self._new_stream()
        return text

    def _restart_after(self, count: int) -> str:
        """Release the first `count` pending ids and let a new stream take the rest."""
        released, rest = self._pending[:count], self._pending[count:]
        text = self._text_of(released)
        self._shown, self._pending = ([] if text.endswith(REPLACEMENT) else released), []
        self._stream = self._new_stream()
        return text + "".join(self.step(token_id) for token_id in rest)

    def _clean_cut(self) -> int:
        """Where the pending ids can be cut without a character ending up on both sides."""
        ids = self._pending
        whole = self._decode(ids)
        for cut in range(len(ids) - 1, max(0, len(ids) - 8), -1):
            if self._decode(ids[:cut]) + self._decode(ids[cut:]) == whole:
                return cut
        return len(ids)

    def _text_of(self, ids: list[int]) -> str:
        before = self._decode(self._shown)
        whole = self._decode([*self._shown, *ids])
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True) if ids else ""

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(ids=list(self._shown), skip_special_tokens=True)
