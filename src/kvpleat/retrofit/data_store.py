"""Texts as tokens: every document of the sources, one after the other in one flat array, made once and kept on disk."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from kvpleat.errors import OptionError
from kvpleat.hf.smollm2 import cache_folder
from kvpleat.retrofit import data_sources
from kvpleat.retrofit.data_sources import Source

VERSION = 1  # of what is written: raise it when that changes
BATCH_CHARACTERS = 2_000_000  # tokenised in one call: enough for all cores, and some 100 MB at most
ENDS, TOKENS = "ends.npy", "tokens"  # the second one's suffix is its dtype

Progress = Callable[[float, int, int], None]


@dataclass(frozen=True)
class TokenStore:
    """Documents as tokens.

    Args:
        tokens: [all tokens] uint16 or uint32, the documents one after the other, each with its end-of-text token.
        ends: [documents] int64, where each ends in `tokens`.
    """

    tokens: NDArray[Any]
    ends: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """[documents] where each begins."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    @property
    def num_documents(self) -> int:
        """How many documents."""
        return len(self.ends)

    @property
    def num_tokens(self) -> int:
        """How many tokens, all documents together."""
        return len(self.tokens)

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of one document."""
        return self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]


def load_tokens(
    names: Sequence[str | Path],
    tokenizer: Any,
    *,
    text_field: str = "text",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """The documents of sources as tokens: read back where they were made before, else made now and kept.

    What was made is found again by the tokenizer and by the files' paths, sizes and times. Safe with several
    processes: one tokenises, the others wait. 125 MB of text take about a minute on two cores.

    Args:
        names: see `data_sources.find`.
        tokenizer: of transformers.
        text_field: the field of JSONL files or the column of tables that holds the text.
        folder: where to keep tokens; None: `tokens` in kvpleat's cache folder.
        progress: called with (share of the bytes read, documents, tokens) now and then.

    Raises:
        OptionError: a source cannot be read, has a bad line, or there is no text in any.
    """
    sources = data_sources.find(names)
    folder = cache_folder() / "tokens" if folder is None else folder
    target = folder / _key(sources, tokenizer, text_field)
    if not target.is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{target.name}.lock"):
                if not target.is_dir():
                    _write(sources, tokenizer, text_field, target, progress)
        except OSError as error:
            raise OptionError(
                f"Tokens could not be written into {folder}: {error}. They need 2 to 4 bytes each; make room, or name "
                "another folder in KVPLEAT_CACHE."
            ) from error
    return _read(target)


def token_dtype(tokenizer: Any) -> Any:
    """uint16 where it holds every token of the vocabulary, else uint32."""
    return np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32


def _write(sources: list[Source], tokenizer: Any, field: str, target: Path, progress: Progress | None) -> None:
    """Write beside the target and rename: so the folder appears complete or not at all."""
    dtype = token_dtype(tokenizer)
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=target.parent))
    ends: list[int] = [0]
    try:
        with (part / f"{TOKENS}.{np.dtype(dtype).name}").open("wb") as file:
            for share, documents in _tokenize(_batches(sources, field), tokenizer):
                for document in documents:
                    file.write(np.asarray(document, dtype).tobytes())
                    ends.append(ends[-1] + len(document))
                if progress is not None:
                    progress(share, len(ends) - 1, ends[-1])
        if len(ends) == 1:
            listed = ", ".join(source.key.split(" ")[0] for source in sources[:3])
            raise OptionError(f"{listed}: no document there holds any text. Pass sources with text to train on.")
        np.save(part / ENDS, np.asarray(ends[1:], np.int64))
        part.chmod(0o755)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _batches(sources: list[Source], field: str) -> Iterator[tuple[float, list[str]]]:
    """(share of all bytes read, texts) in batches of about BATCH_CHARACTERS."""
    total, before, share = sum(source.size for source in sources) or 1, 0, 0.0
    texts: list[str] = []
    characters = 0
    for source in sources:
        for text, part in source.texts(field):
            texts.append(text)
            characters += len(text)
            share = min(1.0, (before + part * source.size) / total)
            if characters >= BATCH_CHARACTERS:
                yield share, texts
                texts, characters = [], 0
        before += source.size
    if texts:
        yield share, texts


def _tokenize(batches: Iterator[tuple[float, list[str]]], tokenizer: Any) -> Iterator[tuple[float, list[list[int]]]]:
    """Each text as the model expects a document: its start (the BOS token, if the tokenizer adds one), text, end."""
    start, end = start_tokens(tokenizer), end_tokens(tokenizer)
    for share, texts in batches:
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield share, [[*start, *document, *end] for document in ids if document]


def start_tokens(tokenizer: Any) -> list[int]:
    """The BOS token where the tokenizer puts it before every text, else nothing."""
    ids: list[int] = tokenizer("", verbose=False)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def end_tokens(tokenizer: Any) -> list[int]:
    """The EOS token, or nothing where the tokenizer has none."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _key(sources: list[Source], tokenizer: Any, field: str) -> str:
    """A name for what these sources become with this tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    state = {name: value for name, value in state.items() if name not in ("truncation", "padding")}  # left by calls
    around = [start_tokens(tokenizer), end_tokens(tokenizer)]
    known = [VERSION, field, [source.key for source in sources], around, state]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _read(folder: Path) -> TokenStore:
    try:
        (file,) = folder.glob(f"{TOKENS}.uint*")
        ends = np.load(folder / ENDS)
        tokens = np.memmap(file, dtype=file.suffix[1:], mode="r")
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{folder} is damaged ({error}). Remove the folder, and the next run makes it again."
        ) from error
    if len(tokens) != ends[-1]:
        raise OptionError(
            f"{folder} is damaged: {len(tokens)} tokens, where its documents have {ends[-1]}. Remove the folder, and "
            "the next run makes it again."
        )
    return TokenStore(tokens, ends)
