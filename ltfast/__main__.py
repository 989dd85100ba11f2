"""`python -m ltfast` is the command `ltfast`, and what a launcher starts in each process."""

import atexit
import contextlib
import os
import sys

from ltfast.cli import main
from ltfast.launch import launched


def leave(code: int) -> None:
    """End this process, once Python's own exit functions have run.

    In one of several processes, without the destructors of C++ libraries: with gloo they have aborted a process that had
    done its work, and all were started again to evaluate once more.
    """
    if not launched():
        raise SystemExit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
