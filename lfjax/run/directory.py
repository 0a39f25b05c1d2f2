"""A run's directory: one run holds it at a time, and goes on only with the config and inputs it was started with."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from lfjax import config as configs
from lfjax import files, tokenizers
from lfjax.config import Config, InputError
from lfjax.files import write_json
from lfjax.interop import hf
from lfjax.metrics import METRICS, SAMPLES, SUMMARY, TIMING
from lfjax.report.rundir import STAGES
from lfjax.run.devices import sync
from lfjax.run.longer import lengthen, lengthened
from lfjax.run.stage import Stage
from lfjax.terminal import note

INPUTS = "inputs.json"  # sha256 of the data, models, tokenizer and forks that the run was started with
PARTS = (
    "checkpoints", "models", "tensorboard", "steps", "profile", "config.json", INPUTS, STAGES, METRICS, TIMING, SAMPLES,
    SUMMARY,
)  # fmt: skip
WHOLE_BYTES = 64 * 2**20  # a larger file of a model counts by its size, its first MiB and its last


class Workdir:
    """The directory of one run.

    Args:
      stages: name -> declaration, of all that there are.
      follow_links: links in it may lead out of it.
    Raises:
      InputError: no folder can be there.
    """

    def __init__(
        self, path: str | os.PathLike[str], stages: Mapping[str, Stage], *, follow_links: bool = False
    ) -> None:
        if not os.fspath(path):
            raise InputError("--workdir=: empty; name the folder of the run")
        if "://" in os.fspath(path):
            raise InputError(f"--workdir={os.fspath(path)}: an address; name a folder, of a mounted bucket perhaps")
        self.path = Path(path)
        self._stages, self._follow_links = stages, follow_links
        self._held: int | None = None

    def open(
        self, config: Config, forks: Mapping[str, Path], *, fits: Callable[[], None], check: Callable[[], None]
    ) -> None:
        """Holds the directory, which is new, or the same run's: then data and models have to be the same as well.

        Args:
          forks: name -> source file of what is not lfjax's own code; `steps/` keeps copies.
          fits: raises InputError where the config does not fit the models; called before anything is written.
          check: raises InputError where a new run cannot be done otherwise; called then.
        Raises:
          InputError: it belongs to another config, to another data file or model, or to a run that goes on.
        """
        try:
            self._open(config, forks, fits, check)
            sync("opened the run directory")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leaves the directory to others."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _open(self, config: Config, forks: Mapping[str, Path], fits: Callable, check: Callable) -> None:
        resolved, path = covered(config, self._stages), self.path / "config.json"
        self._check_folders(config)
        self._hold()
        begun = any((self.path / name).exists() for name in ("checkpoints", METRICS))
        if path.exists():
            before = files.read_json(path, dict)
            differs = changes(before, resolved, config, self._stages)
            moved = [change for change in differs if change.startswith("config.mesh.")]  # where, not what, is computed
            differs = [change for change in differs if change not in moved]
            if moved and begun and not differs and jax.process_index() == 0:
                note(f"note: going on with another mesh ({'; '.join(moved)})")
            if not differs and begun:
                self._check_inputs(config, forks)
                return fits()
            if begun and (stage := lengthened(config, self._stages, before, resolved, differs)):
                self._check_inputs(config, forks)
                fits()
                if jax.process_index() == 0:
                    lengthen(self.path, config, stage, before, resolved)
                return
            if differs and begun:
                shown = "; ".join(differs[:5]) + (f"; and {len(differs) - 5} more" if len(differs) > 5 else "")
                raise InputError(
                    f"{path}: the run was started with another config ({shown}); use another --workdir"
                    f"{self._start_from_here(config, differs)}"
                )
        fits()
        check()
        if jax.process_index() == 0:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"--workdir={self.path}: {error.strerror}; choose a folder you may write") from error
            self._hold()
            for name, source in forks.items():
                (self.path / "steps").mkdir(exist_ok=True)
                files.write_bytes(self.path / "steps" / f"{name}.py", source.read_bytes())
            write_json(self.path / INPUTS, digests(config, self._stages, forks))
            write_json(path, resolved)

    def _start_from_here(self, config: Config, differs: list[str]) -> str:
        """How a new run of the first stage whose own section differs starts from a model that is here; "": none is."""
        sections = [change.split(".")[1] for change in differs]
        stage = next((stage for stage in config.stages if stage in sections and self._stages[stage].makes), "")
        key, name = self._stages[stage].start(config, self._stages) if stage else ("", None)
        folder = self.path / "models" / (name or "")
        here = name and folder.is_dir()
        return f", which may start from a model of this one: --config.{key}={folder}" if here else ""

    def _check_folders(self, config: Config) -> None:
        """Called before anything in the directory is read."""
        for folder in (self.path, *self.path.parents):
            if folder.is_symlink() and not folder.exists():
                raise InputError(
                    f"--workdir={self.path}: {folder} is a link to {folder.readlink()}, which is not there; make that"
                    " folder, or choose another --workdir"
                )
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--workdir={self.path}: a file, not a folder; choose another --workdir")
        try:
            str(self.path.absolute()).encode()
        except UnicodeEncodeError:
            if any(
                self._stages[stage].trains(config) for stage in config.stages
            ):  # TensorStore, which writes checkpoints, takes no other names
                raise InputError(f"--workdir={str(self.path)!a}: no UTF-8 name; name another folder") from None
        parts = ("checkpoints", "models")
        for name in (*parts, "steps", *(f"{part}/{stage}" for part in parts for stage in config.stages)):
            folder = self.path / name
            if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
                raise InputError(f"{folder}: a file where a folder of the run goes; move it away")
        if not self._follow_links:
            self._check_links()
        for entry in _entries(self.path / "checkpoints"):
            if not entry.is_file() and not entry.is_dir() and entry.exists():
                raise InputError(f"{entry}: not a regular file; remove it")  # Orbax would wait for a FIFO

    def _check_links(self) -> None:
        """Refuses links that lead out: what is written through them lands in others' folders, and so they are read."""
        home = Path(os.path.realpath(self.path))
        own = (self.path / "wandb", self.path / "wandb" / "run_id")  # what wandb puts there has links to its logs
        for entry in (*own, *(entry for name in PARTS for entry in _entries(self.path / name))):
            if entry.is_symlink() and not (end := Path(os.path.realpath(entry))).is_relative_to(home):
                raise InputError(
                    f"{entry}: a link to {end}, outside of the run directory; remove it, or give --follow-links"
                )

    def _hold(self) -> None:
        """Keeps the directory to this run until `close`; the lock goes with the process, however it ends."""
        if self._held is not None or jax.process_index() != 0 or not self.path.is_dir():
            return
        held = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise InputError(
                f"--workdir={self.path}: another lfjax train works there; wait for its end, or use another --workdir"
            ) from None
        except OSError:  # a file system without locks
            pass
        self._held = held
        for folder in (self.path, self.path / "steps", *self.path.glob("checkpoints/*")):
            if folder.is_dir():
                files.remove_leftovers(folder)

    def _check_inputs(self, config: Config, forks: Mapping[str, Path]) -> None:
        """Refuses to go on with other data or models than the run was started with; keeps other code and says so.

        Code may have been mended, data may not be: which record comes when follows from it.
        """
        path = self.path / INPUTS
        fix = "delete it, if data and forks are what the run was started with"
        before = files.read_json(path, dict, fix=fix) if path.exists() else {}
        found = digests(config, self._stages, forks)
        other = [name for name, digest in found.items() if before.get(name, digest) != digest]
        for name in other:
            if not name.startswith("steps/"):
                raise InputError(
                    f"{path}: {name} is not what the run was started with; put that back, or use another --workdir"
                )
        if other and jax.process_index() == 0:
            for name in other:
                stem = name.removeprefix("steps/").removesuffix(".py")
                earlier = len(list((self.path / "steps").glob(f"{stem}*.py")))
                kept = self.path / "steps" / f"{stem}.{earlier + 1}.py"
                files.write_bytes(kept, forks[stem].read_bytes())
                note(f"note: {forks[stem]} has changed since the run was started; kept as {kept}")
            write_json(path, before | found)


def _entries(top: Path) -> Iterator[Path]:
    """A file or folder and all that is below it, links before what they lead to; each folder once."""
    found, seen = [top], set()
    while found:
        entry = found.pop()
        yield entry
        if entry.is_dir() and (place := os.path.realpath(entry)) not in seen:
            seen.add(place)
            with contextlib.suppress(OSError):
                found += sorted(entry.iterdir(), reverse=True)


def forks_of(
    config: Config,
    stages: Mapping[str, Stage],
    steps: Mapping[str, Any],
    functions: Mapping[str, Any],
    trackers: Iterable[type] = (),
) -> dict[str, Path]:
    """Name -> source file of the code that is not lfjax's own: steps, functions that stages call, trackers, stages.

    Args:
      functions: config key -> function.
    """
    steps = {**steps, **{f"{kind.__name__}_tracker": kind for kind in trackers}}
    functions = {re.sub(r"\W+", "_", key.rpartition(".")[2] + "_function"): f for key, f in functions.items()}
    found = _sources({**steps, **functions})
    own = _sources({f"{stage}_stage": stages[stage].run for stage in config.stages})
    return found | {name: path for name, path in own.items() if path not in found.values()}


def _sources(functions: Mapping[str, Any]) -> dict[str, Path]:
    found = {}
    for name, function in functions.items():
        function = inspect.unwrap(getattr(function, "func", function))
        known = inspect.isfunction(function) or inspect.isclass(function)
        source = inspect.getsourcefile(function) if known else None
        if source and not function.__module__.startswith("lfjax."):
            found[name] = Path(source)
    return found


def covered(config: Config, stages: Mapping[str, Stage]) -> dict[str, Any]:
    """What of a config makes a run what it is: the sections that stages share, and those of its own stages.

    Of a stage that is not the run's own only the keywords of steps that the run's stages take: the rest is left out.
    A method that is added to lfjax later changes nothing of it.
    """
    plain = configs.to_plain(config)
    taken = {name: step for stage in config.stages for name, step in stages[stage].steps.items()}
    found: dict[str, Any] = {}
    for name, value in plain.items():
        if name == "steps":
            found[name] = {step: value[step] for step in value if step in taken}
        elif name not in stages or name in config.stages or name in configs.shared_sections():
            found[name] = value
    for step in taken.values():
        section, _, part = step.section.partition(".")
        if section and section not in config.stages:
            found[section] = {**found.get(section, {}), part: plain[section][part]}
    return found


def changes(before: dict[str, Any], now: dict[str, Any], config: Config, stages: Mapping[str, Stage]) -> list[str]:
    """One "key: old -> new" for each leaf of `covered` that differs and may not: what is in `run` may.

    A key that was not there before is no difference where it has its default, nor is one that has moved.
    """
    moved = {f"config.{old}": f"config.{new}" for old, new in configs.moved_keys(stages).items()}
    default = configs.flatten(configs.to_plain(configs.base_config(*config.outside)))
    known = {moved.get(key, key): value for key, value in configs.flatten(before).items()}
    found = configs.flatten(now)
    added = {key: value for key, value in found.items() if key not in known and default.get(key) == value}

    def counts(key: str) -> bool:
        section, _, rest = key.removeprefix("config.").partition(".")
        whole = section in config.stages or section not in {"steps", *stages}
        return section in now and section != "run" and (whole or rest.partition(".")[0] in now[section])

    compared = {key: value for key, value in (known | added).items() if counts(key)}
    return configs.difference_of(compared, {key: value for key, value in found.items() if counts(key)})


def digests(config: Config, stages: Mapping[str, Stage], forks: Mapping[str, Path]) -> dict[str, str]:
    """sha256 of what a run reads besides its config: config key or fork -> digest, of the files that are there."""
    data = config.data
    files = {f"config.data.{key}": data[key] for key in ("path", "validation_path", "test_path") if data[key]}
    files |= {f"steps/{name}.py": source for name, source in forks.items()}
    found = {}
    for name, file in files.items():
        if Path(file).is_file():
            with open(file, "rb") as content:
                found[name] = hashlib.file_digest(content, "sha256").hexdigest()
    models = {f"config.{k}": v for stage in config.stages for k, v in stages[stage].models(config, stages).items()}
    if config.model.init_from:
        models["config.model.init_from"] = config.model.init_from
    found |= {key: _digest(model_files(Path(name))) for key, name in models.items() if name not in stages}
    if config.tokenizer.path:
        found["config.tokenizer.path"] = _digest(tokenizer_files(Path(config.tokenizer.path)))
    return found


def tokenizer_files(path: Path) -> list[Path]:
    """What a tokenizer is read from: a folder's files, or the one that is named and what stands beside it."""
    folder, named = (path, ()) if path.is_dir() else (path.parent, (path.name,))
    names = sorted({*named, *tokenizers.NAMES, hf.CONFIG})
    return [folder / name for name in names if (folder / name).is_file()]


def model_files(folder: Path) -> list[Path]:
    """What a model is read from: its tensors, config.json and tokenizer; of an adapter also its base's."""
    parts = hf.folders(folder)
    settings = [file for part in parts if (file := part / hf.ADAPTER_CONFIG).is_file()]
    return [*settings, *(x for part in parts for x in (*sorted(part.glob("*.safetensors*")), *tokenizer_files(part)))]


def _digest(files: Iterable[Path]) -> str:
    """sha256 of names, sizes and contents, of a file beyond WHOLE_BYTES its first MiB and its last."""
    found, part = hashlib.sha256(), 2**20
    for file in files:
        size = file.stat().st_size
        found.update(os.fsencode(f"{file.name}\0{size}\0"))
        with file.open("rb") as content:
            if size <= WHOLE_BYTES:
                found.update(content.read())
            else:
                found.update(content.read(part))
                content.seek(-part, os.SEEK_END)
                found.update(content.read())
    return found.hexdigest()
