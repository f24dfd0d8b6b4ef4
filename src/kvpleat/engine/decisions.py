"""What becomes of entries at the moments of a policy: after a step, for each row that came to one, as `hf.attention`
does it for one model. Everything follows from sizes that the host knows, so nothing is read from the device.

Streams lie in pages in any order, and policies see them by position: entries are sorted as they are read, and a
decision goes back to where they lie. In a prompt layers are looked at in their order, as when it runs through
`kvpleat.compress`, and what is left of them is only noted until all have spoken. While decoding several are looked at
as one, because a moment comes often, and launching many small operations is what it would cost.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpleat.engine.moments import Calendar, decides
from kvpleat.engine.observed import Observed
from kvpleat.engine.rows import Feed, Row
from kvpleat.hf.families import ModelFacts
from kvpleat.kernels import reference, update
from kvpleat.kernels.device_pool import DevicePool
from kvpleat.policies.base import LayerScores, Policy
from kvpleat.types import Decision, PolicyInput

NOWHERE = 2**31 - 1  # position of a hole: it sorts last
AT_ONCE = 2**25  # numbers of keys that are looked at in one go: 128 MiB in float32, and some times that beside them


@dataclass
class Held:
    """The entries of one layer of one row by position, or of several with the heads of all, [H, N] each; streams that
    are shorter than N end in holes.

    Args:
        layers: which ones, of those that the policy sees.
        slots: of the pool; those of holes are another entry's. source: number of the entry in [H * N] whose slot it is.
        order: place in the stream. live: not a hole. keep: what is left of it. positions, scores, log_weights: of each.
        merging: the decision that merges some of them, and what was left when it was made.
    """

    layers: range
    slots: Tensor
    source: Tensor
    order: Tensor
    live: Tensor
    keep: Tensor
    positions: Tensor
    scores: Tensor | None
    log_weights: Tensor | None
    merging: tuple[Decision, Tensor] | None = None

    def take(self, decision: Decision, holds: Tensor | bool = True) -> None:
        """Note a decision, where `holds` ([] bool) says that it does."""
        before = self.keep
        kept = decision.keep & before
        self.keep = kept if holds is True else torch.where(torch.as_tensor(holds), kept, before)
        if decision.scores is not None:
            self.scores = decision.scores
        if decision.merge_into is None:
            return
        assert self.log_weights is not None
        assert decision.log_weights is not None
        if holds is not True:
            own = torch.arange(before.shape[1], device=before.device).expand_as(before)
            decision = replace(
                decision,
                merge_into=torch.where(torch.as_tensor(holds), decision.merge_into, own),
                log_weights=torch.where(torch.as_tensor(holds), decision.log_weights, self.log_weights),
            )
        self.log_weights, self.merging = decision.log_weights, (decision, before)


def looking_back(policy: Policy, facts: ModelFacts, pool: DevicePool) -> "tuple[Observed | None, Decisions | None]":
    """What a policy that decides at moments needs; nothing for others."""
    if not decides(policy, facts.shape):
        return None, None
    calendar, observed = Calendar(policy, facts.shape), None
    if policy.observation_window:
        seats = pool.lengths.shape[0]
        observed = Observed(facts.shape, seats, policy.observation_window, calendar, pool.key.device)
    return observed, Decisions(policy, facts, pool, calendar, observed)


class Decisions:
    """Decisions about the rows of a pool.

    Args:
        policy: one that decides at moments. facts: of the model. pool: the rows of all seats.
        calendar: of the policy. observed: what it looks back at, or None.
    """

    def __init__(
        self, policy: Policy, facts: ModelFacts, pool: DevicePool, calendar: Calendar, observed: Observed | None
    ) -> None:
        self._policy, self._facts, self._pool = policy, facts, pool
        self._calendar, self._observed = calendar, observed
        self._one = torch.ones(1, dtype=torch.bool, device=pool.key.device)
        self._numbers = torch.tensor(facts.layers, device=pool.key.device)

    def after(self, feeds: list[Feed]) -> None:
        """Decide about the rows that a step brought to a moment."""
        come = [feed for feed in feeds if self._calendar.falls_on(feed.row.prompt_size, feed.start + feed.size)]
        for feed in come:
            self._decide(feed.row, feed.seat, feed.start, feed.start + feed.size)
        if come:
            update.give_back(self._pool)

    def _decide(self, row: Row, seat: int, start: int, moment: int) -> None:
        policy, shape, prompt = self._policy, self._facts.shape, row.prompt_size
        since = self._calendar.last(prompt, start)
        parts: list[Held] = []
        most = row.most_entries(moment)
        for layers in self._together(moment > prompt, most):
            held = self._held(seat, layers, most)
            inputs = self._read(row, seat, held, since, moment)
            decision = policy.decide(inputs)
            if decision is not None:
                held.take(decision)
            parts.append(held)
            if moment == prompt and layers.stop < shape.num_layers:
                self._compete(parts, moment)
        if moment >= prompt:
            self._compete(parts, moment)
        for held in parts:
            self._apply(seat, held)

    def _together(self, decoding: bool, most: int) -> list[range]:
        """Layers that are looked at as one, with streams of up to `most` entries."""
        shape, step = self._facts.shape, 1
        if decoding and self._policy.decides_at_once and len(set(self._facts.logits)) == 1:
            step = max(1, AT_ONCE // (shape.num_kv_heads * most * shape.head_dim))
        return [range(i, min(i + step, shape.num_layers)) for i in range(0, shape.num_layers, step)]

    def _compete(self, parts: list[Held], moment: int) -> None:
        """Let layers compete, where they hold more than the row's budget."""
        policy, shape = self._policy, self._facts.shape
        counts = torch.cat([held.keep.sum(1) for held in parts]).view(-1, shape.num_kv_heads)
        over = policy.over_budget(counts, moment, shape)
        if over is False:
            return
        seen = []
        for held in parts:
            assert held.scores is not None
            seen.append(LayerScores(held.scores, held.positions, held.keep, held.log_weights))
        decisions = policy.squeeze(seen, moment, shape, final=len(counts) == shape.num_layers)
        for held, decision in zip(parts, decisions, strict=True):
            held.take(decision, over)

    def _read(self, row: Row, seat: int, held: Held, since: int, moment: int) -> PolicyInput:
        """What the policy sees of some layers of a row."""
        pool, facts, prompt = self._pool, self._facts, row.prompt_size
        layers = held.layers
        keys, values = (_entries(array, held.slots) for array in (pool.key, pool.value))
        queries: tuple[Tensor | None, Tensor | None] = (None, None)
        samples: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._observed is not None:
            queries = self._observed.recent(layers, seat, moment)
            found = self._observed.sampled(layers.start, row, since, moment) if moment <= prompt else None
            samples = queries if found is None else found
        scale, softcap = facts.logits[layers.start]
        return PolicyInput(
            position=moment,
            layer=layers.start,
            shape=facts.shape,
            positions=held.positions,
            live=held.live,
            keys=keys,
            values=values,
            log_weights=held.log_weights,
            scores=held.scores,
            queries=queries[0],
            query_positions=queries[1],
            samples=samples[0],
            sample_positions=samples[1],
            last_moment=since,
            scale=scale,
            softcap=softcap,
            rotary=facts.rotary,
            layer_share=1 / facts.shape.num_layers,  # it changes where layers compete; from then on they always do
            competes=moment >= prompt,
        )

    def _held(self, seat: int, layers: range, most: int) -> Held:
        """The entries of one row in some layers, `most` of a stream at most."""
        pool, size, numbers = self._pool, self._pool.shape.page_size, self._numbers[layers.start : layers.stop]
        lengths, table = (x[seat].index_select(0, numbers).flatten(0, 1) for x in (pool.lengths, pool.page_table))
        index = torch.arange(most, device=lengths.device).expand(lengths.shape[0], -1)
        live = index < lengths[:, None]
        slots = table.gather(1, index // size).clamp(min=0).long() * size + index % size
        order = torch.where(live, _entries(pool.arrays["position"], slots), NOWHERE).argsort(dim=1)
        # Live entries come first now. Holes are another entry, so that whatever is done to all of them is done to it.
        first = lengths.argmax() * most
        source = torch.where(live, torch.arange(live.numel(), device=live.device).view_as(live), first)
        slots = slots.gather(1, order).flatten()[source]
        arrays = {name: _entries(pool.arrays[name], slots) for name in pool.shape.fields}
        return Held(
            layers, slots, source, order, live, live, arrays["position"], arrays.get("score"), arrays.get("log_weight")
        )

    def _apply(self, seat: int, held: Held) -> None:
        """Write what merged and what was scored, and let go of what is not kept."""
        pool = self._pool
        if held.merging is not None:
            decision, before = held.merging
            assert decision.merge_into is not None
            assert decision.share is not None
            target = torch.where(before, decision.merge_into, -1)
            keys, values = (_entries(array, held.slots) for array in (pool.key, pool.value))
            means = reference.merge_into(keys, values, held.positions, target, decision.share, self._facts.rotary)
            self._write(held, pool.key, means[0])
            self._write(held, pool.value, means[1])
        for name, new in (("score", held.scores), ("log_weight", held.log_weights)):
            if new is not None:
                self._write(held, pool.arrays[name], new)
        row = slice(seat, seat + 1)
        alone = replace(
            pool, page_table=pool.page_table[row], num_pages=pool.num_pages[row], lengths=pool.lengths[row],
            row_pages=pool.row_pages[row],
        )  # fmt: skip
        keep = torch.zeros_like(held.keep).scatter(1, held.order, held.keep)
        for layer, kept in zip(held.layers, keep.chunk(len(held.layers)), strict=True):
            update.evict(alone, self._facts.layers[layer], kept[None], self._one)

    def _write(self, held: Held, array: Tensor, new: Tensor) -> None:
        """New values [H, N, ...] of all entries; the old ones where the step has failed."""
        flat = array.view(-1, *array.shape[2:])
        new = new.flatten(0, 1)[held.source].to(array.dtype)
        flat[held.slots] = torch.where(self._pool.failed == 0, new, flat[held.slots])


def _entries(array: Tensor, slots: Tensor) -> Tensor:
    """[H, N, ...] of one array [P, S, ...] of the pool."""
    return array.view(-1, *array.shape[2:])[slots]
