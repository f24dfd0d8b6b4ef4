"""Time to the first token of requests that begin with the same long text, where that is computed once and where not:
python -m kvpleat.bench.prefix [--model smollm2-135m | --shape llama-3.2-1b] [--device cpu] [--tokens 1500]."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from kvpleat.bench import engine_models
from kvpleat.bench.engine_state import random_request
from kvpleat.bench.soak_load import policy_for, served
from kvpleat.engine.core import EngineCore
from kvpleat.engine.params import Request, SamplingParams
from kvpleat.hf.families import describe
from kvpleat.policies import Full, Window
from kvpleat.policies.base import Policy

REQUESTS = 4


def first_tokens(core: Any, beginning: tuple[int, ...]) -> list[tuple[float, int]]:
    """Of requests one after the other: seconds to the first token, and tokens of the prompt that were there already."""
    found = []
    for number in range(REQUESTS):
        start = time.perf_counter()
        core.add(Request(str(number), (*beginning, 5 + number, 3, 4), SamplingParams(max_tokens=1, detokenize=False)))
        while not (emitted := core.step()):
            pass
        found.append((time.perf_counter() - start, emitted[0].num_cached_tokens))
    return found


def _served(args: argparse.Namespace, device: torch.device) -> tuple[Any, Callable[[str], Policy]]:
    """A model, and its policies by name."""
    if args.shape is None:
        it = served(args.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        return it.model, lambda name: policy_for(it, name)
    model = engine_models.random_model(args.shape, device, tiny=False)
    shape = describe(model).shape
    stays = engine_models.profile(4.0, args.tokens, shape.num_layers, shape.num_kv_heads)
    policies = {"full": Full(), "window": Window(ratio=4.0), "dms": engine_models.policy_for(model, stays)}
    return model, policies.__getitem__


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each policy and request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; none: random weights")
    parser.add_argument(
        "--shape", choices=engine_models.SHAPES, help="random weights of this shape instead, gates at 4"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=1500, help="that all prompts begin with")
    parser.add_argument("--policies", nargs="+", default=["full", "dms", "window"])
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model, policies = _served(args, device)
    length = min(args.tokens + 16, model.config.max_position_embeddings)
    beginning = random_request(1, length - 16, 1, model.config.vocab_size).prompt
    print(f"seconds to the first token of {REQUESTS} requests with the same first {len(beginning)} tokens")
    for name in args.policies:
        for sharing in (False, True):
            core = EngineCore(
                model, policies(name), max_num_seqs=4, max_model_len=length, enable_prefix_caching=sharing
            )
            first_tokens(core, tuple(reversed(beginning)))  # warms up, and shares nothing with what is timed
            told = [f"{seconds:.3f} ({cached})" for seconds, cached in first_tokens(core, beginning)]
            print(f"{name:8} {'shared' if sharing else 'alone':8}", *told, sep="  ")
            core.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
