"""The records of TensorBoard's files of events."""

import struct
from typing import Any

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c


def records(data: bytes) -> list[Any]:
    """The events in the content of a file. Every checksum must be right, and no record cut short."""
    protocol: Any = event_pb2  # protobuf creates its classes at import, where a type checker does not see them
    found = []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event, sums = data[12 : 12 + size], (data[8:12], data[12 + size : 16 + size])
        assert sums == tuple(struct.pack("<I", masked_crc32c(part)) for part in (data[:8], event))
        found.append(protocol.Event.FromString(event))
        data = data[16 + size :]
    return found
