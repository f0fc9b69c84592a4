"""Tables as dataclasses: unknown keys, missing ones and values of other types are errors."""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

from bwla_compiler.errors import RecipeError


def unknown_key(key: str, known: list[str], where: str) -> RecipeError:
    """Return the error of a key that is none of those known, with the nearest one."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return RecipeError(f"{where}: unknown key {key!r}{hint} Known keys: {', '.join(known)}")


def _as(value: Any, hint: Any, where: str) -> Any:
    """Return value as the annotated type, or raise."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: expected a table, found {value!r}")
        return build(typing.cast(type, hint), value, where)
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise RecipeError(f"{where} = {value!r}: must be one of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        (item, _) = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where}: expected a list, found {value!r}")
        return tuple(_as(v, item, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and not isinstance(value, dict):
        raise RecipeError(f"{where}: expected a table, found {value!r}")
    if origin in (dict, types.UnionType):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise RecipeError(f"{where} = {value!r}: must be of type {hint.__name__}")
    return value


def build(cls: type, table: dict[str, Any], where: str) -> Any:
    """Return the instance of a dataclass that a table describes. Raises RecipeError, naming where and the key."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in table:
        if key not in known:
            raise unknown_key(key, known, where)
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in table:
            raise RecipeError(f"{where}: the key {name!r} is required")
    return cls(**{key: _as(value, hints[key], f"{where}.{key}") for key, value in table.items()})
