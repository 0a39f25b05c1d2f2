"""What the command prints of texts that somebody else wrote."""

from __future__ import annotations

import re
import sys

# C0 but tab and line feed, DEL, C1, line and paragraph separators, what sets or overrides the direction of writing.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""The text with every control character as an escape (\x1b, \u202e): a terminal shows it and obeys nothing."""
    return HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)


def show(text: str) -> None:
    """Prints what a model wrote to stdout: as it is for a pipe or a file, `visible` on a terminal."""
    print(visible(text) if sys.stdout.isatty() else text)


def note(text: str) -> None:
    """Prints one line to stderr, `visible`."""
    print(visible(" ".join(text.splitlines())), file=sys.stderr, flush=True)
