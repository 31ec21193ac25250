"""Configuration: frozen pydantic models, filled from a YAML file and `KEY=VALUE` overrides.

Every problem is reported in one `ConfigError` with the field's path, the value and the remedy.
"""

import ast
import difflib
import inspect
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, to_jsonable_python

from pipeline.errors import ConfigError
from pipeline.storage.credentials import check_no_credentials


class Config(BaseModel):
    """Base of every configuration model: frozen, no unknown keys, docstrings become schema text.

    Pydantic's `use_attribute_docstrings` parses the source of each model at its import, a tenth of the start of a
    command; here the schema does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(core_schema)
        fields = handler.resolve_ref_schema(found).get("properties", {})
        for name in cls.model_fields.keys() & fields.keys():
            owner = next(base for base in cls.__mro__ if name in inspect.get_annotations(base))
            text, told = _field_texts(owner).get(name), handler.resolve_ref_schema(fields[name]).get("description")
            if "description" not in fields[name] and text not in (None, told):
                fields[name]["description"] = text
        return found


@cache
def _field_texts(owner: type) -> dict[str, str]:
    """The docstrings under the fields of a class, without those of its bases."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def local_path(place: str, option: str) -> Path:
    """A path on this machine that a user gave.

    Raises:
        ConfigError: it is a URL.
    """
    if "://" in place:
        raise ConfigError(f"{option} {place}: is a URL, and only a local path works here; copy it to this machine")
    return Path(place)


ConfigT = TypeVar("ConfigT", bound=Config)
Tree = dict[str, object]

_TAGS = ("kind", "family")  # names of the fields that choose between models


def load_config(
    config_class: type[ConfigT], source: Path | Mapping[str, object] | None = None, overrides: Sequence[str] = ()
) -> ConfigT:
    """Builds a config from a YAML file or a mapping, then overrides.

    Args:
        overrides: `a.b=c` sets a value (YAML; list items by index), `a.b+=[c]` appends to a list.
    """
    tree: Tree = read_yaml(source) if isinstance(source, Path) else dict(source or {})
    for override in overrides:
        if is_addition(override):
            tree = _validated(config_class, tree).model_dump(mode="json")  # so that defaults are appended to as well
        else:
            _seed_default_list(config_class, tree, override)
        _apply_override(tree, override)
    return _validated(config_class, tree)


def is_addition(override: str) -> bool:
    """Whether an override appends to a list."""
    return override.partition("=")[0].rstrip().endswith("+")


def _validated(config_class: type[ConfigT], tree: Tree) -> ConfigT:
    for name, field in config_class.model_fields.items():
        section = tree.get(name)
        kind = getattr(field.default, "kind", None)
        if kind is not None and isinstance(section, dict):
            section.setdefault("kind", kind)  # so that `source.seed=1` alone changes the default source
    tree = cast(Tree, expand_home(tree))
    for name, value in _leaves(tree):  # the configuration is written into the run folder
        check_no_credentials(name, "config")
        if isinstance(value, str):
            check_no_credentials(value, name)
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(config_class, error)) from error


def expand_home(value: object) -> object:
    """The value with `~/` at the beginning of each of its texts replaced by the home folder, as a shell does."""
    if isinstance(value, dict):
        return {key: expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in entries:
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


class _YamlLoader(yaml.SafeLoader):
    """YAML whose keys are what is written: `null: x.npy` has the key `null`, and `on: 1` the key `on`.

    Numbers have no base 60, which YAML 1.1 had and 1.2 has not: `3:2` is a text, and not 182.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"):
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)


def _number(loader: _YamlLoader, node: yaml.ScalarNode) -> int | float | str:
    if ":" in node.value:
        return node.value
    is_whole = node.tag == "tag:yaml.org,2002:int"
    return loader.construct_yaml_int(node) if is_whole else loader.construct_yaml_float(node)


for _tag in ("int", "float"):
    _YamlLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)


def _load_yaml(text: str) -> Any:
    loader = _YamlLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path) -> Tree:
    """Reads a YAML mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"config file {path}: cannot be read ({error.strerror}); check the path") from error
    return parse_yaml(data, path)


def parse_yaml(data: bytes, path: Path | str) -> Tree:
    """The mapping in the content of a YAML file; `path` names it.

    Raises:
        ConfigError: it is not YAML, or not a mapping.
    """
    try:
        tree = _load_yaml(data.decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config file {path}: not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path}: must be a mapping of keys, got {type(tree).__name__}")
    return tree


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML, in the order of the model's fields."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _seed_default_list(config_class: type[Config], tree: Tree, override: str) -> None:
    """Lets `encoders.0.max_tokens=64` change an item of a default list that is not in the file."""
    parts = override.partition("=")[0].strip().split(".")
    field = config_class.model_fields.get(parts[0])
    if field is not None and parts[0] not in tree and len(parts) > 1 and parts[1].isdigit():
        tree[parts[0]] = to_jsonable_python(field.get_default(call_default_factory=True, validated_data={}))


def _apply_override(tree: Tree, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().removesuffix("+").strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: write KEY=VALUE, for example images.sizes_px='[64, 256]'")
    value = _parse_value(override, text)
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            index = int(part) if part.isdigit() else -1
            if not 0 <= index < len(node):
                where = ".".join(parts[:depth])
                raise ConfigError(f"override {override!r}: {where} has items 0..{len(node) - 1}, got {part!r}")
            if last:
                node[index] = _added(override, node[index], value) if is_addition(override) else value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = _added(override, node.get(part), value) if is_addition(override) else value
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is a plain value, not a mapping")


def _added(override: str, items: object, value: object) -> list[object]:
    """The list with the value appended, or with its items if it is a list itself."""
    if not isinstance(items, list):
        key = override.partition("+=")[0].strip()
        raise ConfigError(f"override {override!r}: {key} is no list (it is {items!r}); use {key}=VALUE")
    return [*items, *(value if isinstance(value, list) else [value])]


_GLOB_STARTS = ("*", "{", "?", "%")


def _parse_value(override: str, text: str) -> object:
    """The value as YAML; paths that are not valid YAML, such as `*.csv` and `{00..09}.tar`, stay as they are."""
    try:
        return _load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if text.startswith(_GLOB_STARTS):
            return text
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _explain(config_class: type[Config], error: ValidationError) -> str:
    lines = []
    items = cast(list[dict[str, Any]], error.errors())
    deeper = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
    for item in items:
        if item["type"] == "too_short" and item["loc"] in deeper:
            continue  # only because the list lost its bad items
        parts, owner = _walk(config_class, item["loc"])
        path = ".".join(parts) or "config"
        value = item.get("input")
        if item["type"] == "extra_forbidden":
            known = sorted(owner.model_fields) if owner else []
            close = difflib.get_close_matches(parts[-1], known, n=1)
            choice = f"known keys{_of_kind(parts, owner)}: {', '.join(known)}" if known else "remove it"
            hint = f"did you mean {close[0]!r}?" if close else choice
            lines.append(f"{path}: unknown key (got {value!r}); {hint}")
        elif item["type"] == "missing":
            lines.append(f"{path}: needed, but not given; set it in the file or as {path}=VALUE")
        elif item["type"] == "union_tag_not_found":
            tag = item["ctx"]["discriminator"].strip("'")
            lines.append(f"{path}.{tag}: needed, but not given")
        elif item["type"] == "union_tag_invalid":
            kind, tags = item["ctx"]["tag"], item["ctx"]["expected_tags"].replace("'", "")
            close = difflib.get_close_matches(kind, tags.split(", "), n=1)
            choice = f"choose from {tags}" if tags else "install the package that adds it"
            hint = f"did you mean {close[0]!r}?" if close else choice
            tag = item["ctx"]["discriminator"].strip("'")
            lines.append(f"{path}.{tag}: there is none of this name (got {kind!r}); {hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message.replace("a valid tuple", "a list").replace("Tuple", "List")
            shown = f" (got {value!r})" if len(repr(value)) <= 100 else ""
            lines.append(f"{path}: {message[:1].lower()}{message[1:]}{shown}")
    return "\n".join(lines)


def _of_kind(parts: Sequence[str], owner: type[BaseModel] | None) -> str:
    tag = next((tag for tag in _TAGS if owner and tag in owner.model_fields), None)
    return (
        "" if owner is None or tag is None else f" of {'.'.join([*parts[:-1], tag])}={owner.model_fields[tag].default}"
    )


def _walk(annotation: object, location: Sequence[int | str]) -> tuple[list[str], type[BaseModel] | None]:
    """Turns an error's location into the key path of the file, and finds the model that holds the key.

    pydantic puts the tag of a discriminated union into the location; it is not a key, so it is omitted.
    """
    parts: list[str] = []
    owner: type[BaseModel] | None = None
    for part in location:
        annotation = _unwrap(annotation)
        members = [_unwrap(member) for member in get_args(annotation)]
        if _is_union(annotation) and len(members) == 2 and type(None) in members:
            annotation = next(member for member in members if member is not type(None))
            members = [_unwrap(member) for member in get_args(annotation)]
        if isinstance(part, str) and _is_union(annotation):
            tagged = [m for m in members if part in _tags(m)]
            if tagged:
                annotation = tagged[0]
                continue
        parts.append(str(part))
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif isinstance(part, str) and _is_union(annotation):
            annotation = owner = None  # of a kind that another package adds
        else:
            annotation = members[0] if members else None
    return parts, owner


def _unwrap(annotation: object) -> object:
    return _unwrap(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _is_union(annotation: object) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _tags(member: object) -> tuple[object, ...]:
    if not (isinstance(member, type) and issubclass(member, BaseModel)):
        return ()
    return tuple(value for tag in _TAGS if tag in member.model_fields for value in _literals(member, tag))


def _literals(model: type[BaseModel], tag: str) -> tuple[object, ...]:
    return get_args(model.model_fields[tag].annotation)
