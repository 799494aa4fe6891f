"""Docstrings call their example ``Example:``; what reads them for the site knows the section as ``Examples:``."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class OneExample(Extension):
    """Renames the section where a docstring is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
