import pytest

from lfjax.data.windows import windows

CASES = [(n, c, s, p) for n in (0, 1, 2, 7, 8, 9, 23, 40) for c in (4, 8) for s in (1, 3, 4) for p in (0, 1)]


@pytest.mark.parametrize("length, context, stride, begins", CASES)
def test_every_token_is_a_target_once_with_the_context_that_is_promised(length, context, stride, begins):
    start, text = [-1] * begins, list(range(length))
    scored = []
    for row, targets in windows(start, text, context=context, stride=stride):
        assert len(row) <= context + 1 and row[:begins] == start and 0 < targets < len(row)
        stretch = row[begins:]
        assert stretch == text[stretch[0] : stretch[0] + len(stretch)]
        for token in row[-targets:]:
            assert token - stretch[0] >= min(token, context + 1 - begins - stride)
        scored += row[-targets:]
    assert scored == text[1 - begins :]


def test_a_stride_that_leaves_tokens_out_is_refused():
    for stride in (0, 5):
        with pytest.raises(ValueError, match="stride"):
            list(windows([], list(range(9)), context=4, stride=stride))
