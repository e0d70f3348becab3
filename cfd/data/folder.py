"""Images in a folder or in a .zip file: which folder is the split, which files are read, and the class of each file.

Both may be in a bucket. The layout is path/<split>/<class>/.../<image>, or for the split "train" also
path/<class>/.../<image>. A class folder is read with all folders inside it, as torchvision's ImageFolder does. The
whole layout decides what a folder is, and an ambiguous layout is refused. Everything that is not read is counted in a
note.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from cfd.data.dataset import Source
from cfd.data.files import (
    NO_LINKS,
    Place,
    archive_in_bucket,
    archive_on_disk,
    folder_in_bucket,
    folder_on_disk,
    is_file,
    is_folder,
    read_object,
    zip_file,
)
from cfd.data.labels import holds_labels, read_table
from cfd.devices import buckets
from cfd.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
EDM_LABELS = "dataset.json"
MAX_IMAGE_BYTES = 2**26
MAX_TABLE_BYTES = 2**30
"""Largest image file and largest file of labels that are read, in bytes."""
_SPLIT = re.compile(r"(train|test|val|valid|validation|dev|eval|extra|unlabell?ed)(ing)?([-_.\d].*)?", re.IGNORECASE)

Unread = dict[str, tuple[int, str]]
"""The number of names that are not read, and the first of them, by the reason."""


def open_folder(
    path: str, split: str, labels: str, empty_classes: bool, decode: Callable[[bytes, str], np.ndarray]
) -> Source:
    """The images of a split in the folder or .zip file `path`, pixels by `decode(content, name)`.

    If `labels` is "", each folder is a class, and `empty_classes` accepts classes without images. Otherwise `labels` is
    a file that `read_table` reads, inside the folder of the split or with an absolute path or URL, and the files that
    it lists are read. Raises ValueError if there is nothing to read or if the layout is ambiguous.
    """
    unread: Unread = {}
    place = split_of(open_place(path, bool(labels)), path, split, bool(labels))
    listed = _by_table(place, labels, unread) if labels else _by_folders(place, empty_classes, unread)
    class_names, names, sizes, classes = listed
    if not names:
        raise UserError(f"{place.label} contains no image: put the images of each class into its folder")
    numbers = np.array(classes, np.int32)

    def read(i: int) -> tuple[np.ndarray, int]:
        return decode(place.read(names[i], MAX_IMAGE_BYTES), f"{place.label}/{names[i]}"), int(numbers[i])

    return Source(
        read=read,
        read_label=lambda i: int(numbers[i]),
        read_labels=lambda: numbers,
        num_examples=len(names),
        class_names=class_names,
        identity=_identity(class_names, names, sizes, classes),
        described=f"the split {split!r} of data.path = {path!r}",
        numbered="numbered as in the file" if labels.lower().endswith(".json") else "numbered by name",
        notes=(
            *_note_of_order(class_names),
            *_note_of_empty(class_names, numbers),
            *_note_of_unread(place, unread),
        ),
        remote=place.remote,
    )


def open_place(path: str, by_table: bool) -> Place:
    """The folder or .zip file at `path`, or a folder inside a .zip file, such as images.zip/train.

    All of them may be in a bucket. A single folder around everything else in a .zip file is entered.
    """
    place, inside = _in_bucket(path) if buckets.is_url(path) else _on_disk(path)
    if inside is None:
        return place
    for name in inside:
        if name not in (folders := place.entries("").folders):
            there = f"one of {_some(folders)}" if folders else "the folder that contains one folder per class"
            raise UserError(f"data.path is {path!r}, and {place.label} has no folder {name!r}: give {there}")
        place = place.enter(name)
    while not inside:
        folders, files, *_ = place.entries("")
        wraps = len(folders) == 1 and not files and not is_split_name(folders[0])
        if not wraps or (not by_table and holds_directly(place, folders[0])):
            break
        place = place.enter(folders[0])
    return place


def _on_disk(path: str) -> tuple[Place, tuple[str, ...] | None]:
    """The folder at `path` and None, or a .zip file and the folders inside it that lead to `path`."""
    root = Path(path).expanduser()
    if path and is_folder(root):
        return folder_on_disk(root), None
    file = next((file for file in (root, *root.parents) if is_file(file)), None)
    if not path or file is None or file.suffix.lower() != ".zip":
        unpack = " (unpack it first)" if file == root and not is_image(root.name) else ""
        raise UserError(
            f"data.path is {path!r}, which is not a folder or a .zip file{unpack}: give the folder that contains one "
            "folder per class"
        )
    return zip_file(archive_on_disk(file)), root.relative_to(file).parts


def _in_bucket(url: str) -> tuple[Place, tuple[str, ...] | None]:
    """The same for a URL. All objects of a folder are listed once."""
    bucket, key = buckets.split("data.path", url)
    if sizes := buckets.sizes("data.path", url):
        return folder_in_bucket(f"gs://{bucket}/{key}".rstrip("/"), sizes), None
    parts = key.split("/")
    for i, part in enumerate(parts):
        file = "/".join((f"gs://{bucket}", *parts[: i + 1]))
        if part.lower().endswith(".zip") and buckets.size("data.path", file) is not None:
            return zip_file(archive_in_bucket(file)), tuple(parts[i + 1 :])
    raise UserError(
        f"data.path is {url!r}, and no object lies there: give the folder that contains one folder per class, or a "
        ".zip file; `gcloud storage cp -r FOLDER URL` copies a folder"
    )


def is_split_name(name: str) -> bool:
    """Whether a folder's name is usual for a split, such as train, Val or test_2."""
    return _SPLIT.fullmatch(name) is not None


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def holds_directly(place: Place, folder: str) -> bool:
    """Whether a folder holds images, not counting those in its own folders."""
    return any(map(is_image, place.entries(folder).files))


def holds_deeper(place: Place, folder: str) -> Iterator[str]:
    """The folders in `folder` that hold an image, at any depth."""
    for name in sorted(place.entries(folder).folders):
        inside = f"{folder}/{name}" if folder else name
        if holds_directly(place, inside) or next(holds_deeper(place, inside), None):
            yield name


def split_of(place: Place, path: str, split: str, by_table: bool) -> Place:
    """The folder of the split, or `place` itself if it is not divided and the split is "train".

    Raises ValueError, with what lies there, if the split is missing, or if a folder can be a split as well as a class.
    """
    asked = f"data.split or eval.test_split is {split!r}"
    if not split or "/" in split or split.startswith("."):
        raise UserError(
            f"{asked}; for a folder, it is the name of a folder directly in data.path, or 'train' if data.path is not "
            "divided: give such a name, and the folder above it as data.path"
        )
    top = place.entries("")
    folders = sorted([*top.folders, *top.links])
    if split not in folders and split != "train":
        there = ", ".join(filter(is_split_name, folders)) or "none that looks like a split"
        slices = "; slices such as 'train[:90%]' are for data.source = 'tfds'" if "[" in split else ""
        raise UserError(
            f"{asked}, but there is no folder {place.label}/{split} (folders there: {there}{slices}): create it, with "
            "one folder per class, or give the name of another, or 'train', which is data.path itself if that is not "
            "divided into splits"
        )
    if by_table:
        return place.enter(split) if split in folders else place
    if split in folders:
        # Only "train" can also be the whole folder, and its folder of that name a class, as in PASCAL VOC.
        others = (
            [name for name in folders if not is_split_name(name) and _holds(place, name)] if split == "train" else []
        )
        nested = next(holds_deeper(place, split), None) if others else None
        if not others or (nested is None and not holds_directly(place, split)):
            return place.enter(split)
        if nested is not None:
            raise UserError(
                f"{place.label}/{split} can be the split {split!r}, with the class {nested!r}, or a class beside "
                f"{_some(others)}: if it is the split, give data.path = '{place.label}/{split}', or move the other "
                f"folders away; if it is a class, move all class folders into a new folder {split!r} in {path!r}"
            )
    return _undivided(place, path, folders)


def _undivided(place: Place, path: str, folders: list[str]) -> Place:
    """`place`, whose folders are the classes of the split "train". Raises ValueError if some look like splits."""
    divided = [name for name in folders if is_split_name(name)]
    nested = [name for name in divided if not holds_directly(place, name) and next(holds_deeper(place, name), None)]
    if folders and divided == folders:
        words = "splits" if nested else "splits without class folders"
        raise UserError(
            f"data.split is 'train', and {place.label} has no folder of this name, but {_some(folders)}, which look "
            f"like {words}: set data.split to the one to train on (case matters), with one folder per class in it, or "
            "put the class folders into a folder 'train' there"
        )
    if nested:
        raise UserError(
            f"{place.label} has no folder 'train', and its folder {nested[0]!r} can be a split or a class beside "
            f"{_some([name for name in folders if name not in divided])}: put the class folders of the training images "
            f"into a folder 'train' in {path!r}"
        )
    alone = len(folders) == 1 and not holds_directly(place, folders[0])
    if alone and (inside := list(holds_deeper(place, folders[0]))):
        raise UserError(
            f"{place.label} has one folder, {folders[0]!r}, whose images lie in its folders {_some(inside)}: give "
            f"data.path = '{place.label}/{folders[0]}' if these are classes or splits, or move the images into "
            f"{folders[0]!r} itself if that is the class"
        )
    return place


def _holds(place: Place, folder: str) -> bool:
    return holds_directly(place, folder) or next(holds_deeper(place, folder), None) is not None


def _files_below(place: Place, top: str, unread: Unread) -> dict[str, int]:
    """The size in bytes of every visible file below the folder `top`, by its name relative to `place`."""
    sizes: dict[str, int] = {}
    pending = [top]
    while pending:
        folder = pending.pop()
        prefix = f"{folder}/" if folder else ""
        found = place.entries(folder)
        sizes |= {prefix + name: size for name, size in found.files.items()}
        pending += [prefix + name for name in found.folders]
        for name in found.links:
            _count(unread, "links to folders", prefix + name)
        for name in found.hidden:
            _count(unread, "hidden", prefix + name)
    return sizes


_Listed = tuple[tuple[str, ...], list[str], list[int], list[int]]
"""The names of the classes, and the name, size in bytes and class of every image, sorted by class and name."""


def _by_folders(place: Place, empty_classes: bool, unread: Unread) -> _Listed:
    """The images below the folders of `place`; each folder is a class."""
    top = place.entries("")
    if EDM_LABELS in top.files and holds_labels(place.read(EDM_LABELS, MAX_TABLE_BYTES)):
        raise UserError(
            f"{place.label}/{EDM_LABELS} holds labels, and data.labels is '': set data.labels = {EDM_LABELS!r}, or "
            "remove the file if the folders are the classes"
        )
    folders = sorted([*top.folders, *top.links])
    for name in sorted(top.hidden):
        _count(unread, "hidden", name)
    for name in sorted(top.files):
        _count(unread, "beside the class folders" if folders and is_image(name) else _suffix(name), name)
    if not folders:
        there = f", but files ({_counted(unread)})" if unread else ""
        raise UserError(
            f"{place.label} contains no folder{there}: put the images of each class into a folder named after the class"
        )
    names: list[str] = []
    sizes: list[int] = []
    classes: list[int] = []
    for number, folder in enumerate(folders):
        if folder in top.links and place.leads_out(folder):
            raise UserError(f"{place.label}/{folder} is a link that leads out of {place.label}: {NO_LINKS}")
        passed: Unread = {}
        found = _files_below(place, folder, passed)
        images = sorted(filter(is_image, found))
        for name in sorted(found.keys() - images):
            _count(passed, _suffix(name), name)
        if not images and not empty_classes:
            there = f" ({_counted(passed)})" if passed else ""
            raise UserError(
                f"the class folder {place.label}/{folder} contains no {'/'.join(SUFFIXES)} file{there}: fill it or "
                "remove it, or, if the class must keep its number without images, set data.empty_classes = True"
            )
        deeper = {name.split("/", 2)[1] for name in images if name.count("/") > 1}
        if deeper and all(map(is_split_name, deeper)) and not any(name.count("/") == 1 for name in images):
            raise UserError(
                f"the class folder {place.label}/{folder} holds the folders {_some(sorted(deeper))}, which look like "
                f"splits: give data.path = '{place.label}/{folder}' if it is a data set, or move the images to "
                f"<split>/{folder}, because splits lie above classes"
            )
        for reason, (count, first) in passed.items():
            unread[reason] = (unread.get(reason, (0, ""))[0] + count, unread.get(reason, (0, first))[1])
        names += images
        sizes += [found[name] for name in images]
        classes += [number] * len(images)
    return tuple(folders), names, sizes, classes


def _by_table(place: Place, labels: str, unread: Unread) -> _Listed:
    """The images that the file `labels` lists."""
    found = _files_below(place, "", unread)
    file = Path(labels).expanduser()
    if buckets.is_url(labels):
        label, size = labels, buckets.size("data.labels", labels)
        there = size is not None
        content = read_object(size, labels, MAX_TABLE_BYTES) if size is not None else b""
    elif file.is_absolute():
        label, there, real = str(file), is_file(file), file.resolve()
        content = folder_on_disk(real.parent).read(real.name, MAX_TABLE_BYTES) if there else b""
    else:
        label, there = f"{place.label}/{labels}", labels in found
        content = place.read(labels, MAX_TABLE_BYTES) if there else b""
    if not there:
        raise UserError(
            f"data.labels is {labels!r}, and there is no file {label}: give the CSV file of the labels, relative to "
            "the folder of the split, or with its absolute path or URL"
        )
    table = read_table(content, label)
    for name in table.labels:
        if name not in found:
            raise UserError(
                f"{label} lists {name!r}, which is not in {place.label}{_alike(name, found)}: add the file, or correct "
                "or remove its line"
            )
        if not is_image(name):
            raise UserError(
                f"{label} lists {name!r}, which is no {'/'.join(SUFFIXES)} file: convert it, or remove its line"
            )
    for name in sorted(found.keys() - table.labels.keys() - {labels}):
        _count(unread, f"not in {labels}" if is_image(name) else _suffix(name), name)
    names = sorted(table.labels, key=lambda name: (table.labels[name], name))
    return table.class_names, names, [found[name] for name in names], [table.labels[name] for name in names]


def _alike(name: str, found: Iterable[str]) -> str:
    r"""The first of the names that differs from `name` only by case, "\" for "/" or its form in Unicode, in words."""

    def alike(text: str) -> str:
        return unicodedata.normalize("NFC", text.replace("\\", "/")).casefold()

    there = next((other for other in found if alike(other) == alike(name)), None)
    return "" if there is None else f" (there is {there!a})"


def _identity(class_names: tuple[str, ...], names: list[str], sizes: list[int], classes: list[int]) -> str:
    """The SHA-256, in hexadecimal, of the class names and of the name, size and class of every image."""
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for row in zip(classes, sizes, names, strict=True):
        digest.update("{}:{}:{}\0".format(*row).encode(errors="surrogateescape"))
    return digest.hexdigest()


def _suffix(name: str) -> str:
    return Path(name).suffix.lower() or "without a suffix"


def _count(unread: Unread, reason: str, name: str) -> None:
    count, first = unread.get(reason, (0, name))
    unread[reason] = (count + 1, first)


def _counted(unread: Unread) -> str:
    return ", ".join(f"{reason}: {count:,} ({first})" for reason, (count, first) in sorted(unread.items()))


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _note_of_unread(place: Place, unread: Unread) -> Iterator[str]:
    """The files and folders in `place` that are not read."""
    if unread:
        total = sum(count for count, _ in unread.values())
        yield f"Not read in {place.label}: {total:,} files or folders ({_counted(unread)})."


def _note_of_empty(class_names: tuple[str, ...], numbers: np.ndarray) -> Iterator[str]:
    empty = np.flatnonzero(np.bincount(numbers, minlength=len(class_names)) == 0)
    if len(empty):
        yield f"Classes without images: {len(empty)} ({_some([f'{i} = {class_names[i]}' for i in empty])})."


def _note_of_order(class_names: tuple[str, ...]) -> Iterator[str]:
    """That names with numbers, such as "10" and "2", are sorted as text, if this gives another order."""

    def by_number(name: str) -> list[tuple[int, int, str]]:
        parts = re.split(r"(\d+)", name)
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]

    for i, (name, counted) in enumerate(zip(class_names, sorted(class_names, key=by_number), strict=True)):
        if name != counted:
            yield f"Classes are numbered by their names sorted as text, and not as numbers: class {i} is {name!r}."
            return
