"""Files of runs and results. Text is UTF-8. A file is put in place when it is whole.

JSON may come from somebody else, from another version, or from a disk that lost a part. Each fault is one line.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

CHECKSUMS = "sha256.json"  # the checksums of the other files of a folder


class RecordError(SystemExit):
    """A file of the run cannot be written or read. Ends the program with its message, one line, unless it is caught."""


def parse_json(text: bytes, where: object) -> Any:
    """The value of a JSON text. Raises ValueError, which begins with `where`, if there is none.

    An integer that does not fit into a float becomes infinity, as such a decimal number does.
    """
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits))
    except (ValueError, RecursionError) as error:  # broken UTF-8 and deep nesting included
        raise ValueError(f"{where}: not JSON ({error})") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises OSError, or ValueError that names the file."""
    return parse_json(path.read_bytes(), path)


def read_lines(path: Path, check: Callable[[Any], str]) -> tuple[list[Any], list[str], str]:
    """The values of a file with a JSON text in each line, and what is wrong with the other lines. Raises OSError.

    check: says what is wrong with a value, "" for nothing.  Returns values, faults, cut. A fault names file and line.
    cut: the fault of a last line that has no line end and is not JSON, because its writer was stopped; "" for none.
    """
    *lines, last = path.read_bytes().split(b"\n")
    values, faults, cut = [], [], ""
    for number, line in enumerate([*lines, last] if last else lines, 1):
        where = f"{path}, line {number}"
        try:
            values.append(parse_json(line, where))
            if fault := check(values[-1]):
                values.pop()
                faults.append(f"{where}: {fault}")
        except ValueError as error:
            if number > len(lines):
                cut = f"{where}: cut off"
            else:
                faults.append(str(error))
    return values, faults, cut


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Turns an OSError, such as a full disk, into a RecordError that names the file."""
    try:
        yield
    except OSError as error:
        raise RecordError(f"could not write {path}: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path to write a file to. When it is whole, it is put in place, so that a killed program leaves the old one.

    A device or a pipe is written to directly. Raises RecordError if the file cannot be written.
    """
    with naming_the_file(path):
        if Path("/dev") in path.parents or (path.exists() and not path.is_file()):
            yield path
            return
        aside = path.with_name(f".{path.name}.partial")
        yield aside
        os.replace(aside, path)  # a link, too: in somebody's folder it may lead to a file of yours


def replace_file(path: Path, text: str) -> None:
    """Write a text file, see `replacing`."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def require_writable(folder: Path) -> None:
    """Make the folder. Raises RecordError unless files can be written there."""
    with naming_the_file(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()


def require_writable_file(path: Path) -> None:
    """Raises RecordError unless the file can be written. To be called before a measurement, which would be lost."""
    if path.is_file() or not path.exists():  # a device or a pipe has no folder of its own
        require_writable(path.parent)
    if path.exists():
        with naming_the_file(path):
            path.open("ab").close()


def lock_of(folder: Path) -> FileLock:
    """The lock of a folder, which is made. A process may take it several times. No other process has it meanwhile.

    The system takes it back when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock", is_singleton=True)


def write_checksums(folder: Path) -> None:
    (folder / CHECKSUMS).write_text(json.dumps(checksums(folder), indent=1), encoding="utf-8")


def require_undamaged(folder: Path) -> None:
    """Raises RecordError naming a file of a saved policy that is not as its checksum says. What training alone needs is
    not read, and what is not in the list of checksums does not matter."""
    for name, digest in saved_checksums(folder).items():
        path = folder / name
        own = path.parent == folder and path.suffix != ".pt" and path.is_file()
        if own and _digest(path) != digest:
            raise RecordError(f"{path} is damaged")


def own_and_foreign(folder: Path) -> tuple[set[str], set[str]]:
    """The files in a folder that are as its checksums say, and the others. The file of checksums is in neither."""
    actual, expected = checksums(folder), saved_checksums(folder)
    own = {name for name in actual if actual[name] == expected.get(name)}
    return own, actual.keys() - own


def saved_checksums(folder: Path) -> dict[str, str]:
    """What the folder's own list says; {} if it has none that can be read."""
    try:
        saved = read_json(folder / CHECKSUMS)
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder and its folders, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): _digest(path) for path in files}


def content_digest(path: Path, pattern: str) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files that match the pattern.

    Not counted are notes (.md), hidden files, and what Python caches beside code.
    """
    if path.is_file():
        return _digest(path)
    readable = [file for file in path.glob(pattern) if file.is_file() and os.access(file, os.R_OK)]
    files = sorted(file.relative_to(path) for file in readable if file.suffix != ".md")
    kept = [file for file in files if not any(part.startswith((".", "__pycache__")) for part in file.parts)]
    return hashlib.sha256(json.dumps([(str(file), _digest(path / file)) for file in kept]).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
