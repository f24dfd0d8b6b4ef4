"""What a retrofit costs: `python -m kvpleat.retrofit.flops` prints tokens/s and GPU hours for models of known sizes.

FLOPs of one token of the student, a multiplication and an addition counted as two:

    P  weights of the decoder's linear layers    h  weights of the head
    G  weights of the gates                      A  weights of the adapters
    n  keys that a token sees on average; (T + 1) / 2 where rows of T tokens hold one document each
    a  = 4 Q D n, summed over the layers: the two products of attention

    teacher    2 (P + h) + a
    forward    2 (P + h + G + A) + a
    backward   2 (P + h + G + A) + 2 a      gradients of activations
             + 2 (G + A)                    gradients of weights; 2 (P + h + G) where all weights are trained

These are the model's FLOPs: what is computed a second time (in attention's backward pass, with checkpointing) does not
count, nor do norms, softmax, rotation, sums of groups and the optimiser.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from kvpleat import policies
from kvpleat.errors import OptionError
from kvpleat.hf.families import attention_modules, base_of, describe
from kvpleat.policies.learned import Learned, new_gates
from kvpleat.retrofit.config import TRAINED, Recipe
from kvpleat.retrofit.data_store import TokenStore

# Layers, hidden, query heads, KV heads, head_dim, channels in an MLP, vocabulary, whether the head is the embedding.
SIZES = {
    "SmolLM2-135M": (30, 576, 9, 3, 64, 1536, 49_152, True),
    "Llama-3.2-1B": (16, 2048, 32, 8, 64, 8192, 128_256, True),
    "Llama-3.2-3B": (28, 3072, 24, 8, 128, 8192, 128_256, True),
    "Llama-3.1-8B": (32, 4096, 32, 8, 128, 14_336, 128_256, False),
    "Qwen3-32B": (64, 5120, 64, 8, 128, 25_600, 151_936, False),
    "Llama-3.1-70B": (80, 8192, 64, 8, 128, 28_672, 128_256, False),
}
PEAK = 989.0  # TFLOP/s of an H100 SXM in bfloat16, dense, by its data sheet
SHARE = 0.2  # of the peak, assumed for the table
TABLE_TOKENS = 100_000_000


@dataclass(frozen=True)
class Cost:
    """FLOPs of one token: the teacher's forward, the student's forward and its backward."""

    teacher: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.teacher + self.forward + self.backward


def cost(model: Any, recipe: Recipe, visible: float | None = None) -> Cost:
    """FLOPs of one token of a retrofit; the formula stands above.

    Args:
        model: a causal LM without adapters, of a family that kvpleat serves; on the meta device too.
        recipe: what is trained, and rows of how many tokens.
        visible: keys that a token sees on average (see `visible_keys`); None: rows of one document each.
    """
    facts = describe(model)
    seen = (recipe.length + 1) / 2 if visible is None else visible
    layers = len(facts.layers) * seen + sum(min(seen, window) for window in facts.sliding.values())
    attention = 4 * facts.shape.num_q_heads * facts.shape.head_dim * layers
    head: Any = model.get_output_embeddings()
    frozen = sum(weight.numel() for weight in _linear_weights(facts.decoder)) + head.weight.numel()
    trained = trained_weights(model, recipe)
    added = trained["gates"] + trained.get("adapters", 0)
    teacher = 2 * frozen + attention
    forward = 2 * (frozen + added) + attention
    weights = added + (frozen if recipe.train == "full" else 0)
    return Cost(teacher, forward, 2 * (frozen + added) + 2 * attention + 2 * weights)


def trained_weights(model: Any, recipe: Recipe) -> dict[str, int]:
    """How many numbers are trained: "gates", and "adapters" or "model"."""
    facts = describe(model)
    base = base_of(model, facts)
    policy = policies.registry()[recipe.method]
    assert issubclass(policy, Learned), "Recipe knows the methods"
    with torch.device("meta"):
        gates = new_gates(
            policy,
            delay=recipe.delay,
            num_layers=facts.shape.num_layers,
            num_kv_heads=facts.shape.num_kv_heads,
            hidden_size=base["hidden_size"],
            mlp_size=recipe.mlp_size,
        )
    counts = {"gates": sum(p.numel() for p in gates.parameters())}
    if recipe.train == "lora":
        where = attention_modules(facts) if recipe.adapt == "attention" else [facts.decoder]
        adapted = [weight for module in where for weight in _linear_weights(module)]
        counts["adapters"] = sum(recipe.rank * sum(weight.shape) for weight in adapted)
    if recipe.train == "full":
        counts["model"] = sum(p.numel() for p in model.parameters())
    return counts


def _linear_weights(module: nn.Module) -> list[Tensor]:
    """The matrices of all linear layers."""
    return [m.weight for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]


def visible_keys(store: TokenStore, length: int, recall_share: float = 0.0) -> float:
    """Keys that a token sees on average where documents are packed into rows of `length` tokens, and a share of the
    rows are recall tasks, one document each."""
    full, rest = np.divmod(store.ends - store.starts, length)
    pairs = full.sum() * length * (length + 1) / 2 + (rest * (rest + 1) / 2).sum()
    return float(recall_share * (length + 1) / 2 + (1 - recall_share) * pairs / store.num_tokens)


def matmul_rate(device: torch.device, size: int = 8192, repeats: int = 10) -> float:
    """FLOP/s of a product of two bfloat16 matrices [size, size] on this device: the peak that can really be had."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = 0.0
    for count in (3, repeats):  # the first ones warm up
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            torch.matmul(a, b)
        _wait(device)
        seconds = time.perf_counter() - start
    return 2 * size**3 * repeats / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the table


def sized_model(name: str) -> Any:
    """A model without numbers: one of SIZES by name, or what the config in a folder describes."""
    with torch.device("meta"):
        if name in SIZES:
            layers, hidden, queries, heads, channels, inner, vocabulary, tied = SIZES[name]
            config = LlamaConfig(
                num_hidden_layers=layers,
                hidden_size=hidden,
                num_attention_heads=queries,
                num_key_value_heads=heads,
                head_dim=channels,
                intermediate_size=inner,
                vocab_size=vocabulary,
                tie_word_embeddings=tied,
                max_position_embeddings=131_072,
            )
            return AutoModelForCausalLM.from_config(config)
        if not (Path(name) / "config.json").is_file():
            raise OptionError(f"{name!r} is neither a folder with config.json nor one of {', '.join(SIZES)}.")
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, local_files_only=True))


def table(names: list[str], recipe: Recipe, peak: float, share: float) -> str:
    """Costs of models as markdown: peak in TFLOP/s of one GPU, share of it that is reached."""
    millions = TABLE_TOKENS // 10**6
    lines = [
        f"| model | GFLOP a token | tokens/s of one GPU | GPU hours for {millions}M tokens | weights, 16 bits |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        model = sized_model(name)
        flops = cost(model, recipe).total
        speed = peak * 1e12 * share / flops
        size = 2 * sum(p.numel() for p in model.parameters())
        hours = TABLE_TOKENS / speed / 3600
        lines.append(
            f"| {Path(name).name} | {flops / 1e9:.3g} | {speed:,.0f} | {hours:,.2g} | {size / 2**30:.3g} GiB |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Command line of the table."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpleat.retrofit.flops",
        description="Computed cost of a retrofit. Nothing is measured: peak and share are what you say.",
    )
    parser.add_argument("models", nargs="*", help=f"folders with config.json, or of {', '.join(SIZES)} (default: all)")
    parser.add_argument("--train", choices=TRAINED, default="gates")
    parser.add_argument("--length", type=int, default=Recipe.length, help="tokens of a row")
    parser.add_argument("--peak", type=float, default=PEAK, help="TFLOP/s of one GPU (default: %(default)s, an H100)")
    parser.add_argument("--share", type=float, default=SHARE, help="of the peak that is reached (default: %(default)s)")
    args = parser.parse_args(argv)
    print(table(args.models or list(SIZES), Recipe(train=args.train, length=args.length), args.peak, args.share))


if __name__ == "__main__":
    main()
