"""AIMET's encodings JSON: every version and form, and the one that the stages exchange."""

from sdconvert.io.encodings.describe import describe
from sdconvert.io.encodings.document import EncodingsFile
from sdconvert.io.encodings.reading import parse_encodings, read_encodings_file
from sdconvert.io.encodings.tensor import Kind, TensorEncoding
from sdconvert.io.encodings.torch_keyed import (
    VERSION,
    Encoding,
    ParamEncodings,
    dump_encodings,
    read_encodings,
    write_encodings,
    write_params,
)

__all__ = [
    "VERSION",
    "Encoding",
    "EncodingsFile",
    "Kind",
    "ParamEncodings",
    "TensorEncoding",
    "describe",
    "dump_encodings",
    "parse_encodings",
    "read_encodings",
    "read_encodings_file",
    "write_encodings",
    "write_params",
]
