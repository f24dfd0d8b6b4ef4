"""Continuation: a prompt of real text is compressed, and the next 256 tokens are predicted on what is left of it."""

from typing import ClassVar

import torch

from kvpleat.bench import metrics
from kvpleat.bench.methods import Session
from kvpleat.bench.tasks.base import Item, Observation, Source, Task, Trial, memory

TOKENS = 256


class Continuation(Task):
    """Perplexity, KL and argmax agreement of the tokens after a compressed prompt, the true ones fed back."""

    name: ClassVar[str] = "continuation"
    summary: ClassVar[str] = "perplexity, KL and agreement of 256 tokens after a compressed prompt of real text"

    def items(self, source: Source) -> list[Item]:
        items = []
        for length in source.lengths:
            windows = source.windows(length - len(source.start), source.count)
            for i, (kind, tokens) in enumerate(windows):
                group = {"length": length, "source": kind}
                items.append(Item(f"{self.name}/{length}/{i}", group, source.start + tokens))
        return items

    def measure(self, item: Item, trial: Trial) -> list[Observation]:
        ids = trial.tensor(item.content)
        prompt, rest = ids[:, :-TOKENS], ids[:, -TOKENS:]

        def act(session: Session) -> tuple[torch.Tensor, dict[str, object]]:
            first = session.prefill(prompt)
            after = session.memory()
            logits = torch.cat([first[:, None], session.decode(rest[:, :-1])], dim=1)
            return logits, memory(session.memory(), after)

        logits, held = trial.run(act)
        full, _ = trial.reference(act)
        scores = {
            "nll": float(metrics.token_losses(logits, rest).sum()),
            "tokens": float(TOKENS),
            "kl": float(metrics.kl_divergence(full, logits).sum()),
            "agree": float(metrics.agreement(full, logits).sum()),
        }
        return [Observation(scores, held)]
