"""How statements and questions of recall tasks are written into a row: as plain text, or as a chat of several turns."""

from dataclasses import dataclass
from typing import Any, Protocol

from kvpleat.retrofit.data_kinds import Ask
from kvpleat.retrofit.data_words import Draw

# {q} question, {l} lead, {a} answer, {e} end of the lead's sentence
FRAMES = (
    "{q}\n{a}\n",
    "Q: {q}\nA: {a}\n",
    "Question: {q}\nAnswer: {a}\n",
    "{q} Answer: {a}\n",
    '{q}\n"{a}"\n',
    "{l} {a}{e}\n",
    "{l} {a}{e}\n",
    "{q} {l} {a}{e}\n",
    "{q}\n- {a}\n",
    "> {q}\n{a}\n",
    "{q} [{a}]\n",
    "**{q}** {a}\n",
    "Quiz: {q} Solution: {a}\n",
    '{l} "{a}"{e}\n',
    "{q} -> {a}\n",
    "{q}\n\n{l} {a}{e}\n",
    "<ask>{q}</ask><reply>{a}</reply>\n",
)
SEAMS = (("\n\n", "\n\n"), ("\n\n", "\n\n"), ("\n", "\n"), (" ", " "))
OPENINGS = (
    "Keep the details of what follows in mind: some of them are asked for at the end.\n\n",
    "You will be tested on small facts that stand between these paragraphs.\n\n",
    "A long read. Names, numbers and remarks in it matter later on.\n\n",
    "Instructions: read everything, then reply to the queries.\n\n",
    "Various notes and excerpts, with an examination afterwards:\n\n",
)
CLOSINGS = (
    "",
    "",
    "\n\nEnd of the excerpts.",
    "\n\n---",
    "\n\nNow from memory:",
    "\n\n# Queries",
    "\n\nWhat was that again?",
)
ACKNOWLEDGED = (
    "Noted.",
    "Got it.",
    "Thank you, I will remember that.",
    "Okay, go on.",
    "I have read it.",
    "Understood.",
    "Thanks. What next?",
)
REQUESTS = (
    "Here is something to read:\n\n",
    "Let me paste a few pages.\n\n",
    "I will send you my notes, keep them.\n\n",
    "",
    "",
    "Read along with me, I will come back to this.\n\n",
)
SPEAKERS = (
    ("User: ", "Assistant: "),
    ("Human: ", "AI: "),
    ("A: ", "B: "),
    ("Customer: ", "Agent: "),
    ("Me - ", "You - "),
    ("<visitor> ", "<clerk> "),
    ("## Student\n", "## Teacher\n"),
)


class Frame(Protocol):
    """A way to write a row."""

    opening: str
    closing: str  # between the last of the text and the questions at the end

    def state(self, draw: Draw, statement: str) -> str:
        """A statement between other text."""

    def ask(self, draw: Draw, ask: Ask, last: bool) -> tuple[str, str]:
        """What stands before and after an answer; last: among the questions at the end, no text before it."""


class Plain:
    """Plain text. All questions of a row have one form, or each its own."""

    def __init__(self, draw: Draw) -> None:
        self.opening = draw.pick(OPENINGS) if draw.chance(0.3) else ""
        self.closing = draw.pick(CLOSINGS)
        self._forms = draw.some(FRAMES, 1) if draw.chance(0.5) else FRAMES
        self._gap = draw.pick(["", "\n", "\n"])

    def state(self, draw: Draw, statement: str) -> str:
        before, after = draw.pick(SEAMS)
        return before + statement + after

    def ask(self, draw: Draw, ask: Ask, last: bool) -> tuple[str, str]:
        before, _, after = draw.pick(self._forms).partition("{a}")
        before, after = (part.format(q=ask.question, l=ask.lead, e=ask.end) for part in (before, after))
        return (self._gap if last else "\n\n") + before, after


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around messages.

    Args:
        opening: before the first message, the user's.
        reply: between a message of the user and the assistant's.
        next: between a message of the assistant and the user's.
    """

    opening: str
    reply: str
    next: str


class Chat:
    """A chat: the user shows texts and states facts, the assistant acknowledges, and later on answers."""

    def __init__(self, draw: Draw, turns: Turns) -> None:
        self.opening = turns.opening + draw.pick(REQUESTS)
        self.closing = turns.reply + draw.pick(ACKNOWLEDGED) + turns.next
        self._turns = turns
        self._sentences = draw.chance(0.5)

    def state(self, draw: Draw, statement: str) -> str:
        text = draw.pick(["\n\n", "\n", " "]) + statement
        return text + (self._acknowledge(draw) if draw.chance(0.4) else draw.pick(["\n\n", "\n", " "]))

    def ask(self, draw: Draw, ask: Ask, last: bool) -> tuple[str, str]:
        before = ("" if last else self._acknowledge(draw)) + ask.question + self._turns.reply
        if self._sentences:
            return f"{before}{ask.lead} ", ask.end + self._turns.next
        return before, self._turns.next

    def _acknowledge(self, draw: Draw) -> str:
        return self._turns.reply + draw.pick(ACKNOWLEDGED) + self._turns.next


def transcript(draw: Draw) -> Turns:
    """A chat as people write it down."""
    user, assistant = draw.pick(SPEAKERS)
    gap = draw.pick(["\n", "\n\n"])
    return Turns(user, gap + assistant, gap + user)


def chat_turns(tokenizer: Any) -> Turns | None:
    """What the tokenizer's chat template puts around messages; None where it has none, or changes what it is given."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    marks = [f"kvpleat{i}mark" for i in range(4)]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rest, parts = tokenizer.apply_chat_template(messages, tokenize=False), []
    for mark in marks:
        part, found, rest = rest.partition(mark)
        if not found:
            return None
        parts.append(part)
    opening, first_reply, following, reply = parts
    return Turns(opening, reply, following) if first_reply == reply else None
