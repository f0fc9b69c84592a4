"""Plain data back into frozen dataclasses, strictly: every field there, none unknown, each of its annotated type."""

import dataclasses
import types
import typing
from functools import cache
from typing import Any, Literal, TypeVar

from bwla_compiler.errors import PlanError

T = TypeVar("T")


def read(cls: type[T], value: Any, *, where: str) -> T:
    """Return value, as json.loads gave it for dataclasses.asdict, as an instance of a dataclass.

    Lists become tuples. Raises PlanError, naming the place below `where`, for whatever else differs.
    """
    return typing.cast(T, _read(cls, value, where))


def _read(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _instance(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return _items(arguments, value, where)
    if origin is Literal:
        return value if value in arguments and type(value) is str else _refuse(where, value, arguments)
    if origin is types.UnionType:
        (inner,) = [a for a in arguments if a is not types.NoneType]
        return None if value is None else _read(inner, value, where)
    if origin is dict:
        found = value if type(value) is dict else _refuse(where, value, "a table")
        return {k: _read(arguments[1], v, f"{where}.{k}") for k, v in found.items()}
    if hint is float and type(value) is int:
        return float(value)
    return value if type(value) is hint else _refuse(where, value, hint.__name__)


def _instance(cls: type, value: Any, where: str) -> Any:
    if type(value) is not dict:
        _refuse(where, value, "a table")
    hints = _hints(cls)
    if value.keys() != hints.keys():
        odd = ", ".join(sorted(value.keys() ^ hints.keys()))
        raise PlanError(f"{where}: keys missing or unknown: {odd}")
    return cls(**{key: _read(hint, value[key], f"{where}.{key}") for key, hint in hints.items()})


def _items(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if type(value) is not list:
        _refuse(where, value, "a list")
    hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(hints) != len(value):
        _refuse(where, value, f"a list of {len(hints)}")
    return tuple(_read(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _refuse(where: str, value: Any, expected: Any) -> Any:
    shown = repr(value)
    short = shown if len(shown) <= 40 else shown[:37] + "..."
    raise PlanError(f"{where}: expected {expected}, found {short}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)
