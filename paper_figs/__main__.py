"""Every figure and table: drawn from the data kept with the code, or from runs made again.

    python -m paper_figs [--only NAME ...] [--recompute] [--scale laptop|gpu|cluster] [--write-manifest]
                         [--data DIR] [--out DIR] [--work DIR] [--runs RUN ...]

Without --recompute nothing is trained: paper_figs/data is read, and each figure written as PDF, SVG and PNG. A figure whose data are missing
is named and left out. --recompute makes the runs under --work, goes on where it was stopped, writes the data, and says which headline numbers
leave the manifest's by more than their tolerance. Studies are made again by their own program, python -m paper_figs.studies.
The dynamics figure is drawn from measured runs of your own: name them with --runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure

from landscape.plotting.style import save, style
from landscape.plotting.view import load_view
from paper_figs import (
    fig_convergence,
    fig_coupled,
    fig_covariance,
    fig_dynamics,
    fig_edges,
    fig_ledger,
    fig_noise,
    fig_rescue,
    fig_scorecard,
    fig_self_adjusting,
    fig_slices,
    fig_smoothing,
    fig_smoothness,
    fig_spectra,
    fig_stability_map,
    table_rates,
)
from paper_figs.manifest import MANIFEST, differences, entry, read_manifest, write_manifest
from paper_figs.scales import SCALES, Scale
from paper_figs.studies.stored import DATA, read_all
from paper_figs.study_claims import STUDY_CLAIMS


def _by_name(*modules: ModuleType) -> dict[str, Any]:
    return {module.__name__.rpartition(".")[2]: module for module in modules}


CLAIMS = _by_name(
    fig_self_adjusting, fig_noise, fig_covariance, fig_spectra, fig_smoothing, fig_coupled, fig_ledger, fig_stability_map, fig_slices,
    fig_rescue, fig_scorecard,
)  # fmt: skip
"""Scripts of one figure and one claim each, see `paper_figs.claims`; those that share data stand before those that need these runs."""
STUDIES = _by_name(fig_edges, fig_convergence, fig_smoothness, table_rates)
"""Scripts that draw all studies under the data folder."""
FIGURES = Path(__file__).with_name("figures")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for a user's mistake, or where nothing could be drawn; 1 where recomputed numbers leave the manifest's."""
    given = _arguments(argv)
    try:
        chosen = given.only or [*CLAIMS, *STUDIES]
        if given.recompute:
            _recompute([name for name in chosen if name in CLAIMS], given.work, SCALES[given.scale], given.data)
        files, entries, skipped = _draw(chosen, given.data, given.out)
        if given.runs:
            files += save(fig_dynamics.draw([load_view(path) for path in given.runs]), given.out / "fig_dynamics")
        if given.write_manifest:
            write_manifest(entries)
        changed = _changed(entries) if given.recompute or given.write_manifest else []
    except (ValueError, OSError) as error:
        print(f"paper_figs: {error}", file=sys.stderr)
        return 2
    for reason, names in skipped.items():
        print(f"paper_figs: not drawn: {', '.join(names)}: {reason}", file=sys.stderr)
    for line in changed:
        print(f"paper_figs: {line}", file=sys.stderr)
    if files:
        print("\n".join(str(path) for path in files))
    return 2 if not files else 1 if changed else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paper_figs", description=(__doc__ or "").splitlines()[0])
    known = [*CLAIMS, *STUDIES]
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=f"some of {', '.join(known)}")
    parser.add_argument("--recompute", action="store_true", help="make the runs and the data again")
    parser.add_argument(
        "--scale", choices=list(SCALES), default="laptop",
        help="how large the runs are that --recompute makes (default: %(default)s, on a CPU; the data kept with the code are of this one, "
        "the larger ones want a GPU and were not run)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="DIR", help="where the data are (default: paper_figs/data)"
    )
    parser.add_argument(
        "--out", type=Path, default=FIGURES, metavar="DIR", help="where the files go (default: paper_figs/figures)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/paper_figs"), metavar="DIR",
        help="where --recompute keeps runs and finds them again (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--write-manifest", action="store_true", help=f"write {MANIFEST.name} from what was drawn")
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="measured runs for the dynamics figure")
    return parser.parse_args(argv)


def _recompute(names: Sequence[str], work: Path, scale: Scale, folder: Path) -> None:
    """Make the data of these figures, each file once."""
    done: list[Callable[..., Path]] = []
    for name in names:
        if CLAIMS[name].compute not in done:
            done.append(CLAIMS[name].compute)
            path = CLAIMS[name].compute(work, scale, folder)
            print(f"{path} ({path.stat().st_size / 1000:.0f} kB)", file=sys.stderr)


def _draw(names: Sequence[str], folder: Path, out: Path) -> tuple[list[Path], dict[str, Any], dict[str, list[str]]]:
    """Draw what has its data: the files, the entries of the manifest, and the figures left out by reason."""
    files: list[Path] = []
    entries: dict[str, Any] = {}
    skipped: dict[str, list[str]] = {}
    read: dict[Any, Any] = {}
    for name in names:
        reader = CLAIMS[name].read if name in CLAIMS else read_all
        try:
            data = read[reader] if reader in read else reader(folder)
        except ValueError as error:
            skipped.setdefault(str(error), []).append(name)
            continue
        read[reader] = data
        if name in CLAIMS:
            script = CLAIMS[name]
            files += save(_laid_out(script.draw(data)), out / name)
            entries[name] = entry(script.CLAIM, script.INPUTS, folder, script.headlines(data))
        else:
            files += STUDIES[name].write(data, out)
            about = STUDY_CLAIMS[name]
            inputs = tuple(f"{study.name}.nc" for study in data)
            entries[name] = entry(about.claim, inputs, folder, about.headlines(data))
    return files, entries, skipped


def _laid_out(figure: Figure) -> Figure:
    """The figure with its layout settled, which every format would settle anew."""
    with style():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _changed(entries: dict[str, Any]) -> list[str]:
    kept = read_manifest()
    return [
        f"{name}: {said}" for name, found in entries.items() if name in kept for said in differences(found, kept[name])
    ]


if __name__ == "__main__":
    sys.exit(main())
