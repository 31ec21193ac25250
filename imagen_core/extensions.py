"""Unions of configurations picked by `kind`, which other installed packages extend through entry points.

A package adds a kind by an entry point in the union's group: its name is the kind, its value the configuration class.
Nothing of a package is imported before one of its kinds is used, or the JSON schema is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, get_args

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

_TAG = "kind"


@dataclass(frozen=True, slots=True)
class Kinds:
    """Makes a union of built-in configuration classes open: `Annotated[A | B, Kinds("pipeline.sources", Config)]`.

    Attributes:
        group: the entry-point group of further kinds.
        base: the class that all kinds of other packages derive from.
        default: the kind of a mapping that names none; None: it must name one.
    """

    group: str
    base: type[BaseModel]
    default: str | None = None

    def member(self, built_in: Sequence[type[BaseModel]], kind: str) -> type[BaseModel]:
        """The class of a kind.

        Raises:
            ValueError: no such kind, two packages define it, or its package is broken; with the remedy.
        """
        classes = _by_kind(built_in)
        entries = _entries(self.group, kind)
        if kind in classes and not entries:
            return classes[kind]
        if not entries:
            known = ", ".join(sorted({*classes, *_names(self.group)}))
            raise ValueError(f"{_TAG} {kind!r}: no installed package defines it; the available ones: {known}")
        if kind in classes or len(entries) > 1:
            owners = ["this toolkit"] * (kind in classes) + [_described(entry) for entry in entries]
            raise ValueError(f"{_TAG} {kind!r} is defined by {' and by '.join(owners)}; uninstall one of the packages")
        return self._load(entries[0])

    def _load(self, entry: EntryPoint) -> type[BaseModel]:
        where = f"{_TAG} {entry.name!r} of {_described(entry)}"
        try:
            found = entry.load()
        except Exception as error:
            raise ValueError(
                f"{where} cannot be loaded ({type(error).__name__}: {error}); repair or uninstall the package"
            ) from error
        is_member = isinstance(found, type) and issubclass(found, self.base)
        if not is_member or entry.name not in _kinds_of(found):
            raise ValueError(
                f"{where} must be a {self.base.__module__}.{self.base.__name__} with "
                f"`{_TAG}: Literal[{entry.name!r}]` (got {found!r}); repair or uninstall the package"
            )
        return found

    def __get_pydantic_core_schema__(self, union: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        classes = _by_kind(get_args(union) or (union,))
        choices = {kind: handler.generate_schema(member) for kind, member in classes.items()}

        def validate(value: Any, built_in: core_schema.ValidatorFunctionWrapHandler) -> Any:
            if isinstance(value, Mapping) and self.default is not None:
                value = {_TAG: self.default, **value}
            kind = value.get(_TAG) if isinstance(value, Mapping) else getattr(value, _TAG, None)
            if not isinstance(kind, str):
                return built_in(value)
            names = _names(self.group)
            if kind not in classes and kind not in names:
                expected = ", ".join(repr(name) for name in [*classes, *sorted(names - classes.keys())])
                context = {"discriminator": repr(_TAG), "tag": kind, "expected_tags": expected}
                raise PydanticKnownError("union_tag_invalid", context)
            if kind not in names:
                return built_in(value)
            return self.member(tuple(classes.values()), kind).model_validate(value)

        as_it_is = core_schema.wrap_serializer_function_ser_schema(
            lambda value, serialize: serialize(value), schema=core_schema.any_schema()
        )
        schema = core_schema.tagged_union_schema(choices, discriminator=_TAG)
        return core_schema.no_info_wrap_validator_function(validate, schema, serialization=as_it_is)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The built-in kinds, and those of installed packages; a broken one as the text of its error."""
        result = handler(schema)
        for kind in sorted(_names(self.group)):
            try:
                member = self.member((), kind)
                choice = member.__get_pydantic_json_schema__(member.__pydantic_core_schema__, handler)
            except ValueError as error:
                choice = {"properties": {_TAG: {"const": kind}}, "description": str(error)}
            result["oneOf"].append(choice)
        return result


def member_of(union: Any, kind: str) -> type[Any]:
    """The class of a kind in a union that is annotated with `Kinds`; raises as `Kinds.member`."""
    members, kinds, *_ = get_args(union)
    return kinds.member(get_args(members) or (members,), kind)


def _by_kind(members: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    return {kind: member for member in members for kind in _kinds_of(member)}


def _kinds_of(member: type[BaseModel]) -> tuple[str, ...]:
    """The values of its `kind: Literal[...]`."""
    field = member.model_fields.get(_TAG)
    return () if field is None else get_args(field.annotation)


@cache
def _installed(group: str) -> EntryPoints:
    """The entry points of a group; reading them takes tens of milliseconds."""
    return entry_points(group=group)


def _names(group: str) -> frozenset[str]:
    return frozenset(_installed(group).names)


def _entries(group: str, kind: str) -> list[EntryPoint]:
    return list(_installed(group).select(name=kind))


def _described(entry: EntryPoint) -> str:
    package = "an unknown package" if entry.dist is None else f"package {entry.dist.name} {entry.dist.version}"
    return f"{package} (entry point `{entry.name} = {entry.value}` in {entry.group})"
