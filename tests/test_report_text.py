"""Values as words: significant digits, uncertainties, changes, sizes and names."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrscope.report import text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"), (0.0, "0"), (-0.25, "−0.2500"), (24.1, "24.10"), (1234567, "1,234,567"), (1234.5678, "1,235"),
        (1.2e-5, "1.20×10⁻⁵"), (4.1e35, "4.10×10³⁵"), (-3.3e8 - 0.5, "−3.30×10⁸"), (None, "–"), (float("nan"), "–"),
        (float("inf"), "–"), ("word", "–"), (np.float32(0.5), "0.5000"), (np.int64(7), "7"), (pd.NA, "–"),
    ],
)  # fmt: skip
def test_numbers_have_four_significant_digits(value: object, words: str) -> None:
    assert text.number(value) == words


@pytest.mark.parametrize(
    ("value", "sem", "words"),
    [
        (0.25401, 0.00512, "0.2540 ± 0.0051"), (24.123, 0.9, "24.12 ± 0.90"), (1.0, 0.0, "1"), (1.0, 1e-17, "1"),
        (0.5, None, "0.5000"), (None, 0.1, "–"), (4.1e35, 2e33, "4.1×10³⁵ ± 2×10³³"), (151.2, 33.0, "151 ± 33"),
    ],
)  # fmt: skip
def test_uncertain_numbers_end_where_their_error_does(value: object, sem: object, words: str) -> None:
    assert text.plus_minus(value, sem) == words


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.25, 0.25, "unchanged"), (0.25, 0.2, "−20.0 %"), (0.25, 0.2501, "+0.04 %"), (0.1, 20, "×200"), (0, 1, "–"),
        (None, 1, "–"), (0, 0, "unchanged"), (0.25, np.nextafter(0.25, 1), "+0.00 %"),
    ],
)  # fmt: skip
def test_only_equal_values_are_called_unchanged(before: object, after: object, words: str) -> None:
    assert text.change(before, after) == words


def test_long_names_keep_head_and_tail() -> None:
    assert text.shorten("model.layers.29.mlp.down_proj.weight", 20) == "model.la…proj.weight"
    assert len(text.shorten("y" * 500, 26)) == 26
    assert text.shorten("short", 26) == "short"


@pytest.mark.parametrize(
    ("count", "words"), [(999, "999 bytes"), (1500, "1.500 kB"), (2.69e8, "269 MB"), (3e12, "3 TB")]
)
def test_sizes_come_in_the_largest_fitting_unit(count: float, words: str) -> None:
    assert text.size(count) == words


@given(st.text(max_size=80))
def test_visible_text_is_xml_without_hidden_characters(value: str) -> None:
    import unicodedata
    import xml.etree.ElementTree as ET
    from xml.sax.saxutils import escape

    shown = text.visible(value)
    assert ET.fromstring(f"<a>{escape(shown)}</a>").text in {shown, None}
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert shown == text.visible(shown)
    shown.encode("utf-8")


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e30, max_value=1e30))
def test_a_number_reads_back_as_itself_to_three_digits(value: float) -> None:
    shown = text.number(value).replace(",", "").replace("−", "-")
    mantissa, _, exponent = shown.partition("×10")
    digits = exponent.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    assert float(mantissa) * 10.0 ** int(digits or 0) == pytest.approx(value, rel=6e-3, abs=1e-300)
