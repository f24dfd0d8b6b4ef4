"""From files of all formats to tokens: the same documents whatever holds them, kept; bad input is told by its place."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpleat.errors import OptionError
from kvpleat.retrofit import data_store
from kvpleat.retrofit.data import load_tokens
from kvpleat.retrofit.data_store import TokenStore, token_dtype
from tests.bench import byte_model
from tests.retrofit import texts

DOCUMENTS = [
    "The first document.\nIt has two lines.",
    "Ein zweites, with ümlauts, 数字 and an emoji 🙂.",
    "x",
    "A long one. " * 300,
]
END = texts.tokenizer().eos_token_id


def write(folder: Path, form: str, documents: list[str] = DOCUMENTS, field: str = "text") -> Path:
    """Documents in one file of a format, or one file each in a folder."""
    lines = "".join(json.dumps({"source": "a", field: text}, ensure_ascii=False) + "\n" for text in documents)
    path = folder / f"data.{form}"
    if form == "jsonl":
        path.write_text(lines, encoding="utf-8")
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif form == "jsonl.xz":
        path.write_bytes(lzma.compress(lines.encode()))
    elif form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"number": list(range(len(documents))), field: documents}), path)
    else:
        path = folder / f"folder-{form}"
        for i, text in enumerate(documents):
            below = path / str(i)
            below.mkdir(parents=True)
            (below / f"document.{form}").write_text(text, encoding="utf-8")
    return path


def load(*names: str | Path, folder: Path, **options: Any) -> TokenStore:
    """Tokens of sources, kept in a folder of the test."""
    return load_tokens(names, texts.tokenizer(), folder=folder / "kept", **options)


def expected(documents: list[str]) -> list[list[int]]:
    """Tokens of each document by itself, and the end."""
    fast = texts.tokenizer()
    return [[*fast(text, add_special_tokens=False)["input_ids"], END] for text in documents]


def documents(store: TokenStore) -> list[list[int]]:
    return [store.document(i).tolist() for i in range(store.num_documents)]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.xz", "parquet", "txt", "md"])
def test_every_format_holds_the_same(form: str, tmp_path: Path) -> None:
    """The documents, in order, each with its end; a batch of the tokenizer may end anywhere."""
    store = load(write(tmp_path, form), folder=tmp_path)
    assert documents(store) == expected(DOCUMENTS)
    assert store.tokens.dtype == np.uint16
    assert store.num_tokens == sum(map(len, expected(DOCUMENTS)))
    assert store.starts.tolist() == [0, *store.ends[:-1].tolist()]


def test_batches_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents come out the same when every few characters make a batch of the tokenizer."""
    monkeypatch.setattr(data_store, "BATCH_CHARACTERS", 30)
    many = [f"Document {i}. {'word ' * (i % 7)}" for i in range(50)]
    assert documents(load(write(tmp_path, "jsonl", many), folder=tmp_path)) == expected(many)


def test_folders_globs_and_repeats(tmp_path: Path) -> None:
    """A folder stands for all below it, a glob for what it matches, and what is named twice comes once."""
    folder = tmp_path / "texts"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.md").write_text("first")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "deep" / "er" / "c.txt").write_text("third")
    found = documents(load(folder, folder / "b.txt", folder=tmp_path))
    assert found == expected(["first", "second", "third"])
    assert documents(load(f"{folder}/**/*.txt", folder=tmp_path)) == expected(["second", "third"])
    assert documents(load(f"{folder}/*.txt", f"{folder}/a.md", folder=tmp_path)) == expected(["second", "first"])


def test_other_fields_and_empty_texts(tmp_path: Path) -> None:
    """The field can be chosen; blank lines and documents of nothing but spaces are left out."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"body": "one", "text": 3}\n\n{"body": "  \\n"}\n{"body": "two"}\n')
    assert documents(load(path, folder=tmp_path, text_field="body")) == expected(["one", "two"])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """As some editors write it."""
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "text"}\n', encoding="utf-8-sig")
    assert documents(load(tmp_path / "a.txt", tmp_path / "b.jsonl", folder=tmp_path)) == expected(["text", "text"])


def test_documents_begin_as_the_model_expects(tmp_path: Path) -> None:
    """With the token that the tokenizer puts before every text, where it does."""
    path = write(tmp_path, "jsonl", ["ab", "c"])
    with_start, without = byte_model.tokenizer(start=True), byte_model.tokenizer()
    kept = {"folder": tmp_path / "kept"}
    found = documents(load_tokens([path], without, **kept))
    assert [one[-1] for one in found] == [1, 1]
    assert documents(load_tokens([path], with_start, **kept)) == [[0, *one] for one in found]


def test_a_large_vocabulary_takes_four_bytes() -> None:
    """uint16 ends at token 65,535."""

    class Vocabulary:
        def __init__(self, size: int) -> None:
            self.size = size

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(self.size)}

    assert token_dtype(Vocabulary(65_536)) is np.uint16
    assert token_dtype(Vocabulary(65_537)) is np.uint32


def test_tokens_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once; made again when a file, the field or the tokenizer is another one."""
    made: list[Path] = []
    write_store = data_store._write

    def counted(sources: Any, tokenizer: Any, field: str, target: Path, progress: Any) -> None:
        made.append(target)
        write_store(sources, tokenizer, field, target, progress)

    monkeypatch.setattr(data_store, "_write", counted)
    path = write(tmp_path, "jsonl")
    first = documents(load(path, folder=tmp_path))
    texts.tokenizer()(["a", "longer one"], padding=False, truncation=True, max_length=3)
    assert documents(load(path, folder=tmp_path)) == first
    assert len(made) == 1
    path.write_text(json.dumps({"text": "new", "title": "old"}) + "\n")
    assert documents(load(path, folder=tmp_path)) == expected(["new"])
    assert documents(load(path, folder=tmp_path, text_field="title")) == expected(["old"])
    load_tokens([path], byte_model.tokenizer(), folder=tmp_path / "kept")
    load_tokens([path], byte_model.tokenizer(start=True), folder=tmp_path / "kept")
    assert len(set(made)) == 5


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    """The next run starts afresh instead of taking half a store for a whole one."""

    def stop(share: float, documents: int, tokens: int) -> None:
        raise KeyboardInterrupt

    path = write(tmp_path, "jsonl")
    with pytest.raises(KeyboardInterrupt):
        load(path, folder=tmp_path, progress=stop)
    assert [p for p in (tmp_path / "kept").iterdir() if p.suffix != ".lock"] == []
    assert documents(load(path, folder=tmp_path)) == expected(DOCUMENTS)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.xz", "parquet", "txt"])
def test_progress(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share grows to 1; documents and tokens to all of them."""
    monkeypatch.setattr(data_store, "BATCH_CHARACTERS", 50)
    many = [f"Document {i} of some length." for i in range(40)]
    calls: list[tuple[float, int, int]] = []
    store = load(write(tmp_path, form, many), folder=tmp_path, progress=lambda *now: calls.append(now))
    assert len(calls) > 10
    assert calls == sorted(calls)
    assert calls[0][0] > 0
    assert calls[-1] == (1.0, store.num_documents, store.num_tokens)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"line 2: not JSON .*Mend or remove the line"),
        (b'["text"]', r"line 2: a JSON list, where an object with the text is needed"),
        (b'{"body": "x", "id": 3}', r"line 2: there is no field 'text', only 'body', 'id'.*--text-field"),
        (b"{}", r"line 2: there is no field 'text', only none at all"),
        (b'{"text": 7}', r"line 2: 'text' holds int, not a text.*--text-field"),
        (b'{"text": null}', r"line 2: 'text' holds NoneType"),
        (b'{"text": "\xff"}', r"line 2: not JSON .*utf-8"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_lines(line: bytes, message: str, packed: bool, tmp_path: Path) -> None:
    """File and line, what is wrong, what to do."""
    path = tmp_path / ("data.jsonl.gz" if packed else "data.jsonl")
    content = b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n'
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(OptionError, match=f"{path.name}, {message}"):
        load(path, folder=tmp_path)


@pytest.mark.parametrize("form", ["jsonl.gz", "jsonl.xz"])
@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_damaged_archives(form: str, damage: str, tmp_path: Path) -> None:
    """Cut off, changed in the middle, or nothing at all: never half the text."""
    generator = np.random.default_rng(0)
    path = write(tmp_path, form, [str(generator.integers(0, 10**9, 50)) for _ in range(200)])
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    path.write_bytes({"cut": content[: len(content) // 2], "changed": content, "empty": b""}[damage])
    with pytest.raises(OptionError, match=rf"data\.{form}"):
        load(path, folder=tmp_path)


def test_bad_tables(tmp_path: Path) -> None:
    """No Parquet, no such column, no text in it."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(OptionError, match=r"data.parquet cannot be read as Parquet"):
        load(path, folder=tmp_path)
    parquet.write_table(pyarrow.table({"text": ["a", None], "id": [1, 2]}), path)
    with pytest.raises(OptionError, match="row 2: 'text' holds NoneType"):
        load(path, folder=tmp_path)
    with pytest.raises(OptionError, match="there is no field 'body', only 'text', 'id'"):
        load(path, folder=tmp_path, text_field="body")


def test_names_that_stand_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, of another format, without text, not UTF-8: each says what can be passed."""
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "latin.txt").write_bytes(b"\xfcmlaut")
    (tmp_path / "blank.txt").write_text(" \n")
    for name, message in [
        (tmp_path / "nowhere.txt", "nowhere.txt stands for no text"),
        (tmp_path / "*.jsonl", "stands for no text"),
        (tmp_path / "picture.png", "picture.png is of no format that can be read.*parquet"),
        (tmp_path / "latin.txt", "latin.txt cannot be read as text .*Convert it to UTF-8"),
        (tmp_path / "blank.txt", "blank.txt: no document there holds any text"),
        ("datasets:name", "does not name a data set and its split. Write datasets:NAME"),
        ("datasets::train", "does not name a data set"),
    ]:
        with pytest.raises(OptionError, match=message):
            load(name, folder=tmp_path)
    with pytest.raises(OptionError, match="No text to train on was named"):
        load(folder=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(OptionError, match="empty stands for no text"):
        load(empty, folder=tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"without datasets. Install it: pip install 'kvpleat\[retrofit\]'"):
        load("datasets:name:train", folder=tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(OptionError, match=r"without pyarrow. Install it"):
        load(tmp_path / "a.parquet", folder=tmp_path)


def test_data_sets_of_the_library(tmp_path: Path) -> None:
    """A split of a set, of which a part can be asked for."""
    pytest.importorskip("datasets")
    write(tmp_path, "jsonl")
    store = load(f"datasets:{tmp_path}:train", folder=tmp_path)
    assert documents(store) == expected(DOCUMENTS)
    assert documents(load(f"datasets:{tmp_path}:train[1:3]", folder=tmp_path)) == expected(DOCUMENTS[1:3])
    with pytest.raises(OptionError, match="there is no field 'body', only 'source', 'text'"):
        load(f"datasets:{tmp_path}:train", folder=tmp_path, text_field="body")
    with pytest.raises(OptionError, match=r"cannot be loaded .*save the set as JSONL"):
        load(f"datasets:{tmp_path}:nosplit", folder=tmp_path)


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    """Rather than trained on."""
    path = write(tmp_path, "jsonl")
    load(path, folder=tmp_path)
    (tokens,) = (tmp_path / "kept").glob("*/tokens.uint16")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(OptionError, match=r"is damaged: .* Remove the folder"):
        load(path, folder=tmp_path)
    tokens.unlink()
    with pytest.raises(OptionError, match=r"is damaged .*Remove the folder"):
        load(path, folder=tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Says where, and which setting names another one."""
    path = write(tmp_path, "jsonl")
    (tmp_path / "kept").write_text("a file where the folder should be")
    with pytest.raises(OptionError, match=r"could not be written into .*KVPLEAT_CACHE"):
        load(path, folder=tmp_path)
