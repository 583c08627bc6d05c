"""The command line: parsing only. Every command is a library call; the help comes from its docstrings."""

from landscape.cli.program import main as main
