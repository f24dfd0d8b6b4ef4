"""vLLM's own server under vLLM's own benchmark, with and without kvpleat: python -m kvpleat.bench.vllm_serve

One arm a run: `dense` (vLLM as it is), `fp8` (vLLM with an FP8 KV cache) or `kvpleat`; run them beside each other, each
on a GPU of its own. Models have the shapes of known ones and vLLM's dummy weights. Under these, hidden states are
little more than the token's embedding, so a random direction says another thing of each token, and the bias of a gate
sets exactly how many it marks: as many in each head as gates that come with kvpleat were measured to keep. Answers are
drawn at random, so what is fed is as random as prompts are.
"""

import argparse
import asyncio
import contextlib
import io
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from kvpleat.bench.engine_models import profile
from kvpleat.bench.vllm_server import RATIO, Server, metrics, watched
from kvpleat.policies import GateConfig, Gates
from kvpleat.vllm.settings import CONNECTOR, KEY, PREFIX, ROLE

DUMMY = 1e-3  # vLLM draws dummy weights from -DUMMY to DUMMY
WORDS = 30_000  # of the tokenizer: each a number, so that text and tokens are the same thing
POSITIONS = 40_960
SPARE = 64  # tokens above those of a case: vLLM's benchmark draws prompts of about that length
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "rope_theta": 5e5, "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "vocab_size": 32000, "rope_theta": 1e4, "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
}  # fmt: skip
ARMS = ("dense", "fp8", "kvpleat")
KEPT = (
    *("completed", "failed", "duration", "output_throughput", "request_throughput", "mean_ttft_ms", "p50_ttft_ms"),
    *("p99_ttft_ms", "mean_tpot_ms", "p50_tpot_ms", "p99_tpot_ms", "total_output_tokens", "max_output_tokens_per_s"),
    "max_concurrent_requests",
)  # of what vLLM's benchmark says


def write_model(shape: str, folder: Path) -> None:
    """A model without weights: its config, and a tokenizer of numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = {"max_position_embeddings": POSITIONS, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1}
    config["rms_norm_eps"] = 1e-12  # dummy weights are so small that 1e-5 would outweigh what is normalised
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | config))
    # vLLM refuses texts of more characters than that many tokens of the longest word have, spaces not counted.
    special = ("<padding>", "<the end>")  # no numbers: they are found inside of other words too
    numbers = {str(n): n for n in range(len(special), WORDS)}
    words = Tokenizer(models.WordLevel(dict(zip(special, (0, 1), strict=True)) | numbers, unk_token=special[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=special[1], pad_token=special[0]).save_pretrained(folder)


def gates_for_dummy_weights(shape: str, ratio: float, tokens: int) -> Gates:
    """DMS gates that keep, of rows of so many tokens, what `engine_models.profile` says: see above."""
    sizes = SHAPES[shape]
    layers, heads, hidden = (sizes[x] for x in ("num_hidden_layers", "num_key_value_heads", "hidden_size"))
    stays = profile(ratio, tokens, layers, heads)
    keep = stays.keep.mean(0)  # [L, H]
    gates = Gates(
        GateConfig("dms", layers, heads, hidden, stays.delay, sinks=1, scale=1.0, ratio=1 / float(keep.mean()))
    )
    spread = (DUMMY**2 / 3) ** 0.5  # of a weight; a normalised hidden state is multiplied by such
    generator = torch.Generator().manual_seed(0)
    layer: Any
    for layer, share in zip(gates.outer, keep.tolist(), strict=True):
        drawn = torch.randn(heads, hidden, generator=generator)
        layer.weight.data.copy_(drawn / (spread * hidden**0.5))
        normal = NormalDist()
        layer.bias.data.copy_(torch.tensor([-normal.inv_cdf(min(max(x, 1e-4), 1 - 1e-4)) for x in share]))
    return gates.requires_grad_(False)


def command(arm: str, model: Path, shape: str, port: int, length: int, extra: list[str]) -> list[str]:
    """`vllm serve` of one arm."""
    made = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--load-format", "dummy"]
    made += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(length), "--block-size", "16"]
    made += ["--no-enable-prefix-caching", "--dtype", "float32" if shape == "tiny" else "bfloat16"]
    if arm == "fp8":
        made += ["--kv-cache-dtype", "fp8"]
    if arm == "kvpleat":
        name = f"{PREFIX}{SHAPES[shape]['architectures'][0]}"
        override = {"architectures": [name], KEY: {"policy": "dms", "gates": str(model / "gates")}}
        made += ["--hf-overrides", json.dumps(override)]
        made += ["--kv-transfer-config", json.dumps({"kv_connector": CONNECTOR, "kv_role": ROLE})]
    return made + extra


def measure(model: Path, port: int, tokens: int, answer: int, clients: int, seconds: float) -> dict[str, Any]:
    """One run of `vllm bench serve`: as many requests as clients, all at once."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = {
        "backend": "openai", "endpoint": "/v1/completions", "host": "127.0.0.1", "port": port, "model": model,
        "tokenizer": model, "dataset-name": "random", "random-input-len": tokens, "random-output-len": answer,
        "num-prompts": clients, "max-concurrency": clients, "seed": clients, "temperature": 1,
        "ready-check-timeout-sec": 0, "percentile-metrics": "ttft,tpot", "metric-percentiles": "50,99",
    }  # fmt: skip
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    arguments = parser.parse_args([*given, "--ignore-eos", "--disable-tqdm"])
    with contextlib.redirect_stdout(io.StringIO()):
        said = asyncio.run(asyncio.wait_for(main_async(arguments), seconds))
    return {name: said[name] for name in KEPT if name in said}


def cases_of(text: str) -> list[tuple[int, int, int]]:
    """(tokens of a prompt, tokens of an answer, clients) of each case.

    Raises:
        ArgumentTypeError: it is none, or a request is longer than the model has positions.
    """
    cases = []
    for case in text.split(","):
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", case):
            raise argparse.ArgumentTypeError(f"{case!r} is no case. Write PROMPTxANSWERxCLIENTS, such as 8192x256x8.")
        prompt, answer, clients = map(int, case.split("x"))
        if prompt + answer + SPARE > POSITIONS:
            raise argparse.ArgumentTypeError(
                f"{case!r}: prompt and answer may have {POSITIONS - SPARE} tokens together. Ask for fewer."
            )
        cases.append((prompt, answer, clients))
    return cases


def ratio_of(text: str) -> float:
    """Raises ArgumentTypeError for what is no ratio that gates were measured near to."""
    with contextlib.suppress(ValueError):
        if 1 < float(text) <= 16:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no ratio above 1 and up to 16; for ratio 1 take --arm dense.")


def main(argv: list[str] | None = None) -> int:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--ratio", type=ratio_of, default=4.0, help="of kvpleat, for rows of 8,192 tokens (4)")
    parser.add_argument("--cases", type=cases_of, default="8192x256x1,8192x256x8", metavar="PROMPTxANSWERxCLIENTS,...")
    parser.add_argument("--seconds", type=float, default=600.0, help="no case goes on after that (600)")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all figures there, as they are measured")
    parser.add_argument("extra", nargs="*", help="after --: more arguments of `vllm serve`")
    given = parser.parse_args(argv)
    start = time.monotonic()
    length = max(prompt + answer for prompt, answer, _ in given.cases) + SPARE
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / given.shape
        write_model(given.shape, model)
        if given.arm == "kvpleat":
            gates_for_dummy_weights(given.shape, given.ratio, 8192).save_pretrained(model / "gates")
        made = command(given.arm, model, given.shape, given.port, length, given.extra)
        server = Server(made, given.port, Path(folder) / "log.txt")
        try:
            return _run(server, model, given, start)
        finally:
            server.close()


def _run(server: Server, model: Path, given: argparse.Namespace, start: float) -> int:
    def left() -> float:
        return float(start + given.seconds - time.monotonic())

    server.ready(left())
    about = {"shape": given.shape, "arm": given.arm, "ratio": given.ratio if given.arm == "kvpleat" else 1.0}
    about |= {"started_s": round(time.monotonic() - start, 1), "said": server.said()}
    print(json.dumps(about), flush=True)
    measure(model, given.port, 600, 8, 2, left())  # compiles what is compiled at the first request
    records: list[dict[str, Any]] = []
    for prompt, answer, clients in given.cases:
        record: dict[str, Any] = about | {"prompt": prompt, "answer": answer, "clients": clients}
        before = metrics(given.port)
        with watched(given.port) as fullest:
            try:
                record |= measure(model, given.port, prompt, answer, clients, max(1.0, left()))
            except TimeoutError:
                record["cut"] = True
        after, preempted = metrics(given.port), "vllm:num_preemptions_total"
        # vLLM's benchmark takes an answer that broke off, as when a server dies, for one that was short.
        record["missing_tokens"] = answer * clients - record.get("total_output_tokens", 0)
        record |= fullest | {"preempted": after.get(preempted, 0) - before.get(preempted, 0)}
        records.append(record)
        print(line(record), flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(records, indent=1))
        if record.get("cut") or record["failed"] or record["missing_tokens"]:
            print(server.log.read_text(errors="replace")[-2000:])
            return 1
    return 0


def line(record: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{record['arm']:8s} {record['prompt']:6d} + {record['answer']:4d} tokens, {record['clients']:4d} at once"
    if record.get("cut"):
        return f"{head}: out of time"
    return (
        f"{head}: {record['output_throughput']:8.1f} tokens/s, TTFT p50 {record['p50_ttft_ms'] / 1e3:6.2f} s, "
        f"p99 {record['p99_ttft_ms'] / 1e3:6.2f} s, TPOT p50 {record['p50_tpot_ms']:6.2f} ms, "
        f"p99 {record['p99_tpot_ms']:6.2f} ms, {record['duration']:6.1f} s, {record['preempted']:.0f} preempted"
        + (f", ratio {record[RATIO]:.2f}" if RATIO in record else "")
        + (f", {record['failed']} FAILED" if record["failed"] else "")
        + (f", {record['missing_tokens']} tokens of answers MISSING" if record.get("missing_tokens") else "")
    )


if __name__ == "__main__":
    raise SystemExit(main())
