"""`python -m landscape`, so that `torchrun -m landscape train ...` works."""

import os
import sys

from landscape.cli import main
from landscape.ranks import launched

if __name__ == "__main__":
    status = main()
    if launched().size == 1:
        raise SystemExit(status)
    # Without Python's finalization: a thread of gloo that lets go of its last tensor only then asks for Python's lock and aborts the process
    # ("terminate called without an active exception"), now and then on a busy machine, when all of the run has been written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
