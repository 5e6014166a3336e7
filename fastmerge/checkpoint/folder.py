"""The output folder as one process has it: whom it may not belong to, and what an unfinished run left in it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from .. import system
from ..errors import OutputError

#: Every file of an unfinished output begins so; the next run with the same folder goes on with them or removes them.
LEFTOVER = ".fastmerge-"
#: A folder inside the output for what is wanted only until the commit.
STAGES = LEFTOVER + "stages"
#: Which tensors are whole.
JOURNAL = LEFTOVER + "journal"
#: Held by the process that writes.
LOCK = LEFTOVER + "lock"
#: The names being renamed, the one that completes the output last, with a NUL between them.
COMMIT = LEFTOVER + "commit"


def refuse_inputs(out: Path, inputs: Sequence[Path]) -> None:
    """The output is neither an input's folder, nor inside one, nor where an input's files really lie, or the files
    beside them: on the way from a link to its file, too."""
    real = _real(out)
    here = [_identity(folder) for folder in (real, *real.parents)]
    for path in inputs:
        resolved = _real(path)
        if resolved.is_dir():
            if _identity(resolved) in here:
                where = "is" if _identity(resolved) == here[0] else "is inside"
                raise OutputError(f"the output folder {out} {where} the input {path}; choose another folder")
            files = _links(resolved)
        else:
            files = [path.absolute(), *_links(path.absolute().parent), *_links(resolved.parent)]
        if any(_identity(place.parent) == here[0] is not None for file in files for place in _way(file)):
            raise OutputError(f"the output folder {out} holds files of the input {path}; choose another folder")


def _links(folder: Path) -> list[Path]:
    """The files in a folder that lie elsewhere."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_symlink() and os.path.isfile(entry)]
    except OSError:
        return []  # there is nothing to read, as the reader says


def _way(file: Path) -> Iterator[Path]:
    """A file, and where its name leads from link to link."""
    for _ in range(_MOST_LINKS):
        yield file
        if not file.is_symlink():
            return
        file = file.parent / os.readlink(file)


_MOST_LINKS = 40  # as in Linux


def lock(out: Path) -> int:
    """Takes the folder for this process until the returned descriptor is closed."""
    while True:
        descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | system.FLAGS | system.NO_LINK, 0o666)
        try:
            system.lock(descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(out / LOCK)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"another fastmerge is writing to {out}: wait for it, or choose another folder") from None
        except FileNotFoundError:
            pass  # its holder finished and removed it between the two lines above
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def clear(out: Path) -> None:
    """Removes what an unfinished run left; an output whose last file has its name is finished, and stays."""
    if not finished(out):
        for name in committing(out):
            (out / name).unlink(missing_ok=True)
    leftovers = [name for name in os.listdir(out) if name.startswith(LEFTOVER) and name != LOCK]
    for name in sorted(leftovers, key=lambda name: name == COMMIT):
        _remove(out / name)


def take_back(out: Path, kept: Collection[str]) -> None:
    """Hides again what an unfinished run has made visible, and removes what it hid but for the files of these names,
    the journal and the stages; of those too, what would be written elsewhere."""
    for name in reversed(committing(out)):  # the one that completes the output first
        if os.path.lexists(out / name) and not os.path.lexists(out / temporary(name)):
            os.rename(out / name, out / temporary(name))
    keep = {STAGES, *map(temporary, kept)}
    for name in os.listdir(out):
        if name.startswith(LEFTOVER) and name not in (LOCK, JOURNAL) and (name not in keep or _linked(out / name)):
            _remove(out / name)


def committing(out: Path) -> list[str]:
    """The files that a commit was giving their names, the one that completes the output last."""
    names = os.fsdecode(left_in(out / COMMIT)).split("\0")
    return [os.path.basename(name) for name in names if os.path.basename(name)]


def left_in(path: Path) -> bytes:
    """What an earlier run left in a file of its own; nothing of a link, a folder, or a pipe that nobody writes to.
    OutputError where the system does not let us know."""
    try:
        descriptor = os.open(path, os.O_RDONLY | system.FLAGS | system.NO_LINK | system.NO_WAIT)
        with open(descriptor, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EAGAIN):
            return b""
        raise OutputError(f"{path} cannot be read ({error.strerror}): mend that, or choose another folder") from None


def finished(out: Path) -> bool:
    """Whether a commit came so far that the output is complete, but for what it leaves behind."""
    names = committing(out)
    return bool(names) and not os.path.lexists(out / temporary(names[-1]))


def _remove(path: Path) -> None:
    if path.name == STAGES and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _linked(path: Path) -> bool:
    """Whether a file, or one in a folder, is a link or has another name."""
    status = os.lstat(path)
    if stat.S_ISDIR(status.st_mode):
        return any(_linked(entry) for entry in path.iterdir())
    return stat.S_ISLNK(status.st_mode) or status.st_nlink > 1


def temporary(name: str) -> str:
    """The hidden name of a file until the commit."""
    return f"{LEFTOVER}{name}.part"  # no loader looks for such a suffix


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on a loop of links


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
