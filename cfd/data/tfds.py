"""Data sets that TensorFlow Datasets (tfds) has prepared as ArrayRecord files, read without TensorFlow."""

import contextlib
import errno
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from cfd.data.dataset import REMOTE_READS, Source
from cfd.devices import buckets
from cfd.errors import UserError

PACKAGES = ("tensorflow-datasets>=4.9.10", "array_record>=0.7.1")
"""The packages that reading needs: the extra `tfds` of the package."""
PREPARE = ("tensorflow", "importlib_resources")
"""The packages that preparing needs beyond them: the extra `prepare`."""
PREPARED = "~/tensorflow_datasets/array_record"
"""Where the remedies for a bucket prepare a data set, before it is copied."""


def open_tfds(name: str, split: str, path: str, decode: Callable[[bytes, str], np.ndarray]) -> Source:
    """A split of the data set `name` below the folder `path`, which may be in a bucket; "" is tfds's own folder.

    `decode(content, name)` gives the pixels. Raises ValueError if tfds is not installed, if the data set is unknown,
    not prepared as ArrayRecord, incomplete, or without images and classes, if it has no such split, and if the bucket
    cannot be read.
    """
    tfds, example_type = _packages()
    field, folder = ("data.path", path) if path else ("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR", ""))
    remote = buckets.is_url(folder)
    if remote:
        _check_bucket(field, folder)
    data_dir = (path if remote else os.path.expanduser(path)) or None
    builder = _prepared(tfds, name, data_dir)
    features, info = builder.info.features, builder.info
    if "image" not in features or "label" not in features or not hasattr(features["label"], "names"):
        raise UserError(
            f"the tfds data set {name!r} has the features {sorted(features)}: "
            "choose a data set with an 'image' and a 'label' that is a class"
        )
    try:
        if not info.splits[split].num_examples:
            raise ValueError("it selects no example")
        records = builder.as_data_source(
            split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES, file_format="array_record"
        )
        files = [str(shard.filename) for shard in info.splits[split].file_instructions]
        file_bytes = _sizes_in_bucket(field, files) if remote else [os.stat(file).st_size for file in files]
        shards = [
            (os.path.basename(file), size, shard.skip, shard.take)
            for file, size, shard in zip(files, file_bytes, info.splits[split].file_instructions, strict=True)
        ]
    except OSError as error:
        raise UserError(
            f"{error.filename or builder.data_dir} cannot be read ({error.strerror or error}): copy or prepare the "
            f"tfds data set {name!r} again"
        ) from error
    except (ValueError, KeyError) as error:
        counts = ", ".join(f"{known} ({info.splits[known].num_examples:,} examples)" for known in info.splits)
        raise UserError(
            f"data.split or eval.test_split is {split!r}, which the tfds data set {name!r} does not have "
            f"({str(error).splitlines()[0].rstrip('.')}): give one of its splits, or a slice within one: {counts}"
        ) from error
    # A file's size is a multiple of 64 KiB; the metadata have the exact number of bytes of its records.
    record_bytes = {known: info.splits[known].num_bytes for known in sorted(info.splits)}
    identity = hashlib.sha256(json.dumps([info.full_name, split, shards, record_bytes]).encode()).hexdigest()

    # The parser of tfds takes as long as decoding a small JPEG. This one reads only the two features that are needed.
    def parse(i: int, record: bytes) -> tuple[bytes, int]:
        feature = example_type.FromString(record).features.feature
        label = feature["label"].int64_list.value[0]
        if label < 0:
            raise UserError(f"{name} {split} record {i} has no label (it is {label}): choose a split with labels")
        return feature["image"].bytes_list.value[0], label

    @contextlib.contextmanager
    def reading(i: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # ArrayRecord's error of every kind, with the name of the file
            raise UserError(
                f"{name} {split} record {i} cannot be read ({' '.join(str(error).split())}): repair the file or its "
                f"permissions, or copy or prepare the tfds data set {name!r} again"
            ) from error

    def record(i: int) -> bytes:
        with reading(i):
            return records[i]

    def read_block(block: range) -> Sequence[bytes]:
        with reading(block.start):
            if not remote:
                return records.__getitems__(block)
            with ThreadPoolExecutor(REMOTE_READS) as pool:  # `__getitems__` waits for one record of a file at a time
                return list(pool.map(records.__getitem__, block))

    def read(i: int) -> tuple[np.ndarray, int]:
        image, label = parse(i, record(i))
        return decode(image, f"{name} {split} record {i}"), label

    def read_labels() -> np.ndarray:
        labels = np.empty(len(records), np.int32)
        with tqdm(total=len(records), desc="read labels", unit="record", unit_scale=True, disable=None) as bar:
            for first in range(0, len(records), 1024):
                block = range(first, min(first + 1024, len(records)))
                labels[block.start : block.stop] = [
                    parse(i, record)[1] for i, record in zip(block, read_block(block), strict=True)
                ]
                bar.update(len(block))
        return labels

    return Source(
        read=read,
        read_label=lambda i: parse(i, record(i))[1],
        read_labels=read_labels,
        num_examples=len(records),
        class_names=tuple(features["label"].names),
        identity=identity,
        described=f"the split {split!r} of the tfds data set {info.full_name}",
        numbered="numbered by the data set",
        remote=remote,
    )


def _check_bucket(field: str, url: str) -> None:
    """Raises UserError unless ArrayRecord's reader can read the bucket, which `field` names."""
    buckets.check(field, url)
    emulated = bool(os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT"))
    if not emulated and not buckets.has_credentials(field, url):
        raise UserError(
            f"{field} is {url!r}, and ArrayRecord's reader waits for credentials for ever, even if everybody may read "
            f"the bucket: {buckets.LOGIN}"
        )


def _sizes_in_bucket(field: str, files: list[str]) -> list[int]:
    """The sizes in bytes of the files of one split, by one listing. Raises FileNotFoundError if one is missing."""
    found = buckets.sizes(field, os.path.dirname(files[0]))
    for file in files:
        if os.path.basename(file) not in found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
    return [found[os.path.basename(file)] for file in files]


def _packages() -> tuple[Any, Any]:
    """tfds and its message type of one example. No import loads TensorFlow. Raises ValueError if one is missing."""
    try:
        import array_record.python.array_record_data_source  # noqa: F401 (tfds imports it only to read)
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2
    except ImportError as error:
        install = " ".join(map(shlex.quote, PACKAGES))
        raise UserError(f"data.source 'tfds' needs TensorFlow Datasets ({error}): pip install {install}") from error
    example_type: Any = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    return tfds, example_type


def _prepared(tfds: Any, name: str, data_dir: str | None) -> Any:
    """tfds's builder of a data set that is prepared as ArrayRecord. Raises ValueError, with the remedy, otherwise."""
    if not name:
        raise UserError("data.name is '': give the name of a data set of tfds, such as 'cifar10'")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError, ImportError, OSError) as error:
        if not isinstance(error, tfds.core.DatasetNotFoundError):
            reason = " ".join(" ".join(str(error).splitlines()[:4]).split())
            raise UserError(
                f"data.name is {name!r}, which tfds does not open ({reason}): give NAME, NAME/CONFIG or "
                "NAME/CONFIG:VERSION"
            ) from error
        there = _names(data_dir) if data_dir else []
        raise UserError(
            f"data.name is {name!r}; tfds has no data set of this name, and none is prepared in "
            f"{data_dir or '~/tensorflow_datasets'} (there: {', '.join(there[:5]) or 'nothing'}): correct data.name or "
            "data.path"
        ) from error
    root = str(builder.data_dir).removesuffix(builder.info.full_name).rstrip("/")
    remote = buckets.is_url(root)
    if not builder.is_prepared():
        raise UserError(
            f"the tfds data set {name!r} is not prepared in {root}. Prepare it once: "
            f"{_copied(name, builder.name, root) if remote else _command(name, root)}"
        )
    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if "array_record" in formats:
        return builder
    # tfds refuses a second format in the same folder, and its converter needs Apache Beam.
    other = f"{root}/array_record"
    prepared = f"the tfds data set {name!r} in {root} is prepared as {', '.join(formats)}"
    made, copy = other, ""
    if remote:
        made, copy = os.path.expanduser(PREPARED), f", copy it with `{_copy(builder.name, other)}`"
    try:
        tfds.builder_cls(builder.name)
    except ValueError:
        raise UserError(
            f"{prepared}, and not as ArrayRecord. tfds does not know how to make it: make it again, with the program "
            f"that made it, file_format='array_record' and data_dir={made!r}{copy}, and set data.path = {other!r}"
        ) from None
    command = _copied(name, builder.name, other) if remote else _command(name, other, downloads=f"{root}/downloads")
    raise UserError(
        f"{prepared}, and not as ArrayRecord. Prepare it once more, in another folder, and set data.path = {other!r}: "
        f"{command}"
    )


def _names(data_dir: str) -> list[str]:
    """The names in a folder; none if there is no such folder."""
    folder = epath.Path(data_dir)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _copied(name: str, folder: str, url: str) -> str:
    """The shell command that prepares a data set on the disk and copies it into a bucket. `folder` is tfds's for it.

    ArrayRecord reads from a bucket, and does not write to it.
    """
    return f"{_command(name, os.path.expanduser(PREPARED))} && {_copy(folder, url)}"


def _copy(folder: str, url: str) -> str:
    made = os.path.expanduser(f"{PREPARED}/{folder}")
    return f"gcloud storage cp -r {shlex.quote(made)} {shlex.quote(f'{url}/')}"


def _command(name: str, data_dir: str, downloads: str = "") -> str:
    """The shell command that prepares a data set as ArrayRecord; archives that are in `downloads` are used again."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    builder = f'tfds.builder({quoted(name)}, data_dir={quoted(data_dir)}, file_format="array_record")'
    where = f"download_dir={quoted(downloads)}" if downloads else ""
    code = f"import tensorflow_datasets as tfds; {builder}.download_and_prepare({where})"
    return f"pip install {' '.join(PREPARE)} && python -c {shlex.quote(code)}"
