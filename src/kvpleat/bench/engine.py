"""The engine beside its floor, its rivals and itself without compression: `python -m kvpleat.bench.engine`

Parts, in the order they run:
- host: what a step costs the host, by number of rows; - step: a decode step of one batch at ratio 1, 4 and 8;
- throughput: as many rows as one memory holds, at each ratio;
- compare: transformers' generate, with three caches, on the same prompts; - prefill: time to the first token;
- long: one row of 32k and 128k tokens; - scores: what AttentionScore costs while decoding;
- serve: requests that come as they like.

The floor of a step is the bytes of weights and live entries over the bandwidth of a large copy, measured here by the
clock that times the graphs. Models have random weights, and gates that keep in each head what trained gates keep.
On a CPU pass --tiny, which shows that all of it runs; `--only host` needs no GPU.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvpleat.bench import engine_decode, engine_host, engine_peers, engine_serve
from kvpleat.bench.engine_models import SHAPES
from kvpleat.bench.engine_report import Bench
from kvpleat.bench.records import environment
from kvpleat.engine.sizes import parse_bytes

PARTS: dict[str, Callable[[Bench], None]] = {
    "host": engine_host.host,
    "step": engine_decode.step,
    "throughput": engine_decode.throughput,
    "compare": engine_peers.compare,
    "prefill": engine_peers.prefill,
    "long": engine_decode.long,
    "scores": engine_decode.scores,
    "serve": engine_serve.serve,
}


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if a case broke for another reason than time, memory, or that it is not served."""
    parser = _parser()
    args = parser.parse_args(argv)
    chosen = args.only.split(",") if args.only else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(PARTS)}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny and chosen != ["host"]:
        parser.error("there is no GPU, and models of this size take hours on a CPU. Pass --tiny to see that it runs.")
    start = time.perf_counter()
    bench = Bench(
        device, args.tiny, rows=args.rows, tokens=args.tokens, step_tokens=args.step_tokens, page_size=args.page_size,
        kv_memory=None if args.kv_memory is None else parse_bytes(args.kv_memory), compile=args.compile,
        seconds=args.seconds, file=args.json, rate=args.rate, shape=args.shape, cases=args.cases,
        start=start,
    )  # fmt: skip
    bench.about = environment(device) | {
        "command": " ".join(["python -m kvpleat.bench.engine", *(sys.argv[1:] if argv is None else argv)]),
        "copy_bandwidth": bench.bandwidth,
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
    }
    versions = " ".join(f"{name} {version}" for name, version in bench.about["versions"].items())
    print(f"{bench.about['machine']}, {versions}, copy {bench.bandwidth / 1e9:.0f} GB/s, compile={bench.compile}")
    for name in PARTS:
        if name in chosen:
            PARTS[name](bench)
            bench.write()
    print(f"\n{time.perf_counter() - start:.0f} s")
    return int(bench.failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvpleat.bench.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="NAME,...", help="some of the parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all figures there, as they are measured")
    parser.add_argument("--seconds", type=float, default=500, help="no case begins after that (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="models of a few kilobytes")
    parser.add_argument("--rows", type=int, default=64, help="of a decode step, if they fit (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="that a row has seen (%(default)s)")
    parser.add_argument("--kv-memory", metavar="BYTES", help='such as "40GiB"; what the GPU has left')
    parser.add_argument("--step-tokens", type=int, default=8192, help="of a step with prompts (%(default)s)")
    parser.add_argument("--page-size", type=int, default=16, choices=(16, 32), help="entries (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="as LLM(compile=True)")
    parser.add_argument("--rate", type=float, help="requests a second of serve; a quarter more than ratio 1 can take")
    parser.add_argument("--shape", choices=SHAPES, help="of compare and throughput")
    parser.add_argument("--cases", metavar="ROWSxTOKENS,...", help="of compare")
    return parser


if __name__ == "__main__":
    sys.exit(main())
