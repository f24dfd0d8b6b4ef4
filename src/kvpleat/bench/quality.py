"""Quality of policies beside the full cache, on the same items: `python -m kvpleat.bench.quality --help`.

Two tasks. Continuation: a prompt of real text is compressed, and the next 256 tokens are decoded one by one with the
true tokens fed back; the figure is their perplexity over the full cache's. Pass key: a number is hidden at a random
depth of real text and asked for at the end; the figure is the share of prompts answered right.
"""

import argparse
import gzip
import json
import lzma
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from kvpleat import Pleated, compress, policies
from kvpleat.bench import metrics
from kvpleat.errors import OptionError
from kvpleat.hf.models import LoadedModel, load
from kvpleat.policies import Policy

INTRODUCTION = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
PASS_KEY = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass
class Result:
    """What one policy did on the items of a run.

    Args:
        policy: its options.
        losses: per continuation the loss of each token (nats).
        sources: where each continuation comes from.
        correct: per pass-key length, 1 or 0 for each prompt.
        ratios: compression ratio of each item at its end, from allocated bytes.
        seconds: time of the whole run.
    """

    policy: dict[str, Any]
    losses: list[list[float]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    correct: dict[int, list[int]] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of each line of a JSONL file (.xz, .gz or plain) with the keys `source` and `text`."""
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
    with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            yield item.get("source", path.name), item["text"]


def token_windows(
    loaded: LoadedModel, path: Path, length: int, count: int, seed: int, sources: list[str] | None = None
) -> list[tuple[str, Tensor]]:
    """`count` windows of `length` tokens with their source, drawn without replacement from all of the file's text, or
    from that of some sources.

    Documents of one source are joined, so that short ones count too; a source is drawn in proportion to its length.
    """
    generator = random.Random(seed)
    by_source: dict[str, list[str]] = {}
    for source, text in read_documents(path):
        if sources is None or source in sources:
            by_source.setdefault(source, []).append(text)
    joined = {source: "\n\n".join(texts) for source, texts in sorted(by_source.items())}
    span = 8 * length  # characters that hold `length` tokens of almost any text
    places = [(source, i) for source, text in joined.items() for i in range(0, len(text) - span + 1, span)]
    generator.shuffle(places)
    windows = []
    for source, start in places:
        tokens = loaded.tokenizer(joined[source][start : start + span], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        if len(tokens) >= length:
            windows.append((source, torch.tensor(tokens[:length])))
        if len(windows) == count:
            return windows
    raise OptionError(
        f"{path} holds {len(windows)} windows of {length} tokens and {count} were asked for. Ask for fewer."
    )


def pass_key_prompts(
    loaded: LoadedModel, filler: list[tuple[str, Tensor]], length: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """One prompt of `length` tokens for each filler, and the tokens of its answer."""
    generator = random.Random(seed)
    prompts = []
    for _, text in filler:
        key = str(generator.randrange(10_000, 100_000))
        start, needle, question = (
            torch.tensor(loaded.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
            for part in (INTRODUCTION, PASS_KEY.format(key=key), QUESTION)
        )
        room = length - len(start) - len(needle) - len(question)
        depth = generator.randrange(room)
        prompt = torch.cat([start, text[:depth], needle, text[depth:room], question])
        answer = torch.tensor(loaded.tokenizer(" " + key, add_special_tokens=False, verbose=False)["input_ids"])
        prompts.append((prompt, answer))
    return prompts


@torch.no_grad()
def continuation_losses(pleated: Pleated, window: Tensor, num_prompt: int) -> tuple[list[float], float]:
    """Losses of the tokens after a prompt, decoded one by one on the compressed cache, and the ratio at the end."""
    cache = pleated.new_cache()
    ids = window[None].to(pleated.facts.device)
    first = pleated.prefill(ids[:, :num_prompt], cache=cache)
    logits = torch.cat([first[:, None], pleated.continue_with(ids[:, num_prompt:-1], cache=cache)], dim=1)
    ratio = cache.report().compression_ratio
    cache.release()
    return metrics.token_losses(logits, ids[:, num_prompt:])[0].tolist(), ratio


@torch.no_grad()
def answers_pass_key(pleated: Pleated, prompt: Tensor, answer: Tensor) -> tuple[int, float]:
    """1 if greedy decoding gives exactly the answer's tokens, else 0; and the ratio at the end."""
    cache = pleated.new_cache()
    logits = pleated.prefill(prompt[None].to(pleated.facts.device), cache=cache)
    correct = 1
    for token in answer.tolist():
        chosen = logits.argmax(-1, keepdim=True)
        if chosen.item() != token:
            correct = 0
            break
        logits = pleated.model(chosen, past_key_values=cache).logits[:, -1]
    ratio = cache.report().compression_ratio
    cache.release()
    return correct, ratio


def run(loaded: LoadedModel, chosen: list[Policy], args: argparse.Namespace, progress: Progress) -> list[Result]:
    """Every policy on the same items."""
    windows = (
        token_windows(loaded, args.data, args.prompt + args.tokens, args.windows, args.seed) if args.windows else []
    )
    keys = {}
    for length in args.pass_key_lengths if args.pass_keys else []:
        filler = token_windows(loaded, args.data, length, args.pass_keys, args.seed + length, args.pass_key_sources)
        keys[length] = pass_key_prompts(loaded, filler, length, args.seed + length)
    results = []
    task = progress.add_task("items", total=len(chosen) * (len(windows) + sum(map(len, keys.values()))))
    for policy in chosen:
        start, result = time.perf_counter(), Result(policy.to_dict())
        with compress(loaded.model, policy) as pleated:
            for source, window in windows:
                losses, ratio = continuation_losses(pleated, window, args.prompt)
                result.losses.append(losses)
                result.sources.append(source)
                result.ratios.setdefault("continuation", []).append(ratio)
                progress.advance(task)
            for length, prompts in keys.items():
                for prompt, answer in prompts:
                    correct, ratio = answers_pass_key(pleated, prompt, answer)
                    result.correct.setdefault(length, []).append(correct)
                    result.ratios.setdefault(f"pass key {length}", []).append(ratio)
                    progress.advance(task)
        result.seconds = time.perf_counter() - start
        results.append(result)
    return results


def table(results: list[Result]) -> Table:
    """One line a policy; the first result is what the others are measured against."""
    full = results[0]
    out = Table("policy", "ratio", "perplexity", "vs full", "95% interval")
    for length in full.correct:
        out.add_column(f"pass key {length}")
    for result in results:
        options = {
            k: v for k, v in result.policy.items() if v is not None and k in ("ratio", "budget", "coverage", "slack")
        }
        cells = [" ".join([result.policy["name"], *(f"{k}={v:g}" for k, v in options.items())])]
        all_ratios = [x for ratios in result.ratios.values() for x in ratios]
        cells.append(f"{sum(all_ratios) / len(all_ratios):.2f}")
        if result.losses:
            ours, base = (metrics.perplexity([x for losses in r.losses for x in losses]) for r in (result, full))
            low, high = metrics.paired_interval(result.losses, full.losses)
            cells += [
                f"{ours:.3f}",
                f"{100 * (ours / base - 1):+.2f}%",
                f"{100 * (low - 1):+.2f} to {100 * (high - 1):+.2f}%",
            ]
        else:
            cells += ["", "", ""]
        cells += [f"{sum(c)}/{len(c)}" for c in result.correct.values()]
        out.add_row(*cells)
    return out


def parse_policy(text: str) -> Policy:
    """A policy from "name" or "name:option=value,option=value", such as "attention:ratio=4"."""
    name, _, options = text.partition(":")
    values: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        number = float(value)
        values[key] = int(number) if number.is_integer() and key not in ("ratio", "coverage", "slack") else number
    return policies.from_dict({"name": name, **values})


def main(argv: list[str] | None = None) -> None:
    """Command line of the quality benchmark."""
    parser = argparse.ArgumentParser(prog="python -m kvpleat.bench.quality", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["full", "attention:ratio=2.6", "window:ratio=2.6", "attention:ratio=4", "window:ratio=4"],
        help="name or name:option=value,...; the first is what the others are measured against",
    )
    parser.add_argument("--data", type=Path, required=True, help="JSONL (.xz, .gz) with the keys source and text")
    parser.add_argument("--prompt", type=int, default=3840, help="tokens of a continuation's prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a continuation")
    parser.add_argument("--windows", type=int, default=16, help="continuations")
    parser.add_argument("--pass-keys", type=int, default=16, help="pass-key prompts of each length")
    parser.add_argument("--pass-key-lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--pass-key-sources", nargs="+", default=None, help="sources of the text that hides pass keys")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=None, help="write all figures here as JSON")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    loaded = load(args.model, dtype=args.dtype, device=args.device)
    with Progress(console=console) as progress:
        results = run(loaded, list(map(parse_policy, args.policies)), args, progress)
    Console(file=sys.stdout, width=140).print(table(results))
    if args.out is not None:
        figures = {"arguments": {k: str(v) for k, v in vars(args).items()}, "results": [asdict(r) for r in results]}
        args.out.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
