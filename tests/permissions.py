"""Permission bits that hold for root too, as they do for every other user.

`python permissions.py COMMAND ...` runs a command for which they hold.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OVERRIDE = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root ignores permission bits."""


class Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def obey() -> int:
    """From now on, this thread and its forked children obey permission bits. Returns the capabilities until then."""
    header, data, libc = Header(0x20080522, 0), (Data * 2)(), ctypes.CDLL(None, use_errno=True)
    assert libc.capget(ctypes.byref(header), data) == 0
    before = data[0].effective
    data[0].effective &= ~OVERRIDE
    assert libc.capset(ctypes.byref(header), data) == 0
    return before


@contextmanager
def obeyed() -> Iterator[None]:
    """Within it, this thread obeys permission bits."""
    before = obey()
    try:
        yield
    finally:
        header, data, libc = Header(0x20080522, 0), (Data * 2)(), ctypes.CDLL(None, use_errno=True)
        assert libc.capget(ctypes.byref(header), data) == 0
        data[0].effective = before
        assert libc.capset(ctypes.byref(header), data) == 0


if __name__ == "__main__":
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; another user than root has nothing to drop
    os.execv(sys.argv[1], sys.argv[1:])
