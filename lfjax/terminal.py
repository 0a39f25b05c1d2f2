"""What the command prints of texts that somebody else wrote."""

from __future__ import annotations

import re
import sys

# C0 but tab and line feed, DEL, C1, line and paragraph separators, what marks, sets or overrides the direction.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
LONGEST_LINE = 2000  # characters of a note or an error: what it quotes may be of any length
LONGEST_CELL = 200


def visible(text: str) -> str:
    r"""The text with every control character as an escape (\x1b, \u202e): a terminal shows it and obeys nothing."""
    return HIDDEN.sub(_escape, text)


def line(text: str) -> str:
    """The text in one line, `visible`; of a longer one than LONGEST_LINE its beginning and its end."""
    half = LONGEST_LINE // 2
    if len(text) > 2 * LONGEST_LINE:
        text = f"{text[:LONGEST_LINE]} ... {text[-LONGEST_LINE:]}"
    text = visible(" ".join(text.splitlines()))
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


def cell(text: str, most: int = LONGEST_CELL) -> str:
    r"""As `visible`, for a table: a tab and a line feed are escapes too (\t, \n), and what is too long is cut."""
    text = re.sub(r"[\t\n]", _escape, visible(text[: most + 1]))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _escape(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def show(text: str) -> None:
    """Prints what a model wrote to stdout: as it is for a pipe or a file, `visible` on a terminal."""
    print(visible(text) if sys.stdout.isatty() else text)


def note(text: str) -> None:
    """Prints one line to stderr, as `line` makes it."""
    print(line(text), file=sys.stderr, flush=True)
