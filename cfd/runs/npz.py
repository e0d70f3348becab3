"""`.npz` files that anybody may have made, and files of samples that do not fit into memory; on a disk or in a bucket.

Reading never unpickles. `numpy.load` allocates whatever size a header declares, and cannot read an array of an archive
in parts; here, declared sizes are checked against the archive and a limit before anything is allocated. Writing is
atomic, and the same arrays give the same bytes.
"""

import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from cfd.errors import UserError
from cfd.runs import files, ranges

MAX_BYTES = 2**28  # the statistics of two feature layers take 67 MB, the weights of InceptionV3 96 MB
MAX_HEADER_BYTES = 10_000
MAX_RATIOS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # 1032 is the limit of the deflate format
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, SyntaxError)
AGAIN = "save it again with numpy.savez"
PARSERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Header:
    """The declared shape, dtype and order of an array in an archive, and the offset of its values in its member."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    values_at: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Unfit(Exception):
    """The reason why an archive cannot be used, and a remedy for whoever made it: two texts."""


def npz_headers(path: str | os.PathLike[str], *, remedy: str = "") -> dict[str, Header]:
    """The header of every array of an `.npz`, without its values. Raises ValueError as `read_npz` does."""
    with opened(path, remedy) as archive:
        return {name: read_header(path, archive, name) for name in names_of(path, archive)}


def read_npz(
    path: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    remedy: str = "",
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays `names` of an `.npz` (all of them by default): numbers only, and at most `max_bytes` in total.

    Raises ValueError for pickled objects, for headers that contradict the archive, and for damaged or foreign files.
    The message ends with `remedy`, if it is given, and otherwise with one for whoever made the file.
    """
    with opened(path, remedy) as archive:
        present = names_of(path, archive)
        names = present if names is None else names
        missing = [name for name in names if name not in present]
        if missing:
            raise Unfit(f"{path} holds {present}, not {missing}", "give a file that holds them")
        headers = {name: read_header(path, archive, name) for name in names}
        total = sum(header.nbytes for header in headers.values())
        if total > max_bytes:
            raise Unfit(
                f"{path}: {', '.join(names)} declare {total:,} bytes, over the limit of {max_bytes:,}",
                "give a file of smaller arrays",
            )
        return {name: read_values(archive, name, header) for name, header in headers.items()}


def npz_batches(
    path: str | os.PathLike[str], name: str, batch_size: int, *, remedy: str = ""
) -> Iterator[Shaped[np.ndarray, "b ..."]]:
    """Yields array `name` of an `.npz` in batches of `batch_size` rows; only one batch is in memory at a time.

    Raises ValueError as `read_npz` does, and for an array without rows in C order or batches of more than MAX_BYTES.
    """
    with opened(path, remedy) as archive:
        if name not in names_of(path, archive):
            raise Unfit(f"{path} holds {names_of(path, archive)}, not {name!r}", "give a file that holds it")
        header = read_header(path, archive, name)
        if header.fortran or not header.shape:
            raise Unfit(f"{path}: the rows of {name} are not stored one after the other", "save it again in C order")
        row_bytes = math.prod(header.shape[1:]) * header.dtype.itemsize
        if batch_size * row_bytes > MAX_BYTES:
            raise Unfit(
                f"{path}: {batch_size} rows of {name} take {batch_size * row_bytes:,} bytes, over the limit of "
                f"{MAX_BYTES:,}",
                "ask for fewer",
            )
        with archive.open(member(name)) as file:
            read_exactly(file.read, header.values_at)
            for start in range(0, header.shape[0], batch_size):
                rows = min(batch_size, header.shape[0] - start)
                values = np.frombuffer(read_exactly(file.read, rows * row_bytes), header.dtype)
                yield values.reshape(rows, *header.shape[1:])


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Writes arrays of numbers as an `.npz`, atomically.

    Equal arrays give equal bytes, whatever their order in memory, unlike those of `numpy.savez`.
    """
    with replacing(path) as archive:
        for name, array in arrays.items():
            with new_member(archive, name, array.shape, array.dtype) as append:
                append(as_bytes(array))


Write = Callable[[UInt8[np.ndarray, "b h w c"], Int[np.ndarray, " b"]], None]


@contextmanager
def sample_writer(path: str | os.PathLike[str], num_samples: int, image_shape: tuple[int, int, int]) -> Iterator[Write]:
    """`with sample_writer(...) as write: write(images, labels)`: samples in the layout of OpenAI's evaluator.

    `arr_0` is uint8 [num_samples, H, W, C] and `arr_1` int64 [num_samples]. Images are written batch by batch. The file
    appears under its name once it is complete; after an error there is no file. Raises ValueError for images of another
    shape or dtype, and for another number of samples than announced.
    """
    labels: list[Int[np.ndarray, " b"]] = []

    with replacing(path) as archive:
        with new_member(archive, "arr_0", (num_samples, *image_shape), np.dtype(np.uint8)) as append:

            def write(images: Shaped[np.ndarray, "_b ..."], batch_labels: Int[np.ndarray, " _n"]) -> None:
                if images.shape[1:] != image_shape or images.dtype != np.uint8:
                    raise UserError(
                        f"expected uint8 images of shape {image_shape}, got {images.dtype} {images.shape[1:]}"
                    )
                if len(batch_labels) != len(images):
                    raise UserError(f"{len(images)} images came with {len(batch_labels)} labels")
                labels.append(np.asarray(batch_labels, np.int64))
                append(as_bytes(images))

            yield write
        written = sum(map(len, labels))
        if written != num_samples:
            raise UserError(f"{path}: {written} samples were written where {num_samples} were announced")
        with new_member(archive, "arr_1", (num_samples,), np.dtype(np.int64)) as append:
            append(as_bytes(np.concatenate(labels)))


@contextmanager
def opened(path: str | os.PathLike[str], remedy: str) -> Iterator[zipfile.ZipFile]:
    """The archive at `path`. If it cannot be opened, is damaged or is unfit, a ValueError names the file.

    The message ends with `remedy`. With "", it ends with that of `Unfit`, or tells to make the file again.
    """
    with ExitStack() as until_closed:
        try:
            file = until_closed.enter_context(ranges.opened(path))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): {remedy or 'give a file that you may read'}"
            ) from error
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except Unfit as unfit:
            reason, of_maker = unfit.args
            raise UserError(f"{reason}: {remedy or of_maker}") from None
        except DAMAGE as error:
            again = "make it again with numpy.savez, or download it again"
            raise UserError(
                f"{path} is not a sound .npz file ({error or type(error).__name__}): {remedy or again}"
            ) from error


def names_of(path: str | os.PathLike[str], archive: zipfile.ZipFile) -> list[str]:
    """The names of the arrays, in the order of the archive."""
    members = archive.namelist()
    foreign = [name for name in members if not name.endswith(".npy")]
    if foreign:
        raise Unfit(f"{path} is not an .npz file: it holds {foreign[0]!r}", AGAIN)
    if len(set(members)) < len(members):
        raise Unfit(f"{path} holds two arrays of the same name", AGAIN)
    return [name.removesuffix(".npy") for name in members]


def member(name: str) -> str:
    """The name of an array's member of the archive."""
    return f"{name}.npy"


def read_header(path: str | os.PathLike[str], archive: zipfile.ZipFile, name: str) -> Header:
    """The header of one array, checked against the size of its member."""
    info = archive.getinfo(member(name))
    where = f"{path}: {name}"
    archive_bytes = archive.fp.seek(0, os.SEEK_END) if archive.fp else 0
    if info.compress_type not in MAX_RATIOS:  # an LZMA stream may ask for a dictionary of 4 GB
        raise Unfit(f"{where} is neither stored nor deflated", AGAIN)
    # zipfile believes the sizes of the archive's directory, and callers allocate by the shape that is returned here.
    if info.compress_size > archive_bytes or info.file_size > info.compress_size * MAX_RATIOS[info.compress_type]:
        raise Unfit(f"{where} declares {info.file_size:,} bytes, more than the file can hold", AGAIN)
    with archive.open(info) as file:
        # NumPy reads a header whole before it checks its length, so give it a start of bounded length.
        start = io.BytesIO(file.read(MAX_HEADER_BYTES))
    try:
        version = np.lib.format.read_magic(start)
        if version not in PARSERS:
            raise ValueError(f"version {version} of the format is not 1 or 2")
        shape, fortran, dtype = PARSERS[version](start, max_header_size=MAX_HEADER_BYTES)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise Unfit(f"{where} has no header of a NumPy array ({error})", AGAIN) from error
    if dtype.kind not in "biuf":
        raise Unfit(
            f"{where} has dtype {dtype}, and only numbers are read, never pickled objects",
            f"save the file again without {name}, or with numbers in its place",
        )
    header = Header(shape, dtype, fortran, start.tell())
    if min(shape, default=0) < 0 or header.values_at + header.nbytes != info.file_size:
        declared = f"{where} declares shape {shape} of {dtype}"
        raise Unfit(f"{declared}, which is not the {info.file_size:,} bytes it has", AGAIN)
    return header


def read_values(archive: zipfile.ZipFile, name: str, header: Header) -> Shaped[np.ndarray, "..."]:
    """The values of one array."""
    with archive.open(member(name)) as file:
        read_exactly(file.read, header.values_at)
        flat = np.frombuffer(read_exactly(file.read, header.nbytes), header.dtype)
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


def read_exactly(read: Callable[[int], bytes], size: int) -> bytearray:
    """`size` bytes. Raises EOFError if there are fewer, having allocated hardly more than there are."""
    values = bytearray()
    while len(values) < size:
        piece = read(min(size - len(values), 2**24))
        if not piece:
            raise EOFError(f"it ends after {len(values):,} of {size:,} bytes")
        values += piece
    return values


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """A new archive that replaces the file at `path` once it is complete and on the disk or in the bucket."""
    with files.uploaded(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        yield archive


@contextmanager
def new_member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Callable]:
    """Begins an array in the archive; yields a function that appends the bytes of its values."""
    if dtype.kind not in "biuf":
        raise UserError(f"{name} has dtype {dtype}: only numbers are written")
    # Its default date, 1980, makes the bytes of the file a function of the arrays alone.
    info = zipfile.ZipInfo(member(name))
    info.file_size = math.prod(shape) * dtype.itemsize + MAX_HEADER_BYTES
    with archive.open(info, "w") as file:
        descr = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        yield file.write


def as_bytes(array: Shaped[np.ndarray, "..."]) -> memoryview:
    """The values in C order as bytes; not a copy if the array is in C order already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
