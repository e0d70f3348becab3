"""Buckets, gs://NAME: which paths are URLs, and whether a bucket can be used."""

import os


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the URL of something in a bucket, and not a path on this machine."""
    return "://" in os.fspath(path)
