"""The cache's spec and manager with vLLM's own pool of blocks."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vllm import engines  # isort: skip  # skips this module where vLLM is not installed

import torch
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvpleat.errors import OptionError
from kvpleat.vllm.cache import PleatedManager, PleatedSpec, check_pool
from kvpleat.vllm.ledger import Ledger, Report, ledgers

BLOCKS = 40


def spec(**changes: Any) -> PleatedSpec:
    """Streams of 6 heads, entries of 136 bytes; a quarter stays."""
    given: dict[str, Any] = {"waiting": 18, "ratio": 4.0, "seats": 4, "chunk": 64} | changes
    return PleatedSpec(block_size=engines.PAGE, num_kv_heads=6, head_size=136, dtype=torch.uint8, **given)


def manager(blocks: int = BLOCKS, **changes: Any) -> PleatedManager:
    """As vLLM makes it, by the spec's class."""
    mine = spec(**changes)
    made = KVCacheSpecRegistry.get_manager_class(mine)
    assert made is PleatedManager
    pool = engines.BlockPool(num_gpu_blocks=blocks, enable_caching=False, hash_block_size=engines.PAGE)
    return made(
        mine, pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=engines.PAGE,
    )  # fmt: skip


def missing(it: PleatedManager, name: str, tokens: int, **more: Any) -> int:
    return it.get_num_blocks_to_allocate(name, tokens, [], 0, 0, tokens, **more)


def grow(it: PleatedManager, name: str, tokens: int) -> list[Any]:
    return it.allocate_new_blocks(name, tokens, tokens)


def heard(it: PleatedManager, name: str, tokens: int, blocks: int) -> None:
    it.ledger.report([(name, Report(it.ledger[name].birth, tokens, blocks))])


OPS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["grow", "grow", "grow", "free"]), st.integers(1, 90),
              st.floats(0, 1)),
    max_size=40,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(ops=OPS)
def test_what_is_asked_for_is_what_is_taken_and_nothing_is_lost(ops: list[tuple[str, str, int, float]]) -> None:
    """Whatever requests do, blocks are free or belong to one of them, and it holds its charge, or one more."""
    it, tokens = manager(), dict.fromkeys("abcd", 0)
    total = it.block_pool.get_num_free_blocks()
    for name, what, size, stays in ops:
        if what == "free":
            it.free(name)
            tokens[name] = 0
        else:
            after = tokens[name] + size
            asked = missing(it, name, after)
            if asked > it.block_pool.get_num_free_blocks():
                it.free(name)
                tokens[name] = 0
                continue
            before = len(it.req_to_blocks.get(name, []))
            told = grow(it, name, after)
            held = it.req_to_blocks[name]
            assert len(held) - before == asked
            assert told == (held if tokens[name] == 0 else []), "workers are told of the first blocks alone"
            assert 0 <= len(held) - it.ledger.charge(name, after) <= 1
            assert missing(it, name, after) == 0
            tokens[name] = after
            heard(it, name, after, min(len(held), max(1, round(stays * after / engines.PAGE))))
        blocks = [x.block_id for held in it.req_to_blocks.values() for x in held]
        assert len(set(blocks)) == len(blocks), "a block has two owners"
        assert 0 not in blocks, "the first block is vLLM's own"
        assert len(blocks) + it.block_pool.get_num_free_blocks() == total
        assert it.ledger.charged()[0] == len(blocks)
    for name in "abcd":
        it.free(name)
    assert it.block_pool.get_num_free_blocks() == total
    assert it.ledger.charged()[0] == 0


def test_blocks_come_back_when_a_prompt_turns_out_to_be_short() -> None:
    """200 tokens take 13 blocks; of 5 that are left 2 more stay: one for the next token, one spare."""
    it = manager()
    first = grow(it, "a", 200)
    assert len(first) == 13
    heard(it, "a", 200, 5)
    assert missing(it, "a", 201) == 0
    assert [x.block_id for x in it.req_to_blocks["a"]] == [x.block_id for x in first[:7]], "the first ones stay"
    assert it.block_pool.get_num_free_blocks() == BLOCKS - 1 - 7
    assert it.ledger.charged() == (7, 6)
    assert it.ledger.charged() == (7, 0), "what came back is counted once"


def test_freeing_twice_frees_once() -> None:
    """vLLM may finish a request that it preempted before."""
    it = manager()
    grow(it, "a", 60)
    it.free("a")
    it.free("a")
    it.free("never seen")
    assert it.block_pool.get_num_free_blocks() == BLOCKS - 1
    grow(it, "a", 60)
    assert it.ledger["a"].birth == 2


def test_a_preempted_request_has_no_seat_while_its_blocks_wait() -> None:
    """vLLM takes them from the manager, and gives them back itself, where they are to be free a step later."""
    it = manager(seats=1)
    grow(it, "a", 60)
    blocks = it.pop_blocks_for_free("a")
    assert len(blocks) == 4
    assert it.block_pool.get_num_free_blocks() == BLOCKS - 1 - 4
    assert "a" not in it.ledger
    assert len(grow(it, "a", 20)) == 2, "it begins again"
    assert it.ledger["a"].birth == 2
    it.block_pool.free_blocks(blocks)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 5000),
    waiting=st.integers(0, 600),
    ratio=st.floats(1, 16),
    chunk=st.sampled_from([16, 64, 2048]),
)
def test_more_tokens_are_never_expected_to_need_less(tokens: int, waiting: int, ratio: float, chunk: int) -> None:
    """Nor more than without compression; vLLM admits requests by it."""
    it = manager(waiting=waiting, ratio=ratio, chunk=chunk)
    needed = [missing(it, "a", n, apply_admission_cap=True) for n in (tokens, tokens + 1, tokens + 16)]
    assert needed == sorted(needed)
    assert all(1 <= x <= -(-n // engines.PAGE) for x, n in zip(needed, (tokens, tokens + 1, tokens + 16), strict=True))
    assert needed[0] >= -(-min(tokens, chunk) // engines.PAGE), "the first chunk is there in full"
    assert needed[0] >= min(tokens, waiting) // engines.PAGE


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 5000),
    waiting=st.integers(0, 600),
    ratio=st.floats(1, 16),
    chunk=st.sampled_from([16, 64, 1024, 2048]),
    first=st.integers(1, 2048),
)
def test_a_prompt_that_is_let_in_can_be_computed_to_its_end(
    tokens: int, waiting: int, ratio: float, chunk: int, first: int
) -> None:
    """Or it would be preempted in its last chunks, let in again, and so on: what it is charged from chunk to chunk, if
    it compresses as expected, is never more than what was asked for, and where its last chunk is a whole one not much
    less."""
    it = spec(waiting=waiting, ratio=ratio, chunk=chunk)

    def most(first: int) -> int:
        ledger, charged = Ledger(1, engines.PAGE), 0
        ledger.begin("a", 1)
        for done in [*range(min(first, chunk), tokens, chunk), tokens]:
            charged = max(charged, ledger.charge("a", done))
            left = min(done, waiting) + max(0, done - waiting) / ratio
            ledger.report([("a", Report(ledger["a"].birth, done, -(-int(left) // engines.PAGE)))])
        return charged

    assert most(first) <= it.expected_peak(tokens)
    assert it.expected_peak(tokens) <= min(most(tokens % chunk or chunk) + 4, -(-tokens // engines.PAGE))


def test_what_a_running_request_still_needs_is_without_what_it_has() -> None:
    """vLLM keeps so many blocks free for prompts that are being computed."""
    it = manager(ratio=1.0)
    assert missing(it, "a", 160, apply_admission_cap=True) == 10
    grow(it, "a", 64)
    assert missing(it, "a", 160, apply_admission_cap=True) == 6
    assert missing(it, "a", 32, apply_admission_cap=True) == 0


def test_nothing_is_shared_between_requests() -> None:
    """No block is cached, and none is found."""
    it = manager()
    grow(it, "a", 64)
    it.cache_blocks(object(), 64, replay_boundaries=())
    assert it.find_longest_cache_hit([b"hash"], 64, [0, 1], it.block_pool, spec(), False, 16) == (([], []), 0)
    assert not spec().prefix_cacheable


def test_a_block_is_a_page_of_every_stream() -> None:
    """16 entries of 6 streams of 136 bytes."""
    assert spec().page_size_bytes == spec().real_page_size_bytes == 16 * 6 * 136
    assert spec().expected_blocks(10) == 1
    assert spec().expected_blocks(18 + 4 * 160) == int((18 + 160) / 16 + 0.5) + 2


def test_specs_merge_only_with_themselves() -> None:
    """vLLM reads an AssertionError as: not one group."""
    assert PleatedSpec.merge([spec(), spec()]) == spec()
    with pytest.raises(AssertionError, match="differ"):
        PleatedSpec.merge([spec(), spec(ratio=2.0)])


def test_manager_and_connector_find_one_ledger_by_the_pool() -> None:
    """And nothing holds a pool that is gone."""
    it = manager()
    assert ledgers[it.block_pool] is it.ledger
    assert it.ledger is not manager().ledger


def test_a_pool_in_which_one_request_could_get_stuck_is_refused() -> None:
    """If nothing of its text leaves, it needs all its blocks, and one that is vLLM's own."""
    check_pool(spec(), num_blocks=26, max_tokens=384)
    with pytest.raises(OptionError, match=r"25 blocks.*max_model_len=384.*needs 26.*--max-model-len to 368"):
        check_pool(spec(), num_blocks=25, max_tokens=384)
