"""One step on the device: its tensors, the forward of the unpatched model over a flattened batch, the draw of tokens,
and what the host gets to know of it one step late.

A step is as wide as the highest seat in use, rounded up to one of a few sizes (`sizes.ladder`): token i of the batch
is that of seat i, or of nobody; rows move to close gaps. Steps without prompts have fixed shapes, so on a GPU they are
CUDA graphs, and steps with chunks of prompts are padded to some (`engine.mixed`), unless they are so large that it
would not pay. The host writes numbers into pinned memory and never reads a tensor of a step that runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpleat.engine import sliding, windows
from kvpleat.engine.attach import Attached
from kvpleat.engine.attention import Step, Tokens
from kvpleat.engine.decisions import looking_back
from kvpleat.engine.graphs import Graphs
from kvpleat.engine.mixed import Fed, Padded, Shape, columns, unpadded
from kvpleat.engine.rows import Counters, Fork, Plan
from kvpleat.engine.sampling import Mode, Sampled, Sampler
from kvpleat.engine.sizes import ladder, width
from kvpleat.engine.transfer import (
    ACTIVE,
    DRAWS,
    NUMBERS,
    POSITIONS,
    RELEASED,
    Launched,
    event,
    pinned,
    sent,
    to_host,
    written,
)
from kvpleat.kernels import decode, extend, fork, reference, update
from kvpleat.kernels.decode import Work
from kvpleat.kernels.device_pool import DevicePool, first_rows, new_pool


@dataclass(frozen=True)
class Width:
    """What a step of n seats needs: their rows of the pool, also as sliding-window layers see them, and room to plan
    the work of attention."""

    pool: DevicePool
    sliding: DevicePool | None
    work: Work


class Runner:
    """Everything of an engine that lives on the device.

    Args:
        attached: the model. num_pages: of the pool. num_seats: rows that run at a time. length: of a row, in tokens.
        end_ids: the model's end tokens. eager: no CUDA graphs. frozen: rows of the pool behind the seats.
    """

    @torch.inference_mode(False)  # tensors made in that mode could not be written to outside it
    def __init__(
        self,
        attached: Attached,
        num_pages: int,
        num_seats: int,
        length: int,
        end_ids: Sequence[int],
        eager: bool,
        frozen: int = 0,
    ) -> None:
        facts, device = attached.facts, attached.facts.device
        self.attached, self.device, self._end_ids = attached, device, end_ids
        self.pool = new_pool(
            sliding.whole(facts), attached.policy.delayed, num_seats + frozen, num_pages, length, device
        )
        self._sliding = sliding.view(self.pool, facts, length)
        self._layers = {layer: place for place, layer in enumerate(facts.layers)}
        self._observed, self._decisions = looking_back(attached.policy, facts, first_rows(self.pool, num_seats))
        self._moves = windows.moves(attached.policy, facts).to(device)
        self.sampler = Sampler(num_seats, attached.model.config.vocab_size, device)
        self._written = torch.zeros(5, num_seats, dtype=torch.int32, device=device)
        self._next = torch.zeros(num_seats, dtype=torch.int64, device=device)  # token of each seat that is to be fed
        self._logits = torch.zeros(num_seats, self.sampler.vocab_size, dtype=facts.shape.dtype, device=device)
        self._seats = torch.arange(num_seats, device=device)
        self._sent = partial(sent, device=device)
        self._graphs, self._eager = Graphs(device, eager), eager
        self._padded: Padded | None = None
        self._widths = {n: self._width(n) for n in ladder(num_seats)}
        for n in reversed(self._widths):  # the largest first: the others fit into its memory
            self._decode_by_graph(n)  # no seat is active, so nothing happens

    def _width(self, n: int) -> Width:
        rows, shape = first_rows(self.pool, n), self.pool.shape
        windows = None if self._sliding is None else first_rows(self._sliding, n)
        return Width(rows, windows, decode.room(rows.lengths, shape.head_dim, shape.dtype, shape.page_size))

    # ---- a step

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start a step. Nothing here waits for the device."""
        self.attached.check()
        told = self.release(plan)
        for row in plan.seated:
            assert row.seat is not None
            self.sampler.seat(row.seat, row.request.params, row.seed, self._end_ids)
        if plan.begun:
            told.append(self._fork(plan.begun, begin=True))
        counted, sampled = self._step(plan) if plan.size else (self._counted(0), None)
        if plan.taken:
            told.append(self._fork(plan.taken, spare=len(plan.tokens) * self.pool.shape.num_streams))
        if sampled is not None:
            sampled = Sampled._make(None if x is None else to_host(x) for x in sampled)
        forked = to_host(torch.cat(told, 1)) if told else None
        return Launched(plan, to_host(counted), sampled, forked, event(self.device))

    def _step(self, plan: Plan) -> tuple[Tensor, Sampled | None]:
        """The forward, and a draw for every seat: see `Launched`."""
        n = width(plan.width, self._seats.numel())
        if plan.chunks:
            self._mixed(n, plan)
        elif self.device.type == "cuda":
            self._decode_by_graph(n)
        else:
            self._decode(n, columns(self.pool, plan))
        if self._decisions is None:
            windows.slide(self._widths[n].pool, self.attached.policy, self.attached.facts, plan, self._sent)
        else:
            self._decisions.after(plan.feeds)
        return self.draw(n, self.sampler.mode)

    def draw(self, n: int, mode: Mode) -> tuple[Tensor, Sampled | None]:
        """A draw for each of n seats, by its graph where nobody wants more than the token: see `Launched`."""
        if mode.logprobs is None:
            return self._graphs.run((n, mode), lambda: self._draw(n, mode))[0], None
        return self._draw(n, mode)

    @torch.inference_mode()
    def release(self, plan: Plan) -> list[Tensor]:
        """Send the numbers of a step to the device, and empty the rows that leave before it. Returns what became of
        those that stay frozen."""
        for seat, row in plan.released:
            self.sampler.unseat(seat)
            if self._observed is not None:
                self._observed.forget(row)
        self._written.copy_(pinned(written(plan, self._next.shape[0]), self.device), non_blocking=True)
        if plan.dropped:
            self._empty(self._sent(torch.tensor(plan.dropped)))
        if plan.clear:
            self.pool.failed.zero_()
        told = [self._fork(plan.kept, whole=True)] if plan.kept else []
        if plan.released:
            self._empty(self._written[RELEASED, : len(plan.released)])
        if plan.moved:
            self._move(plan)
        return told

    def _move(self, plan: Plan) -> None:
        """Rows go on in other seats, with all that is known of them by seat."""
        pairs = [(move.source, move.target) for move in plan.moved]
        sources, targets = self._sent(torch.tensor(pairs).T.contiguous())
        fork.move(self.pool, sources, targets, None if self._sliding is None else self._sliding.ring)
        self.sampler.move(pairs, sources, targets)
        for state in (self._next, None if self._observed is None else self._observed.last):
            if state is not None:
                state.index_copy_(0, targets, state.index_select(0, sources))

    def _fork(self, forks: Sequence[Fork], begin: bool = False, **options: Any) -> Tensor:
        """Rows become frozen ones, or begin with them: `fork.fork`."""
        seats, frozen = self._sent(torch.tensor([[x.seat for x in forks], [x.frozen.row for x in forks]]))
        sources, targets = (frozen, seats) if begin else (seats, frozen)
        beside = None if self._sliding is None else self._sliding.ring
        return fork.fork(self.pool, sources, targets, self._moves, beside=beside, **options)

    @torch.inference_mode()
    def start_over(self) -> None:
        """Empty all rows, whatever a step that broke off has left in them."""
        for seat in range(self._seats.numel()):
            self.sampler.unseat(seat)
        if self._observed is not None:
            self._observed.forget_all()
        self._empty(torch.arange(self.pool.lengths.shape[0], device=self.device))
        self.pool.failed.zero_()

    def _empty(self, seats: Tensor) -> None:
        """Release rows, and what sliding-window layers remember of them."""
        update.release(self.pool, seats)
        if self._sliding is not None:
            update.release(self._sliding, seats)

    @torch.inference_mode()
    def _decode_by_graph(self, n: int) -> None:
        self._graphs.run(n, lambda: self._decode(n, self.pool.page_table.shape[-1]))

    def _decode(self, n: int, columns: int) -> None:
        """One token of every active seat: what a CUDA graph holds."""
        tokens, own = self._tokens(n)
        step = Step(self.attached.policy, tokens, None, columns, self._layers, (own, None))
        self._logits[:n] = self._forward(step, self._next[:n], self._written[POSITIONS, :n], None)

    def _mixed(self, n: int, plan: Plan) -> None:
        """Chunks of prompts, behind the tokens of all seats if there are any; by a graph if one is large enough."""
        if self._padded is not None and (shape := self._padded.write(plan)) is not None:
            self._graphs.run(shape, partial(self._mixed_as, shape))
            return
        fed = unpadded(self.attached, self.pool, self._sliding, self._observed, plan, n)
        self._feed(n, bool(plan.tokens), columns(self.pool, plan), fed)

    @torch.inference_mode()
    def graph_mixed(self, step_tokens: int) -> None:
        """Make graphs of steps with chunks of prompts, of up to so many tokens. While no row has a seat: each runs, and
        nothing comes of it. Policies that look back at queries have none: what they remember differs in shape."""
        if self._eager or self._observed is not None:
            return
        self._padded = Padded(self.attached, self.pool, self._sliding, self._seats.numel(), step_tokens)
        self._written[ACTIVE].zero_()
        for shape in reversed(self._padded.shapes):  # the largest first: the others fit into its memory
            self._graphs.run(shape, partial(self._mixed_as, shape))

    def _mixed_as(self, shape: Shape) -> None:
        """Tokens of the first seats, and the chunks that were written: what a CUDA graph holds."""
        assert self._padded is not None
        self._feed(shape.width, True, self.pool.page_table.shape[-1], self._padded.read(shape))

    def _feed(self, n: int, decodes: bool, columns: int, fed: Fed) -> None:
        """A forward over the tokens of the first n seats, if any decodes, and over chunks."""
        tokens = own = None
        ids, positions = fed.ids, fed.positions
        if decodes:
            tokens, own = self._tokens(n)
            ids, positions = torch.cat([self._next[:n], ids]), torch.cat([self._written[POSITIONS, :n], positions])
        extend.reserve(self.pool, fed.prompts.chunks)
        step = Step(self.attached.policy, tokens, fed.prompts, columns, self._layers, (own, fed.in_windows))
        self._logits[:n] = self._forward(step, ids, positions, fed.last)
        update.give_back(self.pool)

    def _tokens(self, n: int) -> tuple[Tokens, Tokens | None]:
        """The tokens of the first n seats, with pages and work planned for them; and the same for sliding-window
        layers."""
        rows, facts, delay = self._widths[n], self.attached.facts, self.pool.delay
        positions, active = self._written[POSITIONS, :n], self._written[ACTIVE, :n] != 0
        decode.plan(rows.work, rows.pool.lengths, active)
        # The policy's layers may then get a page that they need later only; those with a window know that they do not.
        update.reserve_token(rows.pool if rows.sliding is None else rows.sliding, positions, active)
        turn = None
        if delay is not None and delay.merges and facts.rotary is not None:
            turn = reference.turn(positions - delay.tokens, facts.rotary, torch.float32)
        last = None if self._observed is None else self._observed.last[:n]
        own = None if rows.sliding is None else Tokens(rows.sliding, positions, active, rows.work, None)
        return Tokens(rows.pool, positions, active, rows.work, turn, last), own

    def _forward(self, step: Step, ids: Tensor, positions: Tensor, last: Tensor | None) -> Tensor:
        """Logits [n, V] after tokens ids [T] at positions [T]; last: [n] where those of each seat end; None: all."""
        model = self.attached.model
        out = model(
            inputs_embeds=model.get_input_embeddings()(ids[None]),  # of ids some families read whether they are padding
            position_ids=positions.long()[None],
            use_cache=False,
            logits_to_keep=0 if last is None else last,
            kvpleat_step=step,
        )
        logits: Tensor = out.logits[0]
        return logits

    def _draw(self, n: int, mode: Mode) -> tuple[Tensor, Sampled]:
        """Draw a token for every seat, and keep it for the next step where one was wanted and the step went well."""
        pool, written = self._widths[n].pool, self._written[:, :n]
        sampled = self.sampler.sample(self._logits[:n], self._seats[:n], written[NUMBERS].long(), mode)
        wanted = (written[DRAWS] != 0) & (pool.failed == 0)
        self._next[:n] = torch.where(wanted, sampled.tokens.clamp(min=0), self._next[:n])
        return torch.cat([self._counted(n), sampled.tokens]), sampled

    def _counted(self, n: int) -> Tensor:
        """[2 + 2 n] int64 free pages, missing ones, those of each seat and those of its longest stream."""
        pool, pages = self.pool, self.pool.num_pages[:n]
        return torch.cat([pool.free_count, pool.failed, pages.sum((1, 2)), pages.amax((1, 2))]).long()

    # ---- between host and device

    def collect(self, launched: Launched) -> tuple[Counters, list[int]]:
        """What became of a step: waits for its end. Counters, and the token that each seat drew (NO_TOKEN: there was
        none to choose)."""
        if launched.done is not None:
            launched.done.synchronize()
        free, missing, *rest = launched.counted.tolist()
        if self._observed is not None and not missing:
            self._observed.settle(launched.plan.feeds)
        held, longest, tokens = (rest[i * len(rest) // 3 : (i + 1) * len(rest) // 3] for i in range(3))
        forked = [] if launched.forked is None else launched.forked.T.tolist()
        return Counters(free, missing, held, longest, forked), tokens

    def close(self) -> None:
        """Let go of graphs, which hold on to the memory of their tensors."""
        self._graphs.clear()
