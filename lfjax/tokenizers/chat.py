"""Chat messages as tokens: the template that a model was trained with, rendered in a sandbox, and who says what in it.

A template may show earlier turns otherwise than it showed them when they were new (reasoning left out, a system prompt
moved), so turns are not found by rendering ever longer conversations. A message's place is where the whole conversation
changes when its content is replaced.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from lfjax.config import InputError

Messages = Sequence[dict[str, Any]]

_OTHER = "\ufdd0"  # stands in for a message's content; no character, so in no text
_OPEN, _CLOSE = "\ufdd1", "\ufdd2"  # around what a template marks with {% generation %}
_TODAY = datetime.datetime(2024, 7, 26)  # what templates are told: with the real date a resumed run would differ


class Turn(NamedTuple):
    """An assistant's turn in a rendered conversation, as places in its text: start <= shown <= end <= stop.

    [start, stop) is what the model writes: what the template puts before the content after the generation prompt, the
    content from `shown` to `end`, and the token that ends the turn.
    """

    start: int
    shown: int
    end: int
    stop: int


def prompt_ids(tokenizer, messages: Messages) -> list[int]:
    """The ids of a conversation that the assistant is to go on with; a BOS comes from the template itself.

    Raises:
      InputError: the template cannot be read, or refuses these messages; names its file.
    """
    return tokenizer.encode_markup(render(tokenizer, messages, generation=True), first=True) or [tokenizer.bos_id]


def response_ids(tokenizer, messages: Messages, text: str) -> list[int]:
    """The ids of the assistant's answer to `messages`, as the template writes it after the prompt, to its end token.

    They are encoded apart from the prompt, so that training sees the ids that sampling makes.
    """
    answered = [*messages, {"role": "assistant", "content": text}]
    whole = render(tokenizer, answered)
    found = turns(tokenizer, answered, whole)
    ids = _turn_ids(tokenizer, whole, found[-1]) if found else tokenizer.encode(text)
    return ids if ids and ids[-1] in _ends(tokenizer).values() else [*ids, end_id(tokenizer)]


def encode(tokenizer, messages: Messages) -> tuple[list[int], list[bool]]:
    """A whole conversation: (ids, mask), the mask True for every token that an assistant wrote, end tokens included.

    The stretches between changes of the mask are encoded apart.
    """
    text = render(tokenizer, messages)
    ids: list[int] = []
    mask: list[bool] = []
    place = 0
    for turn in turns(tokenizer, messages, text):
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
    try:
        text = render(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": _OTHER}])
    except InputError:  # it will say so again, on the real messages
        return tokenizer.eos_id
    after = text.rpartition(_OTHER)[2]
    places = {after.find(token): i for token, i in sorted(tokenizer.specials.items(), key=lambda item: len(item[0]))}
    return next((places[place] for place in sorted(places) if place >= 0), tokenizer.eos_id)


def render(tokenizer, messages: Messages, *, generation: bool = False) -> str:
    """The conversation as text; `generation` adds what comes before the assistant's next turn."""
    return _render(tokenizer, messages, generation).replace(_OPEN, "").replace(_CLOSE, "")


def turns(tokenizer, messages: Messages, text: str) -> list[Turn]:
    """Where `text`, these messages rendered, shows the assistant's turns; a turn that is not shown is left out."""
    marked = _render(tokenizer, messages, False)
    if _OPEN in marked:
        return _marked_turns(marked)
    ends = sorted(_ends(tokenizer), key=len, reverse=True)
    found: list[Turn] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = found[-1].stop if found else 0
        other = render(tokenizer, [*messages[:index], {**message, "content": _OTHER}, *messages[index + 1 :]])
        if other == text:
            continue
        shown = _common(text, other)
        end = len(text) - _common(text[shown:][::-1], other[shown:][::-1])
        start = _start(tokenizer, messages[:index], text, after, shown)
        behind = len(text) - len(text[end:].lstrip())
        token = next((token for token in ends if text.startswith(token, behind)), None)
        found.append(Turn(start, shown, end, end if token is None else behind + len(token)))
    return found


def _common(a: str, b: str) -> int:
    """How many characters both begin with."""
    return len(os.path.commonprefix([a, b]))  # noqa: RUF071 - characters are meant


def _start(tokenizer, before: Messages, text: str, after: int, shown: int) -> int:
    """Where a turn that shows its content at `shown` begins: behind the generation prompt, not ahead of `after`."""
    try:
        prompt, plain = (render(tokenizer, before, generation=generation) for generation in (True, False))
    except InputError:  # a template may refuse a part of a conversation
        prompt = plain = ""
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
    """What the assistant said: markup in it is text, that of the template around it is meant."""
    before, after = text[turn.start : turn.shown], tokenizer.encode_markup(text[turn.end : turn.stop])
    if any(token in before for token in tokenizer.specials):
        return tokenizer.encode_markup(before) + tokenizer.encode(text[turn.shown : turn.end]) + after
    return tokenizer.encode(text[turn.start : turn.end]) + after


def _ends(tokenizer) -> dict[str, int]:
    """The tokens that may end a turn, with their ids."""
    ids = {end_id(tokenizer), *tokenizer.eos_ids}
    return {token: i for token, i in tokenizer.specials.items() if i in ids}


def _render(tokenizer, messages: Messages, generation: bool) -> str:
    template = tokenizer.template
    given = json.loads(json.dumps(list(messages)))  # plain data, and a copy: a template gets nothing it could call
    sandbox, compiled = _compiled(template)
    sandbox.begin()
    try:
        return compiled.render(messages=given, add_generation_prompt=generation, **tokenizer.names)
    except Exception as error:  # a template can fail in any way
        raise InputError(f"{template[1]}: the chat template fails: {' '.join(str(error).split())}") from None


@functools.cache
def _compiled(template: tuple[str, str]):
    """The sandbox of the template, and the template in it."""
    from jinja2.exceptions import TemplateSyntaxError

    from lfjax.tokenizers.sandbox import Sandbox

    source, where = template
    sandbox = Sandbox((_OPEN, _CLOSE))
    sandbox.globals["strftime_now"] = sandbox.bounded("format", lambda text: _TODAY.strftime(text))
    try:
        return sandbox, sandbox.from_string(source)
    except TemplateSyntaxError as error:
        raise InputError(f"{where}: line {error.lineno} of the chat template: {error.message}; mend it") from None
    except Exception as error:  # nested too deep, for one
        raise InputError(f"{where}: the chat template cannot be read: {' '.join(str(error).split())}") from None
