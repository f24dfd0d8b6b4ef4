"""The chunked language model loss against torch's own, gradients included."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpleat.errors import OptionError
from kvpleat.retrofit import cross_entropy as module
from kvpleat.retrofit.cross_entropy import cross_entropy, next_tokens
from kvpleat.retrofit.data import mixture
from tests.retrofit import texts


def problem(seed: int, tokens: int, bias: bool) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states, a head and targets, a third of them unknown."""
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, 11, dtype=torch.float64)
    head = nn.Linear(11, 37, bias=bias, dtype=torch.float64)
    targets = torch.randint(0, 37, (tokens,))
    targets[torch.rand(tokens) < 1 / 3] = -1
    return hidden, head, targets


def textbook(hidden: Tensor, head: nn.Linear, targets: Tensor, softcap: float | None) -> Tensor:
    logits = head(hidden)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("seed", "tokens"), [(0, 1), (1, 7), (2, 14), (3, 52)])
def test_as_torch(seed: int, tokens: int, softcap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and all gradients, with one chunk, several, and a last one that is short."""
    monkeypatch.setattr(module, "CHUNK", 7)
    hidden, head, targets = problem(seed, tokens, bias)
    given = [hidden.requires_grad_(), *head.parameters()]
    found = cross_entropy(hidden, head, targets, softcap=softcap)
    wanted = textbook(hidden, head, targets, softcap)
    torch.testing.assert_close(found, wanted)
    grads = (torch.autograd.grad(loss / 3, given) for loss in (found, wanted))
    for mine, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, torchs)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, head, targets, softcap=softcap), wanted)


def test_only_what_is_trained_gets_a_gradient() -> None:
    """A frozen head has none, and hidden states are served all the same."""
    hidden, head, targets = problem(5, 9, True)
    head.requires_grad_(False)
    cross_entropy(hidden.requires_grad_(), head, targets).backward()
    assert head.weight.grad is None
    assert head.bias.grad is None
    (wanted,) = torch.autograd.grad(textbook(hidden, head, targets, None), hidden)
    torch.testing.assert_close(hidden.grad, wanted)


def test_in_bfloat16() -> None:
    """Under autocast products are of 16 bits, sums and the gradients of the weights are not."""
    hidden, head, targets = problem(6, 400, False)
    hidden, head = hidden.float(), head.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropy(hidden, head, targets)
    found.backward()
    assert found.dtype == torch.float32
    wanted = textbook(hidden, head, targets, None)
    torch.testing.assert_close(found, wanted, rtol=3e-3, atol=0)
    (grad,) = torch.autograd.grad(wanted, head.weight)
    assert head.weight.grad is not None
    assert (head.weight.grad - grad).norm() < 0.02 * grad.norm()


def test_other_heads_are_refused() -> None:
    """A head that is no linear layer would be trained wrongly."""
    with pytest.raises(OptionError, match="Identity"):
        cross_entropy(torch.zeros(2, 3), nn.Identity(), torch.zeros(2, dtype=torch.int64))


def test_next_tokens_stay_in_their_document() -> None:
    """The next token where it is of the same document, and nothing at the end of rows and before padding."""
    store = texts.numbered_store([5, 2, 1, 9, 3])
    batch = next(mixture(store, texts.tokenizer(), length=7, batch_rows=4, recall_share=0.0, seed=1))
    owner = np.repeat(np.arange(5), [5, 2, 1, 9, 3])
    predicted = 0
    for tokens, starts, targets in zip(batch.tokens, batch.doc_start, next_tokens(batch), strict=True):
        for t in range(7):
            known = t < 6 and starts[t + 1] == starts[t] and tokens[t + 1] == tokens[t] + 1
            assert targets[t] == (tokens[t + 1] if known else -1)
            if targets[t] >= 0:
                assert owner[tokens[t]] == owner[targets[t]]
                predicted += 1
    assert predicted > 5
