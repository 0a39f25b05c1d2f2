"""From records to token lists: documents, supervised examples, reward examples, prompts.

Prompt and response are encoded separately and the ids concatenated, so that training sees the ids that sampling makes.
Every sequence starts with BOS where the tokenizer's do; a complete response ends in EOS, or in what ends a chat turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from lfjax.config import InputError
from lfjax.records import Edit, Label, Preference, Ranking, Record, mean_values
from lfjax.tokenizers import Tokenizer, chat

T = TypeVar("T")
Document = tuple[list[int], list[bool]]  # tokens, and whether each counts as a target


@dataclasses.dataclass
class RewardExample:
    """Complete sequences of one record, and what one judgement said of them.

    Attributes:
      candidates: token lists, BOS + prompt + response + EOS.
      ratings: raw values on the record's own scale, None where a candidate has none.
      ranks: 0 = best, ties share a rank, None where a candidate has none.
      margin: how much better a preference's chosen answer is; 0 where nobody said.
      record: the index of the record among those converted.
      cut: how many candidates were longer than allowed.
    """

    candidates: list[list[int]]
    ratings: list[float | None]
    ranks: list[int | None]
    margin: float = 0.0
    record: int = 0
    cut: int = 0

    def first(self, count: int) -> RewardExample:
        """The example with its first `count` candidates alone."""
        kept = {name: getattr(self, name)[:count] for name in ("candidates", "ratings", "ranks")}
        return dataclasses.replace(self, **kept)


def prompt_tokens(record: Record, tokenizer: Tokenizer) -> list[int]:
    """The ids that begin a sequence with the prompt; chat messages as the tokenizer's template writes them."""
    with _naming(record, "prompt"):
        if isinstance(record.prompt, str) or tokenizer.template is None:
            return tokenizer.encode_prompt(record.prompt_text)
        return chat.prompt_ids(tokenizer, record.prompt)


def response_tokens(record: Record, text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a complete response to the record's prompt, with the token that ends it."""
    with _naming(record, "responses" if text in record.responses else "feedback"):
        if isinstance(record.prompt, str) or tokenizer.template is None:
            return [*tokenizer.encode(text, first=not record.prompt), tokenizer.eos_id]
        return chat.response_ids(tokenizer, record.prompt, text)


@contextlib.contextmanager
def _naming(record: Record, field: str):
    """Says which record a chat template or a vocabulary refuses."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{record.where}: field {field!r}: {error}") from error


def pretraining_documents(records: Iterable[Record], tokenizer: Tokenizer) -> list[list[int]]:
    """BOS + prompt + response + EOS for every response that is not empty; every token is learned from."""
    documents = []
    for record in records:
        prompt = prompt_tokens(record, tokenizer)
        for response in filter(None, record.responses):
            documents.append([*prompt, *response_tokens(record, response, tokenizer)])
    return documents


def sft_documents(records: Iterable[Record], tokenizer: Tokenizer) -> list[Document]:
    """Demonstrations: the prompt without loss, the response and its EOS with.

    A person's `edit` is a demonstration; where a record holds no feedback at all, its responses are (reference
    answers). What was only rated, ranked or criticised is not.
    """
    documents = []
    for record in records:
        prompt = prompt_tokens(record, tokenizer)
        for text in sft_texts(record):
            response = response_tokens(record, text, tokenizer)
            documents.append((prompt + response, [False] * len(prompt) + [True] * len(response)))
    return documents


def sft_texts(record: Record) -> list[str]:
    """What fine-tuning learns: people's edits; the responses of a record without feedback."""
    return [e.text for e in record.feedback if isinstance(e, Edit)] if record.feedback else list(record.responses)


def answers(record: Record) -> list[str]:
    """Every response that is not empty."""
    return [*filter(None, record.responses)]


def judged_texts(record: Record) -> list[str]:
    """The responses that judgements compare or score, and people's edits of them."""
    return [text for texts, *_ in judgements(record) for text in texts]


def is_judged(record: Record) -> bool:
    """Whether a judgement scores a response, or puts different ones into an order."""
    found = ((texts, _given(ranks)) for texts, _, ranks, _ in judgements(record))
    return any(not ranks or _compares(texts, ranks) for texts, ranks in found)


def labelled_texts(record: Record) -> list[str]:
    """The responses that have labels."""
    return [record.responses[entry.response] for entry in record.feedback if isinstance(entry, Label)]


class Complete(NamedTuple):
    """BOS + prompt + response + EOS."""

    tokens: list[int]
    start: int  # tokens before the response
    cut: bool


def complete(record: Record, text: str, tokenizer: Tokenizer, max_length: int, truncate: bool = True) -> Complete:
    """The whole sequence of a response in at most `max_length` tokens: the prompt's start is cut first, EOS never."""
    start, prompt = _start(prompt_tokens(record, tokenizer), tokenizer)
    response = response_tokens(record, text, tokenizer)
    excess = len(start) + len(prompt) + len(response) - max_length
    if excess > 0:
        if not truncate:
            raise InputError(
                f"{record.where}: prompt and response have {max_length + excess} tokens; at most {max_length} are "
                "allowed: leave the record out, lengthen the context or allow truncation"
            )
        prompt = prompt[min(excess, len(prompt)) :]
        room = max_length - 1 - len(start) - len(prompt)
        response = response[: max(room, 0)] + response[-1:] if len(response) > room + 1 else response
    return Complete([*start, *prompt, *response][:max_length], len(start) + len(prompt), excess > 0)


def _start(prompt: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(BOS where the prompt begins with one, the rest): what is cut off on the left comes behind it."""
    kept = int(prompt[0] == tokenizer.bos_id)
    return prompt[:kept], prompt[kept:]


def judgements(
    record: Record, scale: tuple[float, float] = (0.0, 1.0)
) -> Iterator[tuple[list[str], list[float | None], list[int | None], float]]:
    """(texts, ratings, ranks, margin) of every judgement that compares or scores responses."""
    values = mean_values(record, scale)
    if values:
        yield [record.responses[i] for i in values], list(values.values()), [None] * len(values), 0.0
    for entry in record.feedback:
        if isinstance(entry, Ranking):
            ranked = [(i, rank) for rank, group in enumerate(entry.order) for i in group]
            texts = [record.responses[i] for i, _ in ranked]
            yield texts, [None] * len(ranked), [rank for _, rank in ranked], 0.0
        elif isinstance(entry, Preference):
            pair = [record.responses[entry.chosen], record.responses[entry.rejected]]
            yield pair, [None, None], [0, 1], entry.margin or 0.0
        elif isinstance(entry, Edit):
            yield [entry.text, record.responses[entry.response]], [None, None], [0, 1], 0.0


def reward_examples(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncate: bool = True,
    scale: tuple[float, float] = (0.0, 1.0),
    counts: Counter[str] | None = None,
) -> list[RewardExample]:
    """What a reward model can learn from, one example a judgement, in the records' order.

    All ratings of a record make one example (of several of one response their mean counts; labels that are true, false
    or numbers count likewise, as the top of `scale`, its bottom or the number, where a response has no rating); every
    ranking makes one; every preference a pair; every edit the pair edit > original. Critiques, word labels and implicit
    signals say nothing here.

    Sequences that are equal, in the file or once cut, are one candidate: rated with their mean, also where each is the
    only one of its record; in a ranking at their rank, or left out where another answer stands between them. What
    compares nothing any more makes no example.

    Args:
      max_length: of a complete sequence, in tokens.
      scale: of the run's ratings, for labels true and false.
      truncate: cut longer ones (first the prompt's start, then the response's end; the EOS stays), else refuse.
      counts: gets "answers" (judged), "cut" (of them) and "equal_pairs" (put in an order, with equal sequences).
    Raises:
      InputError: a sequence is too long and truncate is False; names the record.
    """
    examples = []
    for index, record in enumerate(records):
        for texts, ratings, ranks, margin in judgements(record, scale):
            made = [complete(record, text, tokenizer, max_length, truncate) for text in texts]
            whole = RewardExample([sequence.tokens for sequence in made], ratings, ranks, margin, index)
            kept, example = _distinct(whole)
            if counts is not None:
                cut = sum(sequence.cut for sequence in made)
                counts.update({"answers": len(made), "cut": cut, "equal_pairs": _equal_pairs(whole)})
            if example is not None:
                examples.append(dataclasses.replace(example, cut=sum(made[i].cut for i in kept)))
    return _distinct_singles(examples, counts)


def _distinct_singles(examples: list[RewardExample], counts: Counter[str] | None) -> list[RewardExample]:
    """Rated answers that are alone in their records, each sequence once, with the mean rating, in its first place."""
    groups: dict[Any, list[RewardExample]] = {}
    for place, example in enumerate(examples):
        alone = len(example.candidates) == 1 and example.ratings[0] is not None
        groups.setdefault(tuple(example.candidates[0]) if alone else place, []).append(example)
    found = []
    for group in groups.values():
        ratings = _given([example.ratings[0] for example in group])
        if len(group) > 1:
            if counts is not None:
                same = sum(count**2 for count in Counter(ratings).values())
                counts["equal_pairs"] += (len(ratings) ** 2 - same) // 2
            group[0] = dataclasses.replace(group[0], ratings=[math.fsum(ratings) / len(ratings)])
        found.append(group[0])
    return found


def _distinct(example: RewardExample) -> tuple[list[int], RewardExample | None]:
    """(places of the candidates that stay, the example with these; None where it compares nothing any more)."""
    groups, ranks = _equals(example.candidates), _given(example.ranks)
    if len(groups) == len(example.candidates):
        return list(range(len(example.candidates))), example
    if ranks:
        kept = _apart(example.candidates, ranks)
        order = sorted({ranks[i] for i in kept})
        changes: dict[str, Any] = {"ratings": [None] * len(kept), "ranks": [order.index(ranks[i]) for i in kept]}
    else:
        kept = [places[0] for places in groups]
        values = [_given([example.ratings[i] for i in places]) for places in groups]
        changes = {"ratings": [math.fsum(v) / len(v) for v in values], "ranks": [None] * len(kept)}
    found = dataclasses.replace(example, candidates=[example.candidates[i] for i in kept], **changes)
    return (kept, found) if len(kept) > 1 or not ranks else ([], None)


def _given(values: Iterable[T | None]) -> list[T]:
    """Those that are there."""
    return [value for value in values if value is not None]


def _equals(candidates: Sequence[Any]) -> list[list[int]]:
    """The places of each distinct candidate."""
    groups: dict[Any, list[int]] = {}
    for place, candidate in enumerate(candidates):
        groups.setdefault(tuple(candidate), []).append(place)
    return list(groups.values())


def _apart(candidates: Sequence[Any], ranks: Sequence[int]) -> list[int]:
    """Of a ranking, a place of each distinct candidate; none of equal ones that another one is ranked between."""
    kept = []
    for places in _equals(candidates):
        own = [ranks[i] for i in places]
        others = [rank for i, rank in enumerate(ranks) if i not in places]
        if min(own) == max(own) or not any(min(own) <= rank <= max(own) for rank in others):
            kept.append(places[0])
    return kept


def _compares(candidates: Sequence[Any], ranks: Sequence[int]) -> bool:
    """Whether a ranking puts different candidates into an order: not all of them tied, or equal."""
    return len({ranks[i] for i in _apart(candidates, ranks)}) > 1


def _equal_pairs(example: RewardExample) -> int:
    """How many pairs of equal candidates have different ranks."""
    pairs = (pair for places in _equals(example.candidates) for pair in itertools.combinations(places, 2))
    return sum(example.ranks[i] != example.ranks[j] for i, j in pairs)


def class_name(value: bool | float | str) -> str:
    """A label's class as text: "true", "false", the word, or the number as it is written shortest."""
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value:.15g}"


def class_names(records: Iterable[Record]) -> tuple[str, ...]:
    """The classes of all labels: numbers first, by size, then words by the alphabet."""
    found = {class_name(e.value): e.value for record in records for e in record.feedback if isinstance(e, Label)}
    plain = {name: value if type(value) in (int, float) else math.inf for name, value in found.items()}
    return tuple(sorted(plain, key=lambda name: (plain[name], name)))


def class_labels(records: Iterable[Record], classes: tuple[str, ...]) -> Iterator[tuple[int, Record, Label, int]]:
    """(index of the record, record, label, index of its class) of every label.

    Raises:
      InputError: a label is none of `classes`; names the record.
    """
    number = {name: i for i, name in enumerate(classes)}
    for index, record in enumerate(records):
        for entry in record.feedback:
            if isinstance(entry, Label):
                name = class_name(entry.value)
                if name not in number:
                    raise InputError(
                        f"{record.where}: field 'value': found the label {name!r}, which no training record has;"
                        " leave the record out, or put more of its kind into training"
                    )
                yield index, record, entry, number[name]


def class_examples(
    records: Iterable[Record], tokenizer: Tokenizer, classes: tuple[str, ...], *, max_length: int
) -> list[RewardExample]:
    """One example a label: its sequence, cut as a reward's, with the index of its class as the rating.

    Where people disagree about a text, it is learnt (and judged) with the label of each.

    Raises:
      InputError: as `class_labels`.
    """
    examples = []
    for index, record, entry, number in class_labels(records, classes):
        text = record.responses[entry.response]
        made = complete(record, text, tokenizer, max_length)
        examples.append(RewardExample([made.tokens], [float(number)], [None], 0.0, index, int(made.cut)))
    return examples


def prompts_from_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    min_tokens: int = 4,
    max_tokens: int = 6,
    max_length: int | None = None,
    truncate: bool = False,
    remedy: str = "shorten the prompt",
) -> list[list[int]]:
    """One prompt a record, in the records' order: BOS + its prompt or, where it has none, its text's first tokens.

    How many first tokens, from min_tokens to max_tokens, is decided by the text's sha256, so a record's prompt is
    fixed. A text of fewer tokens is its own prompt.

    Args:
      max_length: of BOS + prompt, in tokens; None: any.
      truncate: cut longer prompts on the left (BOS stays), else refuse.
      remedy: what the error tells the user to do.
    Raises:
      InputError: a prompt is too long and truncate is False (names the record), or min_tokens > max_tokens.
    """
    if not 0 <= min_tokens <= max_tokens:
        raise InputError(f"prompts: found {min_tokens} to {max_tokens} first tokens; allowed: 0 <= min <= max")
    prompts = []
    for record in records:
        tokens = prompt_tokens(record, tokenizer)
        if not record.prompt:
            text = record.responses[0]
            place = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
            tokens += tokenizer.encode(text, first=True)[: min_tokens + place % (max_tokens - min_tokens + 1)]
        if max_length is not None and len(tokens) > max_length:
            if not truncate:
                found = f"found {len(tokens)} tokens with BOS"
                raise InputError(f"{record.where}: field 'prompt': {found}; allowed: at most {max_length}; {remedy}")
            start, rest = _start(tokens, tokenizer)
            tokens = start + rest[len(tokens) - max_length :]
        prompts.append(tokens)
    return prompts
