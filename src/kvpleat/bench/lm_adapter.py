"""lm-eval's view of a model with a compressed cache. Importing this module imports lm-eval, which takes seconds.

Every request runs through a session of a method, one row at a time. Tokens, truncation and scores follow lm-eval's own
HFLM, so that with the method "dynamic" the figures are those of lm-eval itself (a test holds this).
"""

from contextlib import nullcontext
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from torch import Tensor

from kvpleat.bench.methods import Method, Session
from kvpleat.errors import OptionError
from kvpleat.hf.families import describe
from kvpleat.hf.models import LoadedModel

MAX_GEN_TOKS = 256  # lm-eval's default
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}  # values that change nothing
SAMPLING = ("top_k", "top_p", "min_p", "typical_p")  # without effect on greedy decoding

Pair = tuple[list[int], list[int]]  # a prompt's tokens, and those of its continuation


class KeptTasks(TaskManager):
    """Tasks that are loaded once: RULER draws its items as it is loaded, and every method is to get the same."""

    kept: Any = None

    def load(self, task_list: Any) -> Any:
        """Tasks and groups by name. Raises OptionError where one is unknown or its data are not on this machine."""
        if self.kept is None:
            unknown = [name for name in task_list if name not in self.all_tasks]
            if unknown:
                raise OptionError(
                    f"lm-eval has no task named {', '.join(unknown)}. `lm_eval ls tasks` lists what there is; pass "
                    "the folder of your own tasks as include_path."
                )
            try:
                self.kept = super().load(task_list)
            except (OSError, ImportError) as error:
                raise OptionError(
                    f"The data of {', '.join(task_list)} cannot be loaded ({type(error).__name__}: {error}). Go online "
                    "once to download them, install what the message names, or choose tasks that make their own data "
                    "(ruler_vt)."
                ) from error
        return self.kept


def split_window(context: list[int], scored: list[int]) -> list[Pair]:
    """What loglikelihood_rolling scores of one window, as prompts and continuations that score each token once.

    A text alone has no prompt that could be compressed before it. So the window's first half is decoded after `context`
    (one token, as lm-eval has it), compressed only by what the method does while decoding; then the first half is the
    prompt, compressed at its end as the method does, and the second half is decoded after it. lm-eval's last window,
    which brings a longer context, is decoded after that in one part.
    """
    text = context + scored
    cut = max(len(context), len(text) // 2)
    parts = [(context, text[len(context) : cut]), (text[:cut], text[cut:])]
    return [(prompt, continuation) for prompt, continuation in parts if continuation]


class CompressedLM(TemplateLM):  # type: ignore[misc,unused-ignore]
    """A model and a method, as lm-eval wants them.

    Args:
        seed: of sampling; each request draws from its own generator, so that methods see the same random numbers.
    """

    def __init__(self, loaded: LoadedModel, method: Method, seed: int = 0) -> None:
        super().__init__()
        self.loaded, self.method, self.seed = loaded, method, seed
        self.tokenizer: Any = loaded.tokenizer
        facts = describe(loaded.model)
        self.max_length, self._device = facts.max_positions, facts.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """What requests that lm-eval keeps are filed under."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text's tokens; a text that starts with the first token does not get a second one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    # ---- scoring

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in lm-eval's disjoint windows; see `split_window` for what is compressed."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in windows:
                parts = split_window(*utils.make_disjoint_window(window))
                pairs += parts
                owners += [owner] * len(parts)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += score
        return totals

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation; each prompt is prefilled once."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            by_prompt.setdefault(tuple(self._prompt(context, continuation)), []).append(index)
        scores: dict[int, tuple[float, bool]] = {}
        for prompt, indices in by_prompt.items():
            with self.method.open(self.loaded) as session:
                first = session.prefill(self._ids(list(prompt)))
                for index in indices:
                    branch = session.fork() if len(indices) > 1 else nullcontext(session)
                    with branch as own:
                        scores[index] = self._continue(own, first, pairs[index][1])
        return [scores[index] for index in range(len(pairs))]

    def _prompt(self, context: list[int], continuation: list[int]) -> list[int]:
        """The context, cut from the left where it does not fit; the last token of a continuation is never fed."""
        room = self.max_length + 1 - len(continuation)
        if not context or not continuation or room < 1:
            raise OptionError(
                f"A request of {len(context)} tokens of context and {len(continuation)} to score cannot be scored: "
                f"there must be one of each, and the model knows {self.max_length} positions. Leave the item out."
            )
        return context[-room:]

    def _continue(self, session: Session, first: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """Score a continuation: first [1, V] logits after the prompt."""
        logits = first
        if len(continuation) > 1:
            logits = torch.cat([first, session.decode(self._ids(continuation[:-1]))[0]])
        target = torch.tensor(continuation, device=logits.device)
        chosen = logits.float().log_softmax(-1).gather(1, target[:, None])
        return float(chosen.sum()), bool((logits.argmax(-1) == target).all())

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self._device)

    # ---- generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to a stop string or max_gen_toks tokens: greedy, or sampled at a temperature."""
        return [self._generate(r.args[0], r.args[1], self.seed + i) for i, r in enumerate(requests)]

    @torch.no_grad()
    def _generate(self, context: str, options: dict[str, Any], seed: int) -> str:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_GEN_TOKS))
        until = handle_stop_sequences(settings.pop("until"), self.tokenizer.decode(self.eot_token_id))
        limit = settings.pop("max_gen_toks")
        temperature = settings.pop("temperature", 0.0)
        temperature = temperature if settings.pop("do_sample") else 0.0
        self._refuse(settings, greedy=temperature == 0.0)
        if limit >= self.max_length:
            raise OptionError(
                f"max_gen_toks={limit} leaves no room for a prompt: the model knows {self.max_length} positions. "
                "Generate less."
            )
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[limit - self.max_length :]
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        with self.method.open(self.loaded) as session:
            logits = session.prefill(self._ids(prompt))
            while True:
                tokens.append(_choose(logits[0], temperature, generator))
                text = self.tokenizer.decode(tokens)
                if len(tokens) == limit or tokens[-1] in self._ends() or any(s and s in text for s in until):
                    break
                logits = session.decode(self._ids(tokens[-1:]))[:, -1]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return str(postprocess_generated_text(text, until, None))

    def _refuse(self, settings: dict[str, Any], greedy: bool) -> None:
        for name, value in settings.items():
            if not (name in NEUTRAL and value == NEUTRAL[name]) and not (greedy and name in SAMPLING):
                raise OptionError(
                    f"The task asks for {name}={value!r} in generation, which is not served here, so its score would "
                    "be another task's. Served: do_sample, temperature, until, max_gen_toks."
                )

    def _ends(self) -> set[int]:
        ends = getattr(self.loaded.model.generation_config, "eos_token_id", None)
        return {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token: logits [V]."""
    if temperature == 0.0:
        return int(logits.argmax())
    weights = (logits.float() / temperature).softmax(-1).cpu()
    return int(torch.multinomial(weights, 1, generator=generator))
