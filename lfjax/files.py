"""Files in a folder that somebody else may have made."""

from __future__ import annotations

import os
import pathlib

from lfjax.config import InputError


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
