"""Teach an encoder to live with merged tokens: a LoRA, distilled from the model itself on any texts.

    python -m kvpleat.encoder.distill --model FOLDER --texts train.jsonl --out FOLDER

The student is the model under EncoderMerge, at a ratio drawn anew for each batch; the teacher is the model. Learned are
low-rank changes of all linear layers of the encoder. Which tokens merge is not learned: knowing their true importance
would bring little (docs/log.md).
"""

import argparse
import copy
import json
import lzma
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpleat.encoder.attach import MergedEncoder
from kvpleat.encoder.families import describe
from kvpleat.errors import OptionError
from kvpleat.policies.encoder import EncoderMerge
from kvpleat.policies.lora import LoraWeights

TOKEN_WEIGHT = 0.1  # of the single tokens' states beside the text's mean


@dataclass(frozen=True)
class Recipe:
    """How to distil.

    Args:
        ratios: of EncoderMerge, one drawn for each batch.
        rank: of the LoRA. rate: largest learning rate, reached after a twentieth of the steps and zero at the end.
        steps: batches. seconds: where above 0, how long to learn in place of `steps`; the rate then follows the clock.
        batch: texts of one.
        shortest, longest: tokens of a text; each batch has texts of one length. Some are too short to merge at all, so
            that the LoRA leaves those as they are.
        whole_keys: 1 or 0, as EncoderMerge's.
        bf16: 1 or 0, matrix products in bfloat16.
        seed: of everything drawn.
    """

    ratios: tuple[float, ...] = (2.0, 2.6, 4.0)
    rank: int = 32
    rate: float = 1e-3
    steps: int = 4000
    seconds: float = 0.0
    batch: int = 64
    shortest: int = 10
    longest: int = 400
    whole_keys: int = 1
    bf16: int = 0
    seed: int = 0


class Change(nn.Module):
    """The LoRA while it learns: added to what each linear layer puts out."""

    def __init__(self, base: nn.Module, rank: int, start: LoraWeights | None = None) -> None:
        super().__init__()
        self.names, self.rank = [], rank
        self.downs, self.ups = nn.ParameterList(), nn.ParameterList()
        self.handles: list[Any] = []
        for layer, name in _linear_layers(base):
            a = torch.randn(rank, layer.in_features, device=layer.weight.device) / math.sqrt(layer.in_features)
            b = torch.zeros(layer.out_features, rank, device=layer.weight.device)
            if start is not None:
                a, b = start.pairs[name][0].to(a), start.scale * start.pairs[name][1].to(b)
            self.names.append(name)
            self.downs.append(nn.Parameter(a))
            self.ups.append(nn.Parameter(b))
            self.handles.append(layer.register_forward_hook(self._hook(len(self.names) - 1)))

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def changed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + F.linear(F.linear(args[0], self.downs[index]), self.ups[index])

        return changed

    def take_off(self) -> LoraWeights:
        """Remove the hooks and return what was learned."""
        for handle in self.handles:
            handle.remove()
        pairs = zip(self.names, self.downs, self.ups, strict=True)
        return LoraWeights(self.rank, self.rank, {name: (a.detach(), b.detach()) for name, a, b in pairs})


def _linear_layers(base: nn.Module) -> list[tuple[nn.Linear, str]]:
    layers = describe(base).family.layers
    return [(m, name) for name, m in base.named_modules() if type(m) is nn.Linear and name.startswith(layers + ".")]


def distill(
    base: Any,
    stream: Tensor,
    frame: tuple[int, int],
    recipe: Recipe,
    say: Callable[[str], None],
    start: LoraWeights | None = None,
) -> LoraWeights:
    """A LoRA for `base`, the model without its head, whose module names it bears.

    Args:
        base: the encoder, in eval mode; left as it was.
        stream: [N] int64, the tokens of many texts one after the other.
        frame: the special tokens before and after a text.
        recipe: how. say: takes a line about every hundredth part of the learning.
        start: a LoRA of this model to go on from, of the recipe's rank.

    Raises:
        OptionError: `start` has another rank.
    """
    if start is not None and start.rank != recipe.rank:
        raise OptionError(
            f"The LoRA to go on from has rank {start.rank}, and rank {recipe.rank} was asked for: one cannot become "
            f"the other. Pass rank={start.rank}."
        )
    torch.manual_seed(recipe.seed)
    device = next(base.parameters()).device
    draw = torch.Generator().manual_seed(recipe.seed)
    teacher = copy.deepcopy(base).requires_grad_(False)
    was = {p: p.requires_grad for p in base.parameters()}
    base.requires_grad_(False)
    change = Change(base, recipe.rank, start)
    optimizer = torch.optim.AdamW(change.parameters(), lr=recipe.rate, weight_decay=0.0)
    begun, near, step, said = time.perf_counter(), torch.zeros((), device=device), 0, -1
    while (done := _done(recipe, step, time.perf_counter() - begun)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, 20 * (done + 1 / recipe.steps), 1.02 * (1 - done))
        texts = _texts(stream, frame, recipe, draw).to(device)
        ratio = recipe.ratios[int(torch.randint(len(recipe.ratios), (), generator=draw))]
        policy = EncoderMerge(ratio=ratio, whole_keys=bool(recipe.whole_keys))
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(recipe.bf16)):
            with torch.no_grad():
                want = teacher(input_ids=texts).last_hidden_state.float()
            with MergedEncoder(base, policy):
                got = base(input_ids=texts).last_hidden_state.float()
        loss, cosine = _loss(got, want)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(change.parameters(), 1.0)
        optimizer.step()
        near = torch.lerp(near, cosine, 0.02 if step else 1.0)
        if int(100 * done) > said:
            said = int(100 * done)
            say(f"step {step}  cosine of texts {float(near):.4f}  {time.perf_counter() - begun:.0f} s")
        step += 1
    for parameter, needs in was.items():
        parameter.requires_grad_(needs)
    return change.take_off()


def _done(recipe: Recipe, step: int, seconds: float) -> float:
    """Share of the learning that is over."""
    return seconds / recipe.seconds if recipe.seconds > 0 else step / recipe.steps


def _loss(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a batch of texts [B, T, C], and the mean cosine of them."""
    text, aim = (F.normalize(states.mean(1), dim=-1) for states in (got, want))
    cosine = (text * aim).sum(-1).mean()
    among = (text @ aim.T - aim @ aim.T).square().mean()
    tokens = F.cosine_similarity(got, want, dim=-1).mean()
    return 1 - cosine + among + TOKEN_WEIGHT * (1 - tokens), cosine.detach()


def _texts(stream: Tensor, frame: tuple[int, int], recipe: Recipe, draw: torch.Generator) -> Tensor:
    """[batch, T] ids of pieces of the stream in their frame, T drawn evenly on a square-root scale."""
    low, high = math.sqrt(recipe.shortest), math.sqrt(recipe.longest)
    inside = int((low + (high - low) * float(torch.rand((), generator=draw))) ** 2) - 2
    start = torch.randint(len(stream) - inside, (recipe.batch, 1), generator=draw)
    before, after = (torch.full_like(start, token) for token in frame)
    return torch.cat((before, stream[start + torch.arange(inside)], after), dim=1)


def read_texts(path: Path, most: int) -> list[str]:
    """Texts of a JSONL file (.xz or not), at most about `most` characters of each `source`."""
    taken: Counter[str] = Counter()
    texts = []
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            source = row.get("source", "")
            if taken[source] < most:
                taken[source] += len(row["text"])
                texts.append(row["text"])
    return texts


def main() -> None:
    """The command line."""
    from transformers import AutoModel, AutoTokenizer

    parser = argparse.ArgumentParser(description="Distil a LoRA for an encoder whose tokens merge.")
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument(
        "--texts", required=True, type=Path, help="JSONL, perhaps .xz, with `text` and perhaps `source`"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the LoRA")
    parser.add_argument("--most", type=int, default=4_000_000, help="characters of one source")
    parser.add_argument("--start", type=Path, help="folder of a LoRA to go on from")
    for name, value in vars(Recipe()).items():
        kind: Any = float if name == "ratios" else type(value)
        parser.add_argument(f"--{name}", type=kind, nargs="+" if name == "ratios" else None, default=value)
    given = parser.parse_args()
    recipe = Recipe(
        **{name: getattr(given, name) for name in vars(Recipe()) if name != "ratios"}, ratios=tuple(given.ratios)
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModel.from_pretrained(given.model, dtype=torch.float32).to(device).eval()
    first, *_, last = tokenizer("").input_ids
    pieces = tokenizer(read_texts(given.texts, given.most), add_special_tokens=False, verbose=False).input_ids
    stream = torch.tensor([token for piece in pieces for token in piece])
    print(f"{len(stream):,} tokens of {len(pieces):,} texts", flush=True)
    start = LoraWeights.load(given.start) if given.start else None
    lora = distill(model.base_model, stream, (first, last), recipe, lambda line: print(line, flush=True), start)
    given.out.mkdir(parents=True, exist_ok=True)
    lora.save(given.out)
    (given.out / "README.md").write_text(_card(Path(given.model).name, device, recipe, len(stream)), encoding="utf-8")


def _card(model: str, device: str, recipe: Recipe, tokens: int) -> str:
    """What a reader of the folder must know."""
    drawn = f"{recipe.steps * recipe.batch:,} pieces"
    if recipe.seconds > 0:
        drawn = f"for {recipe.seconds:g} s, {recipe.batch} pieces a step"
    rows = "".join(f"| {name} | {value} |\n" for name, value in vars(recipe).items())
    return (
        f'# A LoRA for {model} under EncoderMerge\n\nkvpleat.policies.EncoderMerge(ratio=..., lora="FOLDER") merges it '
        f"into the weights while it is attached.\n\nDistilled by kvpleat.encoder.distill on {device}: {drawn} "
        f"of texts of {tokens:,} tokens, the model itself as teacher.\n\n| | |\n|---|---|\n{rows}"
    )


if __name__ == "__main__":
    main()
