"""A process that has torch imported, of which the workers of a test's cluster are forked.

Most of a replica's start is this import, and tests start hundreds of replicas. What is forked runs Ray's own script of
a worker with the arguments, environment, folder and files that its raylet gave; Ray, which reads its environment as it
is imported, and rayk are imported anew.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
from typing import Any


def begin(told: dict[str, Any], files: list[int]) -> str:
    """Be the process that `told` describes; its script."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environ"])
    tempfile.tempdir = None
    at = next(i for i, word in enumerate(told["argv"]) if word.endswith(".py"))
    script: str = told["argv"][at]
    sys.argv, sys.orig_argv = told["argv"][at:], told["argv"]
    sys.path[:] = [os.path.dirname(script), *told["path"]]
    return script


def load(names: list[str]) -> None:
    """Import what Ray and rayk use, and `names`."""
    for name in [
        "google.protobuf.internal.builder",
        "jsonschema",
        "msgspec",
        "psutil",
        "requests",
        "torch",
        "yaml",
        *names,
    ]:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "what has threads cannot be forked"
    gc.collect()
    gc.freeze()


def main(place: str, *names: str) -> str:
    """Fork whoever asks at the socket `place`, until stdin ends; returns in what was forked only.

    Nothing is imported before somebody asks: a cluster that starts meanwhile on a busy machine needs the cores.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen(64)
        print("ready", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            asker, _ = server.accept()
            with asker:
                _, files, _, _ = socket.recv_fds(asker, 1, 3)
                with asker.makefile("rb") as whole:
                    told = json.load(whole)
                if "torch" not in sys.modules:
                    load(list(names))
                if not os.fork():
                    server.close()
                    asker.close()
                    sys.modules["torch"].seed()
                    return begin(told, files)
                for file in files:
                    os.close(file)
                asker.sendall(b"k")
    os._exit(0)


if __name__ == "__main__":
    worker = main(*sys.argv[1:])
    runpy.run_path(worker, run_name="__main__")
