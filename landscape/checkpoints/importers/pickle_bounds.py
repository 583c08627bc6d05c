"""What unpickling a pickle would name and cost, estimated without doing it.

torch's restricted loader calls only what it allows, but a short pickle can still keep it busy for ever: a tuple that holds one tuple twice, which
holds another twice, and so on, takes 2^depth steps to hash once it is a key of a dictionary, and one nested a million deep overflows the stack; keys
whose hashes collide take quadratic time. Here the operations are followed with sizes in the place of objects, and what is far beyond the size of
the pickle is refused. Those operations are known that torch's loader knows; torch.save writes no others.
"""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
from dataclasses import dataclass
from typing import Any

DEEPEST = 64
"""Tuples in tuples beyond which a pickle is refused."""

FREE = 20_000_000
"""Elementary steps of hashing and comparing that a pickle may ask for, whatever its size."""

LARGEST = 1 << 60
"""Sizes are not counted further; the hashes of integers from here on can be chosen."""

ENCODINGS = ("latin1", "latin-1", "ascii", "utf-8")
"""Those that take time proportional to the text (punycode does not)."""

Storage = tuple[str, str, int]
"""Of numbers stored beside a pickle: the name of their type, where they are, how many there are."""


@dataclass(frozen=True)
class Scanned:
    """What is known of one pickle.

    Attributes:
        names: the classes and functions that it names.
        storages: the numbers beside it that it speaks of.
        problem: why torch's loader would not read it or not get to its end; "" if nothing is known against it.
        end: where it ends.
    """

    names: frozenset[str]
    storages: frozenset[Storage]
    problem: str
    end: int


def scan(content: bytes, begin: int = 0) -> Scanned:
    """Follow one pickle to its end.

    Args:
        content: holds the pickle.
        begin: where it begins.
    """
    names: set[str] = set()
    storages: set[Storage] = set()
    try:
        end = _follow(content, begin, names, storages)
        return Scanned(frozenset(names), frozenset(storages), "", end)
    except _Refused as error:
        problem = str(error)
    except (IndexError, KeyError, ValueError, struct.error):
        problem = "its pickle is damaged"
    return Scanned(frozenset(names) | _names(content[begin:]), frozenset(), problem, len(content))


def _names(content: bytes) -> frozenset[str]:
    """What a pickle of any protocol names, as far as it can be followed."""
    names, strings = set(), ["(hidden)"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of strings with damaged escapes
            for code, argument, _ in pickletools.genops(io.BytesIO(content)):
                if code.name in ("GLOBAL", "INST"):
                    module, _, attribute = str(argument).partition(" ")
                    names.add(_full(module, attribute))
                elif code.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif "UNICODE" in code.name:
                    strings = [*strings[-1:], str(argument)[:200]]
    except (ValueError, EOFError, IndexError, UnicodeDecodeError, OverflowError):
        pass
    return frozenset(names)


def _full(module: str, name: str) -> str:
    """The full name by Python 3's names of modules, where pickles of the old protocols have Python 2's."""
    return f"{ {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(module, module) }.{name}"


class _Refused(Exception):
    pass


WEIGHT, ODD, HARD, DEPTH, ITEMS, VALUE = range(6)
"""What is noted of an object, in a list: how many elements it has, with all that it holds; how many of these, itself or in lists, have a hash that
can be chosen; whether it has itself; how deep tuples go in it; the first items of a tuple; a string's or name's beginning, or a whole number."""

_CHOSEN = (" complex", " Size")
"""Ends of the names of what, beside tuples and large integers, is hashed by its numbers."""


def _follow(content: bytes, begin: int, names: set[str], storages: set[Storage]) -> int:
    """Go through the operations of a pickle; where it ends."""
    at, left = begin, FREE + 4 * (len(content) - begin)
    stack: list[list[Any]] = []
    below: list[list[list[Any]]] = []
    memo: dict[int, list[Any]] = {}
    while True:
        code = content[at]
        at += 1
        cost = 0
        if code == 0x71:  # BINPUT
            memo[content[at]] = stack[-1]
            at += 1
        elif code == 0x72:  # LONG_BINPUT
            memo[int.from_bytes(content[at : at + 4], "little")] = stack[-1]
            at += 4
        elif code == 0x68:  # BINGET
            stack.append(memo[content[at]])
            at += 1
        elif code == 0x6A:  # LONG_BINGET
            stack.append(memo[int.from_bytes(content[at : at + 4], "little")])
            at += 4
        elif code == 0x4B:  # BININT1
            stack.append([1, 0, False, 0, None, content[at]])
            at += 1
        elif code in (0x4D, 0x4A):  # BININT2, BININT
            size = 2 if code == 0x4D else 4
            stack.append([1, 0, False, 0, None, int.from_bytes(content[at : at + size], "little", signed=size == 4)])
            at += size
        elif code == 0x28:  # MARK
            below.append(stack)
            stack = []
        elif code in (0x74, 0x85, 0x86, 0x87, 0x29):  # TUPLE, TUPLE1, TUPLE2, TUPLE3, EMPTY_TUPLE
            if code == 0x74:
                items, stack = stack, below.pop()
            else:
                count = 0 if code == 0x29 else code - 0x84
                if len(stack) < count:
                    raise IndexError
                items = stack[len(stack) - count :]
                del stack[len(stack) - count :]
            stack.append(_tuple(items))
        elif code == 0x58 or code == 0x55:  # BINUNICODE, SHORT_BINSTRING
            head = 4 if code == 0x58 else 1
            size = int.from_bytes(content[at : at + head], "little")
            at += head + size
            if at > len(content):
                raise IndexError
            stack.append([1 + size, 0, False, 0, None, content[at - size : at][:64].decode("utf-8", "replace")])
        elif code == 0x51:  # BINPERSID
            found = stack.pop()
            cost = found[WEIGHT]
            stored = tuple(item[VALUE] for item in found[ITEMS] or ())
            if (
                len(stored) == 5
                and isinstance(stored[1], str)
                and isinstance(stored[2], str)
                and type(stored[4]) is int
            ):
                storages.add((stored[1].replace(" ", "."), stored[2], stored[4]))
            stack.append([1, 0, False, 0, None, None])
        elif code == 0x63:  # GLOBAL
            middle = content.index(b"\n", at)
            end = content.index(b"\n", middle + 1)
            module, name = content[at:middle].decode(), content[middle + 1 : end].decode()
            names.add(_full(module, name))
            stack.append([1, 0, False, 0, None, f"{module} {name}"])
            at = end + 1
        elif code in (0x52, 0x81):  # REDUCE, NEWOBJ
            arguments, what = stack.pop(), stack.pop()
            cost = _cost_of_call(what, arguments)
            chosen = any(str(item[VALUE]).endswith(_CHOSEN) for item in (what, *arguments[ITEMS]))
            stack.append([min(1 + arguments[WEIGHT], LARGEST), 0, chosen, 0, None, None])
        elif code in (0x61, 0x65):  # APPEND, APPENDS
            if code == 0x61:
                items = [stack.pop()]
            else:
                items, stack = stack, below.pop()
            for item in items:
                _add(stack[-1], item)
        elif code in (0x73, 0x75):  # SETITEM, SETITEMS
            if code == 0x73:
                value, key = stack.pop(), stack.pop()
                items = [key, value]
            else:
                items, stack = stack, below.pop()
            cost = _put(stack[-1], items)
        elif code in (0x5D, 0x7D, 0x8F, 0x4E, 0x88, 0x89):  # EMPTY_LIST, EMPTY_DICT, EMPTY_SET, NONE, NEWTRUE, NEWFALSE
            stack.append([1, 0, False, 0, None, None])
        elif code == 0x47:  # BINFLOAT
            stack.append([1, 0, False, 0, None, None])
            at += 8
        elif code == 0x8A:  # LONG1
            size = content[at]
            number = int.from_bytes(content[at + 1 : at + 1 + size], "little", signed=True)
            stack.append([1, 0, abs(number) >= LARGEST, 0, None, number])
            at += 1 + size
        elif code == 0x62:  # BUILD
            state = stack.pop()
            cost = state[WEIGHT]
            _add(stack[-1], state)
        elif code == 0x80:  # PROTO
            at += 1
        elif code == 0x2E:  # STOP
            stack.pop()
            return at
        else:
            raise _Refused(_unknown(code))
        left -= cost
        if left < 0:
            raise _Refused("its pickle is made to take for ever")


def _add(into: list[Any], item: list[Any]) -> None:
    """An item of a tuple or a list."""
    into[WEIGHT] = min(into[WEIGHT] + item[WEIGHT], LARGEST)
    into[ODD] = min(into[ODD] + (1 if item[HARD] else item[ODD]), LARGEST)


def _tuple(items: list[list[Any]]) -> list[Any]:
    depth = 1 + max([item[DEPTH] for item in items], default=0)
    if depth > DEEPEST:
        raise _Refused(f"its pickle holds tuples nested more than {DEEPEST} deep")
    weight = min(1 + sum([item[WEIGHT] for item in items]), LARGEST)
    odd = min(sum([1 if item[HARD] else item[ODD] for item in items]), LARGEST)
    return [weight, odd, True, depth, items[:8], None]


def _put(table: list[Any], items: list[list[Any]]) -> int:
    """The cost of entries of a dictionary: in the worst case a key whose hash is chosen is compared with all such there."""
    cost = 0
    for key, value in zip(items[::2], items[1::2], strict=False):
        if key[HARD]:
            cost += key[WEIGHT] + table[ODD]
            table[ODD] += 1
        table[WEIGHT] = min(table[WEIGHT] + key[WEIGHT] + value[WEIGHT], LARGEST)
    return cost


def _cost_of_call(what: list[Any], arguments: list[Any]) -> int:
    """A call looks at all of its arguments, and may make a set of one of them."""
    items = arguments[ITEMS]
    if items is None:
        raise _Refused("its pickle calls something with no tuple of arguments")
    if what[VALUE] == "_codecs encode" and len(items) > 1 and items[1][VALUE] not in ENCODINGS:
        raise _Refused(f"its pickle encodes text as {items[1][VALUE]!r}")
    return int(arguments[WEIGHT] + (arguments[ODD] and sum(item[ODD] ** 2 for item in items)))


def _unknown(code: int) -> str:
    known = next((op.name for op in pickletools.opcodes if ord(op.code) == code), None)
    if known is None:
        return "it is no pickle, or a damaged one"
    return f"its pickle has the operation {known}, which torch writes only when told to use another protocol; save it with the default one"
