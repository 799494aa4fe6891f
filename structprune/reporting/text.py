"""Numbers and names as people read them, and HTML that is safe to put them into."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(number: float) -> str:
    """A number in three digits.

    Example:
        >>> short(4_089_184_256), short(64), short(1000)
        ('4.09 G', '64', '1.00 k')
    """
    for size, unit in _UNITS:
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}" if abs(number) >= 100 * size else f"{number / size:#.3g} {unit}"
    return f"{number:g}"


def kept(before: float, after: float) -> str:
    """What is left as a percentage.

    Example:
        >>> kept(200, 50)
        '25%'
    """
    share = 100 * after / before if before else 100.0
    return f"{share:.0f}%" if share >= 10 or share == 0 else f"{share:.1f}%"


def places(reason: str) -> str:
    """A reason whose source files are named from their package or the working directory on.

    Example:
        >>> places("conv2d at /opt/env/lib/python3.11/site-packages/timm/models/resnet.py:777 slides over")
        'conv2d at timm/models/resnet.py:777 slides over'
    """
    reason = re.sub(r"\S*?/site-packages/", "", reason)
    return reason.replace(f"{Path.cwd()}/", "")


def element(tag: str, *content: str, **attributes: object) -> str:
    """An element around markup; attributes are escaped, ``class_`` is ``class``, ``data_x`` is ``data-x``.

    Example:
        >>> element("p", "a", class_="b", title='"')
        '<p class="b" title="&quot;">a</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{given}>{''.join(content)}</{tag}>"
