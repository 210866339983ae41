"""Talking to valgrind's callgrind from inside the process that it runs: when to count, and writing down a count.

Valgrind recognises a *client request*: a fixed sequence of instructions that does nothing on a processor, with a
request number and its arguments in registers (valgrind.h and callgrind.h of valgrind, "magic instruction sequence").
Here it is a page of machine code, so that no compiler is needed. x86-64 only.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_RUNNING_ON_VALGRIND = 0x1001
_CALLGRIND = (ord("C") << 24) | (ord("T") << 16)
_ZERO, _DUMP_AT, _START, _STOP = _CALLGRIND + 1, _CALLGRIND + 3, _CALLGRIND + 4, _CALLGRIND + 5

_REQUEST = bytes.fromhex(
    "4889f8"  # mov rax, rdi: the arguments, six words
    "31d2"  # xor edx, edx: the result where there is no valgrind
    "48c1c703 48c1c70d 48c1c73d 48c1c733"  # rol rdi by 3, 13, 61 and 51: 128 bits, so nothing
    "4887db"  # xchg rbx, rbx
    "4889d0 c3"  # mov rax, rdx; ret
)


class Callgrind:
    """The valgrind that runs this process; OSError when there is none."""

    def __init__(self) -> None:
        if platform.machine() != "x86_64":
            raise OSError(f"instructions are counted on x86_64 only, this is {platform.machine()}")
        self._code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._code.write(_REQUEST)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self._call = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(address)
        self._words = (ctypes.c_uint64 * 6)()
        if not self._request(_RUNNING_ON_VALGRIND):
            raise OSError("this process does not run under valgrind")

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Count the instructions of the body, and write them to the next output file under `name`."""
        text = ctypes.create_string_buffer(name.encode())
        self._request(_START)
        self._request(_ZERO)
        try:
            yield
        finally:
            self._request(_DUMP_AT, ctypes.addressof(text))
            self._request(_STOP)

    def _request(self, number: int, argument: int = 0) -> int:
        self._words[0], self._words[1] = number, argument
        return int(self._call(ctypes.addressof(self._words)))
