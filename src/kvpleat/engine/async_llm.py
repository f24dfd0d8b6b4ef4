"""`AsyncLLM`: requests come and go while others run, and outputs stream. One thread of its own drives the core."""

import asyncio
import copy
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from kvpleat.engine.base import Engine
from kvpleat.engine.jobs import Job
from kvpleat.engine.params import RequestOutput, RequestOutputKind, SamplingParams
from kvpleat.engine.prompts import Message, Prompt, render
from kvpleat.errors import EngineError


class Mailbox:
    """From the engine's thread to one coroutine. Nobody waits for a slow reader: what it has not read is joined.

    Args:
        deltas: whether outputs add up; else the last one says all.
    """

    def __init__(self, deltas: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._deltas = deltas
        self._full = asyncio.Event()
        self._output: RequestOutput | None = None
        self._error: Exception | None = None

    def put(self, output: RequestOutput | None, error: Exception | None = None) -> None:
        """From any thread. Raises RuntimeError if the loop of the reader is closed."""
        self._loop.call_soon_threadsafe(self._deliver, output, error)

    async def get(self) -> RequestOutput:
        """What came since the last call; an error after what came before it."""
        await self._full.wait()
        self._full.clear()
        output, self._output = self._output, None
        if output is None:
            assert self._error is not None
            raise self._error
        if self._error is not None:
            self._full.set()
        return output

    def _deliver(self, output: RequestOutput | None, error: Exception | None) -> None:
        if output is not None:
            before = self._output if self._deltas else None
            self._output = output if before is None else joined(before, output)
        self._error = error or self._error
        self._full.set()


class AsyncLLM(Engine):
    """A model that serves requests as they come. See `Engine` for the arguments.

    >>> async with AsyncLLM("smollm2-135m", kv_memory="2GiB") as llm:
    ...     async for output in llm.generate("The sky is blue because", SamplingParams(max_tokens=64)):
    ...         print(output.outputs[0].text)

    Leaving the loop early (and closing the generator) cancels the request. Any number of event loops may call.
    """

    def _start(self) -> None:
        # Callers encode while the engine's thread decodes, and tokenizers are not made to be shared.
        self._encoder = copy.deepcopy(self.tokenizer)
        self._mailboxes: dict[Job, Mailbox] = {}  # of jobs that have not ended; only the engine's thread looks
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._open = True  # orders are taken
        self._thread = threading.Thread(target=self._serve, name="kvpleat-engine", daemon=True)
        self._thread.start()

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue a prompt.

        Args:
            prompt: a text, a list of tokens, {"prompt": text} or {"prompt_token_ids": tokens}.
            sampling_params: None: the defaults. output_kind says what each output holds.
            request_id: unique among the requests that have not ended; None: made up.

        Yields:
            Outputs as tokens come, the last one with finished=True. Those that come while nobody reads are joined.

        Raises:
            OptionError: a prompt or parameters that cannot be used.
            EngineError: the engine has failed or was closed.
        """
        return self._stream(self._job(self._name(request_id), prompt, sampling_params))

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_generation_prompt: bool = True,
        **template: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation in the model's chat template: see `generate` here, and `chat` of `LLM`."""
        options = {"add_generation_prompt": add_generation_prompt, **template}
        prompt = render(messages, self._encoder, options)
        return self._stream(self._job(self._name(request_id), prompt, sampling_params, special=False))

    async def abort(self, request_id: str) -> None:
        """Cancel a request by its name. Its reader gets what there is, with finish_reason "abort"."""
        self._order(partial(self._abort, request_id))

    def close(self) -> None:
        """End all requests, free the memory, leave the model as it was. Who still waits gets an EngineError."""
        with self._gate:
            if self._open:
                self._orders.put(None)
        self._thread.join()
        self._desk.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # ---- for callers

    def _name(self, request_id: str | None) -> str:
        return f"request-{next(self._numbers)}" if request_id is None else request_id

    async def _stream(self, job: Job) -> AsyncGenerator[RequestOutput, None]:
        mailbox = Mailbox(job.params.output_kind is RequestOutputKind.DELTA)
        self._order(partial(self._begin, job, mailbox))
        ended = False
        try:
            while not ended:
                output = await mailbox.get()
                ended = output.finished
                yield output
        finally:
            if not ended:
                with suppress(EngineError):  # then it is no more anyway
                    self._order(partial(self._drop, job))

    def _order(self, order: Callable[[], None]) -> None:
        """Have the engine's thread do something between two steps."""
        with self._gate:
            if self._open:
                self._orders.put(order)
                return
        self._desk.check()

    # ---- for the engine's thread

    def _serve(self) -> None:
        try:
            while self._obey():
                for job in self._desk.step() if self._desk.jobs else ():
                    self._post(job)
            self._desk.close()
        except BaseException as error:
            self._desk.failure = self._desk.failure or error
        with self._gate:
            self._open = False
        for mailbox in self._mailboxes.values():
            self._tell(mailbox)
        while not self._orders.empty():
            if (order := self._orders.get()) is not None:
                order()  # nothing can begin any more, and whoever wants to is told so

    def _obey(self) -> bool:
        """Carry out what was ordered; wait for an order if there is nothing else to do. False: the end."""
        while True:
            try:
                order = self._orders.get(block=not self._desk.jobs)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _begin(self, job: Job, mailbox: Mailbox) -> None:
        try:
            self._desk.submit(job)
            self._mailboxes[job] = mailbox
        except Exception as error:  # of this request alone
            self._tell(mailbox, error)

    def _drop(self, job: Job) -> None:
        self._mailboxes.pop(job, None)
        self._desk.cancel(job)

    def _abort(self, request_id: str) -> None:
        for job in self._desk.jobs:
            if job.id == request_id:
                self._desk.cancel(job)
                self._post(job)

    def _post(self, job: Job) -> None:
        """Hand out what is new of a job."""
        mailbox = self._mailboxes.pop(job, None) if job.finished else self._mailboxes.get(job)
        if mailbox is None:
            return
        output = None if job.error is not None else job.output()
        try:
            if output is not None or job.error is not None:
                mailbox.put(output, job.error)
        except RuntimeError:  # the reader's event loop is closed
            self._drop(job)

    def _tell(self, mailbox: Mailbox, error: Exception | None = None) -> None:
        """An error, or why the engine is no more, for one reader."""
        try:
            if error is None:
                self._desk.check()
        except EngineError as found:
            error = found
        with suppress(RuntimeError):  # the reader's event loop is closed
            mailbox.put(None, error)


def joined(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Two deltas of a request as one."""
    outputs = {each.index: each for each in first.outputs}
    for new in second.outputs:
        old = outputs.get(new.index)
        if old is not None:
            logprobs = None if new.logprobs is None else (old.logprobs or []) + new.logprobs
            new = replace(new, text=old.text + new.text, token_ids=old.token_ids + new.token_ids, logprobs=logprobs)
        outputs[new.index] = new
    return replace(second, outputs=[outputs[index] for index in sorted(outputs)])
