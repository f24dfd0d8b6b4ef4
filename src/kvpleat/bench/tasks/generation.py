"""Open-ended generation: 512 tokens are sampled on the compressed cache and judged by the uncompressed model."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpleat.bench import metrics
from kvpleat.bench.methods import Session
from kvpleat.bench.tasks.base import Item, Observation, Source, Task, Trial, memory

TOKENS = 512
TOP_P = 0.95
TRACE = 32  # tokens between two notes of the memory
BUCKET = 64  # tokens of one figure of KL along the way


class Generation(Task):
    """A text of 512 tokens after a prompt, sampled at temperature 1 from the likeliest 95%.

    Every method draws with the same numbers, so that texts part only where distributions do. Reported: the perplexity
    of the text under the uncompressed model (a text that this model finds unlikely is a bad one), repetition, variety,
    and KL(full || method) along the method's own text.
    """

    name: ClassVar[str] = "generation"
    summary: ClassVar[str] = (
        "512 sampled tokens: their perplexity under the full model, repetition, variety, KL on the way"
    )
    tokens: ClassVar[int] = TOKENS

    def items(self, source: Source) -> list[Item]:
        items = []
        for length in source.lengths:
            if length <= 2 * self.tokens - 256:
                continue  # too short to hold a prompt worth compressing
            windows = source.windows(length - self.tokens - len(source.start), source.count, salt=4)
            for i, (kind, tokens) in enumerate(windows):
                content = (source.start + tokens, 1000 * source.seed + i)
                items.append(Item(f"{self.name}/{length}/{i}", {"length": length, "source": kind}, content))
        return items

    def measure(self, item: Item, trial: Trial) -> list[Observation]:
        prompt, seed = item.content

        def act(session: Session) -> tuple[list[int], Tensor, dict[str, Any]]:
            draws = torch.rand(self.tokens, generator=torch.Generator().manual_seed(seed)).tolist()
            logits, tokens = [session.prefill(trial.tensor(prompt))], []
            after, trace = session.memory(), []
            for number, draw in enumerate(draws):
                if number % TRACE == 0:
                    trace.append([len(prompt) + number, session.memory().allocated_bytes])
                tokens.append(sample(logits[-1][0], draw))
                if number + 1 < len(draws):
                    logits.append(session.decode(trial.tensor(tokens[-1:]))[:, -1])
            return tokens, torch.stack(logits, dim=1), {**memory(session.memory(), after), "trace": trace}

        tokens, ours, held = trial.run(act)

        def score(session: Session) -> Tensor:
            first = session.prefill(trial.tensor(prompt))
            return torch.cat([first[:, None], session.decode(trial.tensor(tokens[:-1]))], dim=1)

        full = trial.reference(score, name=f"score/{trial.method.spec}")
        kl = metrics.kl_divergence(full, ours)[0]
        scores = {
            "nll": float(metrics.token_losses(full, trial.tensor(tokens)).sum()),
            "tokens": float(len(tokens)),
            "kl": float(kl.sum()),
            "repeated": metrics.repeated_ngrams(tokens, 4),
            "distinct": metrics.distinct_ngrams(tokens, 2),
        }
        scores |= {f"kl_{i}": float(part.sum()) for i, part in enumerate(kl.split(BUCKET))}
        return [Observation(scores, held)]


def sample(logits: Tensor, draw: float) -> int:
    """The token at share `draw` (0 to 1) of the probability of the likeliest tokens that make up TOP_P: logits [V]."""
    probability, order = torch.softmax(logits.double(), dim=-1).sort(descending=True, stable=True)
    total = probability.cumsum(0)
    kept = int((total - probability < TOP_P).sum())
    place = int(torch.searchsorted(total[:kept], draw * total[kept - 1]))
    return int(order[min(place, kept - 1)])
