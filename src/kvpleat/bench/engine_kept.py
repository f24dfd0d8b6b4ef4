"""What trained gates keep in each head, measured once on a CPU: `python -m kvpleat.bench.engine_kept [--data FILE]`

The benchmark of the engine gives random models gates that keep as much in each head as these do. Gates that come with
kvpleat for smollm2-135m read documents, and what each head kept of the tokens that had waited long enough goes to
data/kept.json: by ratio, the delay and a number for each document, layer and head.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from kvpleat import compress
from kvpleat.bench import corpus
from kvpleat.hf.models import load
from kvpleat.policies import DMS

MODEL, RATIOS = "smollm2-135m", (2.0, 4.0, 8.0)
TOKENS, DOCUMENTS = 4096, 6
FILE = corpus.shipped("kept.json")


def kept(loaded: Any, policy: DMS, tokens: torch.Tensor) -> tuple[int, list[list[float]]]:
    """The gates' delay, and [L][H] the share of tokens that stayed, of those that could have left."""
    with torch.inference_mode(), compress(loaded.model, policy) as pleated:
        pleated.prefill(tokens[None], cache=pleated.new_cache())
        report, delay = pleated.report(), pleated.policy.delay
    assert delay is not None
    waiting = delay + 1
    shares = (report.kept - waiting) / (tokens.numel() - waiting)
    return delay, [[round(x, 4) for x in layer] for layer in shares.clamp(0, 1).tolist()]


def main(argv: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m kvpleat.bench.engine_kept", description=__doc__)
    parser.add_argument("--data", type=Path, default=corpus.shipped(), help="JSONL of texts with `source` and `text`")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args(argv)
    loaded = load(MODEL, dtype="float32", device="cpu")
    windows = corpus.token_windows(loaded, args.data, TOKENS, DOCUMENTS, seed=0)
    found: dict[str, Any] = {"model": MODEL, "data": args.data.name, "tokens": TOKENS, "ratios": {}}
    for ratio in RATIOS:
        documents = []
        for source, tokens in windows:
            delay, shares = kept(loaded, DMS(ratio=ratio), tokens)
            documents.append(shares)
            print(f"ratio {ratio:g}, {source}: {torch.tensor(shares).mean():.3f} kept", flush=True)
        found["ratios"][f"{ratio:g}"] = {"delay": delay, "documents": documents}
    args.out.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
