"""A core without a model: it answers prompts with tokens it was told, one a step, and a step late as the real one."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from kvpleat.engine.params import Emitted, Request, TokenLogprobs
from kvpleat.errors import OptionError

END = 1  # the end token of the tests' tokenizer
LONGEST = 200  # tokens of a sequence


class FakeCore:
    """See the module.

    Args:
        answer: the tokens that follow a request's prompt; when they are all out it goes on with END.
        width: requests that run at a time.
        before_step: called with the number of the step before each.
        options: what the engine was made with.
    """

    def __init__(
        self,
        answer: Callable[[Request], Sequence[int]],
        width: int = 3,
        before_step: Callable[[int], None] = lambda number: None,
        **options: Any,
    ) -> None:
        self.answer, self.width, self.before_step, self.options = answer, width, before_step, options
        self.added: list[Request] = []
        self.cancelled: list[str] = []
        self.steps = 0
        self.closed = 0
        self.threads: set[int] = set()
        self._live: dict[str, tuple[Request, int]] = {}
        self._late: list[Emitted] = []  # of the step before

    @property
    def unfinished(self) -> int:
        self._called()
        return len(self._live) + len(self._late)

    def add(self, request: Request) -> None:
        self._called()
        if not request.prompt or len(request.prompt) >= LONGEST:
            raise OptionError(f"A prompt of {len(request.prompt)} tokens.")
        if request.id in self._live:
            raise OptionError(f"A request {request.id!r} has not ended yet.")
        assert request.params.n == 1
        self.added.append(request)
        self._live[request.id] = request, 0

    def cancel(self, request_id: str) -> None:
        self._called()
        self.cancelled.append(request_id)
        self._live.pop(request_id, None)

    def step(self) -> list[Emitted]:
        self._called()
        self.before_step(self.steps)
        self.steps += 1
        late, self._late = self._late, []
        for name, (request, count) in list(self._live.items())[: self.width]:
            self._late.append(self._emit(name, request, count))
        return late

    def close(self) -> None:
        self._called()
        self.closed += 1
        self._live, self._late = {}, []

    def _emit(self, name: str, request: Request, count: int) -> Emitted:
        params, answer = request.params, self.answer(request)
        token = answer[count] if count < len(answer) else END
        if token < 0:
            del self._live[name]
            return Emitted(name, [], None, "error" if token == -1 else "memory")
        self._live[name] = request, count + 1
        reason = None
        if token in (params.stop_token_ids or ()) or (token == END and not params.ignore_eos):
            reason = "stop"
        elif count + 1 == params.max_tokens or len(request.prompt) + count + 1 == LONGEST:
            reason = "length"
        if reason is not None:
            del self._live[name]
        number = params.logprobs
        logprobs = None if number is None else [self._record(token, count, number)]
        return Emitted(name, [token], logprobs, reason)

    def _record(self, token: int, count: int, number: int) -> TokenLogprobs:
        """The chosen token is the second likeliest, or the likeliest in even places."""
        ids = [token, token + 1] if count % 2 == 0 else [token + 1, token]
        ids = [*ids, *range(token + 2, token + 9)][:number]
        return TokenLogprobs((token, *ids), tuple(-0.5 * (1 + i) for i in range(number + 1)), 1 + count % 2)

    def _called(self) -> None:
        self.threads.add(threading.get_ident())
