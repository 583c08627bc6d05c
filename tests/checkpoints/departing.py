"""The end of a process that used DistributedDataParallel."""

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """End this process, successfully, without Python's finalization.

    torch keeps a process group that DistributedDataParallel used beyond destroy_process_group, and gloo's threads with it. One of them that lets
    go of its last tensor only then asks for Python's lock, and the process aborts ("terminate called without an active exception"); on a busy
    machine one time in a few.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
