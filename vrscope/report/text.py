"""Values as words: numbers, uncertainties and names as the page shows them.

Everything that comes from a checkpoint or a command line passes through `visible`, so that no name can hide characters
or break the XML of a figure; escaping for HTML is left to the templates.
"""

from __future__ import annotations

import math
import unicodedata
from typing import Any

MISSING = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Direction controls can make one name look like another; U+FFFE and U+FFFF are not XML.
_HIDDEN = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufffe\uffff")


def visible(value: Any) -> str:
    r"""Return `value` as text in which control, direction and surrogate characters are written out as ``\u202e``."""
    text = "" if value is None else str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if c in _HIDDEN or unicodedata.category(c) in {"Cc", "Cs"} else c for c in text)


def shorten(text: str, limit: int) -> str:
    """Return `text` with its middle replaced by an ellipsis if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) * 3 // 5
    return f"{text[: limit - 1 - tail]}…{text[-tail:]}"


def number(value: Any, digits: int = 4) -> str:
    """Return a number with `digits` significant digits, integers in full, a dash where there is none."""
    if is_missing(value):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    x = float(value)
    if x == 0:
        return "0"
    if x.is_integer() and abs(x) < 1e15:
        return f"{int(x):,}".replace("-", "−")
    if not 1e-3 <= abs(x) < 1e6:
        return _power_of_ten(x, digits)
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:,.{places}f}".replace("-", "−")


def tick(value: float) -> str:
    """Return a round number as an axis or legend shows it: powers of ten beyond four digits, no padding."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:,.6g}".replace("-", "−")
    return _power_of_ten(value, 2).removeprefix("1×")


def plus_minus(value: Any, sem: Any) -> str:
    """Return `value ± sem`, both to the second significant digit of the standard error."""
    if is_missing(value):
        return MISSING
    if is_missing(sem) or float(sem) <= 1e-12 * abs(float(value)):
        return number(value)
    x, error = float(value), float(sem)
    places = 1 - math.floor(math.log10(error))
    if places > 7 or abs(x) >= 1e6 or error >= 1e6:
        return f"{number(x, 3)} ± {number(error, 2)}"
    places = max(0, places)
    return f"{x:,.{places}f} ± {error:,.{places}f}".replace("-", "−")


def change(before: Any, after: Any) -> str:
    """Return the relative change from `before` to `after` in percent; "unchanged" only if the two are equal."""
    if is_missing(before) or is_missing(after):
        return MISSING
    old, new = float(before), float(after)
    if old == new:
        return "unchanged"
    if old == 0:
        return MISSING
    relative = 100 * (new - old) / abs(old)
    if abs(relative) >= 1000:
        return f"×{number(new / old, 3)}"
    return f"{relative:+.{2 if abs(relative) < 1 else 1}f} %".replace("-", "−")


def size(count: float) -> str:
    """Return a number of bytes in the largest decimal unit that leaves at least one before the point."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{number(count, 4)} {unit}"
        count = count / 1000
    return f"{number(count, 4)} TB"


def is_missing(value: Any) -> bool:
    """Return whether a value is None, NaN, infinite or not a number at all."""
    if value is None:
        return True
    try:
        return not math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return True


def _power_of_ten(x: float, digits: int) -> str:
    mantissa, exponent = f"{x:.{digits - 2}e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
