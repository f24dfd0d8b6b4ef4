"""Requests that begin alike: the same tokens as without sharing, whatever is frozen, dropped, cancelled or preempted;
what is shared is computed once, and never written to again."""

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpleat.engine import prefixes
from kvpleat.engine.llm import LLM
from kvpleat.engine.params import Emitted, Request, SamplingParams
from kvpleat.engine.prefixes import Prefixes
from kvpleat.engine.rows import Frozen, Holder, Row
from kvpleat.kernels.device_pool import DevicePool
from tests import models
from tests.engine import test_core
from tests.engine.test_core import memory_of, model_of, policy_of

KINDS = ["full", "dms", "fold", "dmc", "dmc of 3", "window", "window that grows"]
LONGEST = 12  # tokens of an answer


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of tests are short: even a few tokens are worth sharing."""
    for module in ("prefixes", "pages"):
        monkeypatch.setattr(f"kvpleat.engine.{module}.LEAST", 6)
    monkeypatch.setattr(prefixes, "BLOCK", 16)


def text(length: int, seed: int = 1) -> tuple[int, ...]:
    return tuple(models.prompt(length, seed=seed)[0].tolist())


def prompt_of(parts: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Beginnings of fixed texts, one behind the other: (which one, tokens of it)."""
    return tuple(itertools.chain.from_iterable(text(60, seed)[:length] for seed, length in parts))


@functools.cache
def alone(kind: str, prompt: tuple[int, ...]) -> list[int]:
    """The greedy answer where nothing is shared."""
    with test_core.Engine(kind, enable_prefix_caching=False) as engine:
        engine.core.add(Request("x", prompt, SamplingParams(temperature=0.0, max_tokens=LONGEST)))
        answer: list[int] = []
        while engine.core.unfinished:
            answer += itertools.chain.from_iterable(news.token_ids for news in engine.core.step())
    return answer


def content(pool: DevicePool, row: int) -> list[Tensor]:
    """All entries of a row of the pool."""
    size = pool.shape.page_size
    index = torch.arange(pool.page_table.shape[-1] * size)
    slots = pool.page_table[row].long().repeat_interleave(size, -1) * size + index % size
    slots = slots[index < pool.lengths[row][..., None]]
    return [array.flatten(0, 1)[slots].nan_to_num() for array in pool.arrays.values()]


class Engine(test_core.Engine):
    """Counts what is fed, and watches over frozen rows."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__(kind, **options)
        self.kind, self.fed, self.prompts, self.cached = kind, 0, {}, {}
        self.frozen: dict[Frozen, list[Tensor]] = {}
        launch = self.core.runner.launch

        def counted(plan: Any) -> Any:
            self.fed += sum(feed.size for feed in plan.chunks)
            return launch(plan)

        self.core.runner.launch = counted  # type: ignore[method-assign]

    def ask(self, name: str, prompt: tuple[int, ...], tokens: int = LONGEST) -> None:
        self.core.add(Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=tokens)))
        self.answers[name], self.reasons[name], self.logprobs[name] = [], None, []
        self.prompts[name] = prompt

    def step(self) -> list[Emitted]:
        emitted = super().step()
        self.cached |= {news.request_id: news.num_cached_tokens for news in emitted}
        known = self.core.scheduler.pages.prefixes._frozen
        self.frozen = {
            frozen: self.frozen.get(frozen) or content(self.core.runner.pool, frozen.row)
            for frozen in known
            if frozen.ready
        }
        if self.steps % 5 == 0:
            for frozen, before in self.frozen.items():
                now = content(self.core.runner.pool, frozen.row)
                assert all(torch.equal(x, y) for x, y in zip(now, before, strict=True)), "a frozen row was written to"
        return emitted

    def finish(self) -> None:
        """Until all have ended."""
        for _ in range(2000):
            if not self.core.unfinished:
                break
            self.step()
        assert not self.core.unfinished, "it does not come to an end"
        for _ in range(2):
            assert self.step() == []
        pool, held = self.core.runner.pool, self.core.scheduler.pages.prefixes.pages
        assert int(pool.free_count) == pool.holders.numel() - held, "the host counts other pages than the device"

    def check(self, gone: frozenset[str] | set[str] = frozenset()) -> None:
        """Answers are those of requests that share nothing."""
        for name, prompt in self.prompts.items():
            answer, whole = self.answers[name], alone(self.kind, prompt)
            assert answer == whole[: len(answer)], name
            assert name in gone or self.reasons[name] == "length"


@pytest.mark.parametrize("kind", KINDS)
def test_computed_once(kind: str) -> None:
    """The same prompt, prompts that part, the next turn of a conversation: each token is fed once, but for the last one
    of a prompt."""
    with Engine(kind, max_num_batched_tokens=64) as engine:
        same, others = prompt_of(((1, 50), (2, 40))), [prompt_of(((1, 50), (seed, 20))) for seed in (3, 4, 5)]
        for number in range(4):
            engine.ask(f"same {number}", same)
        for number, prompt in enumerate(others):
            engine.ask(f"other {number}", prompt)
        engine.finish()
        assert engine.fed == 90 + 3 + 3 * 20
        engine.ask("again", same)
        engine.ask("next turn", (*same, *engine.answers["same 0"], 7, 8, 9))
        engine.finish()
        assert engine.fed == 90 + 3 + 3 * 20 + 1 + 4
        assert engine.cached == {
            **{"same 0": 0, "same 1": 89, "same 2": 89, "same 3": 89, "again": 89},
            **{"other 0": 50, "other 1": 50, "other 2": 50, "next turn": 90 + LONGEST - 1},
        }
        engine.run()  # nothing more comes, and all pages are free
    engine.check()


@pytest.mark.parametrize(("kind", "family"), [("dms", "gemma2"), ("window", "gemma3_text"), ("full", "gpt2")])
def test_families(kind: str, family: str) -> None:
    """Sliding windows of the model's own are copied; what texts have in common is still computed once."""
    answers = []
    for sharing in (True, False):
        options = {"max_num_batched_tokens": 64, "max_model_len": 120, "enable_prefix_caching": sharing}
        with test_core.Engine(kind, family, **options) as engine:
            for number, parts in enumerate([((1, 50), (2, 30))] * 2 + [((1, 50), (3, 20))]):
                params, name = SamplingParams(temperature=0.0, max_tokens=LONGEST), str(number)
                engine.core.add(Request(name, prompt_of(parts), params))
                engine.answers[name], engine.reasons[name], engine.logprobs[name] = [], None, []
            cached: dict[str, int] = {}
            while engine.core.unfinished:
                cached |= {news.request_id: news.num_cached_tokens for news in engine.step()}
            assert cached == ({"0": 0, "1": 79, "2": 50} if sharing else {"0": 0, "1": 0, "2": 0})
            engine.run()
        answers.append(engine.answers)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["full", "dms", "fold"])
def test_pages_are_shared(kind: str) -> None:
    """Several rows that run have pages in common: fewer are in use than they hold together."""
    with Engine(kind, max_model_len=300, max_num_batched_tokens=64) as engine:
        prompt = prompt_of(((1, 60), (2, 60), (3, 60)))
        for number in range(4):
            engine.ask(str(number), prompt)
        while len(engine.core.scheduler.running) < 4 or not all(engine.answers.values()):
            engine.step()
        pool = engine.core.runner.pool
        held, used = int(pool.num_pages[:4].sum()), pool.holders.numel() - int(pool.free_count)
        assert int((pool.holders >= 5).sum()) > held / 4 * 0.4, "four that run and a frozen one"
        assert used < held * 0.75
        engine.run()
    engine.check()


PART = st.tuples(st.sampled_from([1, 2]), st.sampled_from([7, 16, 17, 30]))
REQUEST = st.fixed_dictionaries(
    {
        "parts": st.lists(PART, min_size=1, max_size=3).map(tuple),
        "tokens": st.integers(1, LONGEST),
        "arrives": st.integers(0, 40),
        "cancelled": st.none() | st.none() | st.integers(0, 50),
    }
)


@pytest.mark.parametrize("kind", ["full", "dms", "fold", "window"])
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(REQUEST, min_size=3, max_size=8),
    pages=st.integers(32, 90),
    seats=st.integers(1, 4),
    step_tokens=st.sampled_from([4, 16, 64]),
    frozen=st.sampled_from([1, 3, 20]),
)
def test_any_requests(
    kind: str, requests: list[dict[str, Any]], pages: int, seats: int, step_tokens: int, frozen: int
) -> None:
    """Arrivals, cancels, pools that are too small for all, few frozen rows: every request ends with its own tokens."""
    options = {"max_num_seqs": seats, "max_num_batched_tokens": step_tokens, "max_model_len": 110}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvpleat.engine.sizes.FROZEN", frozen)
        patch.setattr("kvpleat.engine.sizes.FROZEN_SHARE", 1.0)
        engine = Engine(kind, kv_memory=memory_of(kind, pages + 2 * frozen, seats), **options)
    with engine:
        assert engine.core.scheduler.pages.prefixes.on
        gone = set()
        for step in range(51):
            for name, request in enumerate(requests):
                if request["arrives"] == step:
                    engine.ask(str(name), prompt_of(request["parts"]), request["tokens"])
                if request["cancelled"] == step and engine.reasons.get(str(name), "") is None:
                    engine.core.cancel(str(name))
                    gone.add(str(name))
            engine.step()
        engine.finish()
        engine.run()
    engine.check(gone)


@pytest.mark.parametrize("kind", ["full", "dms"])
def test_preempted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share pages and give theirs up, and begin again."""
    monkeypatch.setattr("kvpleat.engine.reckoned.SCALES", (0.125, 0.125))  # so that too many are let in
    preempted = found = 0
    for pages in (38, 54):
        with Engine(kind, kv_memory=memory_of(kind, pages), max_model_len=110, max_num_batched_tokens=64) as engine:
            for seed in (1, 2, 3, 1, 2, 3):
                engine.ask(f"{seed} {len(engine.prompts)}", prompt_of(((8, 20), (seed, 52))))
            engine.finish()
            preempted += engine.core.scheduler.preemptions
            found += sum(engine.cached.values())
            engine.run()
        engine.check()
    assert preempted > 0
    assert found > 0


@pytest.mark.parametrize("kind", ["full", "fold"])
def test_frozen_rows_are_in_nobodys_way(kind: str) -> None:
    """A memory full of them: who comes gets all of it, nothing fails, and nobody is preempted."""
    with Engine(kind, kv_memory=memory_of(kind, 60), max_model_len=110, max_num_batched_tokens=64) as engine:
        for seed in range(6):
            engine.ask(str(seed), prompt_of(((seed, 60), (9, 20))), 4)
        engine.finish()
        assert int(engine.core.runner.pool.free_count) < 32
        settle, went_well = engine.core.scheduler.settle, []

        def watched(*arguments: Any) -> bool:
            went_well.append(settle(*arguments))
            return went_well[-1]

        engine.core.scheduler.settle = watched  # type: ignore[method-assign]
        engine.ask("large", prompt_of(((7, 60), (8, 35))))
        engine.finish()
        assert engine.core.scheduler.preemptions == 0
        assert all(went_well)
        engine.run()
    engine.check()


def test_few_frozen_rows() -> None:
    """The longest unused one goes first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvpleat.engine.sizes.FROZEN", 2)
        engine = Engine("full")
    with engine:
        for seed in (1, 2, 1, 3, 1, 2):
            engine.ask(f"{seed} {engine.steps}", text(40, seed), 2)
            engine.finish()
        found = [count for name, count in engine.cached.items()]
        assert found == [0, 0, 0, 0, 39, 0], "a first repetition finds where texts part, the next one begins there"


def test_a_row_of_nan_leaves_nothing_behind() -> None:
    """What it froze in its prompt is not trusted."""
    model = model_of()
    poisoned = next(token for token in range(models.VOCAB) if token not in text(60, 1))
    kept = model.model.embed_tokens.weight.detach().clone()
    try:
        with Engine("full", max_num_batched_tokens=20) as engine:
            with torch.no_grad():
                model.model.embed_tokens.weight[poisoned] = torch.nan
            engine.ask("bad", (*text(40), poisoned, *text(20)))
            engine.finish()
            assert engine.reasons["bad"] == "error"
            assert not engine.core.scheduler.pages.prefixes._frozen
    finally:
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(kept)


def test_samples_of_one_prompt() -> None:
    """n samples: the prompt is fed once; the output says what was found."""
    fed = 0
    with LLM(model_of(), policy_of("dms"), kv_memory="2MiB", max_num_seqs=4, max_model_len=200) as llm:
        launch = llm._desk.core.runner.launch  # type: ignore[attr-defined]

        def counted(plan: Any) -> Any:
            nonlocal fed
            fed += sum(feed.size for feed in plan.chunks)
            return launch(plan)

        llm._desk.core.runner.launch = counted  # type: ignore[attr-defined]
        params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=5, detokenize=False)
        ids = {"prompt_token_ids": list(text(60))}
        (first,) = llm.generate([ids], params)
        assert (fed, first.num_cached_tokens) == (60 + 3, 0)
        (second,) = llm.generate([ids], params)
        assert (fed, second.num_cached_tokens) == (60 + 3 + 4, 59)
        assert [x.token_ids for x in first.outputs] == [x.token_ids for x in second.outputs]
        assert len({tuple(x.token_ids) for x in first.outputs}) > 1


def test_nothing_is_shared() -> None:
    """Where it is switched off."""
    with Engine("full", enable_prefix_caching=False) as engine:
        for name in "ab":
            engine.ask(name, text(50))
            engine.finish()
        assert engine.fed == 100
        assert engine.cached == {"a": 0, "b": 0}
        assert engine.core.runner.pool.page_table.shape[0] == 4


# ---- the tree of texts


def make_row(tokens: tuple[int, ...]) -> Row:
    return Row(Request("x", tokens, SamplingParams()), 0, 99)


TEXTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=24).map(tuple), min_size=1, max_size=10)


@settings(max_examples=80, deadline=None)
@given(texts=TEXTS, dice=st.randoms(use_true_random=False))
def test_tree(texts: list[tuple[int, ...]], dice: Any) -> None:
    """Rows that come and go and are frozen anywhere: what is found is what comparing all texts finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "LEAST", 1)
        tree, rows = Prefixes(range(4)), []
        frozen: dict[tuple[int, ...], Frozen] = {}
        for tokens in texts:
            rows.append(make_row(tokens))
            tree.add(rows[-1])
            if dice.random() < 0.5:
                row = dice.choice(rows)
                length = dice.randint(1, len(row.tokens))
                known, full = tuple(row.tokens[:length]) in frozen, len(frozen) == 4
                fork = tree.freeze(row, 0, length)
                assert (fork is None) == (known or full)
                if fork is not None:
                    frozen[tuple(row.tokens[:length])] = fork.frozen
                    fork.frozen.ready = True
            if frozen and dice.random() < 0.3:
                dropped = frozen.pop(dice.choice(list(frozen)))
                tree.drop(dropped)
            if len(rows) > 1 and dice.random() < 0.3:
                tree.remove(rows.pop(dice.randrange(len(rows))))
            for row in rows:
                check_row(tree, row, rows, frozen)
        for each in frozen.values():
            tree.drop(each)
        for row in rows:
            tree.remove(row)
        assert not tree._root.children


def check_row(tree: Prefixes, row: Row, rows: list[Row], frozen: dict[tuple[int, ...], Frozen]) -> None:
    tokens = tuple(row.tokens)
    begins = {length for length in range(1, len(tokens)) if tokens[:length] in frozen}
    found = tree.find(row)
    assert (found.node.depth if found else 0) == max(begins, default=0)
    known = [tuple(other.tokens[:-1]) for other in rows] + list(frozen)
    parting = {
        length
        for length in range(1, len(tokens))
        if tokens[:length] not in frozen and len(goes_on(known, tokens[:length])) > 1
    }
    assert tree.point(row, 0, len(tokens)) == min(parting, default=None)


def goes_on(known: list[tuple[int, ...]], begin: tuple[int, ...]) -> list[Any]:
    """Ways in which texts go on that begin alike: tokens, and each end of a row."""
    nexts = {other[len(begin)] for other in known if other[: len(begin)] == begin and len(other) > len(begin)}
    return [*nexts, *(other for other in known if other == begin)]


def test_pages_that_several_hold() -> None:
    """By hand: pages are free with the last who has them."""

    def holder(held: int) -> Holder:
        made = Holder()
        made.held = held
        return made

    def total(*holders: Holder) -> int:
        shares = {share for each in holders for share in each.shares}
        return sum(each.own for each in holders) + sum(share.pages for share in shares)

    row, first, second, other = holder(10), holder(6), holder(9), holder(9)
    first.join(row, 4)
    second.join(row, 7)
    other.join(second, 7)
    assert [x.own for x in (row, first, second, other)] == [3, 2, 2, 2]
    assert total(row, first, second, other) == 3 + 2 + 2 + 2 + 7
    assert first.leave() == 2
    assert row.leave() == 3
    assert other.leave() == 2
    assert second.leave() == 9
