"""The measures of images that any program has written, against any reference set.

    python -m cfd.measure SAMPLES.npz REFERENCE.npz --weights=inception.npz
    python -m cfd.measure SAMPLES.npz REFERENCE.npz --features=dinov2 --weights=dinov2.npz
    python -m cfd.measure SAMPLES.npz REFERENCE.npz --features=classifier --weights=runs/digits/features/classifier.npz

SAMPLES holds the images as arr_0, uint8 [N, H, W, C], and may hold their classes as arr_1, integers [N]. REFERENCE is
such a file too, or one of OpenAI's evaluator, with the statistics mu, sigma, mu_s and sigma_s, or has mu and sigma
alone; then FID is the only measure that compares the samples with it. Either file may be in a bucket, gs://BUCKET/FILE.
With InceptionV3 the definitions are those of OpenAI's evaluator, and neither TensorFlow nor PyTorch is needed.
`python -m cfd.convert` makes the weights of InceptionV3 and of DINOv2. A classifier is that of a run's own images.

Both files are checked before a network is loaded. The result is a table, and a table per class if the samples have
classes; --json writes all numbers. The exit code is 0, or 1 after an error.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32
from tqdm import tqdm

from cfd.devices import notices, output, parallel
from cfd.errors import UserError
from cfd.evaluation import intervals, metrics
from cfd.evaluation.features import (
    FeatureNetwork,
    check_classifier,
    open_dinov2,
    open_inception,
    read_classifier,
)
from cfd.evaluation.reference import (
    NEIGHBOUR_ROWS,
    Words,
    block_rows,
    check_images,
    check_reference,
    evenly_spaced,
    read_reference,
    warn_without_images,
)
from cfd.evaluation.scores import Batches, Scores, score
from cfd.runs import access, files, npz, results

NETWORKS = ("inception", "dinov2", "classifier")
MAKE = {
    "inception": "make it with `python -m cfd.convert inception FILE OUT`",
    "dinov2": "make it with `python -m cfd.convert dinov2 FILE OUT`",
    "classifier": "give the features/classifier.npz of a run",
}
"""{feature network: how to get a file of its weights}."""
NAMES = {"sfid": "sFID", "kid": "KID", "kid_se": "KID, standard error", "is": "Inception score"}
"""{measure: how the table calls it}, if it has another name there."""
NOT_MEASURED = {
    "sfid": "the feature network has no spatial layer, or the reference has no mu_s and sigma_s",
    "kid": "it compares single images, and the reference has none",
    "is": "the feature network gives no class probabilities",
    "precision": "it compares single images, and the reference has none",
    "recall": "it compares single images, and the reference has none",
    "class_accuracy": "it needs a classifier of the samples' classes, and a class arr_1 for every sample",
}
"""{measure: why a file has none}."""


def main(argv: Sequence[str]) -> None:
    """Runs the command line. An error that a user can correct is printed in a line; every other error is raised."""
    with output.lasting(lambda _: None), notices.warnings_in_lines():
        args = parse(argv)
        try:
            parallel.process_count()
            result = measure(args.SAMPLES, args.REFERENCE, args.features, args.weights, args.json)
        except UserError as error:
            end(str(error))
        print(table(result), flush=True)
        if args.json:
            try:
                files.write_atomically(args.json, json.dumps(result, indent=1) + "\n")
            except OSError as error:
                end(f"--json is {args.json!r}, which cannot be written ({error.strerror}); the table has the numbers")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with ~ expanded. A wrong one ends the command."""
    parser = argparse.ArgumentParser(prog="python -m cfd.measure", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("SAMPLES", help="an .npz with the images as arr_0, and their classes as arr_1 if they have any")
    parser.add_argument(
        "REFERENCE", help="an .npz with images as arr_0, with the statistics mu and sigma, or with both"
    )
    parser.add_argument("--features", choices=NETWORKS, default="inception", help="the feature network")
    parser.add_argument("--weights", required=True, help="the file of its weights")
    parser.add_argument("--json", default="", help="a file for all numbers, in addition to the table")
    parser.error = end
    args = parser.parse_args(argv)
    for name in ("SAMPLES", "REFERENCE", "weights", "json"):
        setattr(args, name, os.path.expanduser(getattr(args, name)))
    return args


def end(message: str) -> NoReturn:
    """Ends the command with an error in one line, and code 1."""
    sys.exit(f"error: {' '.join(message.split())}")


def measure(samples: str, reference: str, features: str, weights: str, out: str = "") -> dict[str, Any]:
    """All measures of the file `samples` against `reference`, with the `features` network whose `weights` are a file.

    The result is what --json writes; `out` is that file, whose folder is checked. Raises ValueError, before a network
    is loaded, if a file is not as the command expects.
    """
    if os.path.isdir(out):
        raise UserError(f"--json is {out!r}, which is a folder: give a file")
    if out in (samples, reference, weights):
        raise UserError(f"--json is {out!r}, which is a file that is read: give another file for the numbers")
    if out:
        folder = out if files.is_url(out) else os.path.dirname(out) or "."  # a bucket itself has no folder
        access.check_writable(folder, "give --json=FILE in another folder")
    labels, shape = check_samples(samples, features)
    access.check_file("REFERENCE", reference, "give an .npz with images arr_0, or with the statistics mu and sigma")
    headers = check_reference(reference, shape, features, words_for(samples, features))
    classes = read_labels(reference, headers, headers["arr_0"].shape[0]) if "arr_0" in headers else None
    access.check_file("--weights", weights, MAKE[features])
    if features == "classifier":
        check_classes(labels, check_classifier(weights, shape), samples, weights)

    network = open_network(features, weights, parallel.make_mesh(data=-1, fsdp=1))
    base = read_reference(reference, shape, network, words_for(samples, features))
    if classes is not None and (classes >= 0).all():
        base = base._replace(labels=classes[evenly_spaced(len(classes), NEIGHBOUR_ROWS)])
    warn_without_images(reference, base, features)
    metrics.check_rank(len(labels), len(base.mu))
    if features != "dinov2":  # which has no class probabilities, and therefore no Inception score
        metrics.check_splits(len(labels))
    scores = score(image_batches(samples, labels, shape), len(labels), network, base)
    return {
        "samples": samples,
        "num_samples": len(labels),
        "image_shape": shape,
        "has_classes": bool((labels >= 0).all()),
        "reference": reference,
        "reference_arrays": sorted(headers),
        "features": features,
        "features_sha256": network.weights_hash,
        "fid_name": results.fid_name(len(labels), features),
        "reference_saturation": base.saturation,
        **measured(scores),
    }


def measured(scores: Scores) -> dict[str, Any]:
    """The values, intervals, values without each group of images, and classes of `scores`, as --json has them."""
    values = {key: value for key, value in scores.values.items() if value is not None}
    if "kid" in scores.without:
        values["kid_se"] = intervals.standard_error(scores.without["kid"])
    return {
        "measures": values,
        "intervals": {key: intervals.interval(values[key], without) for key, without in scores.without.items()},
        "not_measured": {key: why for key, why in NOT_MEASURED.items() if scores.values[key] is None},
        "without_a_group": scores.without,
        "classes": scores.classes,
    }


def check_samples(path: str, features: str) -> tuple[Int32[np.ndarray, " n"], tuple[int, int, int]]:
    """The classes of the samples, -1 where the file has none, and the shape (H, W, C) of an image.

    The images are not read. Raises ValueError if the file has no uint8 images [N, H, W, C] in C order, if the feature
    network does not take their channels, or if `arr_1` is not an integer >= -1 for each.
    """
    if path.endswith(".npy"):
        raise UserError(f"{path} is an .npy file: save it again as numpy.savez(FILE, numpy.load({path!r}))")
    access.check_file("SAMPLES", path, "give an .npz with the images as arr_0, uint8 [N, H, W, C]")
    headers = npz.npz_headers(path)
    if "arr_0" not in headers:
        raise UserError(
            f"{path} holds {sorted(headers)}, and no images arr_0: save it again as numpy.savez(FILE, images, classes)"
        )
    shape = headers["arr_0"].shape
    if len(shape) != 4 or 0 in shape:
        raise UserError(
            f"{path}: arr_0 has shape {shape}, expected [N, H, W, C]: save it again with "
            + (
                "arr_0[..., None], the channel of grey images"
                if len(shape) == 3 and shape[2] not in (1, 3)  # not a single image [H, W, C]
                else "several images in these four axes"
            )
        )
    height, width, channels = shape[1:]
    if channels not in (1, 3):
        first = height in (1, 3)
        raise UserError(
            f"{path}: arr_0 has shape {shape}, [N, H, W, C], with {channels} channels, expected 1 or 3: save "
            + ("arr_0.transpose(0, 2, 3, 1).copy() in its place" if first else "images in RGB or grey")
        )
    check_images(path, headers["arr_0"], (height, width, channels), words_for(path, features))
    if features != "classifier" and channels != 3:
        raise UserError(
            f"{path}: arr_0 holds grey images, and --features={features} takes RGB: save numpy.repeat(arr_0, 3, "
            "axis=-1) in its place"
        )
    return read_labels(path, headers, shape[0]), (height, width, channels)


def read_labels(path: str, headers: dict[str, npz.Header], count: int) -> Int32[np.ndarray, " n"]:
    """The classes `arr_1` of `count` images, or -1 for each if the file has none. Raises ValueError for other ones."""
    if "arr_1" not in headers:
        return np.full(count, -1, np.int32)
    header = headers["arr_1"]
    if header.shape != (count,) or header.dtype.kind not in "iu":
        remedy = "save the classes as integers [N], or leave arr_1 out"
        if len(header.shape) == 2 and header.shape[0] == count:  # in a column, or one-hot
            of_row = "arr_1[:, 0].astype(int)" if header.shape[1] == 1 else "numpy.argmax(arr_1, axis=-1)"
            remedy = f"save {of_row} in its place"
        raise UserError(
            f"{path}: arr_1 is {header.dtype} of shape {header.shape}, expected an integer for each of {count} images: "
            f"{remedy}"
        )
    labels = npz.read_npz(path, ["arr_1"])["arr_1"]
    wrong = labels[(labels < -1) | (labels > np.iinfo(np.int32).max)]
    if len(wrong):
        raise UserError(f"{path}: arr_1 holds {wrong[0]}, expected classes from 0 on, or -1 for none: leave it out")
    return labels.astype(np.int32)


def check_classes(labels: Int32[np.ndarray, " n"], num_classes: int, samples: str, weights: str) -> None:
    """Raises ValueError if the classifier lacks the class of a sample."""
    if (largest := int(labels.max())) >= num_classes:
        raise UserError(
            f"{samples}: arr_1 holds the class {largest}, and the classifier {weights} has the classes 0 to "
            f"{num_classes - 1}: give a classifier of the samples' own classes, or leave arr_1 out"
        )


def words_for(samples: str, features: str) -> Words:
    """The names of this command's flags in messages about the two files."""
    return Words(
        features="--features",
        use="give --features={}, or a REFERENCE with images arr_0 alone",
        sized_by=f"{samples} holds images",
        resize="give samples and a reference of the same resolution and channels",
        add_images="give more images",
    )


def open_network(features: str, weights: str, mesh: Mesh) -> FeatureNetwork:
    """The feature network of this name, with the weights in a file."""
    if features == "classifier":
        return read_classifier(weights, mesh)
    return open_inception(weights, mesh) if features == "inception" else open_dinov2(weights, mesh)


def image_batches(path: str, labels: Int32[np.ndarray, " n"], image_shape: tuple[int, int, int]) -> Batches:
    """(images, labels) of the samples, in blocks that fit into memory, with a progress bar."""
    rows = block_rows(image_shape)
    with tqdm(total=len(labels), desc="samples", unit="image", unit_scale=True, disable=None) as bar:
        for first, images in zip(range(0, len(labels), rows), npz.npz_batches(path, "arr_0", rows), strict=True):
            yield images, labels[first : first + rows]
            bar.update(len(images))


def table(result: dict[str, Any]) -> str:
    """The result as text: a line per measure, those that are not measured with the reason, and a line per class."""
    shape = "x".join(map(str, result["image_shape"]))
    lines = [
        f"{result['num_samples']:,} images of {shape} in {result['samples']}",
        f"against {result['reference']}, with the features of {result['features']}:",
        "",
        f"{'':24s}{'value':>10s}   95 % interval",
    ]
    for key, value in result["measures"].items():
        low, high = result["intervals"].get(key, (None, None))
        lines.append(
            f"{name_of(key, result):24s}{value:10.4g}" + ("" if low is None else f"   {low:.4g} to {high:.4g}")
        )
    if result["reference_saturation"] is not None:
        lines.append(f"{'saturation of reference':24s}{result['reference_saturation']:10.4g}")
    lines += ["", *(f"{name_of(key, result)} is not measured: {why}." for key, why in result["not_measured"].items())]
    if result["classes"]:
        names = [name for name in result["classes"][0] if result["classes"][0][name] is not None]
        lines += ["", "".join(f"{name.replace('_', ' '):>16s}" for name in names)]
        lines += ["".join(f"{row[name]:16.4g}" for name in names) for row in result["classes"]]
    return "\n".join(lines)


def name_of(key: str, result: dict[str, Any]) -> str:
    """How the table calls a measure."""
    return result["fid_name"] if key == "fid" else NAMES.get(key, key.replace("_", " "))


if __name__ == "__main__":
    main(sys.argv[1:])
