"""EncoderMerge once more, written without kvpleat: one row at a time, no padding, explicit loops, float64."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OBSERVED = 8


@dataclass
class Token:
    """One token on its way: its state, the columns it stands for, where it stands, and whether it may merge."""

    state: Tensor
    members: list[int]
    position: int
    mass: float
    free: bool


def cost_of(left: Token, right: Token, count: int, distance: float) -> float:
    """What it costs that `left` joins `right`, among `count` free tokens."""
    cosine = float(left.state @ right.state / (left.state.norm() * right.state.norm()))
    away = abs(right.position - left.position - 0.25) / (count + 1)
    return max(0.0, 1.0 - cosine + distance * away) * left.mass


def one_round(tokens: list[Token], wanted: int, distance: float, budget: float = math.inf) -> tuple[list[Token], float]:
    """The tokens after one round, and what it cost."""
    free = [token for token in tokens if token.free]
    joiners, others = free[1::2], free[0::2]
    offers = []
    for joiner in joiners:
        costs = [cost_of(joiner, other, len(free), distance) for other in others]
        offers.append((min(costs), joiner, others[costs.index(min(costs))]))
    offers.sort(key=lambda offer: offer[0])
    lost, joined = 0.0, []
    for cost, joiner, other in offers[: min(wanted, math.ceil(0.5 * len(joiners)))]:
        if lost + cost > budget:
            break
        lost += cost
        joined.append((joiner, other))
    for joiner, other in joined:
        sizes = len(other.members), len(joiner.members)
        other.state = (sizes[0] * other.state + sizes[1] * joiner.state) / sum(sizes)
        other.mass += joiner.mass
        other.members = other.members + joiner.members
    gone = {id(joiner) for joiner, _ in joined}
    return [token for token in tokens if id(token) not in gone], lost


def merged(tokens: list[Token], keep: int, distance: float, budget: float | None = None) -> list[Token]:
    """Rounds until `keep` tokens are left, or the budget is spent, or none may merge."""
    left = math.inf if budget is None else budget
    while len(tokens) > keep:
        fewer, lost = one_round([Token(**vars(token)) for token in tokens], len(tokens) - keep, distance, left)
        if len(fewer) == len(tokens):
            break
        tokens, left = fewer, left - lost
    return tokens


def sizes_of(tokens: list[Token]) -> Tensor:
    return torch.tensor([len(token.members) for token in tokens], dtype=torch.float64)


def states_of(tokens: list[Token]) -> Tensor:
    return torch.stack([token.state for token in tokens])


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """[H, Q, D], [H, K, D] -> [Q, H * D]; bias [K] or [Q, K]."""
    weights = (q @ k.transpose(1, 2) * scaling + bias).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(len(x), count, -1).transpose(0, 1)


def received(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sizes: Tensor, scaling: float) -> Tensor:
    """Importance of keys for the next merge: [K]."""
    mass = torch.zeros(k.shape[1], dtype=torch.float64)
    for i in range(0, q.shape[1], OBSERVED):
        weights = (q[:, i : i + 1] @ k.transpose(1, 2) * scaling + (bias if bias.dim() == 1 else bias[i])).softmax(-1)
        mass += sizes[i] * (weights[:, 0] * v.norm(dim=-1)).sum(0)
    return mass


def regroup(before: list[Token], after: list[Token], mass: Tensor) -> Tensor:
    """Importance of tokens before a merge, as that of the tokens after."""
    where = {member: i for i, token in enumerate(after) for member in token.members}
    out = torch.zeros(len(after), dtype=torch.float64)
    for token, value in zip(before, mass, strict=True):
        out[where[token.members[0]]] += value
    return out


def bert_layer(layer: Any, family: str, now: list[Token], keys: list[Token], count: int) -> tuple[Tensor, Tensor]:
    """States after a post-norm layer whose keys come from other tokens, and the importance of those."""
    if family == "distilbert":
        a = layer.attention
        query, key, value = a.q_lin, a.k_lin, a.v_lin
    else:
        a = layer.attention.self
        query, key, value = a.query, a.key, a.value
    x, longer = states_of(now), states_of(keys)
    q, k, v = heads(query(x), count), heads(key(longer), count), heads(value(longer), count)
    scaling, bias = q.shape[-1] ** -0.5, sizes_of(keys).log()
    out, mass = attend(q, k, v, bias, scaling), received(q, k, v, bias, sizes_of(now), scaling)
    if family == "distilbert":
        x = layer.sa_layer_norm(a.out_lin(out) + x)
        return layer.output_layer_norm(layer.ffn(x) + x), mass
    x = layer.attention.output(out, x)
    return layer.output(layer.intermediate(x), x), mass


def modern_layer(model: Any, index: int, now: list[Token], count: int) -> tuple[Tensor, Tensor]:
    """States after a layer of ModernBERT, and the importance of its tokens."""
    layer, kind = model.layers[index], model.config.layer_types[index]
    x, positions = states_of(now), torch.tensor([[token.position for token in now]])
    cos, sin = model.rotary_emb(x[None], positions, kind)
    projected = layer.attn.Wqkv(layer.attn_norm(x)).view(len(x), 3, count, -1)
    q, k, v = (part.transpose(0, 1) for part in projected.unbind(1))

    def rotated(y: Tensor) -> Tensor:
        one, two = y.chunk(2, -1)
        return y * cos[0] + torch.cat((-two, one), -1) * sin[0]

    q, k, bias = rotated(q), rotated(k), sizes_of(now).log().expand(len(x), -1).clone()
    if kind == "sliding_attention":
        for i, j in torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(x))).tolist():
            if abs(now[i].position - now[j].position) > model.config.sliding_window:
                bias[i, j] = -math.inf
    scaling = q.shape[-1] ** -0.5
    out, mass = attend(q, k, v, bias, scaling), torch.tensor([token.mass for token in now], dtype=torch.float64)
    if kind != "sliding_attention":
        mass = received(q, k, v, bias, sizes_of(now), scaling)
    x = x + layer.attn.Wo(out)
    return x + layer.mlp(layer.mlp_norm(x)), mass


@torch.no_grad()
def forward(
    model: Any,
    family: str,
    ids: Tensor,
    kept: list[int] | None,
    special: set[int],
    distance: float,
    coverage: float | None = None,
    positions: list[int] | None = None,
    whole_keys: bool = True,
) -> tuple[Tensor, list[list[list[int]]]]:
    """One row of [T] ids through the model: [T, C] unmerged states, and for each layer the members of each token.

    Args:
        kept: tokens that enter each layer; None for coverage.
        special: token ids that never merge.
        positions: columns that the tokens stand in, where padding came first.
        whole_keys: whether a layer reads keys and values of the tokens before they merged.
    """
    columns = positions or list(range(len(ids)))
    layers = {"distilbert": lambda: model.transformer.layer, "modernbert": lambda: model.layers}
    layers = layers.get(family, lambda: model.encoder.layer)()
    x = model.embeddings(input_ids=ids[None])[0]
    mass = model.get_input_embeddings()(ids).norm(dim=-1) ** 2
    mass = mass / mass.sum()
    now = [
        Token(x[i], [i], columns[i], float(mass[i]), int(token) not in special and 0 < i < len(ids) - 1)
        for i, token in enumerate(ids.tolist())
    ]
    seen, count = [], model.config.num_attention_heads
    for index, layer in enumerate(layers):
        before = now
        if kept is not None:
            now = merged(now, kept[index], distance)
        elif index == 0:
            assert coverage is not None
            now = merged(now, 0, distance, (1 - coverage) * sum(token.mass for token in now if token.free))
        seen.append([token.members for token in now])
        if family == "modernbert":
            states, mass = modern_layer(model, index, now, count)
        else:
            states, mass = bert_layer(layer, family, now, before if whole_keys else now, count)
            mass = regroup(before, now, mass) if whole_keys else mass
        now = [
            Token(state, token.members, token.position, float(m), token.free)
            for state, token, m in zip(states, now, mass, strict=True)
        ]
    final = states_of(now)
    final = model.final_norm(final) if family == "modernbert" else final
    out = torch.zeros(len(ids), final.shape[1], dtype=torch.float64)
    for token, state in zip(now, final, strict=True):
        out[token.members] = state
    return out, seen
