"""Who holds which block of the KV cache, and which blocks can be reused by a later prompt with the same beginning.

No torch: blocks are numbers. Read `admit`, `append`, `publish` and `release` first. A block is in exactly one state:

    free ──admit/append──▶ held (1..n sequences) ──release──▶ free                      (never published)
                              ▲                  └─release──▶ cached (published, LRU) ──evicted──▶ free
                              └────────────── admit, on a prefix hit ──┘

A published block is found by (its predecessor's serial number, its tokens). A dictionary compares the tokens
themselves, so a collision of hashes can't give a sequence somebody else's prefix. The first block's predecessor is the
salt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from worker.engine.sequence import Sequence

_Key = tuple["int | str", tuple[int, ...]]


class BlockManager:
    """Accounts for `num_blocks` blocks of `block_tokens` tokens each.

    With `contiguous`, the blocks of a sequence are placed side by side wherever possible, so that a device without a
    paged attention kernel can read them without a copy. It changes where blocks lie, never how many are held.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, *, prefix_cache: bool = True, contiguous: bool = False
    ) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError("a KV cache needs at least one block of at least one token")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._prefix_cache = prefix_cache
        self._contiguous = contiguous
        self._free = bytearray(b"\x01" * num_blocks)
        self._unreserved = bytearray(b"\x01" * num_blocks)  # free and in nobody's growth room: a hint, not a state
        self._num_free = num_blocks
        self._holders = [0] * num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # published and held by nobody, least recently used first
        self._found: dict[_Key, int] = {}
        self._key_of: list[_Key | None] = [None] * num_blocks
        self._serial_of = [0] * num_blocks
        self._next_serial = 1

    @property
    def num_available(self) -> int:
        """Blocks that can be given out now: free ones and cached ones that nobody holds."""
        return self._num_free + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Published blocks that nobody holds."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """Published blocks that hold the beginning of the sequence; at least one token is always left to compute."""
        hits: list[int] = []
        if not self._prefix_cache:
            return hits
        parent: int | str = sequence.cache_salt
        size = self.block_tokens
        for start in range(0, sequence.num_tokens - size, size):
            block = self._found.get((parent, tuple(sequence.tokens[start : start + size])))
            if block is None:
                break
            hits.append(block)
            parent = self._serial_of[block]
        return hits

    def can_admit(self, sequence: Sequence, hits: list[int], watermark: int) -> bool:
        """Whether all present tokens of the sequence fit, with `watermark` blocks left over."""
        taken_from_cache = sum(1 for block in hits if self._holders[block] == 0)
        needed = self.blocks_for(sequence.num_tokens) - len(hits)
        return needed + watermark <= self.num_available - taken_from_cache

    def admit(self, sequence: Sequence, hits: list[int]) -> None:
        """Give the sequence the `hits` of `match_prefix` and new blocks for the rest of its tokens."""
        for block in hits:
            self._holders[block] += 1
            self._cached.pop(block, None)
        sequence.blocks = list(hits)
        sequence.num_published = len(hits)
        sequence.chain = self._serial_of[hits[-1]] if hits else sequence.cache_salt
        sequence.num_computed = len(hits) * self.block_tokens
        missing = self.blocks_for(sequence.num_tokens) - len(hits)
        if self._contiguous:
            self._place(sequence, missing)
        while len(sequence.blocks) < len(hits) + missing:
            sequence.blocks.append(self._take(sequence.blocks[-1] if sequence.blocks else None))

    def can_append(self, sequence: Sequence) -> bool:
        """Whether the sequence's tokens so far fit into its blocks and those that are available."""
        return self.blocks_for(sequence.num_tokens) - len(sequence.blocks) <= self.num_available

    def append(self, sequence: Sequence) -> None:
        """Grow the sequence's blocks to hold its tokens so far; `can_append` must hold."""
        while len(sequence.blocks) < self.blocks_for(sequence.num_tokens):
            sequence.blocks.append(self._take(sequence.blocks[-1] if sequence.blocks else None))

    def publish(self, sequence: Sequence) -> None:
        """Make the sequence's full, computed blocks findable. Call it only after their forward pass has completed."""
        if not self._prefix_cache:
            return
        size = self.block_tokens
        while (sequence.num_published + 1) * size <= sequence.num_computed:
            index = sequence.num_published
            key: _Key = (sequence.chain, tuple(sequence.tokens[index * size : (index + 1) * size]))
            block = self._found.get(key)
            if block is None:
                block = sequence.blocks[index]
                self._found[key] = block
                self._key_of[block] = key
                self._serial_of[block] = self._next_serial
                self._next_serial += 1
            sequence.chain = self._serial_of[block]
            sequence.num_published += 1

    def release(self, sequence: Sequence) -> None:
        """Take every block back. Published blocks stay findable, the end of the sequence being evicted first."""
        for block in reversed(sequence.blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._key_of[block] is None:
                    self._set_free(block)
                else:
                    self._cached[block] = None
        sequence.blocks = []
        sequence.num_published = 0
        sequence.chain = sequence.cache_salt
        sequence.num_computed = 0
        self._drop_reservation(sequence)

    def forget(self, sequence: Sequence) -> list[int]:
        """Unpublish and name the blocks that the sequence alone holds: what it computed can't be trusted.

        Those it shares were published before, so a forward pass over them went well, and others are reading them.
        """
        own = [block for block in sequence.blocks if self._holders[block] == 1]
        for block in own:
            self._unpublish(block)
        return own

    def _unpublish(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._found[key]
            self._key_of[block] = None

    def _set_free(self, block: int) -> None:
        self._free[block] = 1
        self._unreserved[block] = 1
        self._num_free += 1

    def _evict(self, block: int) -> None:
        del self._cached[block]
        self._unpublish(block)
        self._set_free(block)

    def _take(self, after: int | None) -> int:
        """One available block, the one behind `after` if it is free; evicts the least recently used when none is."""
        if self._num_free == 0:
            self._evict(next(iter(self._cached)))
        block = -1
        if after is not None and after + 1 < self.num_blocks and self._free[after + 1]:
            block = after + 1
        if block < 0:
            block = self._unreserved.find(1)
        if block < 0:
            block = self._free.find(1)
        return self._hold(block)

    def _hold(self, block: int) -> int:
        self._free[block] = 0
        self._unreserved[block] = 0
        self._num_free -= 1
        self._holders[block] = 1
        return block

    def _place(self, sequence: Sequence, missing: int) -> None:
        """Lay `missing` new blocks side by side, with room to grow behind them where there is any."""
        room = max(missing, self.blocks_for(sequence.max_length) - len(sequence.blocks))
        for want in (room, missing):
            start = self._unreserved.find(b"\x01" * want)
            if start < 0:
                start = self._evict_run(want)
            if start < 0:
                continue
            sequence.blocks.extend(self._hold(block) for block in range(start, start + missing))
            sequence.reserved = (start + missing, start + want)
            self._unreserved[start + missing : start + want] = bytes(want - missing)
            return

    def _evict_run(self, want: int, tries: int = 4) -> int:
        """Make `want` adjacent blocks free around one of the least recently used ones; the first of them, or -1."""
        for _, oldest in zip(range(tries), self._cached, strict=False):
            first = last = oldest
            while last - first + 1 < want and last + 1 < self.num_blocks and self._unused(last + 1):
                last += 1
            while last - first + 1 < want and first > 0 and self._unused(first - 1):
                first -= 1
            if last - first + 1 == want:
                for block in range(first, last + 1):
                    if block in self._cached:
                        self._evict(block)
                return first
        return -1

    def _unused(self, block: int) -> bool:
        return block in self._cached or self._unreserved[block] == 1

    def _drop_reservation(self, sequence: Sequence) -> None:
        if sequence.reserved is not None:
            for block in range(*sequence.reserved):
                self._unreserved[block] = self._free[block]
            sequence.reserved = None

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise RuntimeError unless every block is in exactly one state and `sequences` hold all held blocks."""
        holders = [0] * self.num_blocks
        for sequence in sequences:
            if len(set(sequence.blocks)) != len(sequence.blocks):
                raise RuntimeError(f"sequence {sequence.sequence_id} holds a block twice")
            for block in sequence.blocks:
                holders[block] += 1
        if holders != self._holders:
            raise RuntimeError("the blocks held differ from the sequences' blocks")
        held = sum(1 for count in holders if count)
        if self._free.count(1) != self._num_free or self._num_free + held + len(self._cached) != self.num_blocks:
            raise RuntimeError(
                f"free {self._num_free} + held {held} + cached {len(self._cached)} is not total {self.num_blocks}"
            )
        for block in range(self.num_blocks):
            if self._free[block] + (holders[block] > 0) + (block in self._cached) != 1:
                raise RuntimeError(f"block {block} is in two states or none")
            if self._unreserved[block] > self._free[block]:
                raise RuntimeError(f"block {block} is offered although it is not free")
            key = self._key_of[block]
            if (key is not None and self._found.get(key) != block) or (key is None and block in self._cached):
                raise RuntimeError(f"block {block} is published wrongly")
        if len(self._found) != sum(key is not None for key in self._key_of):
            raise RuntimeError("a prefix is found in a block that doesn't hold it")
