"""The folder of compiled programs and fetched data: where it is, and whether its owner alone may write it.

A compiled program is code, and data made from a checked file can no longer be checked against a known sum: what lies in
a folder that others may write is theirs to choose.
"""

from __future__ import annotations

import functools
import grp
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lfjax import terminal

ELSEWHERE = "set LFJAX_CACHE to another folder"


def location() -> Path:
    """$LFJAX_CACHE, or ~/.cache/lfjax."""
    return Path(os.environ.get("LFJAX_CACHE") or "~/.cache/lfjax").expanduser()


def make(folder: Path) -> None:
    """Makes the folder and those above it that are not there, for their owner alone (0700), whatever the umask."""
    if not folder.exists():
        make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def exposure(folder: Path, part: str) -> str:
    """How others may write a part of the cache folder, with the fix; "" where its owner alone may.

    The owner is this process's user or root. Folders above may be open to all with the sticky bit, as /tmp is, and to a
    group that is this user's alone; who may write one could put another folder in the cache's place.
    """
    for path in _to_check(folder, folder / part):
        status = path.lstat()
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid not in (os.geteuid(), 0):
            return f"{path} belongs to {_user(status.st_uid)}; {ELSEWHERE}"
        if mode & 0o022 and not stat.S_ISLNK(status.st_mode):
            mine = status.st_uid == os.geteuid() and not mode & stat.S_ISVTX
            fix = f"chmod 700 {folder} if nobody else has, or " if mine else ""
            return f"{path} may be written by others (mode {mode:04o}); {fix}{ELSEWHERE}"
    for path in dict.fromkeys((*Path(os.path.abspath(folder)).parents, *(folder / part).resolve().parents)):
        if not path.exists():
            continue
        status = path.stat()
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid not in (os.geteuid(), 0):
            return f"{path}, above it, belongs to {_user(status.st_uid)}; {ELSEWHERE}"
        shared = mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
        if (mode & stat.S_IWOTH or shared) and not mode & stat.S_ISVTX:
            fix = f"chmod go-w {path}, or " if status.st_uid == os.geteuid() else ""
            return f"{path}, above it, may be written by others (mode {mode:04o}); {fix}{ELSEWHERE}"
    return ""


def _is_own_group(number: int) -> bool:
    """Whether a group is the one that systems make for this user alone."""
    try:
        return grp.getgrgid(number).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False


def _to_check(folder: Path, part: Path) -> Iterator[Path]:
    """What others can reach of the folder, of its part, and of all in the part."""
    folder, part = folder.resolve(), part.resolve()
    if folder.exists():
        yield folder
        if (_others_enter(folder) or folder not in part.parents) and part.exists():
            yield part
            if _others_enter(part):
                yield from part.rglob("*")


def _others_enter(folder: Path) -> bool:
    return bool(folder.stat().st_mode & 0o011)


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


def can_be_trusted(folder: Path, part: str) -> bool:
    """Whether what lies in the part was put there by its owner, who is from then on alone with it; else a note."""
    exposed = exposure(folder, part)
    if exposed:
        _note(f"the cache is not used: {exposed}")
    elif (folder / part).is_dir() and (folder / part).stat().st_uid == os.geteuid():
        (folder / part).chmod(0o700)
    return not exposed


def can_keep(folder: Path, part: str) -> bool:
    """Whether files that need trust can be kept in the part, which is made; a note says why where they cannot."""
    try:
        make(folder / part)
        with tempfile.TemporaryFile(dir=folder / part):
            return can_be_trusted(folder, part)
    except OSError as error:
        _note(f"compiled programs are not kept: {folder / part}: {error.strerror}; {ELSEWHERE}")
        return False


@functools.cache
def _note(text: str) -> None:
    """On stderr, once, and of several processes by the first alone."""
    if os.environ.get("LFJAX_PROCESS_ID", "0") == "0":
        terminal.note(f"note: {text}")
