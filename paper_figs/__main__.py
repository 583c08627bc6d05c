"""Every figure and table of the stored studies.

    python -m paper_figs [--data DIR] [--out DIR] [--runs RUN ...]

The dynamics figure is drawn from measured runs, which are not stored here: name them with --runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from landscape.plotting.style import save
from landscape.plotting.view import load_view
from paper_figs import fig_convergence, fig_dynamics, fig_edges, fig_smoothness, table_rates
from paper_figs.studies.stored import DATA, read_all


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for a user's mistake, which is printed."""
    parser = argparse.ArgumentParser(prog="python -m paper_figs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="DIR", help="where the studies' files are (default: paper_figs/data)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("figures"), metavar="DIR", help="where the files go (default: %(default)s)"
    )
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="measured runs for the dynamics figure")
    given = parser.parse_args(argv)
    try:
        studies = read_all(given.data)
        files = [
            path
            for script in (fig_edges, fig_convergence, fig_smoothness, table_rates)
            for path in script.write(studies, given.out)
        ]
        if given.runs:
            files += save(fig_dynamics.draw([load_view(path) for path in given.runs]), given.out / "fig_dynamics")
    except (ValueError, OSError) as error:
        print(f"paper_figs: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
