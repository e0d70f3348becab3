"""Small data sets of TensorFlow Datasets, prepared as ArrayRecord files without TensorFlow."""

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from pictures import FIELDS, encoded, noise

FEATURES = tfds.features.FeaturesDict(
    {
        "file": tfds.features.Text(),
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["ant", "bee"]),
    }
)


def write_metadata(folder: Path, counts: dict[str, int], suffix: str) -> None:
    """Declares a prepared data set, whose files have this suffix and hold so many examples of each split."""
    name, splits = folder.parent.name, []
    for split, count in counts.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=tfds.core.Path(folder), dataset_name=name, split=split, filetype_suffix=suffix
        )
        (folder / f"{name}-{split}.{suffix}-00000-of-00001").touch()
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=0, filename_template=template))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=FEATURES, split_infos=splits, check_data=False)


def write_tiny(root: Path, size: int = 16) -> Path:
    """A data set named "tiny", whose ArrayRecord files are written without TensorFlow."""
    folder = root / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    counts = {"train": 11, "test": 3, "unlabelled": 1, "many": 1030}
    for split, count in counts.items():
        writer = ArrayRecordWriter(str(folder / f"tiny-{split}.array_record-00000-of-00001"), "group_size:1")
        for i in range(count):
            label = -1 if split == "unlabelled" else i % 2
            image = encoded(noise(i if count < 20 else 0, size, size))
            writer.write(FEATURES.serialize_example({"file": f"{i}", "image": image, "label": label}))
        writer.close()
    write_metadata(folder, counts, "array_record")
    return root


def fields_of(root: Path, **changes: Any) -> dict[str, Any]:
    return {**FIELDS, "source": "tfds", "name": "tiny", "path": str(root)} | changes
