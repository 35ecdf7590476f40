"""Output directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(path: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse an output directory that `new_directory` would refuse, before any work is done.

    Raises:
        ValueError: `path` is a file, or a directory that is not empty while `overwrite` is False, or one that
            `overwrite` must not replace because it lacks the file `marker` of an earlier run.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file, and the output must be a directory")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{path} is not empty; choose another directory or pass --overwrite to replace it")
    if not (path / marker).is_file():
        raise ValueError(f"{path} holds no {marker}, so it is not an earlier output and --overwrite leaves it alone")


@contextmanager
def new_directory(path: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Fill a hidden directory beside `path` and rename it to `path` at the end; on any failure nothing stays.

    Args:
        path: the directory to make; missing parents are made too.
        overwrite: replace an earlier output, recognised by its file `marker`.
        marker: name of a file that every such output holds.

    Yields:
        The directory to write into. Until the block ends without an exception, `path` is untouched.

    Raises:
        ValueError: as `check_output` says.
    """
    path = path.resolve()
    check_output(path, overwrite=overwrite, marker=marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            _replace(path, partial)
        else:
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace(path: Path, new: Path) -> None:
    """Swap `new` in for `path`; a failing second rename puts the old directory back."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)
