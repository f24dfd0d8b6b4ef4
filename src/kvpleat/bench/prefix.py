"""Time to the first token of requests that begin with the same long text, where that is computed once and where not:
python -m kvpleat.bench.prefix [--model smollm2-135m] [--device cpu] [--tokens 1500]."""

import argparse
import time
from typing import Any

import torch

from kvpleat.bench.engine_state import random_request
from kvpleat.bench.soak_load import policy_for, served
from kvpleat.engine.core import EngineCore
from kvpleat.engine.params import Request, SamplingParams

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


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each policy and request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; none: random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=1500, help="that all prompts begin with")
    parser.add_argument("--policies", nargs="+", default=["full", "dms", "window"])
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    it = served(args.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    length = min(args.tokens + 16, it.model.config.max_position_embeddings)
    beginning = random_request(1, length - 16, 1, it.model.config.vocab_size).prompt
    print(f"seconds to the first token of {REQUESTS} requests with the same first {len(beginning)} tokens")
    for name in args.policies:
        for sharing in (False, True):
            core = EngineCore(
                it.model, policy_for(it, name), max_num_seqs=4, max_model_len=length, enable_prefix_caching=sharing
            )
            first_tokens(core, tuple(reversed(beginning)))  # warms up, and shares nothing with what is timed
            told = [f"{seconds:.3f} ({cached})" for seconds, cached in first_tokens(core, beginning)]
            print(f"{name:8} {'shared' if sharing else 'alone':8}", *told, sep="  ")
            core.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
