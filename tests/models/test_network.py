"""What every form of a model has in common."""

import pytest

from lfjax.config import InputError
from lfjax.models.encoder import EncoderConfig
from lfjax.models.lstm import LSTMConfig
from lfjax.models.transformer import TransformerConfig

SIZES = {"vocab_size": 10, "width": 8, "layers": 1}
FORMS = {TransformerConfig: {"heads": 2}, EncoderConfig: {"heads": 2}, LSTMConfig: {}}


@pytest.mark.parametrize("kind", FORMS)
def test_sizes_and_dropout_are_checked_and_the_vocabulary_is_padded(kind):
    given = SIZES | FORMS[kind]
    for name in given:
        with pytest.raises(InputError, match=f"model.{name}: found 0; it must be at least 1"):
            kind(**{**given, name: 0})
    for share in (-0.1, 1.0):
        with pytest.raises(InputError, match=rf"model.dropout: found {share}; it must be in \[0, 1\)"):
            kind(**given, dropout=share)
    assert [kind(**given, vocab_multiple=n).padded_vocab for n in (1, 5, 8, 16)] == [10, 10, 16, 16]
