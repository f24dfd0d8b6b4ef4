"""A terminal chat over one compressed cache: every turn is appended to it, nothing is fed twice."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from kvpleat import attach
from kvpleat.accounting import MemoryReport, human_bytes
from kvpleat.cli import show
from kvpleat.cli.options import Decoding
from kvpleat.cli.run import Answer, Prefilling, continue_cache
from kvpleat.errors import CacheError, KvpleatError, OptionError
from kvpleat.hf.families import cache_argument
from kvpleat.hf.models import LoadedModel
from kvpleat.policies import Policy

COMMANDS = {"report": False, "save": True, "load": True, "reset": False, "quit": False}  # whether each takes a FILE
HELP = "/report  memory of the cache    /save FILE  /load FILE  the cache    /reset  start over    /quit"
FIRST, SECOND, REPLY = "⟪first⟫", "⟪second⟫", "⟪reply⟫"  # stand-ins whose surroundings are a template's separators


class Chat:
    """A conversation whose only state is its cache: after each turn the cache holds all of it.

    Attaches the policy to the model until it is left as a context manager.

    Args:
        loaded: the model; its tokenizer must have a chat template.
        policy: what compresses the cache.
        decoding: how answers are generated.
        system: message at the start, or None for the template's own.

    Raises:
        OptionError: the model has no chat template, or one that does not keep turns apart.
    """

    def __init__(self, loaded: LoadedModel, policy: Policy, decoding: Decoding, system: str | None) -> None:
        if loaded.tokenizer.chat_template is None:
            raise OptionError(
                f"{loaded.name} has no chat template, so it does not know what a turn is. Use `kvpleat generate`, or a "
                "model that was tuned for chat."
            )
        self.loaded = loaded
        self.decoding = decoding
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._before, self._after = self._separators()
        self._ends = self._end_tokens()
        self._pleated = attach(loaded.model, policy)
        self._cache = self._pleated.new_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pleated.detach()

    def say(self, text: str, on_text: Callable[[str], None], prefilling: Prefilling) -> Answer:
        """Feed a user turn and generate the answer to it."""
        ids = self._turn(text)
        seen, limit = self._cache.get_seq_length(), self._pleated.facts.max_positions
        if seen + ids.shape[1] + self.decoding.max_new_tokens >= limit:
            raise OptionError(
                f"This turn has {ids.shape[1]:,} tokens and the conversation {seen:,}; an answer of up to "
                f"{self.decoding.max_new_tokens} more would pass the model's {limit:,} positions. Ask for less with "
                "--max-new-tokens, or /reset."
            )
        answer = continue_cache(self.loaded, self._cache, ids, self.decoding, on_text, prefilling)
        self._close(answer.tokens[-1])
        return answer

    def report(self) -> MemoryReport:
        """Memory of the conversation's cache."""
        return self._cache.report()

    def save(self, path: str) -> None:
        """Write the conversation's cache to `path`."""
        if self._cache.get_seq_length() == 0:
            raise CacheError("The conversation is empty, so there is nothing to save. Say something first.")
        self._cache.save(Path(path).expanduser())

    def load(self, path: str) -> None:
        """Go on with the conversation that `save` wrote, under the same model and policy."""
        loaded = self._pleated.load_cache(Path(path).expanduser())
        self._cache.release()
        self._cache = loaded

    def reset(self) -> None:
        """Forget the conversation and return its memory."""
        self._cache.release()
        self._cache = self._pleated.new_cache()

    # ---- the chat template, turn by turn

    def _separators(self) -> tuple[str, str]:
        """What the template puts between a reply and the next user turn, and between that and the reply to it."""
        messages = [("user", FIRST), ("assistant", REPLY), ("user", SECOND)]
        text = self._render([*self._system, *({"role": role, "content": content} for role, content in messages)])
        _, found, rest = text.rpartition(REPLY)
        before, found_too, after = rest.partition(SECOND)
        if not (found and found_too):
            raise OptionError(
                f"The chat template of {self.loaded.name} does not show turns as they were said, so a turn cannot be "
                "appended to a cache. Use `kvpleat generate`."
            )
        return before, after

    def _end_tokens(self) -> list[int]:
        """The token that ends a reply in the template and in generation, as a list of one; empty where they differ."""
        first = self._encode(self._before)[:1]
        ends = self.loaded.model.generation_config.eos_token_id
        return [token for token in first if token in (ends if isinstance(ends, list) else [ends])]

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self.loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _turn(self, text: str) -> Tensor:
        """[1, T] the tokens that a user turn adds to the cache."""
        if self._cache.get_seq_length() == 0:
            return torch.tensor([self._encode(self._render([*self._system, {"role": "user", "content": text}]))])
        ids = self._encode(self._before + text + self._after)
        return torch.tensor([ids[len(self._ends) :]])

    def _close(self, last: int) -> None:
        """Feed what generate() left out: the last token, and the end of the reply where it was cut before."""
        with torch.no_grad():
            for token in [last] if [last] == self._ends else [last, *self._ends]:
                ids = torch.tensor([[token]], device=self.loaded.model.device)
                self.loaded.model(ids, **{cache_argument(self.loaded.model): self._cache})


# ---- the terminal


class LiveReply:
    """What the terminal shows while a reply is made: its last lines, and the cache's status below. Rich draws it."""

    def __init__(self, session: Chat, console: Console) -> None:
        self._session = session
        self._console = console
        self._live = Live(self, console=console, transient=True, refresh_per_second=8)
        self._text = ""
        self._status = ""
        self._next_status = 0.0

    def add(self, text: str) -> None:
        """Take the next words; ask the cache for its status four times a second at most."""
        self._text += text
        if time.monotonic() >= self._next_status:
            self._status = show.status_line(self._session.report())
            self._next_status = time.monotonic() + 0.25

    @contextmanager
    def prefilling(self, seen: Callable[[], int] | None, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar until the first token, the live reply from then on."""
        with show.prefilling(self._console, "reading")(seen, total) as done:

            def first_token() -> None:
                done()
                self._live.start()

            try:
                yield first_token
            finally:
                self._live.stop()

    def __rich__(self) -> Group:
        lines = Text(self._text).wrap(self._console, self._console.width)
        return Group(*lines[-(self._console.height - 2) :], Text(self._status, style="reverse"))


def converse(session: Chat, label: str) -> None:
    """Read turns and commands from stdin until it ends or /quit. Replies go to stdout, the status to stderr.

    Where stdin is no terminal every line is a turn, and an error ends the chat; in a terminal the chat goes on.
    """
    interactive = sys.stdin.isatty()
    out, log = Console(highlight=False), Console(stderr=True, highlight=False)
    log.print(f"{session.loaded.name}, {label}. {HELP}", style="dim", markup=False, soft_wrap=True)
    for line in _lines(interactive):
        try:
            if line.startswith("/"):
                if _command(session, line, out, log) == "quit":
                    return
            else:
                _reply(session, line, out, log)
        except KvpleatError as error:
            if not interactive:
                raise
            log.print(Text(str(error), style="red"), soft_wrap=True)


def _lines(interactive: bool) -> Iterator[str]:
    """Turns and commands, empty lines left out."""
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _reply(session: Chat, line: str, out: Console, log: Console) -> None:
    if out.is_terminal:
        live = LiveReply(session, out)
        answer = session.say(line, live.add, live.prefilling)
        out.print(answer.text.strip(), markup=False)
    else:
        answer = session.say(line, lambda text: _write(out, text), show.prefilling(log, "reading"))
        out.print()
    rate = answer.decode_tokens_per_s
    speed = "" if rate is None else f" · {rate:.1f} tokens/s"
    log.print(show.status_line(session.report()) + speed, style="dim", markup=False)


def _write(out: Console, text: str) -> None:
    out.file.write(text)
    out.file.flush()


def _command(session: Chat, line: str, out: Console, log: Console) -> str:
    """Run a command such as "/save FILE"; returns its name."""
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        raise OptionError(f"/{name} is no command, so nothing was done. Commands: {HELP}")
    if COMMANDS[name] != bool(argument.strip()):
        raise OptionError(f"/{name} takes {'a FILE' if COMMANDS[name] else 'nothing'}, so nothing was done.")
    path = argument.strip()
    if name == "report":
        report = session.report()
        out.print(str(report), markup=False)
        out.print(show.kept_picture(report.kept, report.seen_tokens, out.width))
    elif name == "save":
        session.save(path)
        log.print(f"saved {path} ({human_bytes(Path(path).expanduser().stat().st_size)})", style="dim", markup=False)
    elif name == "load":
        session.load(path)
        log.print(f"loaded {path}: {show.status_line(session.report())}", style="dim", markup=False)
    elif name == "reset":
        session.reset()
        log.print("The conversation is forgotten.", style="dim")
    return name
