"""Reads pickles as data: a small machine of its own that runs no code, knows no classes, and keeps to limits.

Python's unpickler calls what a pickle names and sets attributes on whatever it left, and one bit in an index makes it
ask for gigabytes. This one goes through the instructions that `pickletools` lists and builds dicts, lists, tuples,
plain values and what the caller's `call` makes of a named object; every other instruction is a ValueError. Work and
memory are proportional to the file: containers are never copied, compared or hashed.
"""

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

MAX_INSTRUCTIONS = 2_000_000  # a state dict needs about 40 a tensor
_MAX_LINE = 10_000  # bytes of a name or a decimal number


@dataclass(frozen=True)
class Name:
    """A Python object that a pickle names, never looked up."""

    module: str
    name: str


@dataclass(eq=False)
class Inert:
    """Stands for an object that is not a tensor: of what a pickle does to it the state is kept, if it is a dict."""

    state: dict[Any, Any] = field(default_factory=dict)


class Bounded:
    """A file for `pickletools`, which gives no more than there is instead of making room for what is asked."""

    def __init__(self, file: IO[bytes]):
        self._file, here = file, file.tell()
        self._end = file.seek(0, io.SEEK_END)
        file.seek(here)

    def read(self, size: int) -> bytes:
        return self._file.read(max(0, min(size, self._end - self._file.tell())))

    def readline(self) -> bytes:
        return self._file.readline(_MAX_LINE)

    def tell(self) -> int:
        return self._file.tell()


class Machine:
    """Loads one pickle; `instructions` says afterwards how many there were.

    `call(name, arguments)` makes what a named object gives for arguments, `persistent(id)` what a reference outside
    the pickle stands for. Both raise ValueError for what they do not know.
    """

    def __init__(self, call: Callable[[Name, Any], Any], persistent: Callable[[Any], Any]):
        self._call, self._persistent = call, persistent
        self.instructions = 0

    def load(self, file: IO[bytes]) -> Any:
        """The value of the pickle that begins where `file` stands, and ends where it stands afterwards."""
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}
        for instruction, argument, _ in pickletools.genops(Bounded(file)):  # type: ignore[arg-type]
            self.instructions += 1
            if self.instructions > MAX_INSTRUCTIONS:
                raise ValueError(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")
            self._run(instruction.name, argument)
        return self._stack.pop()

    def _run(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self._stack.append(_VALUES[name](argument))
        elif run := getattr(self, f"_{name.lower()}", None):
            run(argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"its pickle has the instruction {name}, which no tensor file needs")

    def _above_mark(self) -> list[Any]:
        above, self._stack = self._stack, self._outer.pop()
        return above

    def _mark(self, _: None) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _pop(self, _: None) -> None:
        self._stack.pop() if self._stack else self._above_mark()

    def _pop_mark(self, _: None) -> None:
        self._above_mark()

    def _dup(self, _: None) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _binget = _long_binget = _get

    def _tuple(self, _: None) -> None:
        values = tuple(self._above_mark())
        self._stack.append(values)

    _frozenset = _tuple

    def _list(self, _: None) -> None:
        values = self._above_mark()
        self._stack.append(values)

    def _take(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        if len(values) < count:
            raise ValueError("its pickle takes more values than it made")
        self._stack[-count:] = [values]

    def _tuple1(self, _: None) -> None:
        self._take(1)

    def _tuple2(self, _: None) -> None:
        self._take(2)

    def _tuple3(self, _: None) -> None:
        self._take(3)

    def _append(self, _: None) -> None:
        value = self._stack.pop()
        self._extend([value])

    def _appends(self, _: None) -> None:
        values = self._above_mark()
        self._extend(values)

    _additems = _appends

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError(f"its pickle appends to {type(self._stack[-1]).__name__}, which is no list")
        self._stack[-1].extend(values)

    def _dict(self, _: None) -> None:
        values = self._above_mark()
        self._stack.append({})
        self._set(values)

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self, _: None) -> None:
        values = self._above_mark()
        self._set(values)

    def _set(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not dict or len(values) % 2:
            raise ValueError(f"its pickle sets {len(values)} / 2 items of {type(self._stack[-1]).__name__}")
        set_items(self._stack[-1], zip(values[::2], values[1::2], strict=True))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("its pickle names an object by something else than text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        self._stack.append(self._call(Name(module, name), None))

    def _reduce(self, _: None) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            raise ValueError(f"its pickle calls {type(name).__name__}, which is no object that it named")
        self._stack.append(self._call(name, arguments))

    _newobj = _reduce

    def _newobj_ex(self, _: None) -> None:
        self._stack.pop()  # keywords
        self._reduce(None)

    def _build(self, _: None) -> None:
        """Sets the state of an `Inert`; containers and tensors have none that matters."""
        state, value = self._stack.pop(), self._stack[-1]
        if type(value) is Inert:
            value.state = state if type(state) is dict else {}
        elif type(value) is not dict:
            raise ValueError(f"its pickle sets attributes of {type(value).__name__}")

    def _binpersid(self, _: None) -> None:
        self._stack.append(self._persistent(self._stack.pop()))


def set_items(target: dict[Any, Any], items: Any) -> None:
    """Sets the items with plain keys: no other names a tensor, and hashing nested tuples may take forever."""
    for key, value in items:
        if key is None or type(key) in (str, int, float, bool, bytes):
            target[key] = value


def _text(argument: str) -> str:
    """The strings of Python 2 are bytes, which `pickletools` gives as Latin-1."""
    return argument.encode("latin-1").decode("utf-8", "replace")


def _as_is(argument: Any) -> Any:
    return argument


_VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _as_is),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _as_is),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), _as_is),
    **dict.fromkeys(("STRING", "SHORT_BINSTRING", "BINSTRING"), _text),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_SET": lambda _: [],
    "EMPTY_DICT": lambda _: {},
}
