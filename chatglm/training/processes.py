"""Owns how a process ends that a launcher started beside others."""

import logging
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with an exit code; one of several without the destructors of C++.

    What PyTorch keeps of a process group may abort a process that has done its work ("terminate
    called without an active exception", 1 of 15 runs of two processes on CPUs with torch 2.13, with
    `destroy_process_group` and without), and the launcher then calls the whole run failed.

    Args:
        code: 0 if all went well.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


__all__ = ["leave"]
