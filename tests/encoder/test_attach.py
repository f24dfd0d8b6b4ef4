"""Attaching EncoderMerge and taking it off; what is refused; training under it; heads and SentenceTransformers."""

from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from kvpleat import attach, compress
from kvpleat.errors import AttachError, CacheError, OptionError, UnsupportedError
from kvpleat.policies import EncoderMerge, Full
from tests import models
from tests.encoder.models import FAMILIES, config, texts, tiny


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_comes_off(family: str) -> None:
    """Hooks, the attention implementation, and the bits of the output, after an error inside too."""
    model = tiny(family).float()
    ids, mask = texts([40, 31])
    before, implementation, count = model(ids, mask).last_hidden_state, model.config._attn_implementation, hooks(model)
    merged = compress(model, EncoderMerge(ratio=2.0))
    with merged:
        assert merged.attached
        assert not torch.equal(model(ids, mask).last_hidden_state, before)
    with merged, pytest.raises(UnsupportedError):
        model(ids, mask, output_attentions=True)
    assert not merged.attached
    assert hooks(model) == count
    assert "forward" not in vars(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids, mask).last_hidden_state, before)


def test_a_forward_of_the_users_own() -> None:
    """Called under the policy with the model's output, and back in its place afterwards."""
    model = tiny("bert")
    ids, seen, own = texts([30])[0], [], model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        seen.append(out.last_hidden_state.shape[1])
        return out

    model.forward = forward
    with compress(model, EncoderMerge(ratio=2.0, floor=4)):
        assert model(ids).last_hidden_state.shape[1] == 30
    assert seen == [15]
    with compress(model, EncoderMerge(ratio=1.0)):
        assert model.forward is forward
    assert model.forward is forward


def test_one_at_a_time() -> None:
    """Neither twice on a model, nor on two models with one config; a `with` block is not entered twice."""
    model, policy = tiny("bert"), EncoderMerge(ratio=2.0)
    other = type(model)(model.config)
    with compress(model, policy) as merged:
        with pytest.raises(AttachError, match="already has"):
            attach(model, policy)
        with pytest.raises(AttachError, match="shares this model's config"):
            attach(other, policy)
        with pytest.raises(AttachError, match="shares its config"):
            other(texts([20])[0])
        with pytest.raises(AttachError, match="open already"):
            merged.__enter__()
    merged.detach()
    assert not merged.attached


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 2.0, "coverage": 0.9},
        {"ratio": 0.5},
        {"coverage": 0.0},
        {"coverage": 1.1},
        {"ratio": 2.0, "what": "values"},
        {"coverage": 0.9, "what": "kv"},
        {"ratio": 2.0, "steps": 0},
        {"ratio": 2.0, "floor": 1},
        {"ratio": 2.0, "distance": -1.0},
        {"ratio": 1.0, "lora": "all-minilm-l6-v2-merge"},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    """What cannot be meant is an error that says so."""
    with pytest.raises(OptionError):
        EncoderMerge(**options)


@pytest.mark.parametrize(("ratio", "layers", "steps"), [(2.6, 6, 1), (3.8, 6, 3), (1.5, 12, 4), (4.0, 2, 5)])
def test_shares_meet_the_ratio(ratio: float, layers: int, steps: int) -> None:
    """The mean share over layers is 1 / ratio, and shares fall by one factor for `steps` layers."""
    shares = EncoderMerge(ratio=ratio, steps=steps).shares(layers)
    assert sum(shares) / layers == pytest.approx(1 / ratio)
    falls = [b / a for a, b in zip([1.0, *shares], shares, strict=False)]
    assert falls == pytest.approx([shares[0]] * min(steps, layers) + [1.0] * max(0, layers - steps))


def test_the_wrong_model() -> None:
    """A decoder with EncoderMerge, an encoder with a cache's policy, and what is no transformers model."""
    with pytest.raises(UnsupportedError, match="no encoder that kvpleat knows"):
        compress(models.tiny("llama"), EncoderMerge(ratio=2.0))
    with pytest.raises(UnsupportedError, match="EncoderMerge"):
        compress(tiny("bert"), Full())
    with pytest.raises(UnsupportedError, match="no encoder"):
        compress(torch.nn.Linear(2, 2), EncoderMerge(ratio=2.0))
    with pytest.raises(UnsupportedError, match="no encoder"):
        compress(tiny("bert", is_decoder=True), EncoderMerge(ratio=2.0))
    with pytest.raises(OptionError, match="no pages"):
        compress(tiny("bert"), EncoderMerge(ratio=2.0), max_pages=3)  # type: ignore[call-overload]


def test_the_wrong_call() -> None:
    """Attention weights, caches, masks per query and checkpointing: refused by name; the trace needs a call."""
    model = tiny("bert")
    ids, mask = texts([30])
    with compress(model, EncoderMerge(ratio=2.0)) as merged:
        with pytest.raises(CacheError, match="No tokens have merged"):
            _ = merged.trace
        for options, word in (
            ({"output_attentions": True}, "output_attentions"),
            ({"encoder_hidden_states": torch.zeros(1, 3, 32).double()}, "encoder_hidden_states"),
            ({"attention_mask": mask[:, None, None]}, "attention_mask"),
        ):
            with pytest.raises(UnsupportedError, match=word):
                model(input_ids=ids, **options)
        with pytest.raises(ValueError, match="exactly one"):
            model()
        model.train()
        model.gradient_checkpointing = True  # as gradient_checkpointing_enable() does, without its warnings
        with pytest.raises(UnsupportedError, match="checkpointing"):
            model(input_ids=ids)


def test_embeddings_as_input() -> None:
    """inputs_embeds in place of ids: the same where the frame is all that is special."""
    model = tiny("bert")
    ids, mask = texts([30, 22])
    with torch.no_grad(), compress(model, EncoderMerge(ratio=2.0, floor=4)):
        want = model(input_ids=ids, attention_mask=mask).last_hidden_state
        got = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got, want)


def test_low_precision() -> None:
    """bfloat16 stays finite and near float64, with a row of padding alone too."""
    model = tiny("modernbert")
    ids, mask = texts([60, 40, 8])
    mask[2] = 0
    with torch.no_grad(), compress(model, EncoderMerge(ratio=2.0)):
        want = model(input_ids=ids, attention_mask=mask).last_hidden_state
    model.bfloat16()
    with torch.no_grad(), compress(model, EncoderMerge(ratio=2.0)):
        got = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert got.dtype == torch.bfloat16
    assert torch.isfinite(got).all()
    cosine = torch.cosine_similarity(got[:2].double(), want[:2], dim=-1)[mask[:2].bool()]
    assert cosine.median() > 0.99


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_gradients(family: str) -> None:
    """Of the whole encoder under compression: as finite differences say, along a direction in a weight of the layers
    after the merge (a weight before it can change who merges, which no derivative knows)."""
    torch.manual_seed(0)
    model = tiny(family)
    ids, mask = texts([33, 20])
    embedding = model.get_input_embeddings().weight
    weight = next(p for name, p in model.named_parameters() if ".1." in name and p.dim() == 2)
    with compress(model, EncoderMerge(ratio=2.5, floor=4)):

        def loss() -> torch.Tensor:
            return model(input_ids=ids, attention_mask=mask).last_hidden_state.pow(3).mean()

        loss().backward()
        assert embedding.grad.abs().sum() > 0
        direction = torch.randn_like(weight)
        want = float((weight.grad * direction).sum())
        with torch.no_grad():
            values = []
            for step in (1e-6, -2e-6):
                weight += step * direction
                values.append(float(loss()))
        # ModernBERT rotates in float32, which leaves a difference few digits.
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(want, rel=2e-2 if family == "modernbert" else 1e-4)


def test_a_classifier_learns_under_compression() -> None:
    """Head and encoder together, dropout on: the loss falls to a third, and the encoder's weights have moved."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config("bert", num_labels=2)).train()
    ids, mask = texts([40, 28, 35, 40, 22, 31, 38, 26], seed=3)
    labels = torch.tensor([0, 1] * 4)
    ids[labels == 1, 5:9] = 90  # what tells the classes apart
    ids[labels == 0, 5:9] = 20
    start = model.bert.encoder.layer[0].attention.self.value.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with compress(model, EncoderMerge(ratio=2.0, floor=4)) as merged:
        for _ in range(40):
            out = model(input_ids=ids, attention_mask=mask, labels=labels)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(float(out.loss.detach()))
        assert merged.trace.ratio > 1.9
    assert sum(losses[-5:]) / 5 < losses[0] / 3
    assert (model.bert.encoder.layer[0].attention.self.value.weight - start).abs().max() > 1e-3


def test_inside_another_module() -> None:
    """What sentence-transformers does: a module that holds the encoder and pools by the original mask."""

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = tiny("bert")

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            states = self.auto_model.forward(input_ids=ids, attention_mask=mask)[0]  # no hook of this module would run
            weights = mask[..., None].to(states.dtype)
            return (states * weights).sum(1) / weights.sum(1)

    model = Pooled()
    ids, mask = texts([44, 25, 31])
    with torch.no_grad(), compress(model, EncoderMerge(ratio=2.0)):
        together = model(ids, mask)
        for row, length in enumerate((44, 25, 31)):
            alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(together[row], alone[0])
    with pytest.raises(UnsupportedError):
        compress(torch.nn.ModuleList([tiny("bert"), tiny("bert")]), EncoderMerge(ratio=2.0))


def test_in_sentence_transformers(tmp_path: Any) -> None:
    """A SentenceTransformer, whole: embeddings of a text are the same alone and in a batch."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **named).save_pretrained(tmp_path)
    tiny("bert").float().save_pretrained(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    lines = [" ".join(f"w{(i * j) % 60}" for i in range(40)) for j in (3, 7, 11)]
    full = model.encode(lines)
    with compress(model, EncoderMerge(ratio=2.0)) as merged:
        together = model.encode(lines)
        alone = model.encode(lines[1])
        assert merged.trace.ratio > 1.9
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(together[1]), rtol=1e-4, atol=1e-5)
    assert abs(full - together).max() > 1e-4
    assert abs(full - model.encode(lines)).max() < 1e-6
