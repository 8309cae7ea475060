"""The folder for cached files that are trusted when they are read, such as compiled code.

Another user who could replace such a file would run code as this user.
"""

import os
import stat
from pathlib import Path


def private_directory() -> Path | None:
    """Returns the folder gemma_fast in $XDG_CACHE_HOME, by default ~/.cache, with all symlinks
    resolved. Creates it, with mode 0700.

    Only this user and root can change what the path leads to: they own the folder and all folders
    above it, and no one else can write there, except in folders like /tmp with the sticky bit, in
    which others cannot rename it. Returns None if that is not so, if the folder cannot be created,
    and on systems without POSIX permissions. The folder may still be read-only or full, and files
    in it may be damaged.
    """
    if os.name != "posix":
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if not cache.is_absolute():  # the XDG specification ignores such a path
            cache = Path.home() / ".cache"
        directory = cache.resolve() / "gemma_fast"
        for folder in (*reversed(directory.parents), directory):
            folder.mkdir(mode=0o700, exist_ok=True)
            if not _is_private(folder, sticky=folder != directory):
                return None
    except (OSError, RuntimeError):  # RuntimeError: there is no home, or a loop of symlinks
        return None
    return directory


def _is_private(folder: Path, sticky: bool) -> bool:
    """Whether no user but this one and root can rename or remove folders of this user in `folder`.

    sticky  it may be writable for all, if it has the sticky bit
    """
    status = folder.lstat()
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    allowed = not writable or (sticky and status.st_mode & stat.S_ISVTX)
    return stat.S_ISDIR(status.st_mode) and status.st_uid in (0, os.geteuid()) and bool(allowed)
