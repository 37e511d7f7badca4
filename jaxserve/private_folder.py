"""A folder for what is compiled. What lies in it is executed, so nobody else may write there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from jaxserve.errors import ConfigError


def private_folder(folder: str) -> Path:
    """Makes a folder for what is compiled.

    Raises:
        ConfigError: the folder is not this user's alone. What lies in it is executed.
    """
    path = Path(folder).expanduser()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"The compilation cache {folder} must be a folder that belongs to this user with mode 0700, because "
            "compiled code in it is executed. Set the mode, choose another folder, or turn the cache off."
        )
    return path
