"""Chat messages as tokens: the template that a model was trained with, rendered in a bounded child, and who says what.

A template may show earlier turns otherwise than it showed them when they were new (reasoning left out, a system prompt
moved), so turns are not found by rendering ever longer conversations. A message's place is where the whole conversation
changes when its content is replaced.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lfjax.bounded import Breach, Child
from lfjax.bounded_child import HIDDEN, MARKS
from lfjax.config import InputError

Messages = Sequence[dict[str, Any]]

_OPEN, _CLOSE = MARKS
_NO_CHARACTERS = re.compile(f"[{HIDDEN}{_OPEN}{_CLOSE}]")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # what a message's reasoning is called
_CHILD = Child()


class Turn(NamedTuple):
    """An assistant's turn in a rendered conversation, as places in its text: start <= shown <= end <= stop.

    [start, stop) is what the model writes: what the template puts before the content after the generation prompt, the
    content from `shown` to `end`, and the token that ends the turn.
    """

    start: int
    shown: int
    end: int
    stop: int


class _Wanted(NamedTuple):
    """A rendering of a conversation's first `count` messages."""

    count: int
    generation: bool = False  # with what comes before the assistant's next turn
    hidden: int | None = None  # the message whose content is replaced by HIDDEN
    marks: bool = False  # around what the template marks with {% generation %}


def prompt_ids(tokenizer, messages: Messages) -> list[int]:
    """The ids of a conversation that the assistant is to go on with; a BOS comes from the template itself.

    Raises:
      InputError: the template cannot be read, refuses these messages, or takes more than 2 s or 1 GB; names its file.
    """
    return tokenizer.encode_markup(render(tokenizer, messages, generation=True), first=True) or [tokenizer.bos_id]


def response_ids(tokenizer, messages: Messages, text: str) -> list[int]:
    """The ids of the assistant's answer to `messages`: what the template writes of the whole conversation behind the
    generation prompt, to the first end token behind the content; EOS, where the template writes none.

    They are encoded apart from the prompt, so that training sees the ids that sampling makes.

    Raises:
      InputError: as `prompt_ids`; the whole conversation does not begin with the prompt of sampling, lacks a part of
        the answer, or has an end token before it.
    """
    answered, count = [*messages, {"role": "assistant", "content": text}], len(messages)
    wanted = [_Wanted(count, generation=True), _Wanted(count + 1), _Wanted(count + 1, hidden=count)]
    prompt, whole, other = map(_text, _render(tokenizer, answered, wanted))
    where = tokenizer.template[1]
    if not whole.startswith(prompt):
        common = _common(whole, prompt)
        raise InputError(
            f"{where}: the chat template's generation prompt ends in {prompt[common:][:60]!r}, where this"
            f" answer begins with {whole[common:][:60]!r}; give the model a template (chat_template.jinja) whose"
            " generation prompt begins what it writes of an answer, or leave the record out"
        )
    shown = max(_common(whole, other), len(prompt))
    end = len(whole) - _common(whole[shown:][::-1], other[shown:][::-1])
    if not (_shows(whole[len(prompt) :], text) or _shows(whole[_common(whole, _plain(tokenizer, messages)) :], text)):
        raise InputError(
            f"{where}: the chat template leaves out a part of the answer {text[:60]!r}; take that part out of the"
            " record, or give the model a template (chat_template.jinja) that shows it"
        )
    ends = _ends(tokenizer)
    places = [(place, -len(token), token) for token in ends if (place := whole.find(token, end)) >= 0]
    stop = min(places)[0] + len(min(places)[2]) if places else max(end, len(whole.rstrip()))
    ids = _turn_ids(tokenizer, whole, Turn(len(prompt), shown, end, stop))
    ids = ids if places else [*ids, end_id(tokenizer)]
    if any(i in ends.values() for i in ids[:-1]):
        raise InputError(
            f"{where}: the chat template writes {tokenizer.pieces([next(i for i in ids if i in ends.values())])[0]!r},"
            " at which sampling ends, before the answer; give the model a template (chat_template.jinja) without it"
        )
    return ids


def encode(tokenizer, messages: Messages) -> tuple[list[int], list[bool]]:
    """A whole conversation: (ids, mask), the mask True for every token that an assistant wrote, end tokens included.

    The stretches between changes of the mask are encoded apart.
    """
    text, found = turns(tokenizer, messages)
    ids: list[int] = []
    mask: list[bool] = []
    place = 0
    for turn in found:
        before = tokenizer.encode_markup(text[place : turn.start], first=place == 0)
        said = _turn_ids(tokenizer, text, turn)
        ids, mask, place = ids + before + said, mask + [False] * len(before) + [True] * len(said), turn.stop
    rest = tokenizer.encode_markup(text[place:], first=place == 0)
    return ids + rest, mask + [False] * len(rest)


@functools.cache
def end_id(tokenizer) -> int:
    """The token that ends an assistant's turn: the first special one that the template writes behind it, else EOS."""
    if tokenizer.template is None:
        return tokenizer.eos_id
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    try:
        (text,) = _render(tokenizer, talk, [_Wanted(2, hidden=1)])
    except InputError:  # it will say so again, on the real messages
        return tokenizer.eos_id
    after = text.rpartition(HIDDEN)[2] if isinstance(text, str) and HIDDEN in text else ""
    places = {after.find(token): i for token, i in sorted(tokenizer.specials.items(), key=lambda item: len(item[0]))}
    return next((places[place] for place in sorted(places) if place >= 0), tokenizer.eos_id)


def render(tokenizer, messages: Messages, *, generation: bool = False) -> str:
    """The conversation as text; `generation` adds what comes before the assistant's next turn.

    What the template is told is what transformers tells it, but for the date, which is fixed.
    """
    return _text(_render(tokenizer, messages, [_Wanted(len(messages), generation)])[0])


def turns(tokenizer, messages: Messages) -> tuple[str, list[Turn]]:
    """(the conversation as text, where it shows the assistant's turns); a turn that is not shown is left out."""
    if "endgeneration" in tokenizer.template[0]:
        marked = _text(_render(tokenizer, messages, [_Wanted(len(messages), marks=True)])[0])
        if _OPEN in marked:
            return marked.replace(_OPEN, "").replace(_CLOSE, ""), _marked_turns(marked)
    wanted = [_Wanted(len(messages))]
    for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
        wanted += [_Wanted(len(messages), hidden=index), _Wanted(index, generation=True), _Wanted(index)]
    whole, *others = _render(tokenizer, messages, wanted)
    text = _text(whole)
    ends = sorted(_ends(tokenizer), key=len, reverse=True)
    found: list[Turn] = []
    for other, prompt, plain in zip(*[iter(others)] * 3, strict=True):
        after = found[-1].stop if found else 0
        other = _text(other)
        if other == text:
            continue
        shown = _common(text, other)
        end = len(text) - _common(text[shown:][::-1], other[shown:][::-1])
        if isinstance(prompt, InputError) or isinstance(plain, InputError):  # it may refuse a part of a conversation
            prompt = plain = ""
        start = _start(prompt, plain, text, after, shown)
        behind = len(text) - len(text[end:].lstrip())
        token = next((token for token in ends if text.startswith(token, behind)), None)
        found.append(Turn(start, shown, end, end if token is None else behind + len(token)))
    return text, found


def _common(a: str, b: str) -> int:
    """How many characters both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _shows(shown: str, said: str) -> bool:
    """Whether every character of `said` stands in `shown`, in their order; white space aside."""
    shown, said = "".join(shown.split()), "".join(said.split())
    rest = iter(shown)
    return said in shown or all(character in rest for character in said)


def _plain(tokenizer, messages: Messages) -> str:
    """The conversation without a generation prompt; "" where the template refuses that."""
    (found,) = _render(tokenizer, messages, [_Wanted(len(messages))])
    return found if isinstance(found, str) else ""


def _start(prompt: str, plain: str, text: str, after: int, shown: int) -> int:
    """Where a turn that shows its content at `shown` begins: behind the generation prompt, not ahead of `after`."""
    if prompt and text.startswith(prompt) and after <= len(prompt) <= shown:
        return len(prompt)
    header = prompt.removeprefix(plain)
    place = text.rfind(header, after, shown) if header.strip() and header != prompt else -1
    if place >= 0:
        return place + len(header)
    return shown - 1 if shown > after and text[shown - 1] == " " else shown  # a space belongs to the word behind it


def _marked_turns(marked: str) -> list[Turn]:
    """The stretches that the template marks itself; all of one is the template's, as its author says who writes it."""
    pieces = marked.split(_OPEN)
    found, place = [], len(pieces[0])
    for piece in pieces[1:]:
        said, _, rest = piece.partition(_CLOSE)
        found.append(Turn(place, *[place + len(said)] * 3))
        place += len(said) + len(rest)
    return found


def _turn_ids(tokenizer, text: str, turn: Turn) -> list[int]:
    """What the assistant said: markup in it is text, that of the template around it is meant.

    The content is encoded together with what stands between it and the special tokens at its sides.
    """
    before, after = text[turn.start : turn.shown], text[turn.end : turn.stop]
    left = max((before.rfind(token) + len(token) for token in tokenizer.specials if token in before), default=0)
    right = min((after.find(token) for token in tokenizer.specials if token in after), default=len(after))
    said = tokenizer.encode(before[left:] + text[turn.shown : turn.end] + after[:right])
    marked = (tokenizer.encode_markup(part) if part else [] for part in (before[:left], after[right:]))
    return [*next(marked), *said, *next(marked)]


@functools.cache
def _ends(tokenizer) -> dict[str, int]:
    """The tokens that may end a turn, with their ids."""
    ids = {end_id(tokenizer), *tokenizer.eos_ids}
    return {token: i for token, i in tokenizer.specials.items() if i in ids}


def _text(rendering: str | InputError) -> str:
    if isinstance(rendering, InputError):
        raise rendering
    return rendering


def _render(tokenizer, messages: Messages, wanted: Sequence[_Wanted]) -> list[str | InputError]:
    """Renderings of one conversation, each a text, or why the template refuses it."""
    given = []
    for message in messages:
        fields = {name: value for name, value in message.items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING if name in fields), None)
        given.append(fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning})
    return _ask(tokenizer.template, json.dumps(given, ensure_ascii=False), json.dumps(tokenizer.names), tuple(wanted))


@functools.lru_cache(maxsize=8)  # the answers to one prompt follow each other
def _ask(template: tuple[str, str], messages: str, names: str, wanted: tuple[_Wanted, ...]) -> list[str | InputError]:
    source, where = template
    if found := _NO_CHARACTERS.search(messages):
        raise InputError(f"{where}: a message holds U+{ord(found[0]):04X}, which is no character; take it out")
    values = {"tools": None, "documents": None, **json.loads(names)}
    request = {"template": source, "messages": json.loads(messages), "values": values, "wanted": wanted}
    try:
        answer = _CHILD.ask(request)
    except Breach as breach:
        raise InputError(f"{where}: the chat template {breach}; simplify it, or shorten the conversation") from None
    if "syntax" in answer:
        line, message = answer["syntax"]
        place = f"line {line} of the chat template" if line else "the chat template cannot be read"
        raise InputError(f"{where}: {place}: {message}; mend it")
    failed = f"{where}: the chat template fails: "
    return [one["text"] if "text" in one else InputError(failed + one["error"]) for one in answer["texts"]]
