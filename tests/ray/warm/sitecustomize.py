"""In every interpreter of a test's cluster: a worker of Ray is begun by the warm process, and this one ends.

Where that does not answer the worker starts as ever.
"""

import os
import sys

if next((word for word in sys.orig_argv if word.endswith(".py")), "").endswith("/workers/default_worker.py"):
    import json
    import socket

    try:
        with socket.socket(socket.AF_UNIX) as warm:
            warm.connect(os.environ["RAYK_WARM"])
            told = {"argv": sys.orig_argv, "path": sys.path, "environ": dict(os.environ), "folder": os.getcwd()}
            socket.send_fds(warm, [b"3"], [0, 1, 2])
            warm.sendall(json.dumps(told).encode())
            warm.shutdown(socket.SHUT_WR)
            begun = warm.recv(1)
    except (OSError, KeyError):
        begun = b""
    if begun:
        os._exit(0)
