"""`LLM`: prompts in, outputs out, all at once."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvpleat.engine.base import Engine, checked
from kvpleat.engine.params import RequestOutput, RequestOutputKind, SamplingParams
from kvpleat.engine.prompts import Message, Prompt, as_conversations, as_prompts, render
from kvpleat.errors import OptionError


class LLM(Engine):
    """A model that answers many prompts at once over a compressed KV memory. See `Engine` for the arguments.

    >>> with LLM("smollm2-135m", DMS(ratio=4), kv_memory="2GiB") as llm:
    ...     outputs = llm.generate(["The sky is blue because"], SamplingParams(temperature=0.7, max_tokens=64))
    ...     print(outputs[0].outputs[0].text)

    Several threads may call; their calls run one after the other.
    """

    def _start(self) -> None:
        self._lock = threading.Lock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue prompts.

        Args:
            prompts: one or several of: a text, a list of tokens, {"prompt": text}, {"prompt_token_ids": tokens}.
            sampling_params: for all, or one for each; None: the defaults. Outputs are whole, whatever output_kind says.
            use_tqdm: show a progress bar on stderr.

        Returns:
            Outputs in the order of the prompts.

        Raises:
            OptionError: a prompt or parameters that cannot be used; nothing has run then.
            EngineError: the engine has failed or was closed.
        """
        listed = as_prompts(prompts)
        return self._run(listed, self._each(sampling_params, len(listed)), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        add_generation_prompt: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer conversations, in the model's chat template.

        Args:
            messages: of one conversation or of several: {"role": ..., "content": ...} each.
            sampling_params, use_tqdm: as for `generate`.
            add_generation_prompt: whether the template opens an answer.
            template: what else transformers' `apply_chat_template` takes: chat_template, tools, continue_final_message,
                and variables of the template.

        Raises:
            OptionError, EngineError: as for `generate`, and where the template does not take the messages.
        """
        options = {"add_generation_prompt": add_generation_prompt, **template}
        texts = [render(each, self.tokenizer, options) for each in as_conversations(messages)]
        return self._run(texts, self._each(sampling_params, len(texts)), use_tqdm, special=False)

    def close(self) -> None:
        """Free the memory and leave the model as it was. Twice is no error; requests are one after this."""
        with self._lock:
            self._desk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _each(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        """One for each prompt, for whole outputs."""
        if not isinstance(params, Sequence):
            params = [checked(params)] * count
        if len(params) != count:
            raise OptionError(
                f"{len(params)} sampling_params for {count} prompts: it is not clear which is for which. Pass one for "
                "all, or one for each."
            )
        return [replace(checked(each), output_kind=RequestOutputKind.FINAL_ONLY) for each in params]

    def _run(
        self, prompts: Sequence[Prompt], params: list[SamplingParams], use_tqdm: bool, special: bool = True
    ) -> list[RequestOutput]:
        with self._lock:
            jobs = [
                self._job(str(next(self._numbers)), prompt, each, special)
                for prompt, each in zip(prompts, params, strict=True)
            ]
            try:
                for job in jobs:
                    self._desk.submit(job)
                self._finish(len(jobs), use_tqdm)
            finally:
                for job in jobs:
                    self._desk.cancel(job)  # those that an error or Ctrl-C left behind
        return [output for job in jobs if (output := job.output()) is not None]

    def _finish(self, count: int, show: bool) -> None:
        """Step until all jobs have ended."""
        bar = Progress(
            TextColumn("prompts"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            disable=not show,
            console=Console(stderr=True),
        )
        with bar, _between_steps() as pause:
            task = bar.add_task("", total=count)
            while self._desk.jobs:
                for job in self._desk.step():
                    if job.error is not None:
                        raise job.error
                    bar.advance(task, int(job.finished))
                pause()


@contextmanager
def _between_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the end of a step, where it leaves an engine that can be used on. A second one does not wait."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def pause() -> None:
        if pressed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield pause
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
