"""What a terminal is shown of texts that somebody else wrote."""

import io
import unicodedata

import pytest

from lfjax import cli, terminal
from lfjax.run import scoring

HOSTILE = "a\x1b]0;owned\x07\r\x9b2J\u202eb\u2066\x7f\u2028\u200f"


def test_what_a_terminal_obeys_is_shown_and_nothing_else_is_changed():
    assert terminal.visible(HOSTILE) == r"a\x1b]0;owned\x07\r\x9b2J\u202eb\u2066\x7f\u2028\u200f"
    kept = "tab\tline\nÜ 日本 עברית سلام 👩‍👧 e\u0301"
    assert terminal.visible(kept) == kept
    every = {chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Cc"}
    assert {c for c in every if terminal.visible(c) == c} == {"\t", "\n"}
    turning = {chr(code) for code in range(0x110000) if unicodedata.bidirectional(chr(code))[-1:] in "EFIO"}
    marks = {"\u061c", "\u200e", "\u200f"}
    assert not {c for c in turning | marks if terminal.visible(c) == c and unicodedata.category(c) == "Cf"}


def test_a_note_an_error_and_a_cell_of_a_table_are_one_line_of_bounded_length(capsys):
    terminal.note("first\nx" + "k" * 4_000_000 + "\x1b last")
    said = capsys.readouterr().err
    assert said.startswith("first xkkk") and said.endswith(r"kkk\x1b last" + "\n")
    assert len(said) < terminal.LONGEST_LINE + 20 and said.count("\n") == 1
    assert terminal.cell("a\tb\nc\x1b") == r"a\tb\nc\x1b"
    assert terminal.cell("k" * 4_000_000) == "k" * (terminal.LONGEST_CELL - 3) + "..."


def test_errors_show_control_characters(capsys, tmp_path):
    assert cli.main(["report", str(tmp_path / HOSTILE.replace("\u2028", ""))]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and terminal.visible(err) == err and r"\x1b]0;owned\x07" in err


def test_a_name_makes_no_row_of_a_table():
    names = ("tokens", "logprob", "logprob_mean", "tokens_with_eos", "logprob_with_eos", "logprob_mean_with_eos")
    rows = [{"record": 1, "id": "a\n b\tc", "response": 0, **dict.fromkeys(names, 1.0)}]
    table = scoring.completions_table(rows)
    assert table.count("\n") == 3 and "\t" not in table and r"a\n b\tc" in table


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_model_wrote_is_raw_but_for_a_terminal(is_terminal, monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stdout", out)
    terminal.show(HOSTILE)
    assert out.getvalue() == (terminal.visible(HOSTILE) if is_terminal else HOSTILE) + "\n"
