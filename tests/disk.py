"""Disks that are full: by a limit on the size of files, and where the process may mount one, a small file system."""

import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[bool]:
    """A file system of its own at `place`, a new folder; False where this process may not mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def filled(disk: Path, *, but: int = 0) -> Iterator[None]:
    """Within it, at most `but` bytes are free."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:  # which writes what there is space for
        file.write(bytes(shutil.disk_usage(disk).free - but))
    yield
    ballast.unlink()
