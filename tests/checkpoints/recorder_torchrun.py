"""The example under torchrun, in both kinds, with what it recorded kept beside by torch.save: recorder_torchrun.py FOLDER"""

import sys
from pathlib import Path
from typing import Any

import recorder_example
import torch
import torch.distributed as dist
from departing import leave

import landscape as ls

OUT = Path(sys.argv[1])


def save_both(out: str, *, step: int, model: Any, optimizer: Any, **facts: Any) -> Path:
    """Keep the state, record it, and see that nothing has been touched."""
    network = getattr(model, "module", model)
    kept = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    path = OUT / "truth" / f"{Path(out).name}-{step}-{dist.get_rank()}.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save(kept, path)
    versions = [t._version for t in model.state_dict().values()]
    final = record(out, step=step, model=model, optimizer=optimizer, **facts)
    assert versions == [t._version for t in model.state_dict().values()]
    assert torch.equal(kept["rng"], torch.get_rng_state())
    return final


record = ls.save_learner
ls.save_learner = save_both

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind in ("ddp", "gossip"):
        recorder_example.train(kind, str(OUT / kind))
    leave()
