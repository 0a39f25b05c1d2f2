"""23,700 sentences with the mean sentiment that 20 people gave each: the VADER authors' ground truth.

Film reviews, product reviews, newspaper editorials and tweets, rated -4 (extremely negative) to 4 (extremely positive).
The files ship inside the source package vaderSentiment 0.5 (MIT licence), which pip fetches; `prepare` builds a TFDS
dataset from it once (array_record files, no TensorFlow), with a split fixed by each sentence's text.

Source: C. J. Hutto and E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text,
ICWSM 2014.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import html
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from typing import Any, ClassVar

import absl.logging
import numpy as np

from lfjax import files
from lfjax.config import InputError
from lfjax.data.duplicates import SPLITS, merge_rated_duplicates, record_key, split_of
from lfjax.records import Rating, Record

PACKAGE = "vaderSentiment"
PACKAGE_VERSION = "0.5"
ARCHIVE = f"{PACKAGE}-{PACKAGE_VERSION}.zip"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
SCALE = (-4.0, 4.0)
HELD_OUT_FRACTION = 0.05
LICENSE = "MIT"
_INNER = f"{PACKAGE}-{PACKAGE_VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILES = {
    "film": "movieReviewSnippets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
}
_DATASET_VERSION = "1.0.0"  # goes up whenever cleaning, merging or splitting changes: caches are keyed by it


def cache_folder() -> pathlib.Path:
    """$LFJAX_CACHE, or ~/.cache/lfjax."""
    return pathlib.Path(os.environ.get("LFJAX_CACHE") or "~/.cache/lfjax").expanduser()


def fetch(cache: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The path of the source package: from the cache, or else by pip as the user has it configured.

    Args:
      cache: a folder; `cache_folder()` by default.
    Raises:
      InputError: the cached file is not the known one, or no pip could fetch it; says where to put the file.
    """
    folder = pathlib.Path(cache) if cache is not None else cache_folder()
    path = folder / ARCHIVE
    if path.is_file():
        _check(path)
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            fetched = _download(pathlib.Path(temporary), path)
            _check(fetched)
            files.write_bytes(path, fetched.read_bytes())
    except OSError as error:
        raise InputError(f"{folder}: cannot hold the data: {error}; set LFJAX_CACHE to another folder") from None
    return path


def _check(path: pathlib.Path) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise InputError(
            f"{path}: sha256 is {found[:16]}..., not {SHA256[:16]}... as for {PACKAGE} {PACKAGE_VERSION}; delete it"
        )


def _pips() -> list[list[str]]:
    """Ways to call pip: this Python's own, then any on PATH (an environment made by uv has none of its own)."""
    own = [[sys.executable, "-m", "pip"]] if importlib.util.find_spec("pip") else []
    found = (shutil.which(name) for name in ("pip3", "pip"))
    return own + [[path] for path in dict.fromkeys(path for path in found if path)]


def _download(folder: pathlib.Path, destination: pathlib.Path) -> pathlib.Path:
    reason = "there is no pip in this environment or on PATH"
    arguments = ["download", "--no-deps", "--no-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    for pip in _pips():
        try:
            done = subprocess.run(
                [*pip, *arguments, f"{PACKAGE}=={PACKAGE_VERSION}"], capture_output=True, text=True, timeout=300
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = f"{pip[0]}: {type(error).__name__}"
            continue
        files = sorted(folder.glob(f"{PACKAGE}-*"))
        if done.returncode == 0 and files:
            return files[0]
        errors = [line.strip() for line in done.stderr.splitlines() if line.strip().lower().startswith("error")]
        reason = errors[-1] if errors else f"pip ended with code {done.returncode}"
    raise InputError(
        f"{destination}: pip could not fetch {PACKAGE}=={PACKAGE_VERSION} ({reason}); on a machine that can, run "
        f"`pip download --no-deps --no-binary :all: {PACKAGE}=={PACKAGE_VERSION}` and put {ARCHIVE} there"
    )


_URL = re.compile(r"(?:https?://|\bwww\.)[^\s)]*[^\s).,!?;:'\"]|\bhttps?:(?://)?|\b[\w.]+@[\w-]+(?:\.[\w-]+)+")
_HANDLE = re.compile(r"(?:\bRT\s*)?@anonymous\w*(?:'s)?:?")
_EMPTY_BRACKETS = re.compile(r"\(\s*\)")
_SPACES = re.compile(r"\s+")


def clean(text: str) -> str:
    """A sentence as a person would have typed it: no HTML entities, URLs or anonymised names, " in place of ''.

    Case and the spacing of punctuation stay as they are; runs of white space become one space.
    """
    while (plain := html.unescape(text)) != text:  # some rows are escaped twice: &amp;amp;
        text = plain
    text = text.replace("''", '"').replace("``", '"')
    text = _HANDLE.sub(" ", _URL.sub(" ", text))
    return _SPACES.sub(" ", _EMPTY_BRACKETS.sub(" ", text)).strip()


def read_package(path: str | os.PathLike[str]) -> tuple[list[Record], dict[str, Any]]:
    """All the rated sentences of the package, cleaned, near-identical ones merged to one with the mean rating.

    Returns:
      The records in the files' order, each with one `rating`, and counts: rows, rows/<source>, empty (no letter or
      digit is left), duplicates (merged away), duplicates_max_gap (rating points between two copies).
    """
    records: list[Record] = []
    counts: dict[str, Any] = {"rows": 0, "empty": 0}
    with zipfile.ZipFile(path) as package, tarfile.open(fileobj=package.open(_INNER)) as inner:
        for source, name in _FILES.items():
            member = inner.extractfile(f"hutto_ICWSM_2014/{name}")
            assert member is not None
            rows = member.read().decode("utf-8").split("\r\n")
            counts["rows"] += len(rows)
            counts[f"rows/{source}"] = len(rows)
            for number, row in enumerate(rows, 1):
                identity, value, text = row.split("\t")
                text = clean(text)
                if not any(character.isalnum() for character in text):
                    counts["empty"] += 1
                    continue
                rating = Rating(0, float(value), SCALE)
                where = f"{name}:{number}"
                records.append(Record("", [text], [rating], f"{source}-{identity}", source, LICENSE, where=where))
    records, counts["duplicates"], counts["duplicates_max_gap"] = merge_rated_duplicates(records)
    return records, counts


def _tfds() -> Any:
    import tensorflow_datasets  # half a second, so only where it is used

    return tensorflow_datasets


@functools.cache
def _builder_class() -> Any:
    tfds = _tfds()

    class VaderGroundTruth(tfds.core.GeneratorBasedBuilder):
        """Rated sentences; `text` comes back as UTF-8 bytes."""

        name = "vader_ground_truth"
        VERSION = tfds.core.Version(_DATASET_VERSION)
        url_infos: ClassVar[dict[str, Any]] = {}  # no URLs; looking for a checksum file needs importlib_resources
        package: pathlib.Path | None = None

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "text": tfds.features.Text(),
                    "source": tfds.features.Text(),
                    "rating": tfds.features.Scalar(np.float32),
                    "duplicates": tfds.features.Scalar(np.int32),
                }
            )
            return self.dataset_info_from_configs(
                description=__doc__,
                features=features,
                citation="Hutto and Gilbert, VADER, ICWSM 2014",
                license=LICENSE,
                metadata=tfds.core.MetadataDict(),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # the package is fetched by pip, not by a URL
            records, counts = read_package(self.package or fetch())
            splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
            for record in records:
                fractions = {"validation_fraction": HELD_OUT_FRACTION, "test_fraction": HELD_OUT_FRACTION}
                splits[split_of(record_key(record), **fractions)].append(record)
            self.info.metadata["counts"] = json.dumps(counts)
            return {name: self._generate_examples(rows) for name, rows in splits.items()}

        def _generate_examples(self, records):
            for i, record in enumerate(records):
                yield (
                    i,
                    {
                        "id": record.id,
                        "text": record.responses[0],
                        "source": record.source,
                        "rating": record.feedback[0].value,
                        "duplicates": record.extra.get("duplicates", 0),
                    },
                )

    return VaderGroundTruth


def builder(cache: str | os.PathLike[str] | None = None) -> Any:
    """The TFDS builder (`download_and_prepare`, `as_data_source`) whose array_record files lie in the cache folder."""
    folder = pathlib.Path(cache) if cache is not None else cache_folder()
    made = _builder_class()(data_dir=str(folder / "tfds"), file_format="array_record")
    made.package = folder / ARCHIVE
    return made


def prepare(cache: str | os.PathLike[str] | None = None) -> Any:
    """The builder with its dataset prepared: fetches and builds on the first call, one process at a time.

    Raises:
      InputError: see `fetch`; or the cache folder cannot be written.
    """
    made = builder(cache)
    if _is_prepared(made):
        return made
    folder = fetch(cache).parent
    try:
        with files.locked(folder / ".vader.lock"):
            made = builder(cache)  # another process may have built it while this one waited
            if not _is_prepared(made):
                _build_quietly(made)
    except OSError as error:
        raise InputError(f"{folder}: cannot hold the data: {error}; set LFJAX_CACHE to another folder") from None
    return made


def _is_prepared(made: Any) -> bool:
    return (pathlib.Path(made.data_dir) / "dataset_info.json").is_file()  # written last; TFDS's own question warns


def _build_quietly(made: Any) -> None:
    """Without TFDS's bars, prints and warnings about a dataset that is not there yet."""
    _tfds().disable_progress_bar()
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            made.download_and_prepare()
    finally:
        absl.logging.set_verbosity(verbosity)


def load(cache: str | os.PathLike[str] | None = None) -> tuple[dict[str, list[Record]], dict[str, Any]]:
    """(records by split: train, validation, test; the counts of `read_package`). Prepares the dataset if need be."""
    made = prepare(cache)
    sources = made.as_data_source()
    splits = {}
    for name in SPLITS:
        rows = sources[name].__getitems__(range(len(sources[name])))
        splits[name] = [_record(row) for row in rows]
    return splits, json.loads(made.info.metadata["counts"])


def _record(row: dict[str, Any]) -> Record:
    identity, text, source = (row[name].decode("utf-8") for name in ("id", "text", "source"))
    extra = {"duplicates": int(row["duplicates"])} if row["duplicates"] else {}
    rating = Rating(0, round(float(row["rating"]), 6), SCALE)
    return Record("", [text], [rating], identity, source, LICENSE, extra=extra, where=f"vader:{identity}")
