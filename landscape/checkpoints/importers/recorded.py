"""A pickle written down instead of executed.

`read` follows the opcodes of a pickle, as `pickle` does, but calls nothing and imports nothing: a class or function that is named becomes
the word `Named`, what would be made by calling it a note `Made` of the name and the arguments, a dictionary a `Table` of pairs (so that no
key of a file is ever hashed, which takes exponential time for tuples nested in themselves). So the worst that a pickle can do is to say
something untrue, which whoever looks at the notes has to check, and nothing there may be walked through without a bound, as it may hold
itself. Names that are not expected are refused before anything else, so that a file that meant to run something is reported as such.

`pickle.Unpickler` with its own `find_class` would not do: allowed classes get their __setstate__ called with a state of the file's choice,
attributes of classes and functions can be set, and a memo index or a length of 2^40 allocates before anything is checked.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.notes import Made, Named, Table

DICTIONARIES = frozenset({"collections.OrderedDict", "builtins.dict"})
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""What pickles of the old protocols call modules as Python 2 did."""


def read(content: bytes, source: str, allowed: Callable[[str], bool]) -> Any:
    """What a pickle says.

    Args:
        content: the pickle; what follows its end is ignored.
        source: names it in messages.
        allowed: whether a name may occur, such as "torch.Size".

    Returns:
        numbers, strings, bytes, None, tuples and lists as they are; `Table`, `Named` and `Made` in place of the rest.

    Raises:
        CheckpointError: it names something else, or is damaged.
    """
    machine = _Machine(content, source, allowed)
    at, end = 0, len(content)
    try:
        while at < end:
            opcode = content[at]
            if opcode == STOP:
                return machine.pop()
            at = _STEPS[opcode](machine, at + 1)
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise CheckpointError(f"{source} is damaged: {str(error)[:200] or type(error).__name__}") from None
    raise CheckpointError(f"{source} is cut short: its pickle has no end")


class _Machine:
    """A stack, with marks in it and a memo, as of pickle's own."""

    __slots__ = ("allowed", "content", "marks", "memo", "source", "stack")

    def __init__(self, content: bytes, source: str, allowed: Callable[[str], bool]) -> None:
        self.content = content
        self.source = source
        self.allowed = allowed
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("its pickle takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def name(self, module: object, name: object) -> Named:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("its pickle names something by no string")
        full = f"{RENAMED.get(module, module)}.{name}"
        if not self.allowed(full):
            raise CheckpointError(
                f"{self.source} names {full[:200]!r}, which no checkpoint of this kind needs: to make it, code would have to be run that the "
                "file chooses. Nothing was run and nothing was read"
            )
        return Named(full)

    def call(self, what: object, arguments: object) -> Named | Table | Made:
        if not isinstance(what, Named) or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls what is no name")
        if (
            what.name == "builtins.getattr"
        ):  # how members of classes are written: the constant of an enumeration, a class in a class
            if len(arguments) != 2 or not isinstance(arguments[0], Named):
                raise ValueError("its pickle takes an attribute of what is no class")
            return self.name(arguments[0].name, arguments[1])
        return Table() if what.name in DICTIONARIES else Made(what.name, arguments)

    def set_items(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if not isinstance(into, Table) or len(items) % 2:
            raise ValueError("its pickle puts pairs into what is no dictionary")
        into.pairs.extend(zip(items[::2], items[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if not isinstance(into, list):
            raise ValueError("its pickle appends to what is no list")
        into.extend(items)


Step = Callable[[_Machine, int], int]
"""Does what an opcode says; (machine, where its argument begins) -> where the argument ends."""


def _constant(make: Callable[[], Any]) -> Step:
    def step(machine: _Machine, at: int) -> int:
        machine.stack.append(make())
        return at

    return step


def _number(form: str) -> Step:
    number = struct.Struct(form)

    def step(machine: _Machine, at: int) -> int:
        machine.stack.append(number.unpack_from(machine.content, at)[0])
        return at + number.size

    return step


def _skipped(count: int) -> Step:
    return lambda machine, at: at + count


def _counted(form: str, make: Callable[[bytes], Any]) -> Step:
    length = struct.Struct(form)

    def step(machine: _Machine, at: int) -> int:
        (count,) = length.unpack_from(machine.content, at)
        begin = at + length.size
        if count < 0 or begin + count > len(machine.content):
            raise ValueError("its pickle ends within a string")
        machine.stack.append(make(machine.content[begin : begin + count]))
        return begin + count

    return step


def _text(content: bytes) -> str:
    return content.decode("utf-8")


def _integer(digits: bytes) -> int:
    if len(digits) > 16:
        raise ValueError("its pickle holds an integer of more than 128 bits")
    return int.from_bytes(digits, "little", signed=True)


def _tuple(count: int) -> Step:
    def step(machine: _Machine, at: int) -> int:
        items = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(items)))
        return at

    return step


def _tuple_to_mark(machine: _Machine, at: int) -> int:
    machine.stack.append(tuple(machine.pop_to_mark()))
    return at


def _append(machine: _Machine, at: int) -> int:
    item = machine.pop()
    machine.extend([item])
    return at


def _appends(machine: _Machine, at: int) -> int:
    machine.extend(machine.pop_to_mark())
    return at


def _set_item(machine: _Machine, at: int) -> int:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])
    return at


def _set_items(machine: _Machine, at: int) -> int:
    machine.set_items(machine.pop_to_mark())
    return at


def _mark(machine: _Machine, at: int) -> int:
    machine.marks.append(len(machine.stack))
    return at


def _global(machine: _Machine, at: int) -> int:
    content = machine.content
    first = content.index(b"\n", at)
    second = content.index(b"\n", first + 1)
    machine.stack.append(machine.name(_text(content[at:first]), _text(content[first + 1 : second])))
    return second + 1


def _stack_global(machine: _Machine, at: int) -> int:
    name, module = machine.pop(), machine.pop()
    machine.stack.append(machine.name(module, name))
    return at


def _call(machine: _Machine, at: int) -> int:
    arguments, what = machine.pop(), machine.pop()
    machine.stack.append(machine.call(what, arguments))
    return at


def _build(machine: _Machine, at: int) -> int:
    state, into = machine.pop(), machine.stack[-1]
    if isinstance(into, Made):
        into.state = state
    elif not isinstance(into, Table):  # attributes of a dictionary (a state_dict's _metadata) are of no use here
        raise ValueError("its pickle gives a state to what has none")
    return at


def _persistent(machine: _Machine, at: int) -> int:
    machine.stack.append(Made("persistent id", (machine.pop(),)))
    return at


def _memoize(machine: _Machine, at: int) -> int:
    machine.memo[len(machine.memo)] = machine.stack[-1]
    return at


def _put(form: str) -> Step:
    index = struct.Struct(form)

    def step(machine: _Machine, at: int) -> int:
        machine.memo[index.unpack_from(machine.content, at)[0]] = machine.stack[-1]
        return at + index.size

    return step


def _get(form: str) -> Step:
    index = struct.Struct(form)

    def step(machine: _Machine, at: int) -> int:
        machine.stack.append(machine.memo[index.unpack_from(machine.content, at)[0]])
        return at + index.size

    return step


def _unknown(machine: _Machine, at: int) -> int:
    opcode = machine.content[at - 1 : at]
    raise CheckpointError(f"{machine.source} is damaged, or not torch's: its pickle has the opcode {opcode!r}")


STOP = ord(".")
_KNOWN: dict[bytes, Step] = {
    b"\x80": _skipped(1),  # the protocol
    b"\x95": _skipped(8),  # a frame
    b"N": _constant(lambda: None),
    b"\x88": _constant(lambda: True),
    b"\x89": _constant(lambda: False),
    b")": _constant(tuple),
    b"]": _constant(list),
    b"}": _constant(Table),
    b"J": _number("<i"),
    b"K": _number("<B"),
    b"M": _number("<H"),
    b"G": _number(">d"),
    b"\x8a": _counted("<B", _integer),
    b"\x8b": _counted("<i", _integer),
    b"\x8c": _counted("<B", _text),
    b"X": _counted("<I", _text),
    b"\x8d": _counted("<Q", _text),
    b"C": _counted("<B", bytes),
    b"B": _counted("<I", bytes),
    b"\x8e": _counted("<Q", bytes),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": _tuple_to_mark,
    b"a": _append,
    b"e": _appends,
    b"s": _set_item,
    b"u": _set_items,
    b"(": _mark,
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _call,
    b"\x81": _call,  # of a class, by its __new__
    b"b": _build,
    b"Q": _persistent,
    b"\x94": _memoize,
    b"q": _put("<B"),
    b"r": _put("<I"),
    b"h": _get("<B"),
    b"j": _get("<I"),
}
"""What each opcode does. Those of protocols 0 and 1, sets, and anything that torch's own files do not have are not there."""

_STEPS = [_KNOWN.get(bytes([opcode]), _unknown) for opcode in range(256)]
