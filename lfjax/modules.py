"""What "module:name" names: steps, rewards and stages that users write in files of their own."""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path
from typing import Any

from lfjax.config import InputError, on_path


def resolve(key: str, dotted: str, search: tuple[Path, ...] = (), *, kind: type | None = None) -> Any:
    """The function behind "module:function", or with `kind` the object of that kind (`type`: a class).

    The current folder and `search` are on the path.

    Raises:
      InputError: not of that form, no such module (with the paths tried) or no such function in it.
    """
    what = "function" if kind is None else "Class" if kind is type else kind.__name__
    module_name, _, name = dotted.partition(":")
    if not module_name or not name:
        raise InputError(f'{key}: {dotted!r}; write "module:{what}"')
    folders = (Path.cwd(), *search)
    tried = ", ".join(map(str, folders))
    try:
        with on_path(folders):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"{key}: {dotted!r} imports {error.name!r}, which is not installed") from error
        raise InputError(
            f"{key}: no module {module_name!r}; tried {tried} and the installed packages; correct the name"
        ) from error
    except InputError as error:  # of a module that names what is not there itself
        raise InputError(f"{key}: importing {module_name!r} fails: {error}") from error
    except (Exception, SystemExit) as error:  # the user's module fails, or ends the program, while it is imported
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{key}: importing {module_name!r} fails: {cause}; mend that file") from error
    found = getattr(module, name, None)
    if not (callable(found) if kind is None else isinstance(found, kind)):
        near = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"did you mean {near[0]!r}?" if near and near[0] != name else "correct the name"
        place = getattr(module, "__file__", None) or module_name  # a built-in one has no file
        raise InputError(f"{key}: {place} has no {what} {name!r}; {hint}")
    return found


def is_named(text: object) -> bool:
    """Whether it is a text "module:name", not the name of a stage or the path of a folder."""
    return isinstance(text, str) and re.fullmatch(r"[\w.]+:\w+", text) is not None
