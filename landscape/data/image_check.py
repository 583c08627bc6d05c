"""A check of all image files of a data set, and what is left without those that cannot be read."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from landscape.data.image_files import (
    ImageFiles,
    UnreadableImageError,
    class_folders,
    find_images,
    num_threads,
    read_image,
    some,
    split_folders,
)

LIST_NAME = "unreadable-images.json"
"""Where a check of a data set leaves what it found, beside train and val."""
CHUNK = 1024
"""Files that wait to be checked at once."""


@dataclass(frozen=True)
class ImageCheck:
    """What a check of all image files found.

    Attributes:
        root: the folder of train and val.
        num_files: how many were read.
        unreadable: name, as train/CLASS/NAME, and reason of each that cannot be.
        list_file: where this is written down.
    """

    root: Path
    num_files: int
    unreadable: Mapping[str, str]
    list_file: Path

    def __str__(self) -> str:
        lines = [
            f"{self.root}: {self.num_files:,} image files read, {len(self.unreadable):,} cannot be; see {self.list_file}"
        ]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.unreadable.items()])


def check_images(root: str | Path, *, list_file: str | Path | None = None, quiet: bool = False) -> ImageCheck:
    """Read all images under root/train and root/val once, in parallel, and write down which cannot be.

    `image_folder(..., corrupt="skip")` leaves those out. A few ms an image and core: ImageNet takes some minutes on 16 cores.

    Args:
        root: the folder of train and val.
        list_file: where to write the list, JSON; root/unreadable-images.json by default.
        quiet: without a progress bar.
    """
    root = Path(root).expanduser()
    target = root / LIST_NAME if list_file is None else Path(list_file).expanduser()
    parts = [find_images(root / part, class_folders(root / part)) for part in split_folders(root)]
    names = [f"{files.folder.name}/{name}" for files in parts for name in files.names]
    beside = target.with_name(f"{target.name}.part")
    unreadable: dict[str, str] = {}
    try:
        with (
            open(beside, "w", encoding="utf-8") as file,  # opened first: what cannot be written is told before the work
            ThreadPoolExecutor(num_threads()) as pool,
            tqdm(total=len(names), unit="image", desc="check", disable=quiet or None, delay=2, leave=False) as bar,
        ):
            for start in range(0, len(names), CHUNK):
                some_names = names[start : start + CHUNK]
                faults = pool.map(_fault, (os.path.join(root, name) for name in some_names))
                unreadable.update({n: fault for n, fault in zip(some_names, faults, strict=True) if fault is not None})
                bar.update(len(some_names))
            json.dump({"num_files": len(names), "unreadable": unreadable}, file, indent=1)
        os.replace(beside, target)
    except OSError as error:
        raise ValueError(
            f"the list of unreadable images cannot be written to {target}: {error.strerror or error}; name another place with list_file="
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink()
    return ImageCheck(root, len(names), unreadable, target)


def _fault(path: str) -> str | None:
    """Why a file cannot be read, or None."""
    try:
        read_image(path)
    except UnreadableImageError as error:
        return error.reason
    return None


def how_to_check(root: str | Path) -> str:
    """For messages."""
    command = f"from landscape.data.image_folder import check_images; print(check_images({str(root)!r}))"
    return (
        f'find all such files with: python -c "{command}"; then repair them and delete {LIST_NAME}, or keep it: tasks leave out what it names '
        '(image_folder(..., corrupt="skip") too), so that a run begun with all images can only be resumed once they are repaired'
    )


def leave_out(root: Path, parts: Sequence[ImageFiles], list_file: Path) -> list[ImageFiles]:
    """The files without those that a check found unreadable, which a warning counts and names."""
    try:
        listed = [str(name) for name in json.loads(list_file.read_text(encoding="utf-8"))["unreadable"]]
    except FileNotFoundError:
        raise ValueError(
            f'{list_file} is missing: corrupt="skip" needs a check of all images; {how_to_check(root)}'
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{list_file} cannot be read as the list of a check ({error}); {how_to_check(root)}"
        ) from error
    kept = []
    for files in parts:
        within = f"{files.folder.name}/"
        kept.append(files.without([name.removeprefix(within) for name in listed if name.startswith(within)]))
    for before, files in zip(parts, kept, strict=True):
        bare = set(range(len(files.classes))) - set(files.targets.tolist())
        if bare:
            bare_names = [files.classes[c] for c in sorted(bare)]
            raise ValueError(
                f"{files.folder}: no image of {some(bare_names)} is left without the unreadable ones of {list_file}"
            )
        if len(files) < len(before):
            out = sorted(set(before.names) - set(files.names))
            warnings.warn(
                f"{files.folder}: {len(out):,} of {len(before):,} images are left out, unreadable by {list_file}: {some(out)}; delete the list once they are repaired",
                stacklevel=3,
            )
    return kept
