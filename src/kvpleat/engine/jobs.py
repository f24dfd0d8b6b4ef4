"""A user's request: split into samples for the core, and put together from what the core emits."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from kvpleat.engine.params import (
    CompletionOutput,
    Emitted,
    Logprob,
    Request,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TokenLogprobs,
)
from kvpleat.engine.text import OutputText
from kvpleat.errors import EngineError, OptionError


class Core(Protocol):
    """What is needed of kvpleat.engine.core.EngineCore."""

    @property
    def unfinished(self) -> int: ...
    def add(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> Sequence[Emitted]: ...
    def close(self) -> None: ...


class Sample:
    """One of the n samples of a job: what has come of it.

    Args:
        index: which one.
        request: as the core has it.
        tokenizer: of transformers, or None where nothing becomes text.
    """

    def __init__(self, index: int, request: Request, tokenizer: Any) -> None:
        self.index, self.request = index, request
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.cumulative_logprob = 0.0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._text = OutputText(tokenizer, request.prompt, request.params)
        self._tokenizer = tokenizer if request.params.detokenize else None
        self._taken = 0  # tokens that were part of a delta
        self._told = False  # whether a delta said that it ended

    def extend(self, emitted: Emitted) -> None:
        """Add what the core emitted, up to a stop string if one is complete now."""
        params, tokens = self.request.params, emitted.token_ids
        self.num_cached_tokens = emitted.num_cached_tokens
        ended = emitted.finish_reason == "stop"
        seen = tokens[:-1] if ended and not params.include_stop_str_in_output else tokens
        used = self._text.add(seen)
        reason = emitted.finish_reason
        stop_reason: str | int | None = None
        if self._text.stop is not None:
            tokens, reason, stop_reason = tokens[:used], "stop", self._text.stop
        elif ended and tokens[-1] in (params.stop_token_ids or ()):
            stop_reason = tokens[-1]
        self.token_ids += tokens
        for record in (emitted.logprobs or [])[: len(tokens)]:
            self.logprobs.append(self._readable(record))
            self.cumulative_logprob += record.logprobs[0]
        if reason is not None:
            self.finish(reason, stop_reason)

    def finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        """End it."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        self._text.finish()

    @property
    def has_news(self) -> bool:
        """Whether a delta would say anything."""
        return self._taken < len(self.token_ids) or (self.finish_reason is not None and not self._told)

    def output(self, delta: bool) -> CompletionOutput:
        """All so far, or what is new since the last delta."""
        start = self._taken if delta else 0
        if delta:
            self._taken, self._told = len(self.token_ids), self.finish_reason is not None
        asked = self.request.params.logprobs is not None
        return CompletionOutput(
            self.index,
            self._text.take() if delta else self._text.text,
            self.token_ids[start:],
            self.cumulative_logprob if asked else None,
            self.logprobs[start:] if asked else None,
            self.finish_reason,
            self.stop_reason,
        )

    def _readable(self, record: TokenLogprobs) -> dict[int, Logprob]:
        """By token: the chosen one, then the likeliest, whose ranks are their places."""
        ranks = (record.rank, *range(1, len(record.ids)))
        found: dict[int, Logprob] = {}
        for token, logprob, rank in zip(record.ids, record.logprobs, ranks, strict=True):
            if token not in found:
                text = None if self._tokenizer is None else str(self._tokenizer.decode([token]))
                found[token] = Logprob(logprob, rank, text)
        return found


class Job:
    """A request of a user: one prompt, n samples.

    Args:
        request_id: of the user's, or made up.
        text: of the prompt, or None where tokens were given.
        tokens: of the prompt.
        params: of the request.
        tokenizer: of transformers, or None.

    Attributes:
        error: why it came to nothing, if it did.
    """

    def __init__(
        self, request_id: str, text: str | None, tokens: tuple[int, ...], params: SamplingParams, tokenizer: Any
    ) -> None:
        self.id, self.params = request_id, params
        self._text, self._tokens = text, tokens
        self.error: Exception | None = None
        self.samples = []
        for index in range(params.n):
            seed = None if params.seed is None else params.seed + index
            request = Request(
                request_id if params.n == 1 else f"{index}_{request_id}", tokens, replace(params, n=1, seed=seed)
            )
            self.samples.append(Sample(index, request, tokenizer))

    @property
    def finished(self) -> bool:
        """Whether all samples have ended."""
        return all(sample.finish_reason is not None for sample in self.samples)

    def output(self) -> RequestOutput | None:
        """What the user is to be told now, by params.output_kind; None: nothing."""
        kind = self.params.output_kind
        delta = kind is RequestOutputKind.DELTA
        if kind is RequestOutputKind.FINAL_ONLY and not self.finished:
            return None
        samples = [sample for sample in self.samples if sample.has_news or not delta]
        outputs = [sample.output(delta) for sample in samples]
        if not outputs:
            return None
        cached = self.samples[0].num_cached_tokens
        return RequestOutput(self.id, self._text, list(self._tokens), outputs, self.finished, cached)


class Desk:
    """Jobs on their way through a core. All calls come from one thread.

    Args:
        core: what runs them.

    Attributes:
        failure: what the core died of, if it did.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self.failure: BaseException | None = None
        self._closed = False
        self._jobs: dict[str, Job] = {}  # that have not ended
        self._open: dict[str, tuple[Job, Sample]] = {}  # their samples that have not, by the core's id

    @property
    def jobs(self) -> list[Job]:
        """What waits or runs."""
        return list(self._jobs.values())

    def submit(self, job: Job) -> None:
        """Hand a job to the core: all of its samples, or none and an error."""
        self.check()
        if job.id in self._jobs:
            raise OptionError(
                f"request_id={job.id!r} is that of a request which has not ended, so answers could not be told apart. "
                "Pass another one, or none."
            )
        self._jobs[job.id] = job
        try:
            for sample in job.samples:
                self.core.add(sample.request)
                self._open[sample.request.id] = job, sample
        except BaseException:
            self.cancel(job)
            raise

    def cancel(self, job: Job) -> None:
        """End what has not ended of a job. One that is not here is no error."""
        for sample in job.samples:
            if self._open.get(sample.request.id, (None,))[0] is job:
                self._close(job, sample)
            if sample.finish_reason is None:
                sample.finish("abort")
        if self._jobs.get(job.id) is job:
            del self._jobs[job.id]

    def step(self) -> list[Job]:
        """One step of the core.

        Returns:
            Jobs with news. One that could not be served further has its `error` set; others go on.

        Raises:
            EngineError: the core failed, now or before.
        """
        self.check()
        try:
            emitted = self.core.step()
            if not emitted and self._open and not self.core.unfinished:
                raise EngineError(f"The engine lost {len(self._open)} requests.")
        except BaseException as error:
            self.failure = error
            if isinstance(error, Exception):
                self.check()
            raise
        changed: dict[Job, None] = {}
        for each in emitted:
            if each.request_id in self._open:  # else it was cancelled meanwhile
                job, sample = self._open[each.request_id]
                changed[job] = None
                self._extend(job, sample, each)
        return list(changed)

    def close(self) -> None:
        """End all jobs and close the core. Twice is no error."""
        if not self._closed:
            self._closed = True
            for job in self.jobs:
                self.cancel(job)
            self.core.close()

    def check(self) -> None:
        """Raise EngineError if the core has failed or is closed."""
        if self._closed:
            raise EngineError("The engine was closed, so it serves no requests. Make another.")
        if self.failure is not None:
            raise EngineError(
                f"The engine stopped in a step: {type(self.failure).__name__}: {self.failure}. Its memory is in an "
                "unknown state, so its requests are lost. Close it and make another."
            ) from self.failure

    def _extend(self, job: Job, sample: Sample, emitted: Emitted) -> None:
        try:
            sample.extend(emitted)
        except Exception as error:  # whatever a tokenizer does is its request's trouble, not that of others
            job.error = error
            self.cancel(job)
        if sample.finish_reason is not None and sample.request.id in self._open:
            self._close(job, sample, ended=emitted.finish_reason is not None)

    def _close(self, job: Job, sample: Sample, ended: bool = False) -> None:
        del self._open[sample.request.id]
        if not ended and self.failure is None:
            self.core.cancel(sample.request.id)
        if job.finished:
            self._jobs.pop(job.id, None)
