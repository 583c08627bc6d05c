"""What names of files and folders tell: the rank that wrote them, and the step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Counts = Literal["step", "epoch", "number"]
"""What the number in a name counts: steps, epochs, or whatever its writer counted."""

SUFFIXES = (
    "pt",
    "pth",
    "ckpt",
    "chkpt",
    "checkpoint",
    "bin",
    "tar",
    "pkl",
    "safetensors",
    "th",
    "t7",
    "model",
    "mdl",
    "weights",
    "state",
)
WORDS = ("rank", "worker", "learner", "replica", "client", "agent", "peer", "process", "proc", "node", "gpu")
"""What is put before a process's number; where several are there, the first of these counts."""

_NUMBER = r"(\d{1,6})(?!\d)"
_RANKS = (
    *(re.compile(rf"(?<![a-z]){word}s?[_.=-]?{_NUMBER}(?:[_-]?(?:of|n)[_-]?{_NUMBER})?") for word in WORDS),
    re.compile(rf"(?<![a-z0-9])r{_NUMBER}[_-]?n{_NUMBER}"),
    re.compile(rf"(?<!\d){_NUMBER}[_-]of[_-]{_NUMBER}"),
    re.compile(rf"(?<=[_.-])r{_NUMBER}(?=[_.-]|$)"),
)
_END = rf"(?=(?:[_.=-]*(?:(?:{'|'.join(WORDS)})s?|r)?[_.=-]?\*)?[_.-]*$)"
"""The end of a name, with or without a rank."""

_ORDINARY = re.compile(r"(?:(?:model|state|ckpt|net|weights|checkpoint|snapshot|iter)[_.=-]?)?#")
_WORLD = re.compile(rf"(?<![a-z])world[_-]?size[_.=-]?{_NUMBER}")
_STEPS: tuple[tuple[Counts, re.Pattern[str]], ...] = (
    ("step", re.compile(r"(?<![a-z])(?:global[_-]?)?(?:steps?|iters?|iterations?|it|updates?|num_updates)[_.=-]{0,2}(\d{1,15})(?!\d)")),
    ("step", re.compile(r"(?<![\d.])(\d{1,15})[_-]?(?:steps?|iters?|iterations?|updates?)(?![a-z])")),
    ("step", re.compile(r"^checkpoint-(\d{1,15})$")),  # Hugging Face's Trainer
    ("epoch", re.compile(r"(?<![a-z])(?:epochs?|ep)[_.=-]{0,2}(\d{1,15})(?!\d)")),
    ("epoch", re.compile(r"(?<![a-z0-9])e[_=]?(\d{1,15})(?!\d)")),
    ("epoch", re.compile(r"(?<![\d.])(\d{1,15})[_-]?epochs?(?![a-z])")),
    ("number", re.compile(r"(?:^|(?<=[_=-])|(?<=[^\d]\.)|(?<![a-z])(?:model|state|ckpt|net|weights|checkpoint|snapshot))(\d{1,15})" + _END)),
)  # fmt: skip
_SPECIAL = re.compile(r"(?<![a-z])(?:best|last|latest|final|newest|current)(?![a-z])")
_COMPANION = re.compile(
    r"(?:optim\w*|opt|(?:lr_?)?schedulers?|scaler|rng|rng_state|random_states?|training_args|train_args|args|trainer_state|grad_scaler)(?![a-z])"
)


@dataclass(frozen=True)
class Name:
    """What a name tells.

    Attributes:
        stem: what is left without suffix, rank and step: equal for the files of one series.
        rank: of the process that wrote it.
        size: how many processes there are.
        rank_word: what is put before the rank, "" where nothing is.
        number: the step, epoch or other number.
        counts: what that counts; None without one.
        is_special: whether it is called the best, the last or the like.
        is_companion: whether it begins as the state of an optimizer or a schedule does, beside the weights.
        has_suffix: whether it ends as checkpoints do, or with no suffix at all.
    """

    stem: str
    rank: int | None = None
    size: int | None = None
    rank_word: str = ""
    number: int | None = None
    counts: Counts | None = None
    is_special: bool = False
    is_companion: bool = False
    has_suffix: bool = True

    @property
    def sure_number(self) -> int | None:
        """The number, where the name alone tells that it counts checkpoints (`ckpt_3`, not `resnet_18`)."""
        return self.number if self.counts != "number" or _ORDINARY.fullmatch(self.stem) else None


@lru_cache(maxsize=1 << 16)
def parse(name: str) -> Name:
    """What the name of a file or a folder tells.

    >>> parse("checkpoint_ep3_r1_n4.pth.tar")
    Name(stem='checkpoint_ep#_r*', rank=1, size=4, rank_word='r', number=3, counts='epoch', is_special=False, is_companion=False, has_suffix=True)
    >>> [(n.number, n.counts) for n in map(parse, ("epoch=3-step=100.ckpt", "global_step100", "model_100.pt", "checkpoint-100", "resnet50.pth"))]
    [(100, 'step'), (100, 'step'), (100, 'number'), (100, 'step'), (None, None)]
    >>> [(n.rank, n.size) for n in map(parse, ("model_world_size_8_rank_3.pt", "a-00001-of-00004.pt", "worker2.pt", "ckpt_r0.pt", "bert.pt"))]
    [(3, 8), (1, 4), (2, None), (0, None), (None, None)]
    """
    text = name[:1000].lower()
    base, ends = _without_suffix(text)
    rank = size = None
    word = ""
    for pattern in _RANKS:
        found = pattern.search(base)
        if found:
            rank = int(found[1])
            size = int(found[2]) if found.re.groups > 1 and found[2] else None
            word = re.match(r"[a-z]*", found[0])[0]  # type: ignore[index]
            base = base[: found.start(1)] + "*" + base[found.end() :]
            break
    world = _WORLD.search(base)
    if world and rank is not None:
        size = size or int(world[1])
    number, counts = None, None
    for kind, pattern in _STEPS:
        found = pattern.search(base)
        if found:
            number, counts = int(found[1]), kind
            base = base[: found.start(1)] + "#" + base[found.end(1) :]
            break
    return Name(base, rank, size, word, number, counts, bool(_SPECIAL.search(base)), bool(_COMPANION.match(base)), ends)


def _without_suffix(text: str) -> tuple[str, bool]:
    """A name without what checkpoints end with; and whether it ends so, or with no suffix."""
    base, found = text, False
    while True:
        before, dot, suffix = base.rpartition(".")
        if not dot or not before or suffix not in SUFFIXES:
            break
        base, found = before, True
    return base, found or not re.search(r"\.[a-z_]\w*$", base)


def folder_rank(name: str) -> int | None:
    """The rank that a folder of one process is called by: `3`, `rank_3`, `worker3`.

    >>> [folder_rank(n) for n in ("3", "rank_3", "worker3", "step_3", "3rd")]
    [3, 3, 3, None, None]
    """
    found = re.fullmatch(rf"(?:(?:{'|'.join(WORDS)})s?[_.=-]?)?(\d{{1,6}})", name[:100].lower())
    return int(found[1]) if found else None
