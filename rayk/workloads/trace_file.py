"""Opening a trace: decompression by magic number, lines with their numbers, and the error that names them."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rayk.errors import RaykError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class TraceError(RaykError, ValueError):
    """A trace that cannot be used: which file and line (0: the file as a whole), what is wrong, what to do."""

    path: str
    line: int
    problem: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.path}, line {self.line}" if self.line else self.path
        return f"trace {where}: {self.problem}; {self.remedy}"


class TraceLines:
    """The non-empty lines of a trace file, plain, gzip or zstandard, with their numbers from 1.

    A context manager that owns the open file. Every failure to read is a TraceError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.line = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> TraceLines:
        try:
            file = open(self.path, "rb")
            magic = file.read(4)
            file.seek(0)
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror})", "give the path of an existing trace file") from None
        self._file = file
        self._lines: IO[bytes] = file
        if magic.startswith(_GZIP):
            self._lines = io.BufferedReader(gzip.GzipFile(fileobj=file))
        elif magic.startswith(_ZSTD):
            import zstandard

            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            self._lines = io.BufferedReader(reader)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        """Non-empty lines without their ends; `line` is the number of the one handed out last."""
        from zstandard import ZstdError

        lines = iter(self._lines)
        while True:
            try:
                text = next(lines, None)
            except (OSError, EOFError, zlib.error, ZstdError) as error:
                self.line += 1
                raise self.error(f"the compressed data is damaged ({error})", "fetch the file again") from None
            if text is None:
                return
            self.line += 1
            if stripped := text.strip():
                yield stripped

    def error(self, problem: str, remedy: str) -> TraceError:
        """An error about the line handed out last."""
        return TraceError(self.path, self.line, problem, remedy)
