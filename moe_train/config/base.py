"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
AutoInt = PositiveInt | Literal["auto"]


def _possible(path: str) -> str:
    if "\0" in path or len(path.encode()) > 4000 or max(len(part.encode()) for part in path.split("/")) > 250:
        raise ValueError("no file can have this name")  # 250: Linux has 255, and suffixes are added
    return path


PathText = Annotated[str, AfterValidator(_possible)]


class Conflict(NamedTuple):
    """One broken rule between keys that are each valid alone."""

    path: str
    value: object
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}={self.value}: {self.rule}; {self.remedy}"


class Section(BaseModel):
    """A group of keys: frozen, unknown keys refused, infinities refused, the line under each key is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
