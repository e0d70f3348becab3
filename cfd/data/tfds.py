"""Data sets that TensorFlow Datasets (tfds) has prepared as ArrayRecord files, read without TensorFlow."""

import hashlib
import json
import os
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from cfd.data.dataset import Source
from cfd.errors import UserError

PACKAGES = ("tensorflow-datasets>=4.9.10", "array_record>=0.7.1")
"""The packages that reading needs: the extra `tfds` of the package."""
PREPARE = ("tensorflow", "importlib_resources")
"""The packages that preparing needs beyond them: the extra `prepare`."""


def open_tfds(name: str, split: str, path: str, decode: Callable[[bytes, str], np.ndarray]) -> Source:
    """A split of the data set `name` below the folder `path`; "" is tfds's own folder.

    `decode(content, name)` gives the pixels. Raises ValueError if tfds is not installed, if the data set is unknown,
    not prepared as ArrayRecord, incomplete, or without images and classes, and if it has no such split.
    """
    tfds, example_type = _packages()
    data_dir = os.path.expanduser(path) or None
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
        shards = [
            (os.path.basename(shard.filename), os.stat(shard.filename).st_size, shard.skip, shard.take)
            for shard in info.splits[split].file_instructions
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

    def read(i: int) -> tuple[np.ndarray, int]:
        image, label = parse(i, records[i])
        return decode(image, f"{name} {split} record {i}"), label

    def read_labels() -> np.ndarray:
        labels = np.empty(len(records), np.int32)
        with tqdm(total=len(records), desc="read labels", unit="record", unit_scale=True, disable=None) as bar:
            for first in range(0, len(records), 1024):
                block = range(first, min(first + 1024, len(records)))
                labels[block.start : block.stop] = [
                    parse(i, record)[1] for i, record in zip(block, records.__getitems__(block), strict=True)
                ]
                bar.update(len(block))
        return labels

    return Source(
        read=read,
        read_label=lambda i: parse(i, records[i])[1],
        read_labels=read_labels,
        num_examples=len(records),
        class_names=tuple(features["label"].names),
        identity=identity,
        described=f"the split {split!r} of the tfds data set {info.full_name}",
        numbered="numbered by the data set",
    )


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
        there = sorted(os.listdir(data_dir)) if data_dir and os.path.isdir(data_dir) else []
        raise UserError(
            f"data.name is {name!r}; tfds has no data set of this name, and none is prepared in "
            f"{data_dir or '~/tensorflow_datasets'} (there: {', '.join(there[:5]) or 'nothing'}): correct data.name or "
            "data.path"
        ) from error
    root = str(builder.data_dir).removesuffix(builder.info.full_name).rstrip("/")
    if not builder.is_prepared():
        raise UserError(
            f"the tfds data set {name!r} is not prepared in {root}. Prepare it once: {_command(name, root)}"
        )
    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if "array_record" in formats:
        return builder
    # tfds refuses a second format in the same folder, and its converter needs Apache Beam.
    other = f"{root}/array_record"
    prepared = f"the tfds data set {name!r} in {root} is prepared as {', '.join(formats)}"
    try:
        tfds.builder_cls(builder.name)
    except ValueError:
        raise UserError(
            f"{prepared}, and not as ArrayRecord. tfds does not know how to make it: make it again, with the program "
            f"that made it, file_format='array_record' and data_dir={other!r}, and set data.path = {other!r}"
        ) from None
    raise UserError(
        f"{prepared}, and not as ArrayRecord. Prepare it once more, in another folder, and set data.path = {other!r}: "
        f"{_command(name, other, downloads=f'{root}/downloads')}"
    )


def _command(name: str, data_dir: str, downloads: str = "") -> str:
    """The shell command that prepares a data set as ArrayRecord; archives that are in `downloads` are used again."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    builder = f'tfds.builder({quoted(name)}, data_dir={quoted(data_dir)}, file_format="array_record")'
    where = f"download_dir={quoted(downloads)}" if downloads else ""
    code = f"import tensorflow_datasets as tfds; {builder}.download_and_prepare({where})"
    return f"pip install {' '.join(PREPARE)} && python -c {shlex.quote(code)}"
