"""Checkpoints of one stage: asynchronous saves, exact restores on any mesh.

A checkpoint holds the stage's state (a pytree of arrays) and a small JSON dict beside it. The data position is the
step, and randomness is folded from seed and step, so neither is stored.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lfjax import files
from lfjax.config import InputError
from lfjax.terminal import note

FINISHED = "FINISHED"  # the file beside the steps that the chain writes when the stage is done


class Checkpoints:
    """The checkpoints of one stage, `folder`/<step>/, of which the newest `keep` are kept.

    What a kill left half-written is removed when the folder is opened. With several processes every process makes the
    same calls; the folder is one that all of them see.

    Args:
      check: called with a step and the JSON dict read back; raises ValueError where it is not what was saved.
    Raises:
      InputError: no folder can be made, or a checkpoint's metadata cannot be taken.
    """

    def __init__(
        self, folder: str | os.PathLike, *, keep: int = 2, check: Callable[[int, dict[str, Any]], None] | None = None
    ) -> None:
        for name in ("absl", "asyncio", "concurrent.futures"):  # Orbax logs every file and, at a failure that is
            logging.getLogger(name).setLevel(logging.CRITICAL)  # raised all the same, a traceback from each thread
        self.folder = pathlib.Path(folder).absolute()
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._check = check or (lambda step, extra: None)
        self._check_metadata()
        with self._disk_errors():
            self._manager = self._open()

    def _check_metadata(self) -> None:
        """What Orbax reads when it opens the folder; a file that was cut short it takes as one that is not there."""
        paths = sorted(self.folder.glob(f"*/{_METADATA[0]}"))
        for path in (path for path in paths if path.parent.name.isdecimal()):
            try:
                found = files.json_value(files.read_bytes(path, fix=_fix(path.parent)))
            except (json.JSONDecodeError, UnicodeDecodeError):
                continue
            except ValueError as error:
                raise InputError(f"{path}: not JSON ({error}); {_fix(path.parent)}") from None
            if not isinstance(found, dict) or not isinstance(found.get("item_handlers"), (dict, str, type(None))):
                raise InputError(f"{path}: not what Orbax leaves there; {_fix(path.parent)}")

    def _open(self) -> ocp.CheckpointManager:
        try:
            return ocp.CheckpointManager(self.folder, options=self._options)
        except Exception as error:
            if _is_disk_error(error):
                raise
            cause = f"{type(error).__name__}: {_one_line(error)}"
            raise InputError(f"{self.folder}: not a folder of checkpoints ({cause}); {_ANEW}") from error

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Starts saving; returns once `state` may be donated or changed. Waits for the save before it, if still busy.

        Args:
          step: steps done; a checkpoint of that step that exists already is left as it is.
          state: pytree of jax arrays.
          extra: JSON-able dict: the pending metrics window, for example.
        Raises:
          InputError: this save, or the one before it, could not be written (no space, no permission).
        """
        if step in self._manager.all_steps():
            return
        beside = {"extra": dict(extra), "checksums": _checksums(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), beside=ocp.args.JsonSave(beside))
        with self._disk_errors():
            self._manager.save(step, args=items, force=True)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, None if there is none."""
        return self._manager.latest_step()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint back.

        Without `step` a newest checkpoint that cannot be read is reported in one line on stderr, the one before it is
        taken, and the unreadable one is deleted: the run will save that step again.

        Args:
          abstract_state: the state's structure with shapes, dtypes and *shardings*: arrays or jax.ShapeDtypeStruct.
            The shardings may belong to another mesh than the one that saved.
          step: a certain step, or None for the newest.
        Returns:
          (state on the shardings of `abstract_state`, extra).
        Raises:
          InputError: no checkpoint could be read; names the folder, the cause and the fix.
        """
        self.wait()
        target = jax.tree.map(_abstract, abstract_state)
        steps = [step] if step is not None else sorted(self._manager.all_steps(), reverse=True)
        failures: dict[int, str] = {}
        for candidate in steps:
            restored = self._read(candidate, target)
            if isinstance(restored, str):
                failures[candidate] = restored
                continue
            for broken, cause in failures.items():
                place = self.folder / str(broken)
                if jax.process_index() == 0:
                    note(f"{place}: cannot be read ({cause}); going on from step {candidate}")
                self._manager.delete(broken)
            return restored
        cause = next(iter(failures.values()), "there is none")
        asked = "no checkpoint" if step is None else f"checkpoint {step}"
        raise InputError(f"{self.folder}: {asked} can be read: {cause}; {_ANEW}")

    def _read(self, step: int, target: Any) -> tuple[Any, dict[str, Any]] | str:
        """The state and extra of `step`, or why they cannot be read."""
        items, place = ocp.args.Composite(state=ocp.args.StandardRestore(target)), self.folder / str(step)
        with _quiet_failures():
            try:
                for name in _METADATA:
                    for path in place.glob(name):
                        files.read_json(path, dict, fix="the checkpoint is damaged")
                beside = files.read_json(
                    place / "beside" / "metadata", dict, finite=False, fix="the checkpoint is damaged"
                )
                extra = beside.get("extra")
                if not isinstance(extra, dict):
                    raise ValueError("beside/metadata: no extra in it")
                self._check(step, extra)
                state = self._manager.restore(step, args=items)["state"]
                if _checksums(state) == beside.get("checksums"):
                    return state, extra
                cause = "the arrays are not those that were saved: bytes were changed on disk"
            except InputError as error:
                cause = _one_line(str(error).replace(f"{place}/", ""))
            except Exception as error:  # Orbax, TensorStore and json each raise their own kinds for a broken file
                cause = _one_line(error)
            time.sleep(0.2)  # for the reads under way
            gc.collect()
        return cause

    def wait(self) -> None:
        """Returns when everything saved is on disk. Raises InputError if it could not be written."""
        with self._disk_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the saves and frees Orbax's threads."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, InputError) or not _is_disk_error(error):
                raise
            with _quiet_failures():
                time.sleep(0.2)  # for the writes under way
                gc.collect()
            raise InputError(
                f"{self.folder}: cannot write a checkpoint: {_one_line(error)}; free some space or choose another "
                "--workdir, then start the same command again"
            ) from error


# What Orbax reads of a checkpoint as JSON; the first when it opens the folder.
_METADATA = ("_CHECKPOINT_METADATA", "*/_CHECKPOINT_METADATA", "state/_METADATA", "state/array_metadatas/*")
_ANEW = "delete this folder to train the stage again, or use another --workdir"
_DISK_SIGNS = (
    "No space left",
    "File too large",
    "Disk quota",
    "Permission denied",
    "Read-only file system",
    "RESOURCE_EXHAUSTED",
)


@contextlib.contextmanager
def _quiet_failures() -> Iterator[None]:
    """A failed read or write leaves others under way, coroutines and an event loop; their complaints would be noise."""
    previous = sys.unraisablehook
    sys.unraisablehook = lambda _unraisable: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            sys.unraisablehook = previous


def _checksums(state: Any) -> list[int]:
    """The sum modulo 2^32 of every leaf's words: one changed bit changes it, the mesh does not.

    The files themselves do not tell: one changed byte in four comes back as other numbers, without an error.
    """
    return [int(total) for total in jax.device_get(_word_sums(jax.tree.leaves(state)))]


@jax.jit
def _word_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def words(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.bool_:
            return leaf
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        return jax.lax.bitcast_convert_type(leaf, unsigned)

    return [jnp.sum(words(leaf), dtype=jnp.uint32) for leaf in leaves]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _is_disk_error(error: Exception) -> bool:
    return isinstance(error, OSError) or any(sign in str(error) for sign in _DISK_SIGNS)


def _fix(folder: pathlib.Path) -> str:
    return f"delete {folder}: the stage goes on from the checkpoint before, or anew"


def _one_line(error: BaseException | str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
