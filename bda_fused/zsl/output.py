"""Output directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


class OutputError(ValueError):
    """An output directory that cannot be made; nothing was written."""


def check_output(path: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse an output directory that `new_directory` would refuse, as far as can be told without making one.

    Raises:
        OutputError: `path` is a file or lies in one, or it is to be made where nobody may write, or it is a directory
            that is not empty while `overwrite` is False, or one that `overwrite` must not replace because it lacks the
            file `marker` of an earlier run.
    """
    if not path.exists():
        parent = next(parent for parent in path.resolve().parents if parent.exists())
        if not parent.is_dir():
            raise OutputError(f"{path} cannot be made, as {parent} is a file")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path} cannot be made, as {parent} cannot be written to")
        return
    if not path.is_dir():
        raise OutputError(f"{path} is a file, and the output must be a directory")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{path} is not empty; choose another directory or pass --overwrite to replace it")
    if not (path / marker).is_file():
        raise OutputError(f"{path} holds no {marker}, so it is not an earlier output and --overwrite leaves it alone")


@contextmanager
def new_directory(path: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Fill a hidden directory beside `path` and rename it to `path` at the end; on any failure nothing stays.

    Args:
        path: the directory to make; missing parents are made too, and removed again on a failure.
        overwrite: replace an earlier output, recognised by its file `marker`.
        marker: name of a file that every such output holds.

    Yields:
        The directory to write into. Until the block ends without an exception, `path` is untouched.

    Raises:
        OutputError: as `check_output` says, or the system refuses to make the hidden directory.
    """
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with ExitStack() as undo:
        try:
            check_output(path, overwrite=overwrite, marker=marker)
            for parent in reversed([parent for parent in path.parents if not parent.exists()]):
                parent.mkdir(exist_ok=True)
                undo.callback(_remove_if_empty, parent)
            partial.mkdir()
        except OSError as error:
            raise OutputError(f"{path} cannot be made: {error.strerror or error}") from error
        undo.callback(shutil.rmtree, partial, ignore_errors=True)
        yield partial
        if path.exists():
            _replace(path, partial)
        else:
            partial.rename(path)
        undo.pop_all()


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):  # somebody else has put something there since
        path.rmdir()


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
