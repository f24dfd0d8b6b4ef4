"""What workers say of their memory, put together."""

from functools import reduce
from itertools import permutations
from operator import or_

import pytest

from tests.vllm import engines as engines  # isort: skip  # skips this module where vLLM is not installed
import torch

from kvpleat.types import Delay, KVShape
from kvpleat.vllm.connector import Reports
from kvpleat.vllm.ledger import Changes, Report
from kvpleat.vllm.memory import Memory
from kvpleat.vllm.metrics import COUNTERS, Stats, Usage

WORKERS = (Usage(800, 100, 200, 90, 100, 4), Usage(800, 200, 400, 60, 200, 4), Usage(400, 600, 600, 300, 600, 2))


@pytest.mark.parametrize("order", list(permutations(WORKERS)), ids=lambda x: "-".join(str(y.heads) for y in x))
def test_any_number_of_workers_in_any_order(order: tuple[Usage, ...]) -> None:
    """Ten heads with 900 entries hold 90 in the mean, and the fullest 300."""
    numbers = reduce(or_, order).numbers()
    assert numbers["head_skew"] == pytest.approx(300 / 90)
    assert numbers["compression_ratio"] == pytest.approx(2000 / 1200)
    assert (numbers["full_bytes"], numbers["live_bytes"], numbers["allocated_bytes"]) == (2000, 900, 1200)


def test_nothing_there_is_no_skew() -> None:
    """Nor a ratio."""
    numbers = Usage(0, 0, 0, 0, 0, 4).numbers()
    assert (numbers["head_skew"], numbers["compression_ratio"]) == (1.0, 1.0)


def test_messages_of_three_workers() -> None:
    """vLLM puts one after the other into the first."""
    said = [Reports({"a": Report(1, 64, blocks)}, usage) for blocks, usage in zip((3, 5, 4), WORKERS, strict=True)]
    first, second, third = said
    together = first.aggregate(second).aggregate(third)
    assert together.said == {"a": Report(1, 64, 5, by=3)}
    assert together.usage.numbers()["head_skew"] == pytest.approx(300 / 90)


def test_of_gauges_the_last_counts_and_counters_add_up() -> None:
    """What the scheduler said twice before Prometheus was told."""
    first, second = (Stats({"head_skew": x, **dict.fromkeys(COUNTERS, n)}) for x, n in ((2.0, 3), (4.0, 5)))
    assert first.aggregate(second).data == {"head_skew": 4.0, **dict.fromkeys(COUNTERS, 8)}


def test_all_requests_are_reported_and_not_those_alone_that_a_step_feeds() -> None:
    """Stages of a pipeline compute some requests in one step and others in the next: a step would report its own, and
    where every eighth one does that would be the same ones again and again. Full bytes too are of all, as pages are."""
    shape = KVShape(2, 3, 3, 8, torch.float32, engines.PAGE)
    memory = Memory(shape, Delay(4), 2, 64, 64, 0, None, torch.device("cpu"))
    memory.bind(torch.zeros(8, shape.num_streams, engines.PAGE, memory.entry_bytes, dtype=torch.uint8))
    token = 2 * 3 * 2 * 8 * 4  # layers, heads, a key and a value, channels, bytes

    def after(changes: Changes, *fed: tuple[str, int, int, int]) -> dict[str, int]:
        memory.begin_step(changes, bool(fed))
        memory.end_step(list(fed), True)
        (known,) = memory.known()
        seated, _, usage = known
        assert usage.full_bytes == token * sum(tokens for *_, tokens in seated)
        return {f"{request}{birth}": tokens for request, _, birth, tokens in seated}

    assert after(Changes(seated=[(0, 1), (1, 2)]), ("a", 0, 1, 16), ("b", 1, 2, 8)) == {"a1": 16, "b2": 8}
    assert after(Changes(), ("a", 0, 1, 17)) == {"a1": 17, "b2": 8}
    assert after(Changes(), ("b", 1, 2, 9)) == {"a1": 17, "b2": 9}
    assert after(Changes(released=[0]), ("b", 1, 2, 10)) == {"b2": 10}
    assert after(Changes(released=[1], seated=[(1, 3)]), ("b", 1, 3, 3)) == {"b3": 3}
