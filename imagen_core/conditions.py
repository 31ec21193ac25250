"""Conditions on columns: boolean expressions of SQL as expressions of Arrow.

sqlglot parses the text; what it finds is translated, node by node, into an expression of Arrow, and whatever is not
listed here is refused. So an expression can only compare columns of the row: it calls no function, and reads no file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_ROW = "\0row"
_COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": lambda a, b: a == b,
    "NEQ": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LTE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GTE": lambda a, b: a >= b,
}
_FLIPPED = {"LT": "GT", "LTE": "GTE", "GT": "LT", "GTE": "LTE"}
_EXCLUDED: dict[str, Callable[[float, float, float], bool]] = {
    "EQ": lambda limit, least, most: limit < least or limit > most,
    "LT": lambda limit, least, most: least >= limit,
    "LTE": lambda limit, least, most: least > limit,
    "GT": lambda limit, least, most: most <= limit,
    "GTE": lambda limit, least, most: most < limit,
}
"""Whether no value from `least` to `most` fulfils the comparison with a limit."""
_COMPUTED: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
}
_ARGUMENTS = {"this", "expression", "expressions", "low", "high", "negate", "quoted", "is_string"}


class ConditionError(ValueError):
    """A condition does not parse, has what is not supported, or does not fit the columns."""


class Condition:
    """A parsed condition.

    NULL, NaN, and text that is compared with a number and is none, are unknown; as in SQL, a row is kept only where
    the condition is true, not where it is unknown.

    Attributes:
        text: the condition.
        bounds: columns, and a function of the least and largest value of each in some rows, both numbers: whether
            the condition is true for none of these rows.
    Raises:
        ConditionError: it does not parse, or has what is not supported.
        ImportError: sqlglot is not installed.
    """

    def __init__(self, text: str, field: str = "where", dotted: bool = False):
        """
        Args:
            field: what messages call the condition.
            dotted: names such as `clip_score.long` are those of columns; else they are refused.
        """
        self.text, self.field, self.dotted = text, field, dotted
        self._numbers: dict[str, bool] = {}
        self._others: dict[str, pa.DataType] = {}
        self._compared: list[set[str]] = []
        try:
            parsed = _parsed(text)
            self.expression = self._condition(parsed)
        except ConditionError as error:
            raise ConditionError(f"{field}: {error}") from error
        self.bounds = list(_bounds(parsed))
        for _ in self._compared:
            self._share_kinds()

    def __reduce__(self) -> tuple[type["Condition"], tuple[str, str, bool]]:
        return Condition, (self.text, self.field, self.dotted)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names."""
        return tuple(self._numbers)

    def compared_as(self, column: str) -> pa.DataType | None:
        """What a column is compared with: numbers (float64), else text or booleans; None where that is nothing but
        other columns and NULL."""
        return pa.float64() if self._numbers[column] else self._others.get(column)

    def _share_kinds(self) -> None:
        """What a column is compared with holds for the columns that it is compared with, too."""
        for names in self._compared:
            if any(self._numbers[name] for name in names):
                self._numbers.update(dict.fromkeys(names, True))
            kind = next((self._others[name] for name in names if name in self._others), None)
            if kind is not None:
                self._others.update(dict.fromkeys(names, kind))

    def check(self, present: Mapping[str, pa.DataType | None], where: str) -> None:
        """Checks that the columns exist in the table `where`, and can be compared as they are.

        Raises:
            ConditionError: one does not, or cannot.
        """
        missing = next((name for name in self.columns if name not in present), None)
        if missing is not None:
            raise ConditionError(f"{self.field}: {where} has no column {missing!r}; it has: {', '.join(present)}")
        kinds = {name: present[name] or pa.string() for name in self.columns}
        try:
            self.places([pa.array([], kind) for kind in kinds.values()], 0)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, TypeError) as error:
            told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            raise ConditionError(
                f"{self.field}: {self.text!r} does not fit the columns of {where} ({told}): {_first_line(error)}; "
                "compare numbers with numbers and text with 'text'"
            ) from error

    def places(self, columns: Sequence[pa.Array | pa.ChunkedArray], num_rows: int) -> np.ndarray:
        """Positions of the rows that are kept, increasing.

        Args:
            columns: the cells of `self.columns`, in that order.
        """
        arrays = [self._plain_cells(name, cells) for name, cells in zip(self.columns, columns, strict=True)]
        table = pa.table([*arrays, np.arange(num_rows)], names=[*self.columns, _ROW])
        return table.filter(self.expression).column(_ROW).to_numpy()

    def _plain_cells(self, name: str, cells: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """Text and integers as float64 where the column is compared with numbers, and NULL in place of NaN."""
        if pa.types.is_dictionary(cells.type):
            cells = cells.cast(cells.type.value_type)
        is_text = pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)
        if self._numbers[name] and is_text:
            is_number = pc.match_substring_regex(cells, _NUMBER)  # pyright: ignore[reportAttributeAccessIssue]
            trimmed = pc.utf8_trim_whitespace(cells)  # pyright: ignore[reportAttributeAccessIssue]
            cells = pc.if_else(is_number, trimmed, None).cast(pa.float64())  # pyright: ignore[reportAttributeAccessIssue]
        if self._numbers[name] and pa.types.is_integer(cells.type):
            cells = cells.cast(pa.float64(), safe=False)  # Arrow would refuse those that no float64 is equal to
        if pa.types.is_floating(cells.type):
            cells = pc.if_else(pc.is_nan(cells), None, cells)  # pyright: ignore[reportAttributeAccessIssue]
        return cells

    def _condition(self, node: Any) -> pc.Expression:
        kind = _kind(node)
        if kind == "Paren":
            return self._condition(node.this)
        if kind in ("And", "Or"):
            left, right = self._condition(node.this), self._condition(node.expression)
            return left & right if kind == "And" else left | right
        if kind == "Not":
            return ~self._condition(node.this)
        if kind == "Boolean":
            return pc.scalar(bool(node.this))
        if kind == "Column":
            self._others[_name(node)] = pa.bool_()
            return self._value(node, is_number=False)
        found = self._predicate(kind, node)
        return ~found if node.args.get("negate") else found

    def _predicate(self, kind: str, node: Any) -> pc.Expression:
        if kind in _COMPARED:
            sides = [node.this, node.expression]
            return _COMPARED[kind](*self._values(sides, ordered=kind not in ("EQ", "NEQ")))
        if kind == "Between":
            value, low, high = self._values([node.this, node.args["low"], node.args["high"]], ordered=True)
            return (value >= low) & (value <= high)
        if kind == "In" and node.expressions:
            value, *choices = self._values([node.this, *node.expressions], ordered=False)
            found = value == choices[0]
            for choice in choices[1:]:
                found |= value == choice
            return found
        if kind == "Is" and _kind(node.expression) == "Null":
            return self._value(node.this, is_number=self._is_computed(node.this)).is_null()
        if kind in ("Like", "ILike") and _kind(node.expression) == "Literal" and node.expression.is_string:
            value, _ = self._values([node.this, node.expression], ordered=False)
            pattern, ignores = node.expression.this, kind == "ILike"
            return pc.match_like(value, pattern, ignore_case=ignores)  # pyright: ignore[reportAttributeAccessIssue]
        raise _unsupported(node, "is no condition that is supported")

    def _values(self, nodes: Sequence[Any], *, ordered: bool) -> Iterator[Any]:
        """Sides of a comparison: numbers where one of them is, and where only columns are put in order."""
        nodes = [_plain(node) for node in nodes]
        are_columns = all(_kind(node) == "Column" for node in nodes)
        is_number = any(map(self._is_computed, nodes)) or (ordered and are_columns and len(nodes) > 1)
        names = {_name(node) for node in nodes if _kind(node) == "Column"}
        is_text = any(_kind(node) == "Literal" and node.is_string for node in nodes)
        if is_text or any(_kind(node) == "Boolean" for node in nodes):
            self._others.update(dict.fromkeys(names, pa.string() if is_text else pa.bool_()))
        if len(names) > 1:
            self._compared.append(names)
        return iter([self._value(node, is_number=is_number) for node in nodes])

    def _is_computed(self, node: Any) -> bool:
        kind = _kind(_plain(node))
        return kind in _COMPUTED or kind == "Neg" or (kind == "Literal" and not node.is_string)

    def _value(self, node: Any, *, is_number: bool) -> Any:
        node = _plain(node)
        kind = _kind(node)
        if kind == "Column":
            name = _name(node)
            if len(node.parts) > 1 and not self.dotted:
                raise _unsupported(node, "is a path into nested columns, which is not supported")
            self._numbers[name] = self._numbers.get(name, False) or is_number
            return pc.field(name)
        if kind == "Literal":
            return pc.scalar(node.this if node.is_string else float(node.this))
        if kind == "Boolean":
            return pc.scalar(bool(node.this))
        if kind == "Neg":
            return pc.negate(self._value(node.this, is_number=True))  # pyright: ignore[reportAttributeAccessIssue]
        if kind in _COMPUTED:
            sides = [self._value(side, is_number=True).cast(pa.float64()) for side in (node.this, node.expression)]
            return _COMPUTED[kind](*sides)
        raise _unsupported(node, "is not supported")


def _parsed(text: str) -> Any:
    try:
        import sqlglot
        from sqlglot.errors import SqlglotError
    except ImportError as error:
        raise ImportError(
            "a condition needs the package sqlglot, which is not installed; pip install 'sqlglot>=30'"
        ) from error
    try:
        found = [node for node in sqlglot.parse(f"SELECT 1 WHERE {text}\n", dialect="duckdb") if node is not None]
    except (SqlglotError, RecursionError) as error:
        raise ConditionError(f"{text!r} is no expression of SQL: {_first_line(error)}") from error
    where = found[0].args.get("where") if len(found) == 1 and _kind(found[0], check=False) == "Select" else None
    others = (
        set[str]() if not found else {name for name, value in found[0].args.items() if value and name != "expressions"}
    )
    if where is None or others - {"where", "kind"} or not text.strip():
        raise ConditionError(f"{text!r} is not one expression; give a condition such as 'aesthetic >= 5.5'")
    return where.this


def _kind(node: Any, *, check: bool = True) -> str:
    """The name of a node's class.

    Raises:
        ConditionError: it has a part that would be left out.
    """
    kind = type(node).__name__
    if check and kind not in ("Column", "Literal", "Boolean", "Null"):
        extra = next((name for name, value in node.args.items() if value and name not in _ARGUMENTS), None)
        if extra is not None:
            raise _unsupported(node, "is not supported")
    return kind


def _name(node: Any) -> str:
    """The name of a column."""
    return ".".join(part.name for part in node.parts)


def _plain(node: Any) -> Any:
    while _kind(node) == "Paren":
        node = node.this
    return node


def _unsupported(node: Any, why: str) -> ConditionError:
    return ConditionError(
        f"{node.sql()!r} {why}; use columns, numbers, 'text', comparisons, AND, OR, NOT, IN (...), BETWEEN, "
        "LIKE, IS NULL and + - * /"
    )


def _bounds(node: Any) -> Iterator[tuple[str, Callable[[float, float], bool]]]:
    """Columns, and which least and largest values of them rule the whole condition out."""
    kind = _kind(node)
    if kind in ("Paren", "And"):
        for side in (node.this, node.args.get("expression")):
            yield from _bounds(side) if side is not None else ()
    elif kind == "Between" and not node.args.get("negate"):
        yield from _bound("GTE", node.this, node.args["low"])
        yield from _bound("LTE", node.this, node.args["high"])
    elif kind in _COMPARED:
        yield from _bound(kind, node.this, node.expression)
        yield from _bound(_FLIPPED.get(kind, kind), node.expression, node.this)


def _bound(kind: str, column: Any, limit: Any) -> Iterator[tuple[str, Callable[[float, float], bool]]]:
    column, limit = _plain(column), _plain(limit)
    sign = -1 if _kind(limit) == "Neg" else 1
    limit = limit.this if sign < 0 else limit
    if kind in _EXCLUDED and _kind(column) == "Column" and _kind(limit) == "Literal" and not limit.is_string:
        yield _name(column), partial(_EXCLUDED[kind], sign * float(limit.this))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
