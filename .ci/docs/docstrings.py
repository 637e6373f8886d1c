"""What reading docstrings from the source alone misses."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Give each pydantic model the constructor that pydantic makes, and show examples as code."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add a constructor that takes the fields."""
        if not {"BaseModel", "_Frozen"} & {str(base) for base in cls.bases} or "__init__" in cls.members:
            return
        takes = griffe.Parameters(griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword))
        for name, field in cls.members.items():
            if field.is_attribute and field.annotation and "property" not in field.labels and name != "kind":
                # Ranges are in the description.
                kind = re.sub(r"Annotated\[(\w+), Field\([^)]*\)\]", r"\1", str(field.annotation))
                only = griffe.ParameterKind.keyword_only
                takes.add(griffe.Parameter(name, annotation=kind, kind=only, default=field.value))
        cls.set_member("__init__", griffe.Function("__init__", parameters=takes))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Call the section as griffe does."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
