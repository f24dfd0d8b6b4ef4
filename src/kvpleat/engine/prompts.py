"""What a user gives as prompts, as text and tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvpleat.errors import OptionError

Prompt = str | Sequence[int] | Mapping[str, Any]  # text, tokens, {"prompt": text} or {"prompt_token_ids": tokens}
Message = Mapping[str, Any]  # {"role": ..., "content": ...}


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of them."""
    if isinstance(prompts, str | Mapping) or _tokens(prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[Message]]:
    """One conversation or several, as a list of them."""
    if all(isinstance(message, Mapping) for message in messages):
        return [list(messages)] if messages else []  # type: ignore[arg-type]
    return [list(each) for each in messages]  # type: ignore[arg-type]


def read(prompt: Prompt, tokenizer: Any, special: bool = True) -> tuple[str | None, tuple[int, ...]]:
    """Text (None where tokens were given) and tokens of a prompt.

    Args:
        prompt: see `Prompt`.
        tokenizer: of transformers, or None.
        special: whether the tokenizer adds the tokens that it puts around a text.

    Raises:
        OptionError: it is none of these, or text without a tokenizer.
    """
    given: Any = prompt
    if isinstance(prompt, Mapping):
        keys = [key for key in prompt if prompt[key] is not None]
        if keys not in (["prompt"], ["prompt_token_ids"]):
            raise OptionError(
                f"A prompt with {sorted(map(str, keys))}: it has either 'prompt' (text) or 'prompt_token_ids', and "
                "nothing else is understood. Pass one of the two."
            )
        given = prompt[keys[0]]
    if isinstance(given, str):
        if tokenizer is None:
            raise OptionError(
                "There is no tokenizer, so a text cannot become tokens. Pass tokenizer= to the engine, or pass tokens."
            )
        return given, tuple(tokenizer(given, add_special_tokens=special, verbose=False)["input_ids"])
    if _tokens(given) or given == []:
        return None, tuple(given)
    raise OptionError(f"The prompt {given!r} is neither text nor a list of tokens. Pass one of the two.")


def render(messages: Sequence[Message], tokenizer: Any, options: Mapping[str, Any]) -> str:
    """A conversation as text, in the model's chat template.

    Args:
        messages: of the conversation.
        tokenizer: of transformers, or None.
        options: of `apply_chat_template`.

    Raises:
        OptionError: there is no template, or it does not take these messages.
    """
    if tokenizer is None or not (options.get("chat_template") or tokenizer.chat_template):
        lacking = "There is no tokenizer" if tokenizer is None else "The tokenizer has no chat template"
        raise OptionError(
            f"{lacking}, so messages cannot become a prompt. Pass tokenizer= to the engine or chat_template= here, or "
            "use generate() with a text."
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except Exception as error:  # templates are programs of their own, and raise what they like
        raise OptionError(
            f"The chat template does not take these messages: {type(error).__name__}: {error}. Check their roles and "
            "contents."
        ) from error


def _tokens(given: Any) -> bool:
    """Whether it is a list of tokens, of one at least."""
    listed = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    return listed and all(isinstance(x, int) and not isinstance(x, bool) for x in given)
