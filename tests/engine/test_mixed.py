"""Steps with prompts in the shapes of CUDA graphs: they say and do what they do without."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpleat.engine import core as core_module
from kvpleat.engine import mixed
from kvpleat.engine.mixed import Delays, Shape, fitting, shapes, unpacked
from kvpleat.engine.params import Request, SamplingParams
from kvpleat.engine.rows import Decoding, Feed, Plan, Row, whole
from kvpleat.engine.runner import Runner
from kvpleat.engine.transfer import in_order
from kvpleat.kernels import extend
from kvpleat.kernels.device_pool import new_pool
from kvpleat.types import Delay, KVShape, Rotary
from tests.engine.test_core import Engine, alone

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a GPU by graphs, and the same tokens as on a CPU


def plan_of(tokens: list[tuple[int, int]], chunks: list[tuple[int, int, int]]) -> Plan:
    """tokens: seat and position; chunks: seat, first position and size."""

    def row(seat: int) -> Row:
        return Row(Request(str(seat), tuple(range(100 * seat, 100 * seat + 90)), SamplingParams()), 0, 99)

    plan, seats = Plan([], False, False), [seat for seat, _ in tokens]
    starts = [start for _, start in tokens]
    plan.tokens = Decoding([row(seat) for seat in seats], seats, whole(starts), whole([7] * len(seats)))
    plan.chunks = [Feed(row(seat), seat, start, size, True, 0) for seat, start, size in chunks]
    return plan


def test_shapes() -> None:
    found = shapes(seats=100, step_tokens=300, delays=Delays(10, 7))
    assert sorted({x.width for x in found}) == [16, 64, 100]
    assert sorted({x.tokens for x in found}) == [128, 256, 512], "those that cover a step, and no more"
    assert {x.keys - x.tokens for x in found} == {10 * mixed.YOUNG}
    assert {x.in_windows - x.tokens for x in found} == {7 * mixed.YOUNG}
    assert {x.width for x in shapes(3, 300, Delays(0, 0))} == {3}
    assert max(x.tokens for x in shapes(3, 10**6, Delays(0, 0))) == mixed.TOKENS[-1]


def test_fitting() -> None:
    delays = Delays(50, 20)
    known, chunks = shapes(40, 200, delays), mixed.CHUNKS
    assert fitting(known, plan_of([(20, 5)], [(0, 0, 90)]), delays) == Shape(40, 128, chunks, 328, 208)
    assert fitting(known, plan_of([(9, 5)], [(15, 0, 129)]), delays) == Shape(16, 256, chunks, 456, 336)
    assert fitting(known, plan_of([], [(0, 0, 257)]), delays) is None, "more tokens than there is a shape for"
    assert fitting(known, plan_of([], [(seat, 0, 1) for seat in range(chunks + 1)]), delays) is None
    going_on = plan_of([], [(seat, 60, 20) for seat in range(6)])  # 300 young keys and 120 tokens
    assert fitting(known, going_on, delays) == Shape(16, 256, chunks, 456, 336)
    assert fitting(known, going_on, Delays(0, 90)) is None, "6 x 60 young keys in windows"
    assert fitting([], plan_of([], [(0, 0, 1)]), delays) is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_packed_is_what_runs_without(data: st.DataObject) -> None:
    """The same tokens, positions and chunks as `transfer.in_order` and `extend.plan` make; idle chunks behind them."""
    delay = data.draw(st.integers(0, 6))
    seats = data.draw(st.permutations(range(8)))
    chunks = [(seat, data.draw(st.integers(0, 20)), data.draw(st.integers(1, 15))) for seat in seats[:3]]
    tokens = [(seat, data.draw(st.integers(0, 60))) for seat in seats[3 : data.draw(st.integers(4, 8))]]
    window, device = data.draw(st.integers(0, 9)), torch.device("cpu")
    plan, shape = plan_of(tokens, chunks), Shape(8, 48, 5, 48 + 3 * delay, 48 + 3 * window)
    reach = torch.arange(sum(size for *_, size in chunks), dtype=torch.int32)
    memory = torch.full((shape.words + 3,), -7, dtype=torch.int32)
    memory[: shape.words] = mixed.packed(plan, shape, Delays(delay, window), reach)
    fed = unpacked(memory, shape)
    assert all(x.data_ptr() % 16 == memory.data_ptr() % 16 for x in fed)

    ids, positions, last = in_order(plan, 8)
    assert torch.equal(fed.ids[: len(ids)].long(), ids)
    assert torch.equal(fed.positions[: len(ids)], positions)
    assert torch.equal(fed.last.long(), last)
    assert torch.equal(fed.reach[: len(ids)], reach)
    kv = KVShape(1, 2, 2, 16, torch.float32, 16)
    rotary = Rotary(torch.tensor([1.0, 0.1]))
    own, in_windows = fed.chunks(shape, rotary)
    for padded, delayed in ((own, Delay(delay, merges=True)), (in_windows, Delay(window))):
        there = extend.plan(new_pool(kv, delayed, 8, 16, 64, device), *zip(*chunks, strict=True), rotary)
        assert torch.equal(padded.seats[:3], there.seats)
        assert torch.equal(padded.starts[:3], there.starts)
        for longer, known in zip(padded.rows, there.rows, strict=True):
            assert torch.equal(longer[:4], known)
            assert (longer[4:] == known[-1]).all(), "chunks that there are not are empty"
    there = extend.plan(new_pool(kv, Delay(delay, merges=True), 8, 16, 64, device), *zip(*chunks, strict=True), rotary)
    assert own.turn is not None
    assert there.turn is not None
    assert torch.equal(own.turn.cos[: there.num_keys], there.turn.cos)
    assert torch.equal(own.turn.sin[: there.num_keys], there.turn.sin)


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((kind, "llama") for kind in ("full", "window", "window that grows", "dms", "fold", "dmc", "dmc of 3")),
     *((kind, family) for kind in ("full", "dms") for family in ("gpt2", "qwen3", "gemma2")), ("full", "qwen2")],
)  # fmt: skip
def test_answers_are_the_same(kind: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each gets them alone, with steps in some shapes and steps that fit into none."""
    monkeypatch.setattr(core_module, "WARMED", (DEVICE,))
    for name, value in {"TOKENS": (8, 30), "CHUNKS": 2, "YOUNG": 1, "LEAST_WIDTH": 2}.items():
        monkeypatch.setattr(mixed, name, value)
    lengths = (60, 1, 33, 17, 2, 16)
    wanted = {str(length): alone(kind, length, family) for length in lengths}
    used: list[Shape | None] = []
    monkeypatch.setattr(mixed, "fitting", lambda *args: used.append(fitting(*args)) or used[-1])
    engine = Engine(kind, family, DEVICE)
    used.clear()
    for length in lengths:
        engine.add(str(length), length)
        for _ in range(3):
            engine.step()
    engine.run()
    assert engine.answers == wanted
    assert None in used, "a step of 48 tokens fits into none"
    assert len(set(used)) > 2, used
    engine.core.close()


@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"kind": "attention"}])
def test_without_graphs(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wants them, or a policy looks back at queries."""
    monkeypatch.setattr(core_module, "WARMED", ("cpu",))
    monkeypatch.setattr(Runner, "_mixed_as", lambda *_: pytest.fail("there is a graph"))
    options = {"kind": "full", **options}
    wanted = alone(options["kind"], 15)
    engine = Engine(**options)
    engine.add("15", 15)
    engine.run()
    assert engine.answers == {"15": wanted}
    engine.core.close()
