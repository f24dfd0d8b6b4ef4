"""Whether an encoder whose tokens merge in Triton kernels gives what it gives in torch, on the device that is timed."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpleat.bench.encoder.methods import Merge, Method, parse
from kvpleat.errors import JudgeError

ROWS = 3
WORDS = 200  # of the texts that are checked: words come again, so that some tokens are much alike
ONE_ROUND = 1.3  # a ratio that one round reaches: rounding then moves few tokens to other groups
NEAR, MOST = 0.1, 0.95  # relative error of a token's state, and the share of tokens that must be that near
WORSE = 1.02  # cost of the groups over that in torch


def check(method: Method, model: Any, ids: Tensor) -> None:
    """Raises JudgeError where kernels and torch differ by more than rounding, or a row alone merges differently.

    Torch is what runs where something is learned, here the embedding of a copy of the model.

    Args:
        method: any; only those that merge by a ratio run kernels.
        model: the full model. ids: [B, T] from which the rows come.
    """
    ratio = method.options.get("ratio", 1.0)
    if not isinstance(method, Merge) or ratio == 1.0:
        return
    twin, few = copy.deepcopy(model), ids[:ROWS] % WORDS + 5
    twin.get_input_embeddings().weight.requires_grad_(True)
    options = {key: value for key, value in method.options.items() if key != "ratio"}
    try:
        _near(twin, parse_like(ONE_ROUND, options), few)
        _groups(twin, method, few)
    except JudgeError:
        raise
    except Exception as error:  # whatever a compiler or a driver says: this method has no speed then, others do
        raise JudgeError(f"{type(error).__name__}: {error}") from error


def parse_like(ratio: float, options: dict[str, Any]) -> Method:
    """EncoderMerge at another ratio."""
    return parse(",".join([f"merge:ratio={ratio:g}", *(f"{key}={value}" for key, value in options.items())]))


def _run(model: Any, method: Method, ids: Tensor, learns: bool) -> tuple[Tensor, Any]:
    with torch.set_grad_enabled(learns), method.on(model) as merged:
        states = model(input_ids=ids).last_hidden_state
        return states.detach().float(), merged.trace


def _near(model: Any, method: Method, ids: Tensor) -> None:
    (want, _), (got, _) = (_run(model, method, ids, learns) for learns in (True, False))
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    near = (error < NEAR).float().mean().item()
    if near < MOST:
        raise JudgeError(
            f"{method.label}: only {near:.1%} of tokens are as in torch (median error {error.median().item():.3f}), so "
            "there is no speed. Look for the kernel at fault in tests/kernels."
        )


def _groups(model: Any, method: Method, ids: Tensor) -> None:
    (_, want), (_, got), (_, alone) = (
        _run(model, method, rows, learns) for rows, learns in ((ids, True), (ids, False), (ids[:1], False))
    )
    words = F.normalize(model.get_input_embeddings()(ids).detach().float(), dim=-1)
    costs = [cost(words, trace.places[-1]) for trace in (want, got)]
    same = torch.equal(got.places[-1][:1], alone.places[-1])
    if want.counts != got.counts or not same or costs[1] > WORSE * costs[0]:
        raise JudgeError(
            f"{method.label}: groups cost {costs[1]:.4f} where torch's cost {costs[0]:.4f}, tokens are as many: "
            f"{want.counts == got.counts}, a row alone has the same: {same}. There is no speed; look in tests/kernels."
        )


def cost(states: Tensor, place: Tensor) -> float:
    """Mean over tokens of 1 - cosine to the mean of the group: states [B, T, C] of length 1, place [B, T]."""
    sums = torch.zeros_like(states).scatter_add_(1, place[..., None].expand_as(states), states)
    means = sums.gather(1, place[..., None].expand_as(states))
    return 1.0 - F.cosine_similarity(states, means, dim=-1).mean().item()
