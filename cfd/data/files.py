"""Files below a folder or inside a .zip file, on the disk or in a bucket: what lies where, and their bytes.

Nothing is unpacked or copied to the disk.
"""

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cfd.data.decode import BadImage
from cfd.devices import buckets
from cfd.errors import UserError, is_missing

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
    """A folder on the disk, in a bucket or inside a .zip file. Names are relative to it, with "/"; "" is itself.

    `label` names it in messages. `leads_out` is whether a link leads out of it. `enter` makes a Place of a folder.
    `read` gives the content of a file of at most so many bytes, from any thread. It raises BadImage if the file is
    missing or damaged, leads out of the place, is not a regular file or is larger, and ValueError if the system cannot
    read it. `remote` is whether it reads over a network.
    """

    label: str
    entries: Callable[[str], Entries]
    leads_out: Callable[[str], bool]
    enter: Callable[[str], "Place"]
    read: Callable[[str, int], bytes]
    remote: bool = False


def is_hidden(name: str) -> bool:
    """Whether a file or folder is passed over: a dot file, such as the ._ companions of macOS, or __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder at `path`. Raises UserError if the system cannot say."""
    return stat.S_ISDIR(_mode(path))


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file at `path`. Raises UserError if the system cannot say."""
    return stat.S_ISREG(_mode(path))


def _mode(path: str | Path) -> int:
    """The mode of a file or folder, or 0 if there is none. `os.path.isdir` hides that a network disk is away."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if is_missing(error):
            return 0
        raise _unreadable(str(path), error) from error


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


class Archive(NamedTuple):
    """A .zip file on the disk or in a bucket. `label` names it in messages.

    `open` gives it as a binary file, and `span` its bytes [start, end), or fewer at its end, from any thread. Both
    raise OSError if it cannot be read.
    """

    label: str
    open: Callable[[], Any]
    span: Callable[[int, int], bytes]


def archive_on_disk(path: Path) -> Archive:
    def span(start: int, end: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    return Archive(str(path), lambda: open(path, "rb"), span)


def archive_in_bucket(url: str) -> Archive:
    return Archive(url, lambda: buckets.reader(url), lambda start, end: buckets.read(url, start, end))


def zip_file(archive: Archive) -> Place:
    """The content of a .zip file. Raises ValueError if it is damaged, encrypted, or packed in an unusual way."""
    try:
        with archive.open() as file, zipfile.ZipFile(file) as opened:
            members = opened.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{archive.label} is not a .zip file that can be read ({error}): make it again") from error
    except OSError as error:
        raise _unreadable(archive.label, error) from error
    tree = _tree(archive.label, [(member.filename, member) for member in members])
    return _folder_in(
        tree,
        archive.label,
        size=lambda member: member.file_size,
        read=lambda member, name, limit: _read_member(archive, member, name, limit),
        remote=buckets.is_url(archive.label),
    )


def folder_in_bucket(url: str, sizes: dict[str, int]) -> Place:
    """The folder `url`, gs://BUCKET/NAME, in which the objects of these sizes in bytes lie."""
    tree = _tree(url, list(sizes.items()))
    return _folder_in(tree, url, size=lambda size: size, read=read_object, remote=True)


class _Tree(NamedTuple):
    """Files that were listed at once: for each folder, "" being the top, its files by name, and its folders."""

    files: dict[str, dict[str, Any]]
    folders: dict[str, list[str]]


def _tree(label: str, listed: Sequence[tuple[str, Any]]) -> _Tree:
    """The tree of pairs of a name and what is known about the file. The name of a folder ends with a slash."""
    tree = _Tree({"": {}}, {"": []})

    def add(parents: list[str]) -> str:
        folder = "/".join(parents)
        if folder not in tree.files:
            tree.folders[add(parents[:-1])].append(parents[-1])
            tree.files[folder], tree.folders[folder] = {}, []
        return folder

    for name, known in listed:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if len(parts) > MAX_DEPTH:
            raise UserError(f"{label} holds {name[:80]}..., deeper than {MAX_DEPTH} folders: make it again")
        if name.endswith("/"):
            add(parts)
        elif parts:
            files = tree.files[add(parts[:-1])]
            if parts[-1] in files:
                raise UserError(f"{label} holds {'/'.join(parts)} twice: keep one of the two")
            files[parts[-1]] = known
    return tree


def _folder_in(
    tree: _Tree,
    label: str,
    prefix: str = "",
    *,
    size: Callable[[Any], int],
    read: Callable[[Any, str, int], bytes],
    remote: bool,
) -> Place:
    """The folder `prefix` of a tree whose top is named `label`.

    `size` gives the bytes of a file, and `read(known, name, limit)` its content, from what the tree knows about it.
    """
    here = f"{label}/{prefix}".rstrip("/")

    def inside(name: str) -> str:
        return "/".join(part for part in (prefix, name) if part)

    def entries(folder: str) -> Entries:
        files, below = tree.files[inside(folder)], tree.folders[inside(folder)]
        return Entries(
            folders=[name for name in below if not is_hidden(name)],
            files={name: size(known) for name, known in files.items() if not is_hidden(name)},
            links=[],
            hidden=[name for name in (*below, *files) if is_hidden(name)],
        )

    def read_file(name: str, limit: int) -> bytes:
        folder, _, base = inside(name).rpartition("/")
        return read(tree.files[folder][base], f"{here}/{name}", limit)

    return Place(
        label=here,
        entries=entries,
        leads_out=lambda name: False,
        enter=lambda folder: _folder_in(tree, label, inside(folder), size=size, read=read, remote=remote),
        read=read_file,
        remote=remote,
    )


def read_object(size: int, url: str, limit: int) -> bytes:
    """The content of an object of `size` bytes in a bucket; raises as `Place.read` does."""
    _check_bytes(url, size, limit)
    try:
        return buckets.read(url)
    except FileNotFoundError:
        raise BadImage(f"{url} no longer exists: start again") from None
    except OSError as error:
        raise _unreadable(url, error) from error


def _read_member(archive: Archive, member: zipfile.ZipInfo, name: str, limit: int) -> bytes:
    """The content of a file inside a .zip file; raises as `Place.read` does.

    `zipfile.ZipFile.open` counts its readers without a lock, and one ZipFile per thread would hold the whole directory
    several times. Each call therefore reads the bytes itself, in one piece, because a bucket takes its time for each.
    """
    if stat.S_ISLNK(member.external_attr >> 16):
        raise BadImage(f"{name} is a link: make the .zip file without -y, which stores the files")
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadImage(
            f"{name} is encrypted or not packed by deflate: make the .zip file again, with `zip -r` or Python"
        )
    _check_bytes(name, member.file_size, limit)
    start, wanted = member.header_offset, min(member.compress_size, 2 * limit)
    # The directory need not repeat the extra field of the header in front of the content, which may be longer.
    likely = start + 30 + len(member.orig_filename.encode()) + len(member.extra) + 64
    try:
        block = archive.span(start, likely + wanted)
        first = 30 + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
        if start + first > likely:
            block += archive.span(start + len(block), start + first + wanted)
    except OSError as error:
        raise _unreadable(archive.label, error) from error
    packed = block[first : first + wanted]
    content = packed
    try:
        if member.compress_type == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, member.file_size + 1)
    except zlib.error as error:
        raise BadImage(f"{name} is damaged ({error}): make the .zip file again") from error
    if len(content) != member.file_size or zlib.crc32(content) != member.CRC:
        raise BadImage(f"{name} is damaged (its checksum differs): make the .zip file again")
    return content
