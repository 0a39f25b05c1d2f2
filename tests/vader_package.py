"""The rated sentences for tests that need them: from the cache or by pip; skips, loudly, where neither works."""

import functools
import pathlib
import shutil

import pytest

from lfjax.config import InputError
from lfjax.data import vader


@functools.cache
def _path() -> pathlib.Path | str:
    try:
        return vader.fetch()
    except InputError as error:
        return str(error)


def package() -> pathlib.Path:
    """The path of vaderSentiment-0.5.zip."""
    path = _path()
    if isinstance(path, str):
        pytest.skip(f"the rated sentences are not to be had, tests on them did not run: {path}")
    return path


def fill_cache(folder: pathlib.Path) -> pathlib.Path:
    """A cache folder that holds the package and nothing made from it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(package(), folder / vader.ARCHIVE)
    return folder
