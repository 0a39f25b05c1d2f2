import hashlib
import io
import multiprocessing
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
import vader_package

from lfjax.config import InputError
from lfjax.data import vader
from lfjax.data.duplicates import SPLITS, text_key
from lfjax.records import Rating


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return vader_package.fill_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def loaded(cache):
    return vader.load(cache)


def test_every_row_is_accounted_for(loaded):
    """These counts change only with _DATASET_VERSION, or caches keep what an older program made."""
    splits, counts = loaded
    assert counts["rows"] == 10605 + 3708 + 5190 + 4200 == sum(counts[f"rows/{source}"] for source in vader._FILES)
    assert (counts["empty"], counts["duplicates"]) == (7, 84)
    assert sum(map(len, splits.values())) == counts["rows"] - counts["empty"] - counts["duplicates"]
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 21253, "validation": 1179, "test": 1180}
    merged = sum(record.extra.get("duplicates", 0) for rows in splits.values() for record in rows)
    assert merged == counts["duplicates"]
    assert vader._DATASET_VERSION == "1.1.0"


def test_near_identical_sentences_never_straddle_two_splits_and_none_repeats(loaded):
    splits, _ = loaded
    texts = [record.responses[0] for name in SPLITS for record in splits[name]]
    homes = {(text_key(record.responses[0]), name) for name in SPLITS for record in splits[name]}
    assert len(set(texts)) == len(texts) > len(homes) == len({key for key, _ in homes}) == 23433
    assert all(key for key, _ in homes)


def test_every_record_is_a_mean_rating_on_the_scale_with_its_provenance(loaded):
    splits, _ = loaded
    records = [record for rows in splits.values() for record in rows]
    assert {record.source for record in records} == {"film", "product", "news", "tweet"}
    assert len({record.id for record in records}) == len(records)
    for record in records:
        (entry,) = record.feedback
        assert isinstance(entry, Rating) and entry.scale == (-4.0, 4.0) and -4.0 <= entry.value <= 4.0
        assert record.prompt == "" and record.license == "MIT"
    values = [record.feedback[0].value for record in records]
    mean = sum(values) / len(values)
    assert abs(mean - 0.12) < 0.02 and abs((sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5 - 1.65) < 0.02


def test_what_a_model_would_learn_to_emit_is_cleaned_away(loaded):
    splits, _ = loaded
    text = "\n".join(record.responses[0] for rows in splits.values() for record in rows)
    for trace in (
        "@anonymous",
        "url_removed",
        "http:",
        "http//",
        "&amp;",
        "&lt;",
        "&quot;",
        "''",
        "\r",
        "\t",
        "\ufffd",
    ):
        assert trace not in text
    assert "  " not in text and "The" in text  # spaces are single, case is kept


def test_the_prepared_dataset_is_read_back_as_it_was_generated(cache, loaded):
    splits, _ = loaded
    records, _ = vader.read_package(cache / vader.ARCHIVE)
    read = {record.id: record for rows in splits.values() for record in rows}
    assert len(records) == len(read)
    for record in records:
        again = read[record.id]
        assert again.responses == record.responses and again.source == record.source
        assert abs(again.feedback[0].value - record.feedback[0].value) < 1e-5


def test_tfds_sees_an_array_record_dataset_without_tensorflow(cache, loaded):
    made = vader.builder(cache)
    assert made.info.file_format.value == "array_record"
    example = made.as_data_source()["test"][0]
    assert set(example) == {"id", "text", "source", "rating", "duplicates"} and isinstance(example["text"], bytes)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    "raw, cleaned",
    [
        ("''Great'' it isn''t", '"Great" it isn"t'),
        ("A &amp;amp; B &lt;3 &quot;x&quot;", 'A & B <3 "x"'),
        ("Read this http://url_removed now", "Read this now"),
        ("Look: www.site.com/a?b, then go", "Look: , then go"),
        ("the site (http://redchairsoftware.com) works.", "the site works."),
        ("word:http://url_removed!", "word: !"),
        ("RT @anonymous: So true @anonymous's cat, thanks @anonymous", "So true cat, thanks"),
        ("mail customerservice@apexdigital.com please", "mail please"),
        ("thumbs up   ,  really !", "thumbs up , really !"),
        ("Awww, wwwow", "Awww, wwwow"),
    ],
)
def test_cleaning(raw, cleaned):
    assert vader.clean(raw) == cleaned
    assert vader.clean(cleaned) == cleaned


def test_a_file_that_is_not_the_known_package_is_refused(tmp_path):
    (tmp_path / vader.ARCHIVE).write_bytes(b"something else")
    with pytest.raises(InputError, match=r"sha256 is .* delete it"):
        vader.fetch(tmp_path)


def fake_pip(monkeypatch, tmp_path, name, code):
    """Puts an executable `pip` on PATH in place of every other way to call pip."""
    script = tmp_path / name
    script.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(vader, "_pips", lambda: [[str(script)]])


def test_without_pip_access_one_line_says_where_to_put_the_file(monkeypatch, tmp_path):
    fake_pip(monkeypatch, tmp_path, "pip", "print('ERROR: No matching distribution', file=sys.stderr); sys.exit(1)")
    with pytest.raises(InputError) as error:
        vader.fetch(tmp_path / "cache")
    message = str(error.value)
    assert message.startswith(str(tmp_path / "cache" / vader.ARCHIVE)) and "\n" not in message
    assert "ERROR: No matching distribution" in message and "put vaderSentiment-0.5.zip there" in message
    monkeypatch.setattr(vader, "_pips", lambda: [])
    with pytest.raises(InputError, match="no pip in this environment or on PATH"):
        vader.fetch(tmp_path / "cache")


def test_a_damaged_download_never_enters_the_cache(monkeypatch, tmp_path):
    code = "pathlib.Path(sys.argv[sys.argv.index('--dest') + 1], 'vaderSentiment-0.5.zip').write_bytes(b'half')"
    fake_pip(monkeypatch, tmp_path, "pip", code)
    with pytest.raises(InputError, match="sha256"):
        vader.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_pip_fetches_is_cached_and_fetched_once(monkeypatch, tmp_path):
    source = vader_package.package()
    code = f"import shutil; shutil.copy({str(source)!r}, sys.argv[sys.argv.index('--dest') + 1])"
    fake_pip(monkeypatch, tmp_path, "pip", code)
    path = vader.fetch(tmp_path / "cache")
    assert path == tmp_path / "cache" / vader.ARCHIVE and path.read_bytes() == source.read_bytes()
    monkeypatch.setattr(vader, "_pips", lambda: [])
    assert vader.fetch(tmp_path / "cache") == path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all pip looks at; a newer setuptools in it writes `ran` when it runs."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    source_package(folder, "setuptools", "999.0", tmp_path / "ran")
    return folder


def source_package(folder, name, version, ran):
    """A source package whose setup.py writes the file `ran`."""
    with zipfile.ZipFile(folder / f"{name}-{version}.zip", "w") as package:
        code = f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name={name!r}, version={version!r})\n"
        package.writestr(f"{name}-{version}/setup.py", code)


def test_of_another_package_under_the_name_nothing_runs_and_its_hash_is_named(index, tmp_path):
    source_package(index, vader.PACKAGE, vader.PACKAGE_VERSION, tmp_path / "ran")
    found = hashlib.sha256((index / vader.ARCHIVE).read_bytes()).hexdigest()
    with pytest.raises(InputError) as error:
        vader.fetch(tmp_path / "cache")
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{tmp_path / 'cache' / vader.ARCHIVE}: pip could not fetch")
    assert f"{vader.ARCHIVE} has the sha256 {found[:16]}..., not {vader.SHA256[:16]}..." in message
    assert not (tmp_path / "ran").exists() and list((tmp_path / "cache").iterdir()) == []


def test_the_known_package_is_fetched_and_nothing_of_the_index_runs(index, tmp_path, monkeypatch):
    shutil.copy(vader_package.package(), index)
    (tmp_path / "constraints.txt").write_text(f"{vader.PACKAGE}==3.3.2\n")
    (tmp_path / "pip.conf").write_text(f"[global]\nconstraint = {tmp_path / 'constraints.txt'}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert vader.fetch(tmp_path / "cache").is_file()
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def few(loaded, monkeypatch):
    """The package as if it held a few sentences alone, which are built in no time; what loading them gives."""
    splits = {name: rows[:20] for name, rows in loaded[0].items()}
    read = [record for rows in splits.values() for record in rows], {"rows": 60}
    monkeypatch.setattr(vader, "read_package", lambda path: read)
    return splits, {"rows": 60}


def test_a_prepared_dataset_that_has_changed_is_built_again(tmp_path, few):
    cache = vader_package.fill_cache(tmp_path)
    folder = pathlib.Path(vader.prepare(cache).data_dir)
    file = next(folder.glob("*test.array_record*"))
    built = file.read_bytes()
    file.write_bytes(built[:1000] + bytes([built[1000] ^ 1]) + built[1001:])
    assert vader.load(cache) == few
    assert file.read_bytes() == built
    (folder / "metadata.json").unlink()
    assert vader.load(cache) == few


def test_in_a_cache_that_others_may_write_no_dataset_is_read_or_built(tmp_path, few, capsys):
    cache = vader_package.fill_cache(tmp_path / "cache")
    vader.prepare(cache)
    cache.chmod(0o777)
    data = pathlib.Path(vader.prepare(cache).data_dir)
    assert cache not in data.parents and vader.load(cache) == few
    note = f"note: the cache is not used: {cache} may be written by others (mode 0777)"
    assert capsys.readouterr().err.startswith(note)


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="set LFJAX_CACHE to another folder"):
        vader.fetch(tmp_path / "file" / "cache")


def test_importing_the_data_package_does_not_import_tfds():
    code = "import sys, lfjax.data.sources, lfjax.data.batching, lfjax.rewards.baselines, lfjax.rewards.lexicon\n"
    code += "print([m for m in ('tensorflow_datasets', 'sklearn', 'grain', 'vaderSentiment') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_holds_the_licence_and_the_four_files():
    with zipfile.ZipFile(vader_package.package()) as package:
        assert b"MIT" in package.read("vaderSentiment-0.5/LICENSE.txt")
        assert io.BytesIO(package.read(vader._INNER)).read(2) == b"\x1f\x8b"


@pytest.mark.slow
def test_processes_that_start_together_build_the_dataset_once(tmp_path):
    cache = vader_package.fill_cache(tmp_path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        counts = pool.map(_count, [cache] * 2)
    assert counts == [23612, 23612]


def _count(cache):
    return sum(map(len, vader.load(cache)[0].values()))
