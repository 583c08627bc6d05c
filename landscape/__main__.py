"""`python -m landscape`, so that `torchrun -m landscape train ...` works."""

from landscape.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
