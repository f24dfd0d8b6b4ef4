"""EngineCore: requests go in, tokens come out, one step of the whole batch at a time.

A request's tokens follow from its own tokens alone, whoever runs beside it and whether it was preempted: the cache is
the same function of them (rule 1 of docs/design.md), and randomness is a function of the request's seed and the number
of the token. Up to rounding: a product of matrices of another size adds up in another order, preemption feeds as a
prompt what was decoded before, and a request that begins with what another one computed has its prompt cut elsewhere.
So the same requests in the same order give the same bits in a new engine, and a request in another batch or after
preemption gives others: in float32 on a CPU log probabilities agree to 1e-5 (a test holds this; `python -m
kvpleat.bench.soak --only identical` prints what it is on other devices and in fewer bits). Tokens are the same unless
two are as likely as each other to that precision, or a gate's number lies that near to 0. Under AttentionScore the
cache also depends on where the prompt ended, so preemption feeds the prompt as a prompt and the rest as what was
generated, cut at the same moments (engine/moments.py): the same decisions up to that rounding, unless two entries score
alike to it. Nothing that one row computes is read by another, so a NaN stays where it is: what a row of NaN froze for
others to begin with is dropped.
"""

import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kvpleat.engine import sampling, sizes
from kvpleat.engine.attach import Attached
from kvpleat.engine.gained import Gained
from kvpleat.engine.params import Emitted, Request
from kvpleat.engine.rows import Plan, Row
from kvpleat.engine.runner import Runner
from kvpleat.engine.sampling import NO_TOKEN, record
from kvpleat.engine.scheduler import Scheduler
from kvpleat.engine.transfer import Launched
from kvpleat.engine.warm import WARMED, warm_up
from kvpleat.errors import OptionError
from kvpleat.policies.base import Policy


class EngineCore:
    """Continuous batching over one model, policy and memory. All calls come from one thread.

    Args:
        model: a causal LM of a known family, in eval mode, on one device. It is the engine's until `close`.
        policy: what to keep; any, with bits=None.
        kv_memory: of the cache and all that it needs on the device, in bytes or as "20GiB"; None: see
            `sizes.memory_for`.
        max_num_seqs: requests that run at a time. max_num_batched_tokens: of a step.
        max_model_len: longest sequence, prompt and output; None: what the model knows.
        seed: of requests that bring none. enforce_eager: no CUDA graphs.
        compile: whether torch.compile fuses what the model's layers do around attention.
        max_logprobs: most that a request may ask for; -1: any number.
        page_size: entries of a page, 16 or 32.
        enable_prefix_caching: requests that begin as others did start from what was computed for these.
        graph_prompts: graphs of steps with prompts, too, which make the start longer.

    Raises:
        UnsupportedError: the model or the policy is not served. OptionError: options that do not fit together.
        AttachError: the model has a policy attached already.
        OutOfMemoryError: the device has too little memory. The model is as it was, and all that was taken is free.

    Attributes:
        max_model_len: in tokens. scheduler: who waits and runs. runner: what lives on the device.
        start_seconds: that making it took, on a GPU with what is compiled and captured before the first request.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        kv_memory: int | str | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        seed: int = 0,
        enforce_eager: bool = False,
        max_logprobs: int = 20,
        page_size: int = 16,
        compile: bool = False,
        enable_prefix_caching: bool = True,
        graph_prompts: bool = True,
    ) -> None:
        sizes.check_counts(max_num_seqs, max_num_batched_tokens)
        start = time.perf_counter()
        self._attached = Attached(model, policy, page_size, compile)
        try:
            facts = self._attached.facts
            self.max_model_len = sizes.length_for(max_model_len, facts)
            self._end_ids = _end_ids(model)
            self._seed, self._max_logprobs, self._vocabulary = seed, max_logprobs, int(self._config.vocab_size)
            limits = sizes.limits(
                self._attached.policy, facts, kv_memory, max_num_seqs, max_num_batched_tokens, self.max_model_len,
                enable_prefix_caching,
            )  # fmt: skip
            self.scheduler = Scheduler(limits)
            self._device = facts.device if facts.device.type == "cuda" else -1  # -1: no matter
            with torch.cuda.device(self._device):
                self.runner = Runner(
                    self._attached, limits.pages, max_num_seqs, self.max_model_len, self._end_ids, enforce_eager,
                    limits.frozen,
                )  # fmt: skip
                if facts.device.type in WARMED:
                    warm_up(self.runner, limits, graph_prompts)
        except BaseException as error:
            self._attached.close()
            if sizes.out_of_memory(error):
                traceback.clear_frames(error.__traceback__)  # they hold on to what was made until then
                raise sizes.does_not_fit(kv_memory, self._attached.facts.device) from error
            raise
        self.start_seconds = time.perf_counter() - start
        self._rows: dict[str, Row] = {}
        self._arrived = 0
        self._runs: Launched | None = None
        self._void = False  # the step that runs was launched after one that failed, and does nothing

    @property
    def _config(self) -> Any:
        return self._attached.model.config

    @property
    def unfinished(self) -> int:
        """Requests that were added and have not ended."""
        return len(self._rows)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            OptionError: it can never run.
        """
        self._check(request)
        params = request.params
        most = self.max_model_len if params.max_tokens is None else len(request.prompt) + params.max_tokens
        row = Row(
            request,
            seed=sampling.request_seed(self._seed, params, self._arrived),
            limit=min(most, self.max_model_len),
            ends=frozenset(sampling.end_tokens(params, self._end_ids)),
        )
        self._arrived += 1
        self._rows[request.id] = row
        self.scheduler.add(row)

    def cancel(self, request_id: str) -> None:
        """End a request; nothing more comes of it. One that is not there is no error."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self.scheduler.finish(row, "abort")

    def reset_prefix_cache(self) -> None:
        """Forget all beginnings of texts that no request uses. Their pages are free with the next step."""
        self.scheduler.pages.forget()

    def step(self) -> Sequence[Emitted]:
        """Start the next step of the batch, then wait for the one before it.

        Returns:
            what that one brought, for each request that gained a token or ended.
        """
        with torch.cuda.device(self._device):  # whatever thread this is
            plan = self.scheduler.schedule(runs=self._runs is not None and not self._void)
            before, fits = self._runs, True
            try:
                self._runs = self.runner.launch(plan) if plan.size or plan.kept else None
            except Exception as error:
                if not sizes.out_of_memory(error):
                    raise
                fits = False  # what follows is done where the error holds on to nothing any more
            if fits and self._runs is None and (plan.released or plan.dropped or plan.clear or plan.moved):
                self.runner.release(plan)
            if fits:
                return self._settle(before, plan)
            self._runs = None
            gained = self._settle(before, plan)
            self.runner.start_over()
            self.scheduler.start_over(plan)
            return self._without_memory(gained)

    def _settle(self, before: Launched | None, plan: Plan) -> Gained:
        """What the step before brought, once it has ended. plan: of the one that was launched since."""
        if before is None or self._void:
            self._void = False
            return Gained()
        counters, drawn = self.runner.collect(before)
        if self.scheduler.settle(before.plan, counters, plan):
            return self._take(before, drawn)
        self._void = self._runs is not None
        return self._without_memory(Gained())

    def _take(self, launched: Launched, drawn: list[int]) -> Gained:
        """Rows gain the tokens that were drawn in their seats, but for those that had ended already."""
        draws = [feed for feed in launched.plan.chunks if feed.draws]
        rows = [*launched.plan.tokens.rows, *(feed.row for feed in draws)]
        seats = [*launched.plan.tokens.seats, *(feed.seat for feed in draws)]
        if gone := [place for place, row in enumerate(rows) if row.reason is not None]:
            for place in reversed(gone):
                del rows[place], seats[place]
        tokens = [drawn[seat] for seat in seats]
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
        gained = Gained(rows, tokens)
        if launched.sampled is not None:
            told = (record(launched.sampled, row.request.params.logprobs, seats[i]) for i, row in enumerate(rows))
            gained.logprobs = {i: each for i, each in enumerate(told) if each is not None}
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if token in row.ends or len(row.tokens) == row.limit or token == NO_TOKEN:
                gained.reasons[place] = self._ended(row)
        return gained

    def _ended(self, row: Row) -> str:
        """A row's last token was its last. Returns why."""
        if row.tokens[-1] == NO_TOKEN:
            row.tokens.pop()
            reason = "error"
        else:
            reason = "stop" if row.tokens[-1] in row.ends else "length"
        self._finish(row, reason)
        return reason

    def _without_memory(self, gained: Gained) -> Gained:
        """And rows that ended because even alone they need more pages than there are."""
        for row in [row for row in self._rows.values() if row.reason == "memory"]:
            del self._rows[row.request.id]
            gained.reasons[len(gained)] = "memory"
            gained.rows.append(row)
            gained.tokens.append(NO_TOKEN)
        return gained

    def _finish(self, row: Row, reason: str) -> None:
        self.scheduler.finish(row, reason)
        del self._rows[row.request.id]

    def _check(self, request: Request) -> None:
        if request.id in self._rows:
            raise OptionError(f"A request {request.id!r} has not ended yet, and answers could not be told apart.")
        if not request.prompt:
            raise OptionError(f"The prompt of {request.id!r} is empty, so there is nothing to continue. Pass a token.")
        if len(request.prompt) >= self.max_model_len:
            raise OptionError(
                f"A prompt of {len(request.prompt)} tokens leaves no room for an answer in sequences of "
                f"{self.max_model_len}. Shorten it, or make the engine with a larger max_model_len."
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._vocabulary:
            raise OptionError(
                f"The prompt of {request.id!r} holds tokens from {min(request.prompt)} to {max(request.prompt)}; the "
                f"model knows 0 to {self._vocabulary - 1}. Tokenise it with the model's own tokenizer."
            )
        sampling.check(request.params, self._vocabulary, self._end_ids, self._max_logprobs)

    def close(self) -> None:
        """End everything, free the memory, and put the model back as it was. Twice is no error."""
        self._attached.close()
        if hasattr(self, "runner"):
            self.runner.close()
            del self.runner
        self._rows, self._runs = {}, None


def _end_ids(model: Any) -> tuple[int, ...]:
    """The model's end tokens, from its generation config."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
