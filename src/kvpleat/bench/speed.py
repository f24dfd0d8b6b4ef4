"""Speed of methods beside transformers' DynamicCache, on the same tokens and the same weights.

For each batch and context, in this order:

1. Peak memory of each method, in fresh processes (memory.py).
2. A rehearsal of each method, untimed: it warms up, follows memory and checks outputs (rehearsal.py). Who fails gets no
   speed.
3. Timed repeats. All methods hold their caches at once and take turns, one step each, another one first every time, so
   that whatever else the machine does falls on all. kvpress's are timed inside their worker.

What cannot run (too little memory, say) is recorded as refused with the reason, and the sweep goes on.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from kvpleat.accounting import human_bytes
from kvpleat.bench import metrics
from kvpleat.bench.floor import live_bytes, now, weights_read
from kvpleat.bench.memory import available_bytes, can_measure, process_memory
from kvpleat.bench.methods import Memory, Method, Session
from kvpleat.bench.methods.peers import PeerSession, end_workers
from kvpleat.bench.rehearsal import check_pages, follow, verdict
from kvpleat.errors import JudgeError, KvpleatError, PeerError
from kvpleat.hf.families import describe
from kvpleat.hf.models import LoadedModel

CHUNK = 2048  # tokens of a prompt fed at a time, by the methods that can
PAGES = "kvpleat's full cache against DynamicCache, on the timed prompt and steps"
ONE_FUNCTION = "token by token against the same tokens in one go, on a fork"


@dataclass(frozen=True)
class Pace:
    """How much is timed.

    Args:
        steps: timed decode steps of a repeat. warmup: steps before them, left out. repeats: prompts with their steps.
    """

    steps: int = 64
    warmup: int = 4
    repeats: int = 3


@dataclass
class Entrant:
    """A method with a model object of its own, and its record of the current batch and context."""

    method: Method
    loaded: LoadedModel
    record: dict[str, Any]

    def open(self) -> Session:
        """A new session that feeds prompts in chunks."""
        session = self.method.open(self.loaded)
        session.chunk = CHUNK
        return session


def share_weights(loaded: LoadedModel) -> LoadedModel:
    """A second model object on the same weight tensors, so that two caches can be served in turns."""
    model: Any = loaded.model
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(model.state_dict(), assign=True, strict=True)
    for name, buffer in model.named_buffers():  # rotary tables are not in the state dict
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, buffer)
    twin.tie_weights()
    return replace(loaded, model=twin.eval())


def measure(
    loaded: LoadedModel, chosen: Sequence[Method], ids: Tensor, pace: Pace, bandwidth: float, progress: Progress
) -> list[dict[str, Any]]:
    """Records of all methods at one batch and context.

    Args:
        chosen: methods, the reference among them.
        ids: [R, context] the prompt, and the tokens that are fed after it.
        bandwidth: bytes per second, as `copy_bandwidth` measured them.
    """
    torch.cuda.empty_cache()  # what was measured before leaves room for other processes; nothing where there is no GPU
    ids = ids.to(loaded.model.device)
    decoded = pace.warmup + pace.steps
    prompt, rest = ids[:, :-decoded], ids[:, -decoded:]
    entrants = [Entrant(method, share_weights(loaded), _blank(method, ids)) for method in chosen]
    bar = progress.add_task("", total=2 * len(entrants) + pace.repeats * (len(entrants) + decoded))

    def say(what: str, advance: int = 0) -> None:
        progress.update(bar, description=f"{ids.shape[0]} x {ids.shape[1]:,}  {what}", advance=advance)

    if can_measure(loaded.model.device):
        for entrant in entrants:
            say(f"{entrant.method.spec}: memory")
            with _refusing([entrant]):
                _take_memory(entrant, prompt)
            say("", 1)
        with _refusing(_running(entrants)):
            _check_room(_running(entrants), loaded, ids)
    if ours := [entrant for entrant in _running(entrants) if entrant.method.family == "kvpleat"]:
        say("kvpleat's full cache against DynamicCache")
        with _refusing(ours):
            gap = check_pages(share_weights(loaded), share_weights(loaded), prompt, rest, CHUNK)
            verdict([entrant.record for entrant in ours], gap, loaded.model.dtype, PAGES)
    for entrant in _running(entrants):
        say(f"{entrant.method.spec}: rehearsal")
        with _refusing([entrant]):
            _rehearse(entrant, prompt, rest)
        say("", 1)
    if running := _running(entrants):
        with _refusing(running):
            _take_turns(running, prompt, rest, pace, say)
    for entrant in _running(entrants):
        _fill_in(entrant.record, entrants[0].record, loaded, bandwidth)
    progress.remove_task(bar)
    return [entrant.record for entrant in entrants]


def _blank(method: Method, ids: Tensor) -> dict[str, Any]:
    names = ["floor_step_s", "tpot_s", "itl_s", "tokens_per_s", "output_tokens_per_s", "floor_share", "speedup"]
    names += ["peak_bytes", "process", "memory", "check", "refused"]
    record: dict[str, Any] = {"method": method.spec, "batch": ids.shape[0], "context": ids.shape[1]}
    return {**record, "prefill_s": [], "ttft_s": [], "step_s": [], "trace": [], **dict.fromkeys(names)}


# ---- what is refused, and why


def _running(entrants: list[Entrant]) -> list[Entrant]:
    return [entrant for entrant in entrants if entrant.record["refused"] is None]


@contextmanager
def _refusing(entrants: list[Entrant]) -> Iterator[None]:
    """Whatever stops these methods here is recorded as the reason why they get no speed; the rest goes on."""
    try:
        yield
    except (KvpleatError, MemoryError, RuntimeError) as error:
        expected = isinstance(error, KvpleatError | MemoryError | torch.OutOfMemoryError)
        if not expected and "allocate memory" not in str(error):  # torch's words on a CPU; else a mistake of ours
            raise
        if isinstance(error, PeerError):
            end_workers()  # the next one starts afresh
        for entrant in entrants:
            entrant.record["refused"] = " ".join(str(error).split()) or type(error).__name__
            entrant.record |= {"prefill_s": [], "ttft_s": [], "step_s": []}


def _take_memory(entrant: Entrant, prompt: Tensor) -> None:
    model = entrant.loaded.model
    dtype, device = str(model.dtype).removeprefix("torch."), str(model.device)
    taken = process_memory(entrant.loaded.name, entrant.method.spec, prompt, dtype=dtype, device=device, chunk=CHUNK)
    entrant.record |= {"process": taken, "peak_bytes": taken["peak_bytes"]}


def _check_room(entrants: list[Entrant], loaded: LoadedModel, ids: Tensor) -> None:
    """Raise JudgeError unless all caches fit beside each other, by what each took alone.

    The rehearsal holds two at a time, at most two full ones; the turns hold all.
    """
    taken = [entrant.record["process"] for entrant in entrants]
    room = available_bytes(loaded.model.device)
    if not taken or room is None:
        return
    held = max(sum(x["process_bytes"] for x in taken), 2 * max(x["full_bytes"] for x in taken))
    need = held + max(x["peak_bytes"] - x["process_bytes"] for x in taken)
    if need > room:
        raise JudgeError(
            f"{len(taken)} caches of {ids.shape[0]} x {ids.shape[1]:,} tokens take {human_bytes(need)} side by side, "
            f"and {human_bytes(room)} are free, so they cannot take turns. Pass fewer methods, rows or tokens."
        )


# ---- what is measured


def _rehearse(entrant: Entrant, prompt: Tensor, rest: Tensor) -> None:
    """The untimed run of one method: its memory along the steps, and its check."""
    record, ours = entrant.record, entrant.method.family == "kvpleat"
    with ExitStack() as stack:
        session = stack.enter_context(entrant.open())
        session.prefill(prompt)
        known = stack.enter_context(session.fork()) if ours else None
        record["trace"] = [[prompt.shape[1], session.memory().allocated_bytes]]
        gap, trace = follow(session, rest, known)
        record["trace"] += [[prompt.shape[1] + tokens, held] for tokens, held in trace]
        record["memory"] = session.memory().to_dict()
    if ours:
        pages = record["check"]
        verdict([record], gap, entrant.loaded.model.dtype, ONE_FUNCTION)
        record["check"]["pages"] = pages


def _take_turns(
    entrants: list[Entrant], prompt: Tensor, rest: Tensor, pace: Pace, say: Callable[[str, int], None]
) -> None:
    """Timed repeats: all methods hold a cache at once and take one step each, another one first every time."""
    for repeat in range(pace.repeats):
        what = f"repeat {repeat + 1} of {pace.repeats}"
        with ExitStack() as stack:
            sessions = [(entrant.record, stack.enter_context(entrant.open())) for entrant in entrants]
            for record, session in _rotated(sessions, repeat):
                seconds = _seconds(session, session.prefill, prompt)
                record["prefill_s"].append(seconds)
                record["ttft_s"].append(seconds)  # the first token's logits are the last that a prefill computes
                record["step_s"].append([])
                say(f"{what}: prefill", 1)
            for step, token in enumerate(rest.split(1, dim=1)):
                for record, session in _rotated(sessions, step):
                    seconds = _seconds(session, session.decode, token)
                    if step >= pace.warmup:
                        record["step_s"][-1].append(seconds)
                say(f"{what}: decode", 1)


def _rotated(sessions: list[tuple[dict[str, Any], Session]], by: int) -> list[tuple[dict[str, Any], Session]]:
    first = by % len(sessions)
    return sessions[first:] + sessions[:first]


def _seconds(session: Session, feed: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """Time of a prefill or decode where it happens: inside the worker, for sessions that live in one."""
    start = now(ids.device)
    feed(ids)
    seconds = now(ids.device) - start
    return session.timing()["seconds"] if isinstance(session, PeerSession) else seconds


def _fill_in(record: dict[str, Any], reference: dict[str, Any], loaded: LoadedModel, bandwidth: float) -> None:
    """Figures of a method from its times: definitions are in metrics.py."""
    rows, steps = record["batch"], record["step_s"]
    tpots = [metrics.time_per_output_token(repeat) for repeat in steps]
    tpot = statistics.median(tpots)
    pairs = list(zip(record["ttft_s"], steps, strict=True))
    live = live_bytes(Memory(**record["memory"]), describe(loaded.model).shape, rows, record["context"])
    floor = (weights_read(loaded.model) + live) / bandwidth
    record |= {
        "floor_step_s": floor,
        "floor_share": floor / tpot,
        "tpot_s": tpot,
        "itl_s": {f"p{p}": metrics.percentile([s for repeat in steps for s in repeat], p) for p in (50, 90, 99)},
        "tokens_per_s": rows / tpot,
        "output_tokens_per_s": statistics.median(metrics.output_throughput(rows, *pair) for pair in pairs),
    }
    if reference["step_s"]:
        ratios = [metrics.time_per_output_token(a) / b for a, b in zip(reference["step_s"], tpots, strict=True)]
        record["speedup"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
