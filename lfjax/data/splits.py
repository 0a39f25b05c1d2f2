"""Which records are for training, validation and test: whole groups, near the sizes asked for, every kind in each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

from lfjax.data.duplicates import place_of, record_key, split_of, text_key
from lfjax.records import Edit, Preference, Ranking, Record

FILLED = ("test", "validation")  # in this order; what is left is for training
NEEDED = ("train", "validation", "test")  # who gets a kind first that few groups hold
NO_FEEDBACK, PROMPT_ONLY = "no feedback", "prompt only"
ANY = ""  # the kind of every group: no split is emptied for another


@dataclasses.dataclass
class Cut:
    """A file in splits.

    Attributes:
      splits: name -> records, in the file's order.
      by_response: there were fewer prompts than splits, so that responses decide.
      moved: records in another split than their hash alone gives, which may change when others are added.
    """

    splits: dict[str, list[Record]]
    by_response: bool = False
    moved: int = 0


@dataclasses.dataclass(eq=False)
class _Group:
    """Records that stay together: those of one prompt, or of one text where there is no prompt."""

    key: str
    place: float
    rows: list[int] = dataclasses.field(default_factory=list)
    kinds: set[str] = dataclasses.field(default_factory=lambda: {ANY})
    split: str = ""


def kinds_of(record: Record) -> set[str]:
    """The kinds of feedback that a record holds; one that judges nothing is a kind too."""
    if not record.responses:
        return {PROMPT_ONLY}
    return {entry.kind for entry in record.feedback} or {NO_FEEDBACK}


def equal_pairs(record: Record) -> int:
    """How many pairs of answers that are equal somebody put into an order."""
    texts, count = record.responses, 0
    for entry in record.feedback:
        if isinstance(entry, Preference):
            count += texts[entry.chosen] == texts[entry.rejected]
        elif isinstance(entry, Edit):
            count += entry.text == texts[entry.response]
        elif isinstance(entry, Ranking):
            tied = sum(_same([texts[i] for i in group]) for group in entry.order)
            count += _same([texts[i] for group in entry.order for i in group]) - tied
    return count


def _same(texts: list[str]) -> int:
    """How many pairs of equal texts there are."""
    return sum(count * (count - 1) // 2 for count in Counter(texts).values())


def cut(records: list[Record], *, validation_fraction: float, test_fraction: float) -> Cut:
    """The records in splits whose sizes come as near to the fractions as whole groups allow; 0 asks for none.

    Groups go by the hash of their key: the first fill the test split, the next the validation split, one that is too
    large for what is missing is passed over, and every split gets a group. So a group moves little when records are
    added, and not at all with the order of the records. A kind of feedback that so many groups hold is in every split;
    of fewer the first go to training, then to validation. With fewer prompts than splits the responses decide.
    """
    fractions = {"validation": validation_fraction, "test": test_fraction}
    wanted = {name: fractions[name] for name in FILLED if fractions[name] > 0}
    groups = _groups(records, record_key)
    by_response = len(groups) <= len(wanted) < len(records)
    if by_response:
        groups = _groups(records, lambda record: text_key(" ".join(record.responses)))
    for number, name in enumerate(wanted):
        free = [group for group in groups if not group.split]
        _fill(name, free, round(wanted[name] * len(records)), leave=len(wanted) - number)
    for group in groups:
        group.split = group.split or "train"
    _spread(groups, [name for name in NEEDED if name in wanted or name == "train"])
    of_row = {row: group for group in groups for row in group.rows}
    splits: dict[str, list[Record]] = {name: [] for name in NEEDED}
    moved = 0
    for row, record in enumerate(records):
        group = of_row[row]
        splits[group.split].append(record)
        moved += group.split != split_of(
            group.key, validation_fraction=validation_fraction, test_fraction=test_fraction
        )
    return Cut(splits, by_response, moved)


def _groups(records: list[Record], key_of: Callable[[Record], str]) -> list[_Group]:
    """The groups by the hash of their key."""
    groups: dict[str, _Group] = {}
    for row, record in enumerate(records):
        key = key_of(record)
        if key not in groups:
            groups[key] = _Group(key, place_of(key))
        groups[key].rows.append(row)
        groups[key].kinds |= kinds_of(record)
    return sorted(groups.values(), key=lambda group: (group.place, group.key))


def _fill(name: str, free: list[_Group], size: int, *, leave: int) -> None:
    """Puts some of the free groups into a split of about `size` records, and leaves so many for other splits."""
    most, missing, passed = len(free) - leave, max(size, 1), []
    for group in free:
        if most <= 0 or missing <= 0:
            return
        if len(group.rows) <= missing:
            group.split, missing, most = name, missing - len(group.rows), most - 1
        else:
            passed.append(group)
    smallest = min(passed, key=lambda group: len(group.rows), default=None)
    empty = not any(group.split == name for group in free)
    if smallest and most > 0 and (empty or len(smallest.rows) - missing < missing):
        smallest.split = name


def _spread(groups: list[_Group], names: list[str]) -> None:
    """Moves groups so that every kind is in every split that has to have it, at about the same sizes."""
    held = Counter((group.split, kind) for group in groups for kind in group.kinds)
    total = Counter(kind for group in groups for kind in group.kinds)
    for kind in sorted(total, key=lambda kind: (total[kind], kind)):
        for name in names[: total[kind]]:
            if not held[name, kind]:
                _bring(kind, name, groups, held, names)


def _bring(kind: str, name: str, groups: list[_Group], held: Counter, names: list[str]) -> None:
    """Moves the smallest group of a kind into a split that has none, and others of about its size the other way."""

    def spare(group: _Group, but: str = "") -> bool:
        return all(held[group.split, other] > 1 for other in group.kinds if other != but)

    def can_go(group: _Group) -> bool:
        gives = held[group.split, kind] > 1 or names.index(group.split) > names.index(name)
        return kind in group.kinds and gives and spare(group, kind)

    found = min(filter(can_go, groups), key=lambda group: len(group.rows), default=None)
    if found is None:
        return
    giver, missing = found.split, len(found.rows)
    _move(found, name, held)
    for group in groups if name == "train" else reversed(groups):
        if group.split == name and group is not found and len(group.rows) <= missing and spare(group):
            _move(group, giver, held)
            missing -= len(group.rows)


def _move(group: _Group, name: str, held: Counter) -> None:
    for kind in group.kinds:
        held[group.split, kind] -= 1
        held[name, kind] += 1
    group.split = name
