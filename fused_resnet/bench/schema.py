"""Reading JSON as a dataclass: its annotations are the schema, which pydantic checks."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fused_resnet.bench.options import missing_packages

T = TypeVar("T")
KINDS: dict[type, str] = {dict: "an object", list: "an array"}


class Limits:
    """Of an annotation: ``pydantic.Field(**limits)``, made when a file is read; nothing else needs pydantic.

    Args:
        kind: checked in the place of the annotated type.
    """

    def __init__(self, kind: Any = None, **limits: Any) -> None:
        self._kind, self._limits = kind, limits

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import Field

        return handler.generate_schema(Annotated[self._kind or source, Field(**self._limits)])


Seconds = Annotated[float, Limits(ge=0, le=1e12)]
Count = Annotated[int, Limits(ge=0, lt=2**63)]
Number = Annotated[int, Limits(ge=1, lt=2**31)]


def one_of(words: tuple[str, ...]) -> Limits:
    return Limits(pattern=f"^({'|'.join(words)})$")


def read(path: Path, kind: type[T]) -> T:
    """The value of this dataclass in a file; what the file has beyond it is left out.

    Raises:
        ValueError: the file is not JSON, or not of this kind, and where; or pydantic is not installed.
        OSError: it cannot be read.
    """
    if missing := missing_packages("bench", {"pydantic": "pydantic"}):
        raise ValueError(missing)
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        place, found = "".join(f".{name}" for name in first["loc"]), first["input"]
        got = KINDS.get(type(found)) or reprlib.repr(found)
        told = first["msg"] if first["type"] in ("json_invalid", "missing") else f"{first['msg']}; got {got}"
        more = f" (and {len(others)} more)" if others else ""
        raise ValueError(f"{path}{': ' if place else ''}{place.removeprefix('.')}: {told}{more}") from None
