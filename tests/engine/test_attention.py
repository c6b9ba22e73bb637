"""SDPA over the paged cache against a float64 reference, and its promise that company and layout change no bit."""

from __future__ import annotations

import random

import pytest
import torch

from tests.engine.reference_attention import CASES, Case, run_case
from worker.engine import attention as attention_module
from worker.engine.attention import Candidate, candidates, choose_attention
from worker.engine.attention_sdpa import SdpaAttention
from worker.engine.kv_cache import KVCache, KVShape
from worker.engine.loader import LoadError
from worker.engine.packed_batch import PackedBatch, Span
from worker.engine.sdpa_reads import TILE, SdpaReads

CPU = torch.device("cpu")
BLOCK = 16


def build(
    case: Case, dtype: torch.dtype = torch.float32, num_blocks: int = 512, aligned_masks: bool | None = None
) -> tuple[SdpaAttention, KVCache]:
    shape = KVShape(1, case.kv_heads, case.head_dim, dtype)
    cache = KVCache(shape, num_blocks=num_blocks, block_tokens=BLOCK, device=CPU)
    return SdpaAttention(cache, num_heads=case.heads, context_length=2048, aligned_masks=aligned_masks), cache


def side_by_side(case: Case, gap: int = 0) -> list[list[int]]:
    blocks: list[list[int]] = []
    start = 0
    for length in case.lengths:
        count = -(-length // BLOCK)
        blocks.append(list(range(start, start + count)))
        start += count + gap
    return blocks


def scattered(case: Case, num_blocks: int = 512) -> list[list[int]]:
    free = list(range(num_blocks))
    random.Random(3).shuffle(free)
    return [[free.pop() for _ in range(-(-length // BLOCK))] for length in case.lengths]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_wherever_the_blocks_lie(name):
    case = CASES[name]
    attention, cache = build(case)
    error, out = run_case(attention, cache, case, side_by_side(case))
    assert error < 5e-6
    error, moved = run_case(attention, cache, case, scattered(case))
    assert error < 5e-6
    assert torch.equal(out, moved)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_is_as_close_as_it_can_be(dtype, limit):
    for name in ("everything", "window"):
        case = CASES[name]
        attention, cache = build(case, dtype)
        error, _ = run_case(attention, cache, case, side_by_side(case))
        assert error < limit


def test_company_changes_no_bit():
    case = CASES["everything"]
    attention, cache = build(case)
    _, together = run_case(attention, cache, case, side_by_side(case))
    # The first two are decodes and come first; alone they must give the same rows. The histories are drawn in order,
    # so leaving out what comes later changes nothing for what comes before.
    for count in (1, 2):
        fewer = Case(case.lengths[:count], case.new[:count])
        attention, cache = build(fewer)
        _, alone = run_case(attention, cache, fewer, side_by_side(fewer))
        assert torch.equal(alone, together[:count])


def test_one_call_for_equal_decodes_gives_the_bits_of_single_calls():
    case = Case([75, 80, 66, 70, 79, 65], [1] * 6)
    attention, cache = build(case)
    spaced = [list(range(n * 7, n * 7 + 5)) for n in range(6)]
    _, at_once = run_case(attention, cache, case, spaced)
    attention, cache = build(case)
    _, one_by_one = run_case(attention, cache, case, scattered(case))
    assert torch.equal(at_once, one_by_one)


def test_what_lies_behind_a_sequence_does_not_matter():
    """Stale numbers of an earlier sequence are read with the padding and must not count."""
    case = CASES["decodes of many lengths"]
    attention, cache = build(case)
    _, clean = run_case(attention, cache, case, side_by_side(case))
    attention, cache = build(case)
    cache.pool.fill_(1e4)
    _, dirty = run_case(attention, cache, case, side_by_side(case))
    assert torch.equal(clean, dirty)


def test_a_prompt_in_pieces_gives_the_bits_of_the_whole():
    whole = Case([600], [600])
    attention, cache = build(whole)
    blocks = side_by_side(whole)
    _, expected = run_case(attention, cache, whole, blocks)
    for new in (1, 2, 7, 63, 100, 599):
        attention, cache = build(whole)
        _, part = run_case(attention, cache, Case([600], [new]), blocks)
        assert torch.equal(part, expected[600 - new :])


def test_scrubbed_blocks_hold_zeroes():
    _, cache = build(CASES["one token"])
    cache.pool.fill_(float("nan"))
    cache.scrub([3, 5])
    assert not cache.pool[:, :, 3 * BLOCK : 4 * BLOCK].any()
    assert not cache.pool[:, :, 5 * BLOCK : 6 * BLOCK].any()
    assert cache.pool[:, :, 4 * BLOCK].isnan().all()


SHAPE = KVShape(2, 2, 32, torch.float32)


def test_auto_says_what_it_skipped():
    backend = choose_attention("auto", 4, SHAPE, CPU)
    assert backend.name == "sdpa"
    assert "flash_attn" in backend.notice
    assert "torch_varlen" in backend.notice


@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
def test_a_named_one_that_cannot_run_is_refused_with_the_reason(name):
    with pytest.raises(LoadError, match=f"--attention {name}: .*Use --attention auto"):
        choose_attention(name, 4, SHAPE, CPU)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(LoadError, match="one of auto, flash_attn, torch_varlen, sdpa"):
        choose_attention("magic", 4, SHAPE, CPU)


def test_padding_never_reads_past_the_pool():
    case = Case([BLOCK * 4], [1])
    attention, cache = build(case, num_blocks=4)
    error, _ = run_case(attention, cache, case, [[0, 1, 2, 3]])
    assert error < 5e-6
    assert cache.pool.shape[2] - cache.spare_row >= TILE


@pytest.mark.parametrize("name", CASES)
def test_aligned_masks_give_the_same_bits(name):
    """What other devices than a CPU get: masks that begin at a multiple of 16 bytes."""
    case = CASES[name]
    attention, cache = build(case)
    _, expected = run_case(attention, cache, case, side_by_side(case))
    attention, cache = build(case, aligned_masks=True)
    error, out = run_case(attention, cache, case, side_by_side(case))
    assert error < 5e-6
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_are_where_a_kernel_can_read_them(dtype):
    case = CASES["everything"]
    shape = KVShape(1, case.kv_heads, case.head_dim, dtype)
    cache = KVCache(shape, num_blocks=512, block_tokens=BLOCK, device=CPU)
    reads = SdpaReads(cache, groups=2, tails=(64, 128, 256, TILE), context_length=2048, aligned_masks=True)
    for window in (None, 24):
        for length in (*range(1, 40), 63, 64, 65, 511, 513, 700):
            spans = [
                Span(0, 0, length - 1, 1, list(range(48))),
                Span(1, 1, length - 1, 1, list(range(50, 98))),
                Span(2, 2, 0, length, list(range(100, 148))),
            ]
            for read in reads.of(PackedBatch([], [], spans, length + 2, [], 2), window):
                mask = reads.mask_of(read)
                assert mask.data_ptr() % 16 == 0
                assert mask.stride(-1) == 1
                assert all(stride * dtype.itemsize % 16 == 0 for stride in mask.stride()[:-1])


def test_masks_that_would_take_too_much_memory_are_made_for_each_layer(monkeypatch):
    case = Case([10, 900, 300], [1, 500, 300], window=130)
    attention, cache = build(case)
    _, expected = run_case(attention, cache, case, scattered(case))
    for limit in (0, 2 * 64 * 512 * 4 * 3):
        monkeypatch.setattr("worker.engine.sdpa_reads.KEPT_MASK_BYTES", limit)
        attention, cache = build(case)
        _, out = run_case(attention, cache, case, scattered(case))
        assert torch.equal(out, expected)
        reads = SdpaReads(cache, groups=2, tails=(64, TILE), context_length=2048)
        spans = [Span(0, 0, 400, 500, list(range(57))), Span(1, 500, 0, 300, list(range(60, 80)))]
        masks = [read.mask for read in reads.of(PackedBatch([], [], spans, 800, [], 0), None)]
        kept = [mask for mask in masks if isinstance(mask, torch.Tensor)]
        assert sum(mask.nbytes for mask in kept) <= limit
        assert len(kept) < len(masks)


class Broken(Exception):
    """What a kernel raises that doesn't concern the device."""


@pytest.mark.parametrize(
    ("error", "device_works", "ends_the_process"),
    [
        (torch.AcceleratorError("an illegal memory access was encountered"), False, True),
        (torch.AcceleratorError("no kernel image is available for execution on the device"), True, False),
        (Broken("no"), True, False),
    ],
)
def test_a_candidate_that_breaks_the_device_ends_the_process(monkeypatch, error, device_works, ends_the_process):
    def build(cache, heads, context_length):
        raise error

    candidate = Candidate("first", 0, True, True, lambda shape, device: None, build)
    monkeypatch.setattr(attention_module, "candidates", lambda *, deterministic: [candidate, *candidates()])
    monkeypatch.setattr(attention_module, "_still_works", lambda device: device_works)
    if ends_the_process:
        with pytest.raises(torch.AcceleratorError):
            choose_attention("auto", 4, SHAPE, CPU)
        return
    backend = choose_attention("auto", 4, SHAPE, CPU)
    assert backend.name == "sdpa"
    assert f"first: its self-test failed ({type(error).__name__}: {error})" in backend.notice


def test_a_device_that_works_is_known_to_work():
    assert attention_module._still_works(CPU)


def test_only_what_cannot_cut_its_sums_by_the_batch_counts_as_invariant():
    assert {c.name: c.batch_invariant for c in candidates()} == {
        "flash_attn": False,
        "torch_varlen": True,
        "sdpa": True,
    }
    assert all(candidate.batch_invariant for candidate in candidates(deterministic=True))
