"""The step on a device: widths, what is sent there, and that nothing of a step is read when it is started."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvpleat import accounting
from kvpleat.engine import sizes
from kvpleat.engine.attach import Attached
from kvpleat.engine.core import EngineCore
from kvpleat.engine.graphs import Graphs
from kvpleat.engine.params import Request, SamplingParams
from kvpleat.engine.rows import Decoding, Feed, Fork, Frozen, Plan, Row, whole
from kvpleat.engine.runner import Runner
from kvpleat.engine.sizes import ladder, parse_bytes
from kvpleat.engine.transfer import in_order
from kvpleat.errors import OptionError
from kvpleat.kernels import decode, extend, fork, prefill, update
from kvpleat.policies import DMC, DMS, AttentionScore, Fold, Full, GateConfig, Gates, Window
from kvpleat.policies.base import Policy
from tests import models


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (8, [1, 2, 4, 8]),
        (9, [1, 2, 4, 8, 9]),
        (35, [1, 2, 4, 8, 16, 32, 35]),
        (100, [1, 2, 4, 8, 16, 32, 40, 48, 56, 64, 80, 96, 100]),
    ],
)
def test_ladder(most: int, sizes: list[int]) -> None:
    assert ladder(most) == sizes


def plan_of(tokens: list[tuple[int, int]], chunks: list[tuple[int, int, int, bool]]) -> Plan:
    """tokens: seat and position; chunks: seat, first position, size, and whether a token is drawn after it."""

    def row(seat: int) -> Row:
        return Row(Request(str(seat), tuple(range(10 * seat, 10 * seat + 50)), SamplingParams()), 0, 99)

    plan = Plan([], False, False)
    seats, starts = ([x[i] for x in tokens] for i in range(2))
    plan.tokens = Decoding([row(seat) for seat in seats], seats, whole(starts), whole([7] * len(seats)))
    plan.chunks = [Feed(row(seat), seat, start, size, draws, 0) for seat, start, size, draws in chunks]
    return plan


def test_in_order() -> None:
    """Chunks lie one after the other, behind the tokens of all seats if there are any."""
    chunks = [(3, 10, 4, False), (0, 0, 2, True)]
    ids, positions, last = in_order(plan_of([(1, 20)], chunks), 4)
    assert ids.tolist() == [40, 41, 42, 43, 0, 1]
    assert positions.tolist() == [10, 11, 12, 13, 0, 1]
    assert last.tolist() == [4 + 5, 1, 0, 4 + 3]
    assert in_order(plan_of([], chunks), 4)[2].tolist() == [5, 0, 0, 3]


@pytest.mark.parametrize(
    ("text", "size"),
    [(5, 5), ("5", 5), ("20GiB", 20 * 2**30), ("1.5 MiB", 3 * 2**19), ("2 GB", 2 * 10**9), ("7kib", 7168), ("1B", 1)],
)
def test_bytes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 GiB 2", "1.2.3MiB", "3 XB", 1.5e300, None, True])
def test_no_bytes(text: Any) -> None:
    with pytest.raises(OptionError, match="no amount of memory"):
        parse_bytes(text)


# ---- nothing is read


def policy_of(model: Any, kind: str) -> Policy:
    if kind == "attention":
        return AttentionScore(ratio=2.0, interval=2)
    if kind in ("full", "gpt2", "gemma2", "window"):
        return Window(budget=48) if kind == "window" else Full()
    learned = {"dms": (DMS, 4, None), "fold": (Fold, 4, None), "dmc": (DMC, 0, None), "dmc of 3": (DMC, 0, 3)}
    config, (cls, *rest) = model.config, learned[kind]
    gates = GateConfig(cls.name, config.num_hidden_layers, config.num_key_value_heads, config.hidden_size, *rest)
    return cls(gates=Gates(gates).requires_grad_(False))


READS = {f"aten::{name}" for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")}


class NoReads(TorchDispatchMode):
    """Raises where the host would wait for the device, and notes where tensors are made of numbers of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        assert name not in READS, name
        if name == "aten::index.Tensor":
            assert all(x is None or x.dtype != torch.bool for x in args[1]), "a mask's size is read"
        self.made += name in ("aten::lift_fresh", "aten::lift_fresh_copy")
        return function(*args, **(kwargs or {}))


def attended(q: Tensor, *_: Any, **__: Any) -> Tensor:
    return q * 1.0


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU kernels are plain torch, which may read: here they do nothing."""
    for module, names in (
        (update, ("append", "step", "reserve_token", "reserve", "evict", "give_back", "release")),
        (fork, ("_copy",)),
        (extend, ("reserve", "append")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_: None)
    for module in (decode, prefill):
        monkeypatch.setattr(module, "attend", attended)
    seen = SimpleNamespace(keys=None, values=None, past=None, rule=None)
    monkeypatch.setattr(extend, "extend", lambda *_: seen)


@pytest.fixture
def runner(request: pytest.FixtureRequest, no_kernels: None) -> Iterator[Runner]:
    family = request.param if request.param in models.FAMILIES else "llama"
    model = models.tiny(family, dtype=torch.float32)
    attached = Attached(model, policy_of(model, request.param), 16)
    yield Runner(attached, num_pages=64, num_seats=4, length=64, end_ids=(), eager=False, frozen=3)
    attached.close()


@pytest.mark.parametrize("runner", ["full", "gpt2", "gemma2", "attention", "dms", "fold", "dmc"], indirect=True)
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8, "logprobs": 2}])
def test_nothing_is_read(runner: Runner, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with prompts, one without, one before which a row leaves; forks; and moments of a policy."""
    monkeypatch.setattr("kvpleat.policies.attention.known_empty", lambda counts: False)  # as for a GPU
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("a tensor is read"))
    steps = [
        plan_of([], [(1, 0, 5, True), (0, 0, 3, False)]),
        plan_of([(1, 5)], [(0, 3, 4, True)]),
        plan_of([(0, 7)], []),
        plan_of([], [(2, 0, 50, True)]),  # a whole prompt
        plan_of([(2, 51)], []),  # the moment after it
    ]
    for feed in steps[0].chunks:
        object.__setattr__(feed.row.request, "params", SamplingParams(**sampling))
        feed.row.seat = feed.seat
    steps[0].seated = [feed.row for feed in steps[0].chunks]
    steps[2].released, steps[2].clear = [(1, steps[1].tokens.rows[0])], True
    gone = steps[1].tokens.rows[0]
    frozen = [Frozen(row, None, gone) for row in (4, 5, 6)]
    steps[1].taken = [Fork(steps[1].chunks[0].row, 0, frozen[0])]
    steps[2].kept, steps[2].dropped = [Fork(gone, 1, frozen[1])], [6]
    steps[3].begun = [Fork(steps[3].chunks[0].row, 2, frozen[2])]
    for plan in steps:
        with NoReads():
            runner.launch(plan)


@pytest.mark.parametrize("runner", ["full", "gpt2", "gemma2", "attention", "dms", "fold", "dmc"], indirect=True)
def test_a_graph_could_hold_it(runner: Runner) -> None:
    """What is captured makes no tensor of numbers of the host, and leaves its results where they were."""
    runner.graph_mixed(step_tokens=200)
    before = {name: x.data_ptr() for name, x in vars(runner).items() if isinstance(x, Tensor)}
    with NoReads() as mode, torch.inference_mode():
        for n in (1, 2, 4):
            runner._decode(n, runner.pool.page_table.shape[-1])
            runner._draw(n, runner.sampler.mode)
        for shape in runner._padded.shapes if runner._padded else ():
            runner._mixed_as(shape)
    assert mode.made == 0
    assert not runner._logits.requires_grad
    assert {name: x.data_ptr() for name, x in vars(runner).items() if isinstance(x, Tensor)} == before


def test_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU a function runs each time; with one it is captured once for each key, after warming up."""
    calls: list[str] = []
    plain = Graphs(torch.device("cpu"), eager=False)
    assert [plain.run("key", lambda: calls.append("run") or len(calls)) for _ in range(2)] == [1, 2]

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    class Nothing:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def wait_stream(self, _: Any) -> None: ...

    for name, value in {
        "graph_pool_handle": lambda: 0,
        "Stream": Nothing,
        "stream": Nothing,
        "current_stream": Nothing,
        "CUDAGraph": Graph,
        "graph": Nothing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    calls.clear()
    graphs = Graphs(torch.device("cuda"), eager=False)
    results = [graphs.run(key, lambda: calls.append("run") or len(calls)) for key in ("a", "a", "b")]
    assert calls == ["run"] * 3 + ["replay"] * 2 + ["run"] * 3 + ["replay"]
    assert results == [3, 3, 8], "the tensors of the capture, which each replay fills anew"
    eager = Graphs(torch.device("cuda"), eager=True)
    assert eager.run("a", lambda: "run") == "run"


# ---- memory


@pytest.mark.parametrize("kind", ["full", "gemma2", "attention", "dms", "fold", "dmc", "dmc of 3", "window"])
@pytest.mark.parametrize("seats", [3, 8])
def test_memory_is_not_exceeded(kind: str, seats: int) -> None:
    """The cache and all that belongs to it fill what was given to a page, and no more."""
    model = models.tiny("gemma2" if kind == "gemma2" else "llama", dtype=torch.float32)
    memory = {"gemma2": 500_001, "attention": 600_001 * seats}.get(kind, 300_001)
    core = EngineCore(model, policy_of(model, kind), kv_memory=memory, max_num_seqs=seats, max_model_len=200)
    pool, works = core.runner.pool, [width.work for width in core.runner._widths.values()]
    page = accounting.page_bytes(pool.shape) + accounting.PAGE_OVERHEAD
    observed = core.runner._observed
    beside = None if core.runner._sliding is None else core.runner._sliding.ring, observed and observed.last
    taken, frozen = accounting.storage_bytes([pool, works, beside]), core.scheduler.limits.frozen
    fixed = sizes.fixed_bytes(core._attached.policy, core._attached.facts, seats, 2048, 200, frozen)
    taken += fixed["queries sampled of prompts"]  # when there are prompts: see tests.engine.test_core.Engine
    assert memory - page < taken <= memory
    assert taken == sum(fixed.values()) + pool.holders.numel() * page
    core.close()


def test_no_more_memory_than_can_be_used() -> None:
    model = models.tiny("llama", dtype=torch.float32)
    for sharing in (False, True):
        core = EngineCore(model, Full(), max_num_seqs=2, max_model_len=100, enable_prefix_caching=sharing)
        rows = 2 + 2 * sharing  # rows of seven pages a stream; what is frozen gets no more than what runs
        assert core.runner.pool.holders.numel() == rows * 6 * 7
        core.close()
