"""Records: JSON data of a known kind, written and read back through one class.

A record says which ``kind`` of file it is, and which ``format`` (schema version) it has. Keys may be added to a kind without a
new format, and a reader keeps those it does not know; the format grows when an older reader would misread the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from uniprune.errors import InputError
from uniprune.storage import strict_json
from uniprune.storage.files import path_of, write_json

if TYPE_CHECKING:
    from typing_extensions import Self

LARGEST = 2**63 - 1

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Shape = Annotated[tuple[Size, Size], Field(strict=False)]  # a list in JSON


class Facts(BaseModel):
    """A part of a record. A value of another type is refused, not converted; unknown keys are kept (``model_extra``)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _names_are_text(cls, data: Any) -> Any:
        """Half a surrogate pair, which JSON may hold, is no text; pydantic takes no such names."""
        if isinstance(data, Mapping) and not all(name.isascii() for name in data):
            return {name.encode("utf-8", "replace").decode("utf-8"): value for name, value in data.items()}
        return data


class Record(Facts):
    """The content of a file. Each subclass gives ``kind`` its one value."""

    FORMAT: ClassVar[int] = 1  # what this version writes, and the highest that it reads

    kind: str
    format: Annotated[int, Field(ge=1)] = 1

    @classmethod
    def kind_name(cls) -> str:
        """The kind of file."""
        return str(cls.model_fields["kind"].default)

    @classmethod
    def check_keeps_inputs(cls, path: Path, folders: Iterable[Path]) -> None:
        """Raises InputError if a result would replace a file of the folders that are read, but for an earlier one of its kind.

        Results may lie in a model's folder; its ``config.json`` is not to become one.
        """
        for folder in folders:
            if path.exists() and path.resolve().is_relative_to(folder.resolve()) and _kind(path) != cls.kind_name():
                raise InputError(f"output {path} is a file of the input {folder}; give another name")

    def record(self) -> dict[str, Any]:
        """The content as JSON data: its kind and format, and every field that was given a value."""
        return {"kind": self.kind, "format": self.format} | self.model_dump(exclude_unset=True)

    def write(self, path: Path) -> None:
        """Writes a JSON file, at once or not at all."""
        write_json(path, self.record())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The content of a JSON file. Raises InputError that names the file, the field at fault and the remedy."""
        return cls.checked(path, parsed(path))

    @classmethod
    def checked(cls, path: Path, data: Mapping[str, Any]) -> Self:
        """The content of a file that was parsed already. Raises InputError as :meth:`read`."""
        kind, version = data.get("kind"), data.get("format")
        if isinstance(kind, str) and kind != cls.kind_name():
            raise InputError(f"{path} holds {kind[:80]}, not {cls.kind_name()}")
        if type(version) is int and version > cls.FORMAT:
            raise InputError(f"{path} has format {version!s:.20}, this version reads up to {cls.FORMAT}; upgrade")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise cls.damaged(path, reason(error)) from None

    @classmethod
    def damaged(cls, path: Path, why: object) -> InputError:
        """The error for a file that does not have this schema, or does not agree with itself."""
        return InputError(f"{path} is damaged: {str(why)[:300]}; make it again")


def _kind(path: Path) -> Any:
    """What a file says that it is; None for one that is no record."""
    try:
        return strict_json.parse(path.read_bytes()).get("kind")
    except (OSError, ValueError):
        return None


def parsed(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError that names the file."""
    path = path_of(path)
    try:
        return strict_json.parse(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}; make it again") from None


def reason(error: ValidationError) -> str:
    """The first field at fault and what is wrong with it, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "the whole"
    text = f"it lacks {where!r}" if first["type"] == "missing" else f"{where}: {first['msg']}"
    return " ".join(text.split())[:300]
