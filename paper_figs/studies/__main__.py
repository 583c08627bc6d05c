"""Run a study and keep its results.

    python -m paper_figs.studies NAME [--work DIR] [--data-root DIR] [--estimate | --pilot | --quick]
    python -m paper_figs.studies --list

Writes paper_figs/data/NAME.nc. Runs are kept under the work directory, and an interrupted study goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paper_figs.studies.along import places, run_along
from paper_figs.studies.budget import estimate
from paper_figs.studies.declared import STUDIES, Study, study_named
from paper_figs.studies.mapping import load_task, outcome_lines, run_map
from paper_figs.studies.stored import DATA, write_study


def run_study(
    study: Study, work: Path, out: Path | None, data_root: str | Path | None = None, *, quick: bool = False, only_estimate: bool = False,
    map_only: bool = False, quiet: bool = False,
) -> Path | None:  # fmt: skip
    """Both stages, and the file.

    Args:
        study: what to run.
        work: where runs are kept and found again.
        out: folder of the file; paper_figs/data by default, the work directory for a quick study.
        data_root: for tasks that read from disk.
        quick: run `Study.quick` of it instead.
        only_estimate: say what it would take, and stop.
        map_only: stage 1 alone, as text; no file.
        quiet: no progress bars.

    Returns:
        the file written, if any.
    """
    task, train_data = load_task(study, data_root)
    if quick:
        study = study.quick(len(train_data))
    print(study.scale_label(len(train_data)))
    print(estimate(study, task, train_data), flush=True)
    if only_estimate:
        return None
    found = run_map(study, task, train_data, work / study.name, quiet=quiet)
    print("\n".join(outcome_lines(found)), flush=True)
    for place in places(found):
        print(f"along training, {place.kind}: total batch {study.total_batches[place.batch]}, learning rate {study.rates_at(place.batch)[place.rate]:g}")  # fmt: skip
    if map_only:
        return None
    along = run_along(study, found, task, train_data, work / study.name, quiet=quiet)
    path = (out or (work if quick else DATA)) / f"{study.name}.nc"
    write_study(study, found, along, path)
    print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for a user's mistake, which is printed."""
    parser = argparse.ArgumentParser(prog="python -m paper_figs.studies", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", metavar="NAME", help="the study, see --list")
    parser.add_argument("--list", action="store_true", help="say which studies there are")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/studies"),
        metavar="DIR",
        help="where runs are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where NAME.nc goes (default: paper_figs/data; with --quick the work directory)",
    )
    parser.add_argument("--data-root", metavar="DIR", help="folder of the data sets (default: LANDSCAPE_DATA_ROOT)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--estimate", action="store_true", help="time a few steps, say what the study would take, and stop"
    )
    how.add_argument(
        "--pilot", action="store_true", help="the map of the first seed, as text; its runs are kept for the whole study"
    )
    how.add_argument(
        "--quick", action="store_true", help="the same code at a size of about a minute, into NAME-quick.nc"
    )
    given = parser.parse_args(argv)
    if given.list:
        for study in STUDIES.values():
            print(
                f"{study.name:22} {study.task}, total batch {', '.join(map(str, study.total_batches))}, {study.num_epochs:g} epochs"
            )
        return 0
    try:
        if given.name is None:
            raise ValueError(f"name a study: {', '.join(STUDIES)}")
        study = study_named(given.name)
        run_study(
            study.pilot() if given.pilot else study, given.work, given.out, given.data_root, quick=given.quick,
            only_estimate=given.estimate, map_only=given.pilot, quiet=given.quiet,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"studies: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"studies: {stopped or 'stopped'}; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
