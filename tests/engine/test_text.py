"""Text as it streams, against decoding all at once, and stop strings against a search of the text, by character."""

import random
from typing import Any

import pytest

from kvpleat.engine.params import SamplingParams
from kvpleat.engine.text import Detokenizer, OutputText
from tests.engine import tokenizers
from tests.engine.tokenizers import encode

TEXTS = [
    "the end then a thin tent.",
    "  two leading spaces,  and  inner ones \n\n and lines\t!",
    "Grüße, naïve café, Ω≈ç√",
    "中文字符串和日本語のテキスト, mixed with latin",
    "emoji: 👩‍👩‍👧‍👦 🏳️‍🌈 🤷🏽‍♀️ and flags 🇩🇪🇫🇷",
    "e\u0301 combining, \u200b zero width, \ufeff mark, \u2028 separator",
    "العربية עברית हिन्दी ไทย",
    "🙂",
    " ",
    "a\ufffdb: a real replacement character inside",
]


@pytest.fixture(params=tokenizers.EACH)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizers.ALL[request.param]()


def whole(tokenizer: Any, prompt: list[int], ids: list[int], skip: bool = True) -> str:
    """What `ids` add to the text of `prompt`, decoded at once."""
    before = tokenizer.decode(prompt, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    after = tokenizer.decode(prompt + ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert after.startswith(before)
    return str(after[len(before) :])


def certain(tokenizer: Any, ids: list[int]) -> list[str]:
    """What is certain after each token. Bytes of a run count only once the whole run is text, in some decoders."""
    texts = [whole(tokenizer, [], ids[:count]).rstrip("\ufffd") for count in range(1, len(ids) + 1)]
    return [max(texts[:count], key=len) for count in range(1, len(ids) + 1)]


def stream(tokenizer: Any, prompt: list[int], ids: list[int], skip: bool = True) -> list[str]:
    """Piece by piece."""
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [detokenizer.add(token) for token in ids]


# ---- characters


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text(tokenizer: Any, text: str) -> None:
    """Of an output after prompts of several lengths; every piece is whole characters."""
    for prompt in ([], encode(tokenizer, "the"), encode(tokenizer, "then the end of a long prompt, then.")):
        ids = encode(tokenizer, text)
        pieces = stream(tokenizer, prompt, ids)
        assert "".join(pieces) == whole(tokenizer, prompt, ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_a_long_output_is_the_same(tokenizer: Any, text: str) -> None:
    """Further than any window: the same words again and again."""
    ids = encode(tokenizer, text) * 15
    assert "".join(stream(tokenizer, encode(tokenizer, "a"), ids)) == whole(tokenizer, encode(tokenizer, "a"), ids)


def test_a_character_comes_with_the_token_that_completes_it(tokenizer: Any) -> None:
    """No later: each piece brings the text to what is certain of all tokens so far."""
    ids = encode(tokenizer, "the 中文 🙂 end é")
    sofar = ""
    for piece, expected in zip(stream(tokenizer, [], ids), certain(tokenizer, ids), strict=True):
        sofar += piece
        assert sofar == expected


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_prompt_may_end_within_a_character(kind: str) -> None:
    """Its rest comes with the output, and a prompt of nothing but such bytes does not spoil what follows."""
    tokenizer = tokenizers.ALL[kind]()
    ids = encode(tokenizer, "中文字符串中文字符串")
    ids = ids[-30:]  # 10 characters of three bytes, without the mark of a leading space
    for cut in range(31):
        pieces = stream(tokenizer, ids[:cut], ids[cut:])
        assert "".join(pieces) == "中文字符串中文字符串"[cut // 3 :]


def test_half_a_character_at_the_end_never_comes() -> None:
    """Where max_tokens cuts one."""
    tokenizer = tokenizers.of_bytes()
    ids = encode(tokenizer, "ab🙂")
    for count in range(2, 6):
        assert "".join(stream(tokenizer, [], ids[:count])) == "ab"
    assert "".join(stream(tokenizer, [], ids)) == "ab🙂"


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("seed", range(8))
def test_bytes_that_are_no_text_come_as_the_decoder_writes_them(kind: str, seed: int) -> None:
    """Random bytes between letters: the same as decoding all at once, as soon as a character follows.

    A decoder that takes a whole run of bytes for none because of one may take back a character that was shown: it
    stands.
    """
    tokenizer = tokenizers.ALL[kind]()
    generator, letters = random.Random(seed), encode(tokenizer, "a")
    every = set(encode(tokenizer, "".join(chr(i) for i in range(0x80, 0x800))))
    loose = sorted(token for token in every if tokenizer.decode([token]) == "\ufffd")
    assert len(loose) > 80
    ids: list[int] = []
    for _ in range(60):
        ids += generator.choices(loose, k=generator.randrange(12))
        ids += letters * generator.randrange(1, 3)
    text, at_once = "".join(stream(tokenizer, letters, ids)), whole(tokenizer, letters, ids)
    if kind == "bytes":
        assert text == at_once
    assert [word == "" for word in text.split("a")] == [word == "" for word in at_once.split("a")]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_bytes_without_end_cost_no_more_and_hide_no_text(kind: str) -> None:
    """A thousand tokens that are no character are given out meanwhile, and the text after them is right."""
    tokenizer = tokenizers.ALL[kind]()
    detokenizer = Detokenizer(tokenizer, [], True)
    continuation = encode(tokenizer, "中")[-2]  # a byte that begins nothing
    pieces = [detokenizer.add(continuation) for _ in range(1000)]
    assert 900 <= len("".join(pieces)) <= 1000
    assert set("".join(pieces)) == {"\ufffd"}
    assert len(detokenizer._ids) <= 70
    after = "".join(detokenizer.add(token) for token in encode(tokenizer, " the end"))
    assert after.endswith("the end")


def test_special_tokens_are_left_out_or_not(tokenizer: Any) -> None:
    """At the start, inside, at the end, many of them."""
    end = tokenizer.eos_token_id
    words = encode(tokenizer, " the end")
    ids = [end, *words, end, end, *words, *[end] * 40, *words, end]
    assert "".join(stream(tokenizer, words, ids)) == whole(tokenizer, words, ids)
    assert "".join(stream(tokenizer, words, ids, skip=False)) == whole(tokenizer, words, ids, skip=False)
    assert tokenizer.eos_token in "".join(stream(tokenizer, words, ids, skip=False))


# ---- stop strings


def reference(text: str, stops: list[str], include: bool, exempt: int = 0) -> tuple[str, str | None]:
    """Text and stop string if the text came character by character; none may end in the first `exempt` ones."""
    for end in range(exempt + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def surely_shown(text: str, stops: list[str]) -> str:
    """Without the longest end that may be the beginning of a stop string."""
    for start in range(len(text) + 1):
        if any(stop != text[start:] and stop.startswith(text[start:]) for stop in stops):
            return text[:start]
    raise AssertionError


STOPS = [
    ["END"],
    ["the end"],
    ["\n\n"],
    ["aab"],
    ["abab", "bab"],
    ["中文", "文"],
    ["🙂"],
    ["a", "b"],
    ["x", "ENDS", "END"],
]
SOURCES = ["xthe endEND", "aaabaab ababab", "中中文字🙂 the\n\n\nend", "ENDSENDEN", "nothing here", "the en the end"]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_stop_strings_are_found_as_if_characters_came_one_by_one(
    tokenizer: Any, stops: list[str], include: bool
) -> None:
    """In every text, one token at a time or several at once: the same text, the same stop string, the same tokens."""
    for source in SOURCES:
        prompt = encode(tokenizer, "a")
        ids = encode(tokenizer, source)
        expected, stop = reference(whole(tokenizer, prompt, ids), stops, include)
        params = SamplingParams(stop=stops, include_stop_str_in_output=include)
        used = set()
        for chunk in (1, 3, len(ids)):
            text, count = OutputText(tokenizer, prompt, params), 0
            for start in range(0, len(ids), chunk):
                count += text.add(ids[start : start + chunk])
                if text.stop is not None:
                    break
            text.finish()
            assert (text.text, text.stop) == (expected, stop), (source, chunk)
            used.add(count)
        assert len(used) == 1, "the tokens that count do not depend on how they came"
        count = used.pop()
        end = len(expected) + (0 if include or stop is None else len(stop))
        assert len(whole(tokenizer, prompt, ids[:count])) >= end
        assert stop is None or len(whole(tokenizer, prompt, ids[: count - 1]).rstrip("\ufffd")) < end


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_exactly_what_may_become_a_stop_string_is_held_back(tokenizer: Any, stops: list[str]) -> None:
    """After every token: all of the certain text but its longest such end; nothing shown is ever taken back."""
    for source in SOURCES:
        ids, text, shown = encode(tokenizer, source), OutputText(tokenizer, [], SamplingParams(stop=stops)), ""
        for token, known in zip(ids, certain(tokenizer, ids), strict=True):
            text.add([token])
            shown += text.take()
            final, stop = reference(known, stops, False)
            assert shown == (surely_shown(known, stops) if stop is None else final)
            assert text.text == shown
            if stop is not None:
                break


def test_the_end_of_the_tokens_releases_what_was_held(tokenizer: Any) -> None:
    """It was no stop string."""
    text = OutputText(tokenizer, [], SamplingParams(stop="END of it"))
    text.add(encode(tokenizer, "the END"))
    assert text.take() == "the "
    text.finish()
    assert text.take() == "END"
    assert text.text == "the END"
    text.finish()
    assert text.text == "the END"


@pytest.mark.parametrize("minimum", [0, 1, 4, 5, 6, 7, 100])
def test_stop_strings_wait_for_min_tokens(minimum: int) -> None:
    """One that ends in the text of the first min_tokens tokens is none; one that ends after them is."""
    tokenizer = tokenizers.of_bytes()
    source = "xxENDENDyEND"
    params = SamplingParams(stop="END", min_tokens=minimum, max_tokens=200)
    for chunk in (1, 5, 12):
        text, ids = OutputText(tokenizer, [], params), encode(tokenizer, source)
        for start in range(0, len(ids), chunk):
            text.add(ids[start : start + chunk])
            if text.stop:
                break
        text.finish()
        assert (text.text, text.stop) == reference(source, ["END"], False, minimum)


def test_random_texts_and_stops() -> None:
    """Two letters, so that beginnings overlap in every way."""
    tokenizer, generator = tokenizers.of_bytes(), random.Random(0)
    for _ in range(300):
        source = "".join(generator.choices("ab", k=generator.randrange(1, 14)))
        stops = [
            "".join(generator.choices("ab", k=generator.randrange(1, 6))) for _ in range(generator.randrange(1, 4))
        ]
        include, minimum = generator.random() < 0.5, generator.choice([0, 0, 3])
        params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=minimum)
        text, ids = OutputText(tokenizer, [], params), encode(tokenizer, source)
        while ids and text.stop is None:
            size = generator.randrange(1, 4)
            text.add(ids[:size])
            ids = ids[size:]
        text.finish()
        assert (text.text, text.stop) == reference(source, stops, include, minimum), (source, stops)


def test_without_detokenisation_there_is_no_text() -> None:
    """And no tokenizer is needed."""
    text = OutputText(None, [1, 2], SamplingParams(detokenize=False))
    assert text.add([3, 4]) == 2
    text.finish()
    assert (text.text, text.take(), text.stop) == ("", "", None)


def test_special_tokens_can_be_stop_strings(tokenizer: Any) -> None:
    """Where they are part of the text."""
    params = SamplingParams(stop=tokenizer.eos_token, skip_special_tokens=False)
    text = OutputText(tokenizer, [], params)
    ids = [*encode(tokenizer, "the end"), tokenizer.eos_token_id, *encode(tokenizer, "then")]
    assert text.add(ids) == len(encode(tokenizer, "the end")) + 1
    assert (text.text, text.stop) == ("the end", tokenizer.eos_token)
