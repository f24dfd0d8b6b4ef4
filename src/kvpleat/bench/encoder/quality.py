"""What compressed encoders are asked: the text that answers a question, a label by a linear probe, and every token's
hidden state beside the full model's."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.bench.encoder.turns import Entrant
from kvpleat.hf.embed import batch_of, pad_of
from kvpleat.hf.models import LoadedModel

RIDGE = 10.0  # weight of the probe's penalty; 1 to 100 give the same figures within their intervals
LOW = 0.05  # of a text's tokens lie below its "low" cosine


def ranks(questions: Tensor, texts: Tensor, right: Sequence[int]) -> list[int]:
    """Place of each question's right text among all, 1 the first, by the cosine of vectors of length 1.

    Args:
        questions: [Q, C]. texts: [N, C]. right: Q numbers of texts.
    """
    scores = questions.double() @ texts.double().T
    own = scores.gather(1, torch.tensor(right)[:, None])
    return [1 + int(n) for n in (scores > own).sum(1)]


def probe(vectors: Tensor, labels: Sequence[str], seed: int = 0) -> list[int]:
    """Whether a linear probe, fitted to one half of the texts by ridge regression, gets each of the other half right.

    Args:
        vectors: [N, C]. labels: one each. seed: which half is which.

    Returns:
        1 or 0 for each text of the second half, the same texts for all methods.
    """
    names = sorted(set(labels))
    classes = torch.tensor([names.index(label) for label in labels])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    learn, ask = order[: len(order) // 2], order[len(order) // 2 :]
    x = vectors.double()
    mean, spread = x[learn].mean(0), x[learn].std(0) + 1e-9
    x = torch.cat([(x - mean) / spread, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    a, y = x[learn], F.one_hot(classes[learn], len(names)).double()
    penalty = RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(a.T @ a + penalty, a.T @ y)
    return [int(hit) for hit in (x[ask] @ weights).argmax(1) == classes[ask]]


@torch.inference_mode()
def fidelity(
    loaded: LoadedModel, full: Entrant, chosen: Entrant, rows: Sequence[Sequence[int]], size: int
) -> list[list[float]]:
    """Cosine of each token's last hidden state to the full model's, after unmerging.

    A token that the method does not feed has none: 0.

    Returns:
        [mean over tokens, LOW quantile over tokens, cosine of the means over tokens] of each text.
    """
    found: list[list[float]] = []
    fed, pad, device = chosen.method.cut(rows), pad_of(loaded), loaded.model.device
    for start in range(0, len(rows), size):
        places = list(range(start, min(start + size, len(rows))))
        whole, part = batch_of(rows, places, pad, device), batch_of(fed, places, pad, device)
        wanted = full.model(input_ids=whole.ids, attention_mask=whole.mask).last_hidden_state.float()
        given = chosen.model(input_ids=part.ids, attention_mask=part.mask).last_hidden_state.float()
        for row, place in enumerate(places):
            a, b = wanted[row, : len(rows[place])], given[row, : len(fed[place])]
            cosine = F.cosine_similarity(F.pad(b, (0, 0, 0, len(a) - len(b))), a, dim=1)
            whole_text = F.cosine_similarity(a.mean(0), b.mean(0), dim=0)
            found.append([round(float(x), 6) for x in (cosine.mean(), cosine.quantile(LOW), whole_text)])
    return found
