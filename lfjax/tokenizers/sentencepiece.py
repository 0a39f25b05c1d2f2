"""SentencePiece vocabularies (unigram, BPE) that keep every character: trained, saved, loaded."""

from __future__ import annotations

import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from lfjax.config import InputError

MODEL_FILE = "tokenizer.model"
UNK, BOS, EOS, PAD = 0, 1, 2, 3


class SentencePieceTokenizer:
    """A SentencePiece model behind the `Tokenizer` interface.

    decode(encode(x)) == x for models made by `train`, but for U+2581, SentencePiece's own mark for a space.
    A model without a pad piece (pad_id -1) is padded with its unknown id, which no text that it knows contains.
    """

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        pad = self._processor.pad_id()
        self.pad_id: int = pad if pad >= 0 else self.unk_id

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; see `Tokenizer.encode`."""
        return self._processor.Encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD."""
        specials = (self.bos_id, self.eos_id, self.pad_id)
        return self._processor.Decode([int(i) for i in ids if i not in specials])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id, to show."""
        return [self._processor.IdToPiece(int(i)) for i in ids]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes FOLDER/tokenizer.model, in place of an older one only when it is whole; a failure leaves nothing."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{MODEL_FILE}.{os.getpid()}"
        try:
            temporary.write_bytes(self._model)
            os.replace(temporary, folder / MODEL_FILE)
        finally:
            temporary.unlink(missing_ok=True)


def train(
    texts: Iterable[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    vocab_size: int,
    model_type: str = "unigram",
    num_threads: int = 1,
) -> SentencePieceTokenizer:
    """Learns a vocabulary from texts; the same texts and arguments give the same file, byte for byte.

    Nothing is normalised away: case, spaces, tabs and newlines stay, bytes stand in for rare characters.

    Args:
      texts: the training texts, each a document; empty ones do not count.
      folder: where tokenizer.model is saved; None saves nothing.
      vocab_size: pieces, with the 4 specials (unk 0, bos 1, eos 2, pad 3) and the 256 bytes.
      model_type: "unigram" or "bpe".
      num_threads: part of the result (sums over threads are rounded), so it is fixed and not the machine's count.
    Raises:
      InputError: an unknown model_type, no text, or a vocab_size that these texts cannot fill or that is too small.
    """
    if model_type not in ("unigram", "bpe"):
        raise InputError(f"tokenizer.model_type: found {model_type!r}; allowed: unigram | bpe")
    sentences = [text for text in texts if text]
    if not sentences:
        raise InputError("tokenizer: no text to learn a vocabulary from; the training split is empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=0.9995,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
            num_threads=num_threads,
            max_sentence_length=1 << 20,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(_vocabulary_error(str(error), vocab_size)) from None
    tokenizer = SentencePieceTokenizer(model.getvalue())
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def _vocabulary_error(message: str, vocab_size: int) -> str:
    at_most = re.search(r"<= (\d+)", message)
    if at_most:
        return f"tokenizer.vocab_size: found {vocab_size}; these texts fill at most {at_most[1]} pieces"
    at_least = re.search(r"smaller than required_chars\.?\D*\d+ vs (\d+)", message)
    if at_least:
        return f"tokenizer.vocab_size: found {vocab_size}; these texts need at least {at_least[1]} pieces"
    return f"tokenizer: sentencepiece could not learn {vocab_size} pieces: {' '.join(message.split())}"


def load(path: str | os.PathLike[str]) -> SentencePieceTokenizer:
    """The tokenizer of a folder that holds tokenizer.model, or of a model file.

    Raises:
      InputError: nothing there, or not a SentencePiece model.
    """
    path = pathlib.Path(path)
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file; the tokenizer stage writes it, or give a SentencePiece model")
    try:
        return SentencePieceTokenizer(file.read_bytes())
    except (RuntimeError, OSError):
        raise InputError(f"{file}: not a SentencePiece model (damaged, or another kind of file)") from None
