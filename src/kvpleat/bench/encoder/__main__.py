"""Encoders with fewer tokens beside the full model: `python -m kvpleat.bench.encoder`

Every method encodes the same texts, a batch each in turns, and its vectors are judged in the same run: the text that
answers a question (R@1, R@10, mean reciprocal rank), a linear probe of sentences, the cosine of each token's last
hidden state to the full model's, texts a second, and the peak of activations in a fresh process. With --match ToMe and
truncation are added at strengths that take as long as each EncoderMerge.

Without files of your own the small sets that come with kvpleat are used: enough to see that it runs, too few for a
verdict. With --speed models of known shapes and random weights are timed instead (on a CPU: --tiny).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kvpleat.accounting import human_bytes
from kvpleat.bench import corpus
from kvpleat.bench.encoder import speed
from kvpleat.bench.encoder.figures import Figures, figures
from kvpleat.bench.encoder.judge import Asked, equal_time, judge, result_file
from kvpleat.bench.encoder.methods import parse_list
from kvpleat.bench.encoder.texts import FORMS, retrieval, sentences, windows
from kvpleat.bench.metrics import Interval
from kvpleat.bench.records import environment
from kvpleat.errors import KvpleatError
from kvpleat.hf.minilm import NAME
from kvpleat.hf.models import load_encoder
from kvpleat.retrofit.flops import matmul_rate

POLICIES = "merge:ratio=2|2.6|3.8"
WIDTH = 200  # of the table, also where stdout is no terminal
HEADS = ["method", "texts/s", "x full", "R@1", "of full's", "R@10", "MRR", "first", "later", "full q.", "probe"]
HEADS += ["cosine", "5%", "long", "peak", "x less"]
READ = """
first, later: R@1 of questions about a text's first paragraph, and about the others. full q.: R@1 where questions are
encoded by the full model. cosine: of tokens to the full model's, mean, 5% quantile, and mean over the longest texts.
peak: of activations, one batch of the longest texts."""


def main(argv: list[str] | None = None) -> int:
    """Returns 2 where an option cannot be used."""
    parser = _parser()
    args = parser.parse_args(argv)
    command = " ".join(["python -m kvpleat.bench.encoder", *(sys.argv[1:] if argv is None else argv)])
    if args.speed and not (torch.cuda.is_available() or args.tiny):
        parser.error("there is no GPU, and models of this size take hours on a CPU. Pass --tiny to see that it runs.")
    try:
        _speed(args, command) if args.speed else _judge(args, command)
    except KvpleatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _judge(args: argparse.Namespace, command: str) -> None:
    log = Console(stderr=True, highlight=False)
    methods = parse_list(args.policy)
    loaded = load_encoder(args.model, dtype=args.dtype, device=args.device)
    source = args.retrieval or corpus.shipped("qa.json")
    probed, labels = sentences(loaded, args.sentiment, args.limit) if args.sentiment else ([], [])
    asked = Asked(
        retrieval(loaded, source, args.texts, args.limit),
        windows(loaded, args.data or corpus.shipped(), args.windows, args.seed),
        probed,
        labels,
        batch=args.batch,
        passes=args.passes,
        memory=not args.no_memory,
    )
    if args.match:
        methods = [*methods, *equal_time(loaded, methods, asked, log.print)]
    settings = {
        **{name: getattr(args, name) for name in ("texts", "limit", "windows", "batch", "passes", "match", "seed")},
        "retrieval": source.name,
        "sentiment": args.sentiment.name if args.sentiment else None,
        "count": {"texts": len(asked.retrieval.texts), "questions": len(asked.retrieval.right)},
        "tokens": sum(map(len, asked.retrieval.texts)),
    }
    records = judge(loaded, methods, asked, log.print)
    file = result_file(loaded, settings, records, command)
    if args.out:
        file.write(args.out)
    texts, questions = settings["count"]["texts"], settings["count"]["questions"]
    about = f"{torch.get_num_threads()} threads, load {file.settings['load']}"
    print(f"{loaded.name}, {file.environment['machine']}, {about}")
    print(
        f"{texts} texts of {settings['tokens'] / texts:.0f} tokens, {questions} questions, {source.name}; 95% intervals"
    )
    Console(highlight=False, width=WIDTH).print(_table(figures(records)))
    print(READ)


def _table(found: Sequence[Figures]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in HEADS:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=name != "method")
    for f in found:
        table.add_row(
            f.label,
            f"{f.texts_per_s:.1f}",
            _interval(f.speed, "{:.2f}"),
            f"{f.recall.value:.1%}",
            _interval(f.kept, "{:.1%}"),
            f"{f.recall_top:.1%}",
            f"{f.mrr:.3f}",
            *("" if x is None else f"{x:.1%}" for x in (f.recall_begins, f.recall_later, f.recall_full_questions)),
            _interval(f.accuracy, "{:.1%}") if f.accuracy else "",
            *("" if x is None else f"{x:.3f}" for x in (f.cosine, f.low, f.cosine_long)),
            human_bytes(f.peak_bytes) if f.peak_bytes else "",
            f"{f.memory:.2f}" if f.memory else "",
        )
    return table


def _interval(figure: Interval, form: str) -> str:
    low, high = form.format(figure.low).rstrip("%"), form.format(figure.high).rstrip("%")
    return f"{form.format(figure.value)} [{low}, {high}]"


def _speed(args: argparse.Namespace, command: str) -> None:
    """All cases, as long as there is time; everything measured so far is in the file after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    rate = matmul_rate(device, size=512 if args.tiny else 8192)
    about = environment(device) | {"command": command, "matmul_flops_per_s": rate}
    print(f"{about['machine']}, torch {torch.__version__}, {rate / 1e12:.1f} TFLOP/s in a large bfloat16 product")
    records: list[dict[str, object]] = []
    first, *others = speed.cases(args.tiny)
    for case, ragged in [(first, False), (first, True), *((case, False) for case in others)]:
        if time.perf_counter() - start > args.seconds:
            print(f"{case.name}: left out, {args.seconds:.0f} s are over")
            continue
        try:
            new = speed.run(case, device, rate, ragged)
        except torch.OutOfMemoryError as error:
            new = [{"shape": case.name, "method": "all", "refused": " ".join(str(error).split())}]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        records += new
        print(f"{case.rows} x {case.tokens:,} tokens{', ragged' if ragged else ''}", *map(speed.line, new), sep="\n")
        if args.out:
            args.out.write_text(json.dumps({"about": about, "records": records}, indent=1), encoding="utf-8")
    print(f"{time.perf_counter() - start:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvpleat.bench.encoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=NAME, help="%(default)s, a folder, or a name on the hub")
    add("--policy", default=POLICIES, metavar="P,P,...", help="methods beside the full model (%(default)s)")
    add("--match", action="store_true", help="add ToMe and truncation that take as long as each EncoderMerge")
    add("--retrieval", type=Path, metavar="FILE", help="JSON with `paragraphs` and `questions`")
    add("--texts", default=FORMS[0], choices=FORMS, help="joined to 256 tokens or more, or as they are (%(default)s)")
    add("--sentiment", type=Path, metavar="FILE", help="JSONL with `text` and `label`; no probe without it")
    add("--data", type=Path, metavar="FILE", help="JSONL (.xz, .gz) of long texts with `source` and `text`")
    add("--windows", type=int, default=16, help="long texts whose tokens are compared (%(default)s)")
    add("--limit", type=int, metavar="N", help="the first paragraphs and sentences only")
    add("--batch", type=int, default=16, help="texts of a forward (%(default)s)")
    add("--passes", type=int, default=1, help="how often the texts are timed (%(default)s)")
    add("--no-memory", action="store_true", help="no fresh process for each method")
    add("--seed", type=int, default=0)
    add("--dtype", help="float32, bfloat16 or float16; the checkpoint's")
    add("--device", help="cpu, cuda, ...; the GPU if there is one")
    add("--out", type=Path, metavar="FILE", help="JSON with everything, for `kvpleat report`")
    add("--speed", action="store_true", help="time models of known shapes with random weights")
    add("--tiny", action="store_true", help="with --speed: shapes of a few kilobytes")
    add("--seconds", type=float, default=100, help="with --speed: no case begins after that (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
