"""The one way to write a file, and to read a small one that somebody else may have made.

Writing: a new file beside the target, then a rename over it, so that a reader sees the old content or the new, no link
is followed, and a failure leaves nothing. Reading: regular files alone, of a bounded size, as values of bounded depth
and number, with finite numbers; what is wrong is one line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, TypeVar

import numpy as np

from lfjax.config import BadLines, InputError

MOST_BYTES = 64 * 2**20  # of a file that is read whole, and of a line
MOST_DEPTH = 100  # of JSON: arrays and objects in one another
MOST_VALUES = 4_000_000  # of a JSON file or line
MOST_RATIO = 200  # of unpacked to packed size, where more is unpacked than two such lines
RESTORE = "restore or delete the file"

_BLOCK = 2**20
_NEW = re.compile(r"\.lfjax-[0-9a-f]{16}")
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
Kind = TypeVar("Kind")
Path = str | os.PathLike[str]


# Writing


@contextlib.contextmanager
def writing(path: Path, *, pipe: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes the target's place at the end of the block, whole; where the block fails, nothing does.

    The mode is what the umask leaves. A link in the target's place is replaced, not followed.

    Args:
      pipe: what is no regular file, such as /dev/stdout or a FIFO, is written directly: for outputs that a user names.
    Raises:
      InputError: it cannot be written; names the target, the cause and the fix.
      BrokenPipeError: whoever reads the pipe has enough.
    """
    path = pathlib.Path(path)
    direct = _open_pipe(path) if pipe else None
    if direct is not None:
        with _naming(path), direct:
            yield direct
        return
    if _is_system(path):
        raise InputError(f"{path}: cannot write: no regular file goes there; name another place")
    fresh = path.parent / f".lfjax-{secrets.token_hex(8)}"
    try:
        with _naming(path, fresh):
            with open(os.open(fresh, _CREATE | os.O_EXCL, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """A whole file, as `writing` does."""
    with writing(path) as file:
        file.write(content)


def write_text(path: Path, text: str, *, pipe: bool = False) -> None:
    """UTF-8 text, as `writing` does."""
    with writing(path, pipe=pipe) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, as `writing` does; non-finite floats become null."""
    write_bytes(path, encoded(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"))


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A safetensors file, as `writing` does, one tensor after the other: none is held twice.

    Source: https://github.com/huggingface/safetensors, "Format"; wider types first, so that each is aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ends = list(itertools.accumulate((tensors[name].nbytes for name in order), initial=0))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, begin, end in zip(order, ends, ends[1:], strict=False):
        x = tensors[name]
        header[name] = {"dtype": _TENSOR_TYPES[x.dtype.name], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


_TENSOR_TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}  # fmt: skip


def append(path: Path, content: bytes) -> None:
    """Adds to a log, a regular file that is made where there is none.

    Raises:
      InputError: it is a link or no regular file, or cannot be written.
    """
    path = pathlib.Path(path)
    with (
        _naming(path),
        open(os.open(path, _CREATE | os.O_APPEND | os.O_NONBLOCK, 0o666), "ab") as file,
    ):
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.ENXIO, "Not a regular file")
        file.write(content)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which is made where there is none, alone among processes; OSError where it cannot be made."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed have left in a folder that this process alone writes to."""
    for entry in pathlib.Path(folder).iterdir():
        if _NEW.fullmatch(entry.name) and not entry.is_dir():
            with contextlib.suppress(OSError):
                entry.unlink()


def cannot_write(path: Path, error: OSError) -> InputError:
    """What to say of a file or folder that cannot be written."""
    cause = "a link stands there" if error.errno == errno.ELOOP else error.strerror or str(error)
    in_the_way = (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTEMPTY)
    fix = "remove what stands there" if error.errno in in_the_way else "free some space, or name another place"
    return InputError(f"{path}: cannot write: {cause}; {fix}")


def plain(value: Any) -> Any:
    """A copy that JSON can hold: NumPy and JAX scalars become Python's, non-finite floats null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encoded(text: str) -> bytes:
    r"""JSON as UTF-8; half a surrogate pair (a file name that is not UTF-8 has them) becomes its JSON escape \uXXXX."""
    return text.encode("utf-8", "backslashreplace")


@contextlib.contextmanager
def _naming(path: pathlib.Path, fresh: pathlib.Path | None = None) -> Iterator[None]:
    """Says of what the system refuses that `path` cannot be written; errors with another file's name pass."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) not in (str(path), str(fresh)):
            raise
        raise cannot_write(path, error) from error


def _open_pipe(path: pathlib.Path) -> BinaryIO | None:
    """What is written to directly: a file that this process holds open, a character device, a FIFO."""
    number = _own_descriptor(path)
    if number is not None:
        with _naming(path):
            return open(os.dup(number), "wb")
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        return None
    with _naming(path):
        return open(os.open(path, os.O_WRONLY | os.O_CLOEXEC), "wb")


_SYSTEM = ("/dev", "/proc", "/sys")  # what stands there is the system's
_OURS = ("/dev/shm",)  # but for what is memory to keep files in


def _is_system(path: pathlib.Path) -> bool:
    """Whether the entry itself, not what it may be a link to, is the system's."""
    folder = pathlib.Path(os.path.realpath(path.parent))
    return any(map(folder.is_relative_to, _SYSTEM)) and not any(map(folder.is_relative_to, _OURS))


def _own_descriptor(path: pathlib.Path) -> int | None:
    """N where the path is /dev/stdout, /dev/fd/N or the like: opened anew, it would be written from its beginning."""
    for _ in range(8):
        folder = os.path.realpath(path.parent)
        if (
            folder in ("/dev/fd", os.path.realpath("/proc/self/fd"), f"/proc/{os.getpid()}/fd")
            and path.name.isdecimal()
        ):
            return int(path.name)
        if not path.is_symlink():
            return None
        path = pathlib.Path(folder) / os.readlink(path)
    return None


# Reading


def open_regular(path: Path, *, fix: str = RESTORE) -> BinaryIO:
    """A regular file, or a link to one, opened to read; nothing else is waited for.

    Raises:
      InputError: no such file, a folder, a FIFO, a device, or no permission.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {fix}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}; {fix}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        found = "is a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{path}: {found}; {fix}")
    return open(descriptor, "rb")


def read_bytes(path: Path, *, most: int = MOST_BYTES, fix: str = RESTORE) -> bytes:
    """A regular file of at most `most` bytes; InputError names it."""
    with open_regular(path, fix=fix) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            content = b"" if size > most else file.read(most + 1)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}; {fix}") from None
    if size > most or len(content) > most:
        raise InputError(f"{path}: larger than {_size(most)}; {fix}")
    return content


def read_text(path: Path, *, most: int = MOST_BYTES, fix: str = RESTORE) -> str:
    """A regular file of UTF-8 text, with or without a byte order mark; InputError names it, and the line."""
    return decoded(read_bytes(path, most=most, fix=fix), path, fix=fix).removeprefix("\ufeff")


def decoded(content: bytes, path: Path, *, fix: str = RESTORE) -> str:
    """UTF-8 text; InputError names the file and the line."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); {fix}") from None


def read_json(
    path: Path, kind: type[Kind] = object, *, most: int = MOST_BYTES, finite: bool = True, fix: str = RESTORE
) -> Kind:
    """What a JSON file holds.

    Args:
      kind: what it has to be: dict or list.
      finite: Python's NaN and Infinity, which no JSON has, are an error.
    Raises:
      InputError: no such file, or not such JSON; names the file and, where it is known, the line.
    """
    return parse_json(read_bytes(path, most=most, fix=fix), path, kind, finite=finite, fix=fix)


def parse_json(
    content: bytes, path: Path, kind: type[Kind] = object, *, finite: bool = True, fix: str = RESTORE
) -> Kind:
    """As `read_json`, of a file's bytes."""
    try:
        value = json_value(content.removeprefix(b"\xef\xbb\xbf"), finite=finite)
    except UnicodeDecodeError:
        decoded(content, path, fix=fix)
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); {fix}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {fix}") from None
    if not isinstance(value, kind):
        wanted = {dict: "an object", list: "an array"}.get(kind, kind.__name__)
        raise InputError(f"{path}: found a JSON {type(value).__name__}, not {wanted}; {fix}")
    return value


def json_value(content: bytes, *, once: bool = False, finite: bool = True) -> Any:
    """The value of a JSON text, of at most MOST_DEPTH and MOST_VALUES; numbers are finite.

    Args:
      once: a field that stands twice in an object is an error.
      finite: without it, and without `once`, numbers may be NaN and infinite as well.
    Raises:
      ValueError: anything else; JSONDecodeError and UnicodeDecodeError know the place.
    """
    _check_shape(content)
    try:
        return (_ONCE if once else _ANY if finite else _PYTHON).decode(content.decode("utf-8"))
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("a whole number of too many digits") from None
        raise


def json_lines(
    path: Path, *, fix: str, once: bool = False, wrong: Callable[[InputError], None] | None = None
) -> Iterator[tuple[str, Any]]:
    """Streams ("FILE:LINE", value) for each line of a JSONL file, packed by gzip or not; blank lines are skipped.

    Args:
      wrong: gets the error of a line, which is then left out; None: it is raised.
    Raises:
      InputError: as `lines`, or a line is not UTF-8 or not JSON; the message starts with FILE:LINE and ends in `fix`.
    """
    for number, line in lines(path, fix=fix):
        where = f"{path}:{number}"
        try:
            value = json_value(line, once=once)
        except ValueError as error:
            if wrong is None:
                raise _not_json(where, error, fix) from None
            wrong(_not_json(where, error, fix))
        else:
            yield where, value


class Faults:
    """Gathers what is wrong with the lines of a file, so that it is shown at once: 20 of them, and how many more."""

    SHOWN, COUNTED = 20, 10_000

    def __init__(self, path: Path):
        self._path, self._count, self._shown = path, 0, list[InputError]()

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, error: InputError) -> None:
        """One more; so many that none is looked for any more are shown now."""
        self._count += 1
        if self._count <= self.SHOWN:
            self._shown.append(error)
        if self._count == self.COUNTED:
            self.show()

    def show(self) -> None:
        """Raises the InputError that there is, or `BadLines` of several; nothing where there is none."""
        if self._count == 1:
            raise self._shown[0]
        more, least = self._count - len(self._shown), "at least " if self._count == self.COUNTED else ""
        if self._count:
            last = [f"{self._path}: {least}{more} more lines are wrong"] if more else []
            raise BadLines([*map(str, self._shown), *last])


def _not_json(where: str, error: ValueError, fix: str) -> InputError:
    if isinstance(error, UnicodeDecodeError):
        found = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
        return InputError(f"{where}: not UTF-8 ({found}); save the file as UTF-8")
    if isinstance(error, json.JSONDecodeError):
        column = min(error.pos, len(error.doc.rstrip())) + 1  # behind the text, not on the line that its end begins
        return InputError(f"{where}: not JSON: {error.msg} at column {column}; {fix}")
    return InputError(f"{where}: not JSON: {error}; {fix}")


def lines(path: Path, *, most: int = MOST_BYTES, fix: str = RESTORE) -> Iterator[tuple[int, bytes]]:
    r"""Streams (number, line) of the lines that are not blank, unpacked where the file is gzipped; `\n` is kept.

    A byte order mark is left out.

    Raises:
      InputError: as `open_regular`; a line of more than `most` bytes, more than is packed into any real file, or
        damaged gzip data.
    """
    with open_regular(path, fix=fix) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if packed else file
        try:
            yield from split_lines(_blocks(path, file, stream, packed, fix), path, most=most, fix=fix)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: damaged gzip data ({error}); restore the file") from None


def text_lines(path: Path, *, fix: str = RESTORE) -> Iterator[tuple[int, str]]:
    """As `lines`, in UTF-8; InputError names the line that is none."""
    for number, line in lines(path, fix=fix):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x}); {fix}") from None


def split_lines(
    blocks: Iterable[bytes], path: Path, *, most: int = MOST_BYTES, fix: str = RESTORE
) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines of a stream that are not blank; a line of more than `most` bytes is an InputError."""
    number, begun, size = 1, [], 0
    for block in blocks:
        if not size and not block.strip():
            number += block.count(b"\n")
            begun = [block[block.rfind(b"\n") + 1 :]]
            size = len(begun[0])
            continue
        first, *others = block.split(b"\n")
        begun.append(first)
        size += len(first)
        if size > most:
            raise InputError(f"{path}:{number}: a line of more than {_size(most)}; {fix}")
        if not others:
            continue
        for line in (b"".join(begun), *others[:-1]):
            if not line.isspace() and line:
                yield number, line + b"\n"
            number += 1
        begun, size = [others[-1]], len(others[-1])
    last = b"".join(begun)
    if last.strip():
        yield number, last


def _blocks(path: Path, file: BinaryIO, stream: Any, packed: bool, fix: str) -> Iterator[bytes]:
    unpacked = 0
    while block := stream.read(_BLOCK):
        block = block if unpacked else block.removeprefix(b"\xef\xbb\xbf")
        unpacked += len(block)
        if packed and unpacked > 2 * MOST_BYTES and unpacked > MOST_RATIO * file.tell():
            raise InputError(f"{path}: gzip data that unpacks to more than {MOST_RATIO} times its size; {fix}")
        yield block


def _check_shape(content: bytes) -> None:
    """Refuses depth and number before anything is made of them; exact only where a cheap upper bound is not enough."""
    opened = content.count(b"[") + content.count(b"{")
    if opened <= MOST_DEPTH and opened + content.count(b",") <= MOST_VALUES:
        return
    bare = content.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_STRUCTURE)
    if bare.count(b'"') > 4 * MOST_VALUES:  # a name and a text each
        raise ValueError(f"more than {MOST_VALUES} values")
    outside = b"".join(bare.replace(b'""', b"").split(b'"')[::2])
    brackets = outside.replace(b",", b"")
    if outside.count(b",") + len(brackets) // 2 > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values")
    depths = itertools.accumulate(1 if bracket in b"[{" else -1 for bracket in brackets)
    if max(depths, default=0) > MOST_DEPTH:
        raise ValueError(f"nested deeper than {MOST_DEPTH}")


_NO_STRUCTURE = bytes(set(range(256)) - set(b'[]{},"'))


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{_cut(text)} is too large a number")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; of a field given twice JSON readers keep one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"field {json.dumps(_cut(twice))} stands twice in one object")
    return found


_ANY = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)
_PYTHON = json.JSONDecoder()
_ONCE = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_each_once)


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _size(count: int) -> str:
    return f"{count // 2**20} MB" if count >= 2**20 else f"{count} bytes"


# Links


def inside(folder: str | os.PathLike[str], name: str) -> pathlib.Path:
    """The path of the file `name` in a folder, which is there or not.

    The folder itself may be a link. In Hugging Face's cache a file of `snapshots/REVISION` is a link to one that lies
    directly in the `blobs` beside `snapshots`.

    Raises:
      InputError: the file is a link that leads out of the folder, and not to such a blob.
    """
    file = pathlib.Path(folder) / name
    root, end = (pathlib.Path(os.path.realpath(path)) for path in (folder, file))
    snapshots = (place.parent for place in (root, *root.parents) if place.parent.name == "snapshots")
    if not end.is_relative_to(root) and not any(end.parent == place.parent / "blobs" for place in snapshots):
        raise InputError(f"{file}: a link that leads out of its folder, to {end}; put that file itself in its place")
    return file
