"""Reads pickles of plain data without running them: an own interpreter that can import and call nothing.

It builds dicts, lists, tuples, text, bytes and numbers, and arrays of numbers as numpy and torch pickle them (of a
tensor, its plain storage). What else a pickle names is refused by that name. So a pickle with code in it is data that
cannot be read, no more.
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, cast

from pipeline.errors import ConfigError
from stages.sources.arrays.pickled_arrays import (
    TORCH_DTYPES,
    Array,
    Dtype,
    NotPlain,
    Storage,
    encode,
    from_bytes,
    no_bytes,
    scalar,
    tensor,
)
from stages.sources.files import Damaged

_IGNORED = {"PROTO", "FRAME"}
_SELF_GIVEN = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C


def read_pickle(data: bytes, where: str) -> Any:
    """The object in a pickle of plain data.

    Args:
        where: names the file in errors.

    Raises:
        ConfigError: it holds something else, which is named.
        Damaged: it is not a complete pickle.
    """
    try:
        return _run(io.BytesIO(data))
    except NotPlain as refused:
        raise ConfigError(
            f"{where}: the pickle has {refused}, which is not plain data, so nothing of it is read; save dicts, "
            "lists, text, numbers, and arrays of numbers only"
        ) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(f"not a pickle of plain data: {error}") from error


class _Global:
    """A name in a pickle that is known, and what stands for it here."""

    def __init__(self, name: str, make: Callable[..., object] | None):
        self.name = name
        self.make = make


def _torch_storage(data: bytes) -> Storage:
    """What torch.save wrote of one storage, in its format of several pickles."""
    file = io.BytesIO(data)
    if _run(file) != _TORCH_MAGIC:
        raise ValueError("not a torch storage")
    _run(file)  # version
    _run(file)  # sizes of C types
    storage = _run(file)
    _run(file)  # keys
    if not isinstance(storage, Storage):
        raise ValueError("not a torch storage")
    storage.fill(file)
    return storage


def _numpy(name: str) -> list[str]:
    """A name in numpy's core, which was renamed in numpy 2."""
    return [f"numpy.core.{name}", f"numpy._core.{name}"]


_KNOWN: Mapping[str, Callable[..., object] | None] = {
    "numpy.ndarray": None,
    "numpy.dtype": Dtype,
    "_codecs.encode": encode,
    "__builtin__.bytes": no_bytes,
    "builtins.bytes": no_bytes,
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch.storage._load_from_bytes": _torch_storage,
    **dict.fromkeys(_numpy("multiarray._reconstruct"), Array),
    **dict.fromkeys(_numpy("multiarray.scalar"), scalar),
    **dict.fromkeys(_numpy("numeric._frombuffer"), from_bytes),
    **{f"torch.{name}": None for name in TORCH_DTYPES},
}


def _known(name: str) -> _Global:
    if name not in _KNOWN:
        raise NotPlain(name)
    return _Global(name, _KNOWN[name])


def _persistent(identity: tuple[Any, ...]) -> Storage:
    kind, dtype, _, _, size, *_ = identity
    name = dtype.name.removeprefix("torch.")
    if kind != "storage" or name not in TORCH_DTYPES:
        raise ValueError("a persistent id")
    return Storage(TORCH_DTYPES[name], size)


def _run(file: BinaryIO) -> Any:
    """Interprets one pickle, and leaves the file behind it."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        place = marks.pop()
        items = stack[place:]
        del stack[place:]
        return items

    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in _IGNORED:
            continue
        if name in _SELF_GIVEN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[cast(int, argument)])
        elif name in ("TUPLE", "LIST"):
            stack.append((tuple if name == "TUPLE" else list)(pop_to_mark()))
        elif name == "DICT":
            items = pop_to_mark()
            stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = pop_to_mark() if name == "APPENDS" else [stack.pop()]
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = pop_to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_known(str(argument).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_known(f"{module}.{attribute}"))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            make = called.make if isinstance(called, _Global) else None
            if make is None:
                raise ValueError("it calls what is no function")
            stack.append(make(*arguments))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Array | Dtype):
                raise ValueError("it sets the state of an object")
            stack[-1].build(state)
        elif name == "BINPERSID":
            stack.append(_persistent(stack.pop()))
        elif name == "STOP":
            return _plain(stack.pop(), {})
        else:
            raise NotPlain(f"the opcode {name}")
    raise ValueError("it has no end")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} in the place of a {kind.__name__}")
    return value


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """With arrays in the place of what builds them; what is shared stays shared."""
    if id(value) not in done:
        result = value
        if isinstance(value, Array):
            result = value.values
        elif isinstance(value, dict):
            result = {key: _plain(item, done) for key, item in value.items()}
        elif isinstance(value, list | tuple):
            result = type(value)(_plain(item, done) for item in value)
        elif isinstance(value, _Global | Dtype):
            raise ValueError("it holds a name, not data")
        done[id(value)] = result
    return done[id(value)]
