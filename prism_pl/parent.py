"""Processes that end with the one that started them."""

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """Have the system kill this process when its parent ends, however that ends. Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
