"""What a pickle would make, noted instead of made, see `recorded`. Notes may be untrue, share parts, and hold themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Named:
    """A class, a function, or a constant of a module, by its full name."""

    name: str


@dataclass(eq=False, slots=True)
class Table:
    """A dictionary, as pairs."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def by_name(self) -> dict[str, Any]:
        """Those of its entries whose key is a string."""
        return {key: value for key, value in self.pairs if isinstance(key, str)}


@dataclass(eq=False, slots=True)
class Made:
    """What would come of calling `name` with `arguments` and giving it `state`."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None

    def attributes(self) -> dict[str, Any]:
        """Its state by name; empty where it is none of the usual kind."""
        return attributes(self.state)


def attributes(state: object) -> dict[str, Any]:
    """A state by name, also one in slots, which is the second of a pair; empty where it is neither, or has more than 64 entries."""
    if isinstance(state, tuple) and len(state) == 2 and state[0] is None:
        state = state[1]
    return state.by_name() if isinstance(state, Table) and len(state.pairs) <= 64 else {}


def whole_numbers(value: object, largest: int = 1 << 48) -> tuple[int, ...] | None:
    """A torch.Size, a tuple or a list of at most 64 non-negative integers; None where it is something else."""
    if isinstance(value, Made) and value.name == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or len(value) > 64:
        return None
    if not all(type(v) is int and 0 <= v <= largest for v in value):
        return None
    return tuple(value)


def plain(value: object) -> Any:
    """A number, a string, None, or a short tuple or list of numbers; anything else is None."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return value[:1000]
    if isinstance(value, tuple | list) and len(value) <= 64:
        return [v if type(v) in (bool, int, float) else None for v in value]
    return None
