"""Files below a folder or inside a .zip file: what lies where, and their bytes. Nothing is unpacked to the disk."""

import os
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cfd.data.decode import BadImage
from cfd.errors import UserError

MAX_DEPTH = 100
"""Largest number of folders inside each other in a .zip file."""
NO_LINKS = "replace links by the files (`cp -rL FOLDER COPY` copies both), or remove them"


class Entries(NamedTuple):
    """The content of one folder, without what lies deeper: names, and for files their sizes in bytes.

    `links` are links to folders. `hidden` are the names that are passed over: those that begin with a dot, and
    __MACOSX.
    """

    folders: list[str]
    files: dict[str, int]
    links: list[str]
    hidden: list[str]


class Place(NamedTuple):
    """A folder on the disk or inside a .zip file. Names are relative to it, with "/"; "" is the folder itself.

    `label` names it in messages. `leads_out` is whether a link leads out of it. `enter` makes a Place of a folder.
    `read` gives the content of a file of at most so many bytes, from any thread. It raises BadImage if the file is
    missing or damaged, leads out of the place, is not a regular file or is larger, and ValueError if the system cannot
    read it.
    """

    label: str
    entries: Callable[[str], Entries]
    leads_out: Callable[[str], bool]
    enter: Callable[[str], "Place"]
    read: Callable[[str, int], bytes]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is passed over: a dot file, such as the ._ companions of macOS, or __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def folder_on_disk(path: Path) -> Place:
    """The folder at `path`, with links resolved. Links below it may not lead out of it."""
    root = path.resolve()

    def entries(folder: str) -> Entries:
        found = Entries([], {}, [], [])
        try:
            with os.scandir(root / folder) as scanned:
                for entry in scanned:
                    if is_hidden(entry.name):
                        found.hidden.append(entry.name)
                    elif entry.is_dir():
                        (found.links if entry.is_symlink() else found.folders).append(entry.name)
                    else:
                        found.files[entry.name] = _size(entry)
        except OSError as error:
            raise UserError(
                f"{error.filename or root / folder} cannot be read ({error.strerror}): repair it or its permissions"
            ) from error
        return found

    return Place(
        label=str(root),
        entries=entries,
        leads_out=lambda name: not (root / name).resolve().is_relative_to(root),
        enter=lambda folder: folder_on_disk(root / folder),
        read=lambda name, limit: _read_file(f"{root}/{name}", root, limit),
    )


def _size(entry: os.DirEntry[str]) -> int:
    """The size of a file in bytes; 0 for a broken link or a file that has just vanished, which `read` refuses."""
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return 0


def _read_file(file: str, root: Path, limit: int) -> bytes:
    """The content of a file below `root`; raises as `Place.read` does."""
    try:
        status = os.lstat(file)
        if stat.S_ISLNK(status.st_mode):
            if not Path(file).resolve().is_relative_to(root):
                raise BadImage(f"{file} is a link that leads out of {root}: {NO_LINKS}")
            status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{file} is not a regular file: remove it")
        _check_bytes(file, status.st_size, limit)
        with open(file, "rb", buffering=0) as f:
            return f.read(status.st_size)
    except FileNotFoundError:
        raise BadImage(f"{file} no longer exists or is a broken link: remove the link, or start again") from None
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: str, error: OSError) -> UserError:
    # This is not a BadImage, because on_bad_image = "skip" must not skip it: whether a disk fails or a permission is
    # missing depends on the moment, and the batches must not.
    return UserError(f"{file} cannot be read ({error.strerror}): repair the file or its permissions")


def _check_bytes(file: str, size: int, limit: int) -> None:
    if size > limit:
        raise BadImage(f"{file} has {size} bytes, and the limit is {limit}: shrink or remove it")


def zip_file(path: Path) -> Place:
    """The content of a .zip file. Raises ValueError if it is damaged, encrypted, or packed in an unusual way."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path} is not a .zip file that can be read ({error}): make it again") from error
    except OSError as error:
        raise _unreadable(str(path), error) from error
    contents: dict[str, dict[str, zipfile.ZipInfo]] = {"": {}}  # of each folder: its files, by name
    folders: dict[str, list[str]] = {"": []}

    def add(parents: list[str]) -> str:
        folder = "/".join(parents)
        if folder not in contents:
            folders[add(parents[:-1])].append(parents[-1])
            contents[folder], folders[folder] = {}, []
        return folder

    for member in members:
        parts = [part for part in member.filename.split("/") if part not in ("", ".")]
        if len(parts) > MAX_DEPTH:
            raise UserError(f"{path} holds {member.filename[:80]}..., deeper than {MAX_DEPTH} folders: make it again")
        if member.is_dir():
            add(parts)
        elif parts:
            contents[add(parts[:-1])][parts[-1]] = member
    return _zip_folder(path, "", contents, folders)


def _zip_folder(
    path: Path, prefix: str, contents: dict[str, dict[str, zipfile.ZipInfo]], folders: dict[str, list[str]]
) -> Place:
    """The folder `prefix` inside the .zip file at `path`."""
    label = f"{path}/{prefix}".rstrip("/")

    def inside(name: str) -> str:
        return "/".join(part for part in (prefix, name) if part)

    def entries(folder: str) -> Entries:
        files, below = contents[inside(folder)], folders[inside(folder)]
        return Entries(
            folders=[name for name in below if not is_hidden(name)],
            files={name: member.file_size for name, member in files.items() if not is_hidden(name)},
            links=[],
            hidden=[name for name in (*below, *files) if is_hidden(name)],
        )

    def read(name: str, limit: int) -> bytes:
        folder, _, base = inside(name).rpartition("/")
        return _read_member(path, contents[folder][base], f"{label}/{name}", limit)

    return Place(
        label=label,
        entries=entries,
        leads_out=lambda name: False,
        enter=lambda folder: _zip_folder(path, inside(folder), contents, folders),
        read=read,
    )


def _read_member(path: Path, member: zipfile.ZipInfo, name: str, limit: int) -> bytes:
    """The content of a file inside a .zip file; raises as `Place.read` does.

    `zipfile.ZipFile.open` counts its readers without a lock, and one ZipFile per thread would hold the whole directory
    several times. Each call therefore opens the file itself.
    """
    if stat.S_ISLNK(member.external_attr >> 16):
        raise BadImage(f"{name} is a link: make the .zip file without -y, which stores the files")
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadImage(
            f"{name} is encrypted or not packed by deflate: make the .zip file again, with `zip -r` or Python"
        )
    _check_bytes(name, member.file_size, limit)
    try:
        with open(path, "rb") as file:
            file.seek(member.header_offset)
            header = file.read(30)
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            file.seek(member.header_offset + 30 + lengths)
            packed = file.read(min(member.compress_size, 2 * limit))
    except OSError as error:
        raise _unreadable(str(path), error) from error
    content = packed
    try:
        if member.compress_type == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, member.file_size + 1)
    except zlib.error as error:
        raise BadImage(f"{name} is damaged ({error}): make the .zip file again") from error
    if len(content) != member.file_size or zlib.crc32(content) != member.CRC:
        raise BadImage(f"{name} is damaged (its checksum differs): make the .zip file again")
    return content
