"""What the weights of a model come to once its file is compressed."""

from __future__ import annotations

import zlib

import onnx_ir as ir

from edgewise.optimizer import files

_LEVEL = 6  # the default of gzip and of zip
_PIECE = 1 << 24  # bytes


def compressed_bytes(model: ir.Model) -> int:
    """Bytes of all tensors after deflate, as gzip, zip and most stores and downloads apply it to a file.

    The tensors follow one another in one stream, as they do in the file. Zeros go nearly for nothing.
    """
    stream, size = zlib.compressobj(_LEVEL), 0
    for _, tensor in files.tensors(model):
        content = memoryview(tensor.tobytes())
        size += sum(len(stream.compress(content[i : i + _PIECE])) for i in range(0, len(content), _PIECE))
    return size + len(stream.flush())
