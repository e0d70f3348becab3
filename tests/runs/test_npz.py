"""`.npz` files of unknown origin are read or refused in little memory, and samples are written batch by batch."""

import io
import pickle
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cfd.runs import npz


class Canary:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def npy(array: np.ndarray, **header) -> bytes:
    """The bytes of an array's member, in which `header` replaces fields of the true header."""
    file = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, fields | header)
    return file.getvalue() + array.tobytes()


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive of these members, whatever they contain."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def patched(path: Path, old: bytes, new: bytes) -> Path:
    """The file with every `old` replaced by `new`."""
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, save):
    arrays = {
        "mu": np.linspace(0.0, 1.0, 7),
        "sigma": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "arr_0": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
        "big_endian": np.arange(5, dtype=">i4"),
        "flag": np.array(True),
        "empty": np.zeros((0, 3), np.float32),
    }
    save(tmp_path / "a.npz", **arrays)
    read = npz.read_npz(tmp_path / "a.npz")
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype
    headers = npz.npz_headers(tmp_path / "a.npz")
    assert headers["arr_0"].shape == (2, 2, 2, 3) and headers["sigma"].nbytes == 96
    assert list(npz.read_npz(tmp_path / "a.npz", ["sigma", "mu"])) == ["sigma", "mu"]
    with pytest.raises(ValueError, match=r"holds \['mu', .*\], not \['mu_s'\]"):
        npz.read_npz(tmp_path / "a.npz", ["mu", "mu_s"])
    with pytest.raises(ValueError, match="over the limit of 50"):
        npz.read_npz(tmp_path / "a.npz", max_bytes=50)


def test_round_trip_gives_the_same_bytes(tmp_path):
    arrays = {"a/b": np.arange(6.0, dtype=np.float32).reshape(2, 3).T, "n": np.array(3), "none": np.zeros((0, 2))}
    npz.write_npz(tmp_path / "a.npz", arrays)
    time.sleep(0.01)
    npz.write_npz(tmp_path / "b.npz", npz.read_npz(tmp_path / "a.npz"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as theirs:
        for name, array in arrays.items():
            np.testing.assert_array_equal(theirs[name], array)
    with pytest.raises(ValueError, match="o has dtype object"):
        npz.write_npz(tmp_path / "c.npz", {"o": np.array([{}])})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def hostile(tmp_path: Path) -> dict[str, Path]:
    """Files that a loader must refuse."""
    good = npy(np.arange(1000.0))
    canary = np.array([Canary(tmp_path / "canary")], dtype=object)
    false = npy(np.arange(1000.0), shape=((2**31 - 128) // 8,))
    objects, pickled = io.BytesIO(), pickle.dumps(Canary(tmp_path / "canary"))
    np.lib.format.write_array(objects, canary, allow_pickle=True)
    inner = archive(tmp_path / "inner.zip", {"mu.npy": good}).read_bytes()
    whole = archive(tmp_path / "whole.npz", {"mu.npy": good}).read_bytes()
    long_header = b"\x93NUMPY\2\0" + (2**32 - 1).to_bytes(4, "little") + b" " * 100
    files = {
        "objects": archive(tmp_path / "objects.npz", {"mu.npy": objects.getvalue()}),
        "pickled member": archive(tmp_path / "member.npz", {"mu.npy": pickled}),
        "pickled file": tmp_path / "file.npz",
        "structured": archive(tmp_path / "structured.npz", {"mu.npy": npy(np.zeros(3, "f4,i4"))}),
        "text": archive(tmp_path / "text.npz", {"mu.npy": npy(np.array(["a"]))}),
        "4 TB": archive(tmp_path / "terabytes.npz", {"mu.npy": npy(np.zeros(1), shape=(2**39,))}),
        "4 TB deflated": archive(
            tmp_path / "z.npz", {"mu.npy": npy(np.zeros(1), shape=(2**39,))}, zipfile.ZIP_DEFLATED
        ),
        "overflow": archive(tmp_path / "overflow.npz", {"mu.npy": npy(np.zeros(1), shape=(2**62, 4, 2**62))}),
        "negative": archive(tmp_path / "negative.npz", {"mu.npy": npy(np.arange(4.0), shape=(-2, -2))}),
        "too short": archive(tmp_path / "short.npz", {"mu.npy": npy(np.arange(3.0), shape=(4,))}),
        "too long": archive(tmp_path / "long.npz", {"mu.npy": npy(np.arange(5.0), shape=(4,))}),
        "header of code": archive(tmp_path / "code.npz", {"mu.npy": npy(np.zeros(1)).replace(b"False", b"exit()")}),
        "header of 4 GB": archive(tmp_path / "header.npz", {"mu.npy": long_header}),
        "header cut": archive(tmp_path / "cut.npz", {"mu.npy": good[:20]}),
        "nothing": archive(tmp_path / "nothing.npz", {"mu.npy": b""}),
        "nested": archive(tmp_path / "nested.npz", {"mu.npy": inner}),
        "zip in it": archive(tmp_path / "zip.npz", {"mu.npy": good, "inner.zip": inner}),
        "path": archive(tmp_path / "path.npz", {"../mu": good}),
        "bomb": archive(tmp_path / "bomb.npz", {"mu.npy": npy(np.zeros(2**23, np.uint8))}, zipfile.ZIP_DEFLATED),
        "lzma": archive(tmp_path / "lzma.npz", {"mu.npy": good}, zipfile.ZIP_LZMA),
        "truncated": tmp_path / "truncated.npz",
        "beheaded": tmp_path / "beheaded.npz",
        "flipped": tmp_path / "flipped.npz",
        "empty": tmp_path / "empty.npz",
        "array": tmp_path / "array.npz",
        "size": archive(tmp_path / "size.npz", {"mu.npy": good}),
        "both sizes": archive(tmp_path / "sizes.npz", {"mu.npy": false}),
        "both sizes deflated": archive(tmp_path / "sizes_z.npz", {"mu.npy": false}, zipfile.ZIP_DEFLATED),
        "encrypted": archive(tmp_path / "encrypted.npz", {"mu.npy": good}),
    }
    files["pickled file"].write_bytes(pickled)
    files["truncated"].write_bytes(whole[: len(whole) // 2])
    files["beheaded"].write_bytes(whole[100:])
    files["flipped"].write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    files["empty"].write_bytes(b"")
    files["array"].write_bytes(good)
    patched(files["size"], len(good).to_bytes(4, "little"), (2**31).to_bytes(4, "little"))
    for kind in ("both sizes", "both sizes deflated"):
        patched(files[kind], len(false).to_bytes(4, "little"), (2**31).to_bytes(4, "little"))
    central = files["encrypted"].read_bytes().replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0")
    files["encrypted"].write_bytes(central)
    return files


def test_hostile_files_are_refused(tmp_path):
    for kind, path in hostile(tmp_path).items():
        start = time.process_time()  # a busy machine takes longer
        tracemalloc.start()
        with pytest.raises(ValueError) as error:
            npz.read_npz(path, max_bytes=2**22)
            pytest.fail(kind)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert str(path) in str(error.value) and ": " in str(error.value).removeprefix(f"{path}: "), kind
        with pytest.raises(ValueError, match=r"\S: remove it$"):
            npz.read_npz(path, max_bytes=2**22, remedy="remove it")
        assert peak < 2**20 and time.process_time() - start < 2.0, kind
        if kind != "bomb":  # its rows can be read, batch by batch, in little memory
            with pytest.raises(ValueError):
                list(npz.npz_batches(path, "mu", 100))
        if "size" in kind:
            with pytest.raises(ValueError, match="2,147,483,648 bytes, more than the file can hold"):
                npz.npz_headers(path)
            with pytest.raises(ValueError, match="more than the file can hold: remove it"):
                npz.npz_headers(path, remedy="remove it")
    assert not (tmp_path / "canary").exists()
    with pytest.raises(ValueError, match=r"absent\.npz cannot be read \(No such file or directory\): give a file"):
        npz.read_npz(tmp_path / "absent.npz")


def test_batches_are_the_array(tmp_path):
    images = np.arange(10 * 4 * 4 * 3, dtype=np.uint8).reshape(10, 4, 4, 3)
    np.savez_compressed(tmp_path / "a.npz", arr_0=images, f=np.asfortranarray(images), n=np.array(1))
    batches = list(npz.npz_batches(tmp_path / "a.npz", "arr_0", 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(batches), images)
    for name, message in (("f", "C order"), ("n", "C order"), ("mu", "not 'mu'")):
        with pytest.raises(ValueError, match=message):
            next(npz.npz_batches(tmp_path / "a.npz", name, 4))
        with pytest.raises(ValueError, match=r": remove it$"):
            next(npz.npz_batches(tmp_path / "a.npz", name, 4, remedy="remove it"))


def test_samples_in_openais_layout(tmp_path):
    """`numpy.load` reads the file like one of `numpy.savez(path, images, labels)`; only one batch was in memory."""
    images = np.arange(600 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(600, 32, 32, 3)
    labels = np.arange(600, dtype=np.int32) % 10
    path = tmp_path / "samples.npz"
    tracemalloc.start()
    with npz.sample_writer(path, 600, (32, 32, 3)) as write:
        for i in range(0, 600, 7):
            write(images[i : i + 7], labels[i : i + 7])
    assert tracemalloc.get_traced_memory()[1] < images.nbytes / 4
    tracemalloc.stop()
    with np.load(path) as theirs:
        assert theirs.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(theirs["arr_0"], images)
        np.testing.assert_array_equal(theirs["arr_1"], labels)
        assert theirs["arr_0"].dtype == np.uint8 and theirs["arr_1"].dtype == np.int64


def test_unfinished_samples_leave_no_file(tmp_path):
    path, image, label = tmp_path / "samples.npz", np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1, np.int32)
    faults = {
        "1 samples were written where 2 were announced": (image, label),
        r"expected uint8 images of shape \(4, 4, 3\), got uint8 \(5, 4, 3\)": (np.zeros((1, 5, 4, 3), np.uint8), label),
        r"expected uint8 .* got float32": (image.astype(np.float32), label),
        "1 images came with 2 labels": (image, np.zeros(2, np.int32)),
    }
    for message, batch in faults.items():
        with pytest.raises(ValueError, match=message), npz.sample_writer(path, 2, (4, 4, 3)) as write:
            write(*batch)
    assert not list(tmp_path.iterdir())

    npz.write_npz(path, {"arr_0": image})
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), npz.sample_writer(path, 2, (4, 4, 3)) as write:
        raise KeyboardInterrupt
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
