"""What cannot work is refused by the right error, which names the remedy; model, caches and files stay as they were."""

import contextlib
import gc
import json
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GenerationConfig, OPTConfig, OPTForCausalLM

from kvpleat import attach, compress
from kvpleat.cache import snapshot
from kvpleat.errors import (
    AttachError,
    CacheError,
    CacheFileError,
    KvpleatError,
    NumericsError,
    OptionError,
    OutOfPagesError,
    UnsupportedError,
)
from kvpleat.hf.cache import PleatedCache
from kvpleat.policies import AttentionScore, Full, Policy, Window, from_dict
from tests import models

POLICIES = (Full(), Window(budget=40), AttentionScore(ratio=2.0))
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def model() -> Any:
    return models.tiny("llama")


def step(model: Any, ids: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        return model(ids, **models.given(cache), **kwargs).logits


def generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **GREEDY, **kwargs})


def goes_on(model: Any, cache: PleatedCache, fed: int = 30) -> None:
    """The cache, which has seen models.prompt(fed), still gives what a fresh one gives."""
    more = models.prompt(5, seed=9)
    fresh = cache.pleated.new_cache()
    step(model, models.prompt(fed), fresh)
    torch.testing.assert_close(step(model, more, cache), step(model, more, fresh), atol=1e-6, rtol=0)


# ---- prompts


def test_empty_prompt(model: Any) -> None:
    """No tokens: refused by generate, prefill and the model, before anything is attended."""
    empty = torch.zeros(1, 0, dtype=torch.long)
    with compress(model, Full()) as pleated:
        for use in (
            lambda: model.generate(empty, **GREEDY),
            lambda: model.generate(input_ids=empty, attention_mask=empty, **GREEDY),
            lambda: pleated.prefill(empty, cache=pleated.new_cache()),
            lambda: step(model, empty),
        ):
            with pytest.raises(OptionError, match="at least one token"):
                use()


def test_a_row_of_padding_only(model: Any) -> None:
    """A batch in which one prompt is all padding."""
    ids, mask = models.prompt(6, rows=2), torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    with compress(model, Full()), pytest.raises(OptionError, match="at least one token a row"):
        generate(model, ids, attention_mask=mask)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_prompt_past_the_positions(family: str) -> None:
    """More tokens than the model has positions: refused in generate, by the model, and step by step at the edge."""
    model, limit = models.tiny(family), models.MAX_POSITIONS
    with compress(model, Window(budget=40)) as pleated:
        with pytest.raises(OptionError, match=f"{limit + 1}.*{limit}.*Shorten the prompt"):
            step(model, models.prompt(limit + 1))
        with pytest.raises(OptionError, match=f"{limit}.*Shorten the prompt or max_new_tokens"):
            generate(model, models.prompt(limit), max_new_tokens=2)
        assert generate(model, models.prompt(limit), max_new_tokens=1).shape[1] == limit + 1
        cache = pleated.new_cache()
        step(model, models.prompt(limit), cache)
        with pytest.raises(OptionError, match="Shorten the prompt"):
            step(model, models.prompt(1), cache)
        assert cache.report().seen_tokens == limit


def test_padding_does_not_count_as_positions(model: Any) -> None:
    """A left-padded batch may be wider than the model's positions, as long as no row has more tokens."""
    wide = models.MAX_POSITIONS + 20
    ids, mask = models.prompt(wide), torch.ones(1, wide, dtype=torch.long)
    mask[:, :40] = 0
    with compress(model, Window(budget=40)):
        assert generate(model, ids, attention_mask=mask).shape[1] == wide + 4


REFUSALS: dict[str, Callable[[Any, Any], Any]] = {
    "too long": lambda model, cache: step(model, models.prompt(models.MAX_POSITIONS), cache),
    "empty": lambda model, cache: step(model, torch.zeros(1, 0, dtype=torch.long), cache),
    "batch size": lambda model, cache: step(model, models.prompt(3, rows=2), cache),
    "mask": lambda model, cache: step(model, models.prompt(3), cache, attention_mask=torch.ones(1, 1, 3, 33)),
    "packed": lambda model, cache: step(model, models.prompt(3), cache, position_ids=torch.tensor([[30, 31, 0]])),
    "gradients": lambda model, cache: model(models.prompt(3), **models.given(cache)),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_refused_call_leaves_the_cache_as_it_was(family: str, refusal: str) -> None:
    """After each refusal the same cache goes on: nothing was appended."""
    model = models.tiny(family)
    with compress(model, Window(budget=40)) as pleated:
        cache = pleated.new_cache()
        step(model, models.prompt(30), cache)
        with pytest.raises(KvpleatError):
            REFUSALS[refusal](model, cache)
        goes_on(model, cache)


def test_a_prompt_declared_to_end_in_the_past(model: Any) -> None:
    """expect_prompt behind what was seen, and a call across the declared end."""
    with compress(model, AttentionScore(ratio=2.0)) as pleated:
        cache = pleated.new_cache()
        step(model, models.prompt(30), cache)
        with pytest.raises(OptionError, match="at least one new token"):
            cache.expect_prompt(30)
        cache.expect_prompt(40)
        with pytest.raises(OptionError, match="Cut the call there"):
            step(model, models.prompt(20), cache)
        with pytest.raises(OptionError, match="chunk_size=0"):
            pleated.prefill(models.prompt(5), cache=cache, chunk_size=0)


# ---- options


@pytest.mark.parametrize("policy", [Window, AttentionScore])
@pytest.mark.parametrize(("ratio", "meant"), [(0.5, "ratio=2"), (0.75, "ratio=4"), (0.0, "ratio=1")])
def test_ratio_below_one(policy: type[Policy], ratio: float, meant: str) -> None:
    """A fraction removed, as other libraries want it: the message quotes 1/(1-r) and its value."""
    with pytest.raises(OptionError, match=r"1/\(1-r\)") as error:
        policy(ratio=ratio)
    assert meant in str(error.value)
    assert str(ratio) in str(error.value)


@pytest.mark.parametrize("policy", [Window, AttentionScore])
@pytest.mark.parametrize("ratio", [-1.0, 1e9, float("nan"), float("inf")])
def test_absurd_ratio(policy: type[Policy], ratio: float) -> None:
    """Not a ratio at all."""
    with pytest.raises(OptionError, match=r"ratio=.*Pass for example ratio=4\.0"):
        policy(ratio=ratio)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "window"},
        {"name": "window", "ratio": 2.0, "budget": 64},
        {"name": "window", "budget": 10},
        {"name": "window", "ratio": 2.0, "sinks": -1},
        {"name": "window", "ratio": 2.0, "sink": 4},
        {"name": "attention"},
        {"name": "attention", "ratio": 2.0, "coverage": 0.9},
        {"name": "no such policy"},
        {},
    ],
    ids=json.dumps,
)
def test_options_of_policies(options: dict[str, Any]) -> None:
    """Contradictory, missing, unknown and impossible options."""
    with pytest.raises(OptionError):
        from_dict(options)


def test_page_size(model: Any) -> None:
    """Pages of 16 or 32 entries."""
    with pytest.raises(OptionError, match="page_size=24"):
        compress(model, Full(), page_size=24)


def test_a_pool_that_is_too_small(model: Any) -> None:
    """max_pages is a limit: past it the error says what to do, the model comes back, other caches live."""
    with compress(model, Full(), max_pages=20) as pleated:
        first = pleated.new_cache()
        step(model, models.prompt(30), first)
        with pytest.raises(OutOfPagesError, match="compression ratio"):
            step(model, models.prompt(100), pleated.new_cache())
        step(model, models.prompt(2, seed=1), first)


# ---- numbers


def poison(model: Any, where: str) -> None:
    layer = model.model.layers[-1]
    places = {
        "embedding": model.model.embed_tokens.weight,
        "queries": layer.self_attn.q_proj.weight,
        "keys": layer.self_attn.k_proj.weight,
        "values": layer.self_attn.v_proj.weight,
        "output": model.lm_head.weight,
    }
    with torch.no_grad():
        places[where][:] = float("nan")


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("where", ["embedding", "queries", "keys", "values", "output"])
@pytest.mark.parametrize("use", ["generate", "prefill"])
def test_nan_weights(model: Any, policy: Policy, where: str, use: str) -> None:
    """NaN anywhere in the model: generate and prefill say so, instead of handing on noise."""
    poison(model, where)
    with compress(model, policy) as pleated:
        uses = {
            "generate": lambda: generate(model, models.prompt(60)),
            "prefill": lambda: pleated.prefill(models.prompt(60), cache=pleated.new_cache()),
        }
        with pytest.raises(NumericsError, match=r"NaN.*Check the.*weights"):
            uses[use]()


# ---- attach and detach


def state(model: Any) -> dict[str, Any]:
    """Everything that attaching may change."""
    modules = list(model.modules())
    return {
        "implementation": [m.config._attn_implementation for m in modules if hasattr(m, "config")],
        "internal": model.config._attn_implementation_internal,
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs)) for m in modules
        ],
        "generate": model.__dict__.get("generate", "the class's"),
        "attributes": sorted(vars(model)),
        "forward": [m.__dict__.get("forward") for m in modules],
    }


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_detach_restores_the_model(family: str, error: type[BaseException] | None) -> None:
    """After the block, by whatever way it was left, the model is as it was, and computes what it computed."""
    model, ids = models.tiny(family), models.prompt(40)
    before, logits = state(model), step(model, ids)
    try:
        with compress(model, Window(budget=40)):
            step(model, ids)
            assert state(model) != before
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert state(model) == before
    assert torch.equal(step(model, ids), logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_detach_restores_the_implementation(implementation: str) -> None:
    """Whichever attention the model came with."""
    model = models.tiny("llama", attn_implementation=implementation)
    with compress(model, Full()):
        assert model.config._attn_implementation == "kvpleat"
    assert model.config._attn_implementation == implementation


def test_detach_restores_a_generate_of_the_users_own(model: Any) -> None:
    """A generate that someone put on this one model object comes back."""
    theirs = model.generate
    model.generate = theirs
    with compress(model, Full()):
        generate(model, models.prompt(5))
    assert model.__dict__.get("generate") is theirs


def test_hooks_of_the_user_stay(model: Any) -> None:
    """Other hooks on the decoder are called, and stay."""
    seen: list[int] = []
    handle = model.model.register_forward_hook(lambda *args: seen.append(1))
    with compress(model, Full()):
        step(model, models.prompt(5))
    step(model, models.prompt(5))
    handle.remove()
    assert len(seen) == 2


def test_two_policies_on_one_model(model: Any) -> None:
    """The second attach is refused, and the first goes on undisturbed."""
    before = state(model)
    with compress(model, Full()) as pleated:
        with pytest.raises(AttachError, match="detach"):
            attach(model, Window(budget=40))
        with pytest.raises(AttachError, match="already has Full"), compress(model, Full()):
            pass
        assert pleated.attached
        generate(model, models.prompt(5))
    assert state(model) == before


def test_nesting_the_same_object(model: Any) -> None:
    """Entering a block again inside itself is refused: the inner exit would take the policy off for the outer one."""
    with compress(model, Full()) as pleated:
        with pytest.raises(AttachError), pleated:
            pass
        assert pleated.attached


def test_attach_and_detach_by_hand(model: Any) -> None:
    """attach and detach in other places than a with block; detach twice; attach again; attach in a with block."""
    before = state(model)
    pleated = attach(model, Full())
    generate(model, models.prompt(5))
    with pytest.raises(AttachError):
        pleated.attach()
    pleated.detach()
    pleated.detach()
    assert state(model) == before
    assert pleated.report().seen_tokens == 8
    pleated.attach()
    assert generate(model, models.prompt(5)).shape == (1, 9)
    pleated.detach()
    with attach(model, Full()) as pleated:
        assert pleated.attached
    assert state(model) == before


def test_use_outside_the_block(model: Any) -> None:
    """After the block: no new caches, no prefill, and old caches say that they were released."""
    with compress(model, Full()) as pleated:
        cache = pleated.new_cache()
        step(model, models.prompt(5), cache)
    for use in (pleated.new_cache, lambda: pleated.prefill(models.prompt(3), cache=cache)):
        with pytest.raises(AttachError, match="with compress"):
            use()
    with compress(model, Full()) as pleated:
        with pytest.raises(CacheError, match="new_cache"):
            step(model, models.prompt(5), cache)
        with pytest.raises(CacheError, match="nothing to report"):
            pleated.report()


def test_two_models_at_once() -> None:
    """Two models, two policies, calls in turns: each computes what it computes alone."""
    one, two = models.tiny("llama", seed=1), models.tiny("llama", seed=2)
    ids = models.prompt(60)
    alone = []
    for model, policy in ((one, Full()), (two, Window(budget=40))):
        with compress(model, policy):
            alone.append([step(model, ids), generate(model, ids)])
    before = state(one), state(two)
    with compress(one, Full()) as first, compress(two, Window(budget=40)) as second:
        caches = first.new_cache(), second.new_cache()
        assert torch.equal(step(one, ids, caches[0]), alone[0][0])
        assert torch.equal(step(two, ids, caches[1]), alone[1][0])
        assert torch.equal(generate(one, ids), alone[0][1])
        assert torch.equal(generate(two, ids), alone[1][1])
        with pytest.raises(CacheError, match="another attachment"):
            step(two, ids, caches[0])
    assert (state(one), state(two)) == before


def test_two_models_of_one_config_object() -> None:
    """Models that share a config share their attention implementation: both come back, or the second is refused."""
    shared = models.config("llama")
    one, two = (models._CLASSES["llama"](shared).eval() for _ in range(2))
    before = one.config._attn_implementation
    expected = step(two, models.prompt(5))
    first = attach(one, Full())
    try:
        second = attach(two, Full())
    except AttachError:
        second = None
    first.detach()
    if second is not None:
        second.detach()
    assert one.config._attn_implementation == before
    assert torch.equal(step(two, models.prompt(5)), expected)


def test_the_other_model_of_one_config_object() -> None:
    """A model that shares its config with one that has a policy runs as before, or says what is wrong."""
    shared = models.config("llama")
    one, two = (models._CLASSES["llama"](shared).eval() for _ in range(2))
    expected = step(two, models.prompt(5))
    with contextlib.suppress(AttachError), compress(one, Full()):
        try:
            assert torch.equal(step(two, models.prompt(5)), expected)
        except AttachError as error:
            assert "copy.deepcopy" in str(error)  # noqa: PT017  # either is fine
    assert torch.equal(step(two, models.prompt(5)), expected)


# ---- interruptions


class Interrupt:
    """Raises in the middle of a forward: before the second layer, the n-th time it is called."""

    def __init__(self, model: Any, error: type[BaseException], call: int) -> None:
        self.error, self.left = error, call
        self.handle = model.model.layers[1].register_forward_pre_hook(self)

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.handle.remove()
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 3])
def test_interrupted_forward(model: Any, error: type[BaseException], call: int) -> None:
    """Ctrl-C in the middle: the cache refuses to go on, a fork from before does, and leaving the block frees all."""
    before = state(model)
    with compress(model, Window(budget=40)) as pleated:
        cache = pleated.new_cache()
        step(model, models.prompt(30), cache)
        twin = cache.fork()
        Interrupt(model, error, call)
        for _ in range(call - 1):
            step(model, models.prompt(1), cache)
        with pytest.raises(error):
            step(model, models.prompt(1), cache)
        for use in (lambda: step(model, models.prompt(1), cache), cache.fork, lambda: cache.save("never written")):
            with pytest.raises(CacheError, match="interrupted"):
                use()
        goes_on(model, twin)
        pool = pleated.pool
    assert pool.in_use == 0
    pool.check_integrity({})
    assert state(model) == before


def test_interrupted_generate(model: Any) -> None:
    """Ctrl-C in generate, given a cache of ours or not; then the next generate works."""
    with compress(model, AttentionScore(ratio=2.0)) as pleated:
        expected = generate(model, models.prompt(60))
        for cache in (None, pleated.new_cache()):
            Interrupt(model, KeyboardInterrupt, 3)
            with pytest.raises(KeyboardInterrupt):
                generate(model, models.prompt(60), **models.given(cache))
            assert torch.equal(generate(model, models.prompt(60)), expected)
        with pytest.raises(CacheError, match="interrupted"):
            generate(model, models.prompt(80), **models.given(cache))


def test_generate_twice_holds_the_memory_of_one(model: Any) -> None:
    """The cache of a generate that is over gives its pages back at once, not when Python's collector comes by."""
    gc.collect()
    gc.disable()
    try:
        with compress(model, Full()) as pleated:
            generate(model, models.prompt(60))
            once = pleated.pool.in_use
            for _ in range(4):
                generate(model, models.prompt(60))
            assert pleated.pool.in_use == once
    finally:
        gc.enable()


def test_inference_mode_and_no_grad_mix(model: Any) -> None:
    """A cache begun under inference_mode goes on under no_grad, and the block can be left."""
    with compress(model, Window(budget=40)) as pleated:
        cache = pleated.new_cache()
        with torch.inference_mode():
            model(models.prompt(30), **models.given(cache))
        goes_on(model, cache)


# ---- what does not go together with a compressed cache


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"num_beams": 2}, "num_beams=1"),
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ({"cache_implementation": "static"}, "leave cache_implementation out"),
        ({"use_cache": False}, "leave use_cache out"),
        ({"custom_generate": "someone/decoding"}, "custom"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_generation_modes(model: Any, options: dict[str, Any], remedy: str) -> None:
    """Decoding that takes tokens back, reorders rows or wants another cache, as arguments and in a config."""
    with compress(model, Full()):
        with pytest.raises(UnsupportedError, match=remedy):
            generate(model, models.prompt(5), **options)
        if "custom_generate" not in options:
            config = GenerationConfig(max_new_tokens=4, **options)
            with pytest.raises(UnsupportedError, match=remedy):
                model.generate(models.prompt(5), generation_config=config)


def test_assisted_generation(model: Any) -> None:
    """An assistant model."""
    with compress(model, Full()), pytest.raises(UnsupportedError, match="assisted generation"):
        generate(model, models.prompt(5), assistant_model=models.tiny("llama", seed=1))


def test_generate_takes_transformers_positional_arguments(model: Any) -> None:
    """Arguments are transformers' own: a generation config may come second, without a name."""
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    with compress(model, Full()):
        assert model.generate(models.prompt(5), config).shape == (1, 9)


@pytest.mark.parametrize("use", ["reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop"])
def test_cache_surgery(model: Any, use: str) -> None:
    """Calls that transformers' other decoding loops make."""
    with compress(model, Full()) as pleated:
        cache = pleated.new_cache()
        step(model, models.prompt(5), cache)
        argument: Any = torch.tensor([0]) if use in ("reorder_cache", "batch_select_indices") else 2
        with pytest.raises(UnsupportedError):
            getattr(cache, use)(argument)


def test_training_mode(model: Any) -> None:
    """Refused at attach, and when it begins later."""
    model.train()
    with pytest.raises(UnsupportedError, match=r"model\.eval\(\)"), compress(model, Full()):
        pass
    assert model.config._attn_implementation != "kvpleat"
    model.eval()
    with compress(model, Full()):
        model.train()
        with pytest.raises(UnsupportedError, match=r"model\.eval\(\)"):
            step(model, models.prompt(5))
        model.eval()
        step(model, models.prompt(5))


def test_gradients(model: Any) -> None:
    """Refused while gradients are on."""
    with compress(model, Full()), pytest.raises(UnsupportedError, match="no_grad"):
        model(models.prompt(5))


def test_dtypes(model: Any) -> None:
    """autocast, and a model that changed its dtype after attaching."""
    model = model.float()
    with compress(model, Full()):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UnsupportedError, match="autocast"):
            step(model, models.prompt(5))
        model.to(torch.bfloat16)
        with pytest.raises(UnsupportedError, match=r"bfloat16.*float32"):
            step(model, models.prompt(5))


def test_packed_sequences(model: Any) -> None:
    """position_ids that start again in the middle of a row."""
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with compress(model, Full()), pytest.raises(UnsupportedError, match="row of its own"):
        step(model, models.prompt(7), position_ids=packed)


def test_wrong_batch_size(model: Any) -> None:
    """A cache of two rows does not take three."""
    with compress(model, Full()) as pleated:
        cache = pleated.new_cache()
        step(model, models.prompt(5, rows=2), cache)
        with pytest.raises(CacheError, match=r"2 rows and 3.*same batch"):
            step(model, models.prompt(1, rows=3), cache)


def test_a_foreign_cache(model: Any) -> None:
    """A DynamicCache that holds tokens; an empty one is replaced."""
    theirs = DynamicCache(config=model.config)
    step(model, models.prompt(5), theirs)
    with compress(model, Full()) as pleated:
        with pytest.raises(UnsupportedError, match=r"new_cache\(\)"):
            step(model, models.prompt(5), theirs)
        with pytest.raises(UnsupportedError, match=r"new_cache\(\)"):
            generate(model, models.prompt(9), **models.given(theirs))
        step(model, models.prompt(5), DynamicCache(config=model.config))
        assert pleated.report().seen_tokens == 5


def test_masks(model: Any) -> None:
    """Masks of four dimensions, or of the wrong length."""
    with compress(model, Full()):
        for mask in (torch.ones(1, 1, 5, 5), torch.ones(1, 4), torch.ones(2, 5)):
            with pytest.raises(UnsupportedError, match=r"expected \(1, 5\)"):
                step(model, models.prompt(5), attention_mask=mask)


def test_families() -> None:
    """A family that is not known is named, with those that are."""
    config = OPTConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=32
    )
    with pytest.raises(UnsupportedError, match=r"'opt'.*gpt2, llama"):
        compress(OPTForCausalLM(config).eval(), Full())
    with pytest.raises(UnsupportedError, match="transformers"):
        compress(torch.nn.Linear(2, 2), Full())


def test_nothing_but_sliding_windows() -> None:
    """Mistral as it first came out: there is nothing to compress."""
    model = models.tiny("mistral", sliding_window=32)
    with pytest.raises(UnsupportedError, match=r"sliding window of 32.*sliding_window=None"):
        compress(model, Full())


# ---- files


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    """A cache of 70 tokens in a file."""
    path = tmp_path / "chat.safetensors"
    with compress(model, Window(budget=40)) as pleated:
        cache = pleated.new_cache()
        step(model, models.prompt(70), cache)
        cache.save(path)
    return path


def load(model: Any, path: Path, policy: Policy | None = None) -> Any:
    """Load and say what it holds."""
    with compress(model, policy or Window(budget=40)) as pleated:
        cache = pleated.load_cache(path)
        assert cache.kv is not None
        return cache.progress(), [t.tolist() for t in snapshot.pack(cache.kv).values()]


def test_disk_full(model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half way leaves the old file as it was, nothing beside it, and the cache usable."""
    before = saved.read_bytes()

    def half(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "save_file", half)
    with compress(model, Window(budget=40)) as pleated:
        cache = pleated.new_cache()
        step(model, models.prompt(30), cache)
        with pytest.raises(CacheFileError, match=r"No space left.*Free [\d,]+ bytes"):
            cache.save(saved)
        assert saved.read_bytes() == before
        assert os.listdir(saved.parent) == [saved.name]
        goes_on(model, cache)


def test_interrupted_save(model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while writing: the old file stays, and nothing beside it."""
    before = saved.read_bytes()

    def half(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot, "save_file", half)
    with compress(model, Window(budget=40)) as pleated:
        cache = pleated.new_cache()
        step(model, models.prompt(30), cache)
        with pytest.raises(KeyboardInterrupt):
            cache.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_disk_full_for_real(tmp_path: Path) -> None:
    """The same with a real limit on the size of files, in a process of its own."""
    code = """
        import os, resource, sys
        from pathlib import Path
        from kvpleat import compress
        from kvpleat.errors import CacheFileError
        from kvpleat.policies import Full
        from tests import models
        from tests.hf.test_bad_input import step

        model, path = models.tiny("llama"), Path(sys.argv[1])
        with compress(model, Full()) as pleated:
            cache = pleated.new_cache()
            step(model, models.prompt(10), cache)
            cache.save(path)
            old = path.read_bytes()
            step(model, models.prompt(400), cache)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            try:
                cache.save(path)
            except CacheFileError as error:
                print(error)
            assert path.read_bytes() == old
            assert os.listdir(path.parent) == [path.name]
            print("intact")
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "chat.safetensors")],
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert done.stdout.strip().endswith("intact")


def test_save_into_no_folder(model: Any, tmp_path: Path) -> None:
    """A folder that does not exist."""
    with compress(model, Full()) as pleated:
        cache = pleated.new_cache()
        step(model, models.prompt(3), cache)
        with pytest.raises(CacheFileError, match="another folder"):
            cache.save(tmp_path / "missing" / "chat.safetensors")
    assert os.listdir(tmp_path) == []


def test_missing_file(model: Any, tmp_path: Path) -> None:
    """No such file, or a folder."""
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CacheFileError, match="missing"):
            load(model, path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_file(model: Any, saved: Path, share: float) -> None:
    """A file cut anywhere."""
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CacheFileError, match="truncated"):
        load(model, saved)


def test_flipped_bits(model: Any, saved: Path) -> None:
    """One bit flipped, anywhere in the file, header or tensors: refused, and never loaded as something else."""
    content, wrong = saved.read_bytes(), []
    truth = load(model, saved)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    places = [*range(0, header, 7), *range(header, len(content), len(content) // 60)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1
        saved.write_bytes(damaged)
        try:
            if load(model, saved) != truth:
                wrong.append(f"byte {place} loaded as something else")
        except CacheFileError:
            pass
        except Exception as error:  # whatever it is, it is not the one that was promised
            wrong.append(f"byte {place} raised {error!r}")
    assert not wrong, f"{len(wrong)} of {len(places)}: " + "; ".join(wrong[:5])


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """The file with its tensors and metadata changed on purpose, and a checksum that fits the tensors."""
    tensors = load_file(path)
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        metadata = json.loads(file.read(size))["__metadata__"]
    change(tensors, metadata)
    if metadata.get("sha256"):
        metadata["sha256"] = snapshot._digest(tensors, metadata.get("header", ""))
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, meta: meta.clear(),
        lambda tensors, meta: meta.update(format="kvpleat-cache-99"),
        lambda tensors, meta: meta.pop("header"),
        lambda tensors, meta: meta.update(header="{}"),
        lambda tensors, meta: meta.update(header="not json"),
        lambda tensors, meta: meta.pop("sha256"),
        lambda tensors, meta: tensors.pop("lengths"),
        lambda tensors, meta: tensors.pop("value"),
        lambda tensors, meta: tensors.update(lengths=tensors["lengths"] + 1),
        lambda tensors, meta: tensors.update(lengths=tensors["lengths"][:, :1].clone()),
        lambda tensors, meta: tensors.update(key=tensors["key"][:, :8].clone()),
        lambda tensors, meta: tensors.update(key=tensors["key"].float()),
        lambda tensors, meta: meta.update(header=meta["header"].replace('"window"', '"policy of tomorrow"')),
    ],
    ids=[
        "no metadata",
        "format of tomorrow",
        "no header",
        "empty header",
        "header is no JSON",
        "no checksum",
        "no lengths",
        "no values",
        "lengths that do not add up",
        "lengths of another shape",
        "keys of another width",
        "keys of another dtype",
        "policy of tomorrow",
    ],
)
def test_foreign_file(model: Any, saved: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """safetensors that are not what save wrote."""
    rewritten(saved, change)
    with pytest.raises(CacheFileError):
        load(model, saved)


def test_file_of_another_kind(model: Any, tmp_path: Path) -> None:
    """Text, and a pickle, which is never opened as one."""
    for content in (b"hello", b"\x80\x04cos\nsystem\n.", b""):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(CacheFileError):
            load(model, path)


@pytest.mark.parametrize(
    "other",
    [
        lambda: models.tiny("llama", seed=1),
        lambda: models.tiny("llama", dtype=torch.float32),
        lambda: models.tiny("llama", num_hidden_layers=4),
        lambda: models.tiny("mistral"),
    ],
    ids=["weights", "dtype", "layers", "family"],
)
def test_file_of_another_model(saved: Path, other: Callable[[], Any]) -> None:
    """Entries of one model mean nothing to another."""
    with pytest.raises(CacheFileError, match="Attach with the same model"):
        load(other(), saved)


def test_file_of_another_policy(model: Any, saved: Path) -> None:
    """Entries kept by one policy are not what another would have kept."""
    for policy in (Window(budget=41), Window(ratio=2.0), Full()):
        with pytest.raises(CacheFileError, match="Attach with the same policy"):
            load(model, saved, policy)


def test_pages_of_another_size_are_no_obstacle(model: Any, saved: Path) -> None:
    """A file holds entries, not pages."""
    with compress(model, Window(budget=40), page_size=32) as pleated:
        cache = pleated.load_cache(saved)
        goes_on(model, cache, 70)
