"""What each result looks like in a terminal: which columns of which table, in which order, rounded how.

Everything here is display: numbers come from the tables of a `Report` and nothing is computed but counts and extremes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vrscope.console import emit, escape, print_table, say
from vrscope.shown import (
    ADDITIVITY,
    APPROXIMATE,
    CORRELATION,
    GAIN_RULES,
    GAINS,
    RECIPE,
    SENSITIVITY,
    Shown,
    gains_by_rule,
)

if TYPE_CHECKING:
    import pandas as pd

    from vrscope.tables import Report

_FEW = 10  # rows of the short form of a long table
_OUTCOME = frozenset(("damage", "gains", "reach"))
_MARKS = {"good": ("+", "green"), "note": ("-", ""), "bad": ("!", "bold red")}


_DAMAGE = (
    Shown("format", "format"),
    Shown("checkpoint", "checkpoint"),
    Shown("kl", "KL (nats)", "#.4g", "kl_sem"),
    Shown("top1", "top-1 agreement", ".4f", "top1_sem"),
    Shown("perplexity", "perplexity", "#.4g", "perplexity_sem"),
    Shown("perplexity_ratio", "ratio", ".5g", "perplexity_ratio_sem"),
    Shown("relative_error", "relative error", ".4f", "relative_error_sem"),
    Shown("cosine", "cosine", ".5f", "cosine_sem"),
)
_DEPTH_LAW = (
    Shown("role", "role"),
    Shown("layers", "layers", ".0f"),
    Shown("exponent_p", "p in std ~ l^-p", ".3f", "exponent_sem"),
    Shown("sigma_1", "std at l = 1", ".4g"),
    Shown("r_squared", "R2", ".2f"),
)
_TENSORS = (
    Shown("tensor", "tensor"),
    Shown("shape", "shape"),
    Shown("std", "std", ".4g"),
    Shown("kurtosis_excess", "excess kurtosis", ".3g"),
    Shown("absmax", "largest |w|", ".4g"),
    Shown("outlier_share_6sigma", "beyond 6 sigma", ".2g"),
    Shown("tvr_ratio", "std / target", ".3g"),
    Shown("stable_rank", "stable rank", ".4g"),
    Shown("nan_count", "NaN", ".0f"),
    Shown("inf_count", "Inf", ".0f"),
)
_PARTS = (
    Shown("tensor", "tensor"),
    Shown("axis", "axis"),
    Shown("channel", "channel", ".0f"),
    Shown("part", "part"),
    Shown("unit", "unit"),
    Shown("head", "number", ".0f"),
    Shown("std", "std", ".4g"),
    Shown("kurtosis_excess", "excess kurtosis", ".3g"),
    Shown("absmax", "largest |w|", ".4g"),
    Shown("frobenius_norm", "Frobenius norm", ".4g"),
)
_SPACES = (
    Shown("space", "space"),
    Shown("rule", "rule"),
    Shown("size", "scales", ".0f"),
    Shown("changed", "changed", ".0f"),
    Shown("exponent_min", "lowest k", "g"),
    Shown("exponent_max", "highest k", "g"),
    Shown("imbalance_before", "imbalance before", ".3f"),
    Shown("imbalance_after", "after", ".3f"),
    Shown("note", "note"),
)
_MATRICES = (
    Shown("tensor", "tensor"),
    Shown("role", "role"),
    Shown("count", "tensors", ".0f"),
    Shown("std_before", "std before", ".4g"),
    Shown("std_after", "after", ".4g"),
    Shown("target_std", "target", ".4g"),
    Shown("left", "after / target", ".3g"),
)
_REACH = (
    Shown("format", "format"),
    Shown("can_change", "can change"),
    Shown("tensors_changed", "tensors", ".0f"),
    Shown("tensors_total", "of", ".0f"),
    Shown("reason", "why"),
)
_ACTIVATIONS = (
    Shown("tensor", "input of"),
    Shown("tokens", "tokens", ".0f"),
    Shown("absmax", "largest |x|", ".4g"),
    Shown("mean_abs", "mean |x|", ".3g"),
    Shown("std", "std", ".3g"),
    Shown("kurtosis_excess", "excess kurtosis", ".3g"),
    Shown("channel_spread", "channel spread", ".3g"),
    Shown("outlier_channels", "channels beyond 6", ".0f"),
)
_RESIDUAL = (
    Shown("layer", "enters layer", ".0f"),
    Shown("top1", "largest |x|", ".4g"),
    Shown("top2", "second", ".4g"),
    Shown("top3", "third", ".4g"),
    Shown("median_abs", "median |x|", ".3g"),
    Shown("top1_ratio", "largest / median", ".4g"),
    Shown("massive", "massive"),
    Shown("absmax", "peak", ".4g"),
    Shown("peak_channel", "channel", ".0f"),
    Shown("peak_position", "position", ".0f"),
)
_OUTLIERS = (
    Shown("roles", "inputs of"),
    Shown("channel", "channel", ".0f"),
    Shown("layers", "layers", ".0f"),
    Shown("layer_share", "share of layers", ".2f"),
    Shown("position_share", "share of positions", ".2f"),
    Shown("absmax", "largest |x|", ".4g"),
)
_EXPERTS = (
    Shown("role", "role"),
    Shown("layer", "layer", ".0f"),
    Shown("expert", "expert", ".0f"),
    Shown("tokens", "tokens", ".0f"),
    Shown("token_share", "share", ".3f"),
    Shown("absmax", "largest |x|", ".4g"),
)
_PROOF = (Shown("check", "check"), Shown("result", "result"), Shown("detail", "detail"))


def show_report(report: Report, everything: bool = False) -> None:
    """Print the findings, then the tables a reader wants first; `everything` prints all tables, and long ones whole.

    Of the main job only the outcome is printed: its page and its files hold the rest.
    """
    show_findings(report)
    for name, title, view in _VIEWS:
        if report.kind == "run" and name not in _OUTCOME and not everything:
            continue
        if name in report.tables and len(report.tables[name]):
            view(title, report.tables[name], everything)


def show_findings(report: Report) -> None:
    """Print the verdict; if the two checkpoints are not the same function, it says so whatever the findings say."""
    from rich.text import Text

    from vrscope.rescale.plan import NOT_EQUIVALENT

    said = any("NOT EQUIVALENT" in finding.get("text", "") for finding in report.verdict)
    if report.provenance.get("equivalent") == NOT_EQUIVALENT and not said:
        warn_not_equivalent()
    for finding in report.verdict:
        mark, style = _MARKS.get(finding.get("level", "note"), _MARKS["note"])
        emit(Text(f"{mark} {escape(finding.get('text', ''))}", style=style))


def warn_not_equivalent() -> None:
    """Print the label that every result of the raw TVR formula carries."""
    from rich.text import Text

    emit(
        Text("NOT EQUIVALENT: the rescaled checkpoint does not compute the function of the original.", style="bold red")
    )


def show_rescale(equivalent: str, changed: int) -> None:
    """Print in one line what a rescaled checkpoint computes; a warning if that is not the same function."""
    from vrscope.rescale.plan import BIT_EQUAL, NOT_EQUIVALENT

    if equivalent == NOT_EQUIVALENT:
        warn_not_equivalent()
    else:
        proof = "the same function, bit for bit" if equivalent == BIT_EQUAL else f"the same function, {equivalent}"
        say(f"{changed} scales moved: {proof}")


def show_listing(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print what is supported, one line each."""
    print_table("", headings, rows)


def _show(title: str, frame: pd.DataFrame, columns: Sequence[Shown]) -> None:
    """Print the columns that exist and hold at least one value."""
    kept = [c for c in columns if c.name in frame.columns and frame[c.name].notna().any()]
    records = frame.to_dict(orient="records")
    rows = [[_cell(record, column) for column in kept] for record in records]
    print_table(title, [c.heading for c in kept], rows, right=[c.heading for c in kept if c.style])


def _cell(record: dict[Any, Any], column: Shown) -> str:
    from pandas import isna

    value = record[column.name]
    if isna(value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not column.style:
        return str(value)
    text = format(value, column.style)
    error = record.get(column.error)
    return text if isna(error) else f"{text} ± {error:.2g}"


def _damage(title: str, frame: pd.DataFrame, everything: bool) -> None:
    del everything
    _show(title, _by_format(frame), _DAMAGE)


def _by_format(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one format after those of another, so that checkpoints stand side by side."""
    first_seen = {name: place for place, name in enumerate(dict.fromkeys(frame["format"]))}
    return frame.sort_values("format", kind="stable", key=lambda names: names.map(first_seen))


def _weight_error(title: str, frame: pd.DataFrame, everything: bool) -> None:
    keys = [name for name in ("format", "checkpoint") if name in frame.columns]
    if everything:
        names = (*keys, "tensor", "sqnr_db", "relative_error", "max_error")
        _show(title, frame, tuple(Shown(n, n, ".4g" if n in names[-3:] else "") for n in names))
        return
    summary = frame.groupby(keys, sort=False, as_index=False).agg(
        tensors=("sqnr_db", "size"), lowest=("sqnr_db", "min"), median=("sqnr_db", "median")
    )
    columns = (
        *(Shown(key, key) for key in keys),
        Shown("tensors", "tensors", ".0f"),
        Shown("lowest", "lowest SQNR (dB)", ".2f"),
        Shown("median", "median SQNR (dB)", ".2f"),
    )
    _show(title, _by_format(summary), columns)


def _worst(noun: str, columns: Sequence[Shown]) -> Callable[[str, pd.DataFrame, bool], None]:
    """Return a view that shows the rows with the heaviest tails; of whole tensors only the linear weights."""

    def view(title: str, frame: pd.DataFrame, everything: bool) -> None:
        for name in ("nan_count", "inf_count"):  # columns of zeros tell nothing
            if name in frame.columns and not frame[name].fillna(0).any():
                frame = frame.drop(columns=name)
        if not everything and "kind" in frame.columns and (frame["kind"] == "linear").any():
            frame = frame[frame["kind"] == "linear"]
        if not everything and len(frame) > _FEW:
            title = f"{title}: of {len(frame)} {noun} the {_FEW} with the largest excess kurtosis (--all shows all)"
            frame = frame.sort_values("kurtosis_excess", ascending=False, na_position="last").head(_FEW)
        _show(title, frame, columns)

    return view


def _largest(noun: str, by: str, columns: Sequence[Shown]) -> Callable[[str, pd.DataFrame, bool], None]:
    """Return a view that shows the rows with the largest value of a column; layers stay in their order."""

    def view(title: str, frame: pd.DataFrame, everything: bool) -> None:
        if not everything and "shared_with" in frame.columns:
            frame = frame[frame["shared_with"] == frame["tensor"]]  # q, k and v have one input
        if not everything and len(frame) > _FEW:
            heading = next(column.heading for column in columns if column.name == by)
            title = f"{title}: of {len(frame)} {noun} the {_FEW} with the highest {heading} (--all shows all)"
            frame = frame.nlargest(_FEW, by)
            frame = frame.sort_index() if noun == "layers" else frame
        _show(title, frame, columns)

    return view


def _experts(title: str, frame: pd.DataFrame, everything: bool) -> None:
    if everything:
        _show(title, frame, _EXPERTS)
        return
    summary = frame.groupby(["role", "layer"], sort=False, as_index=False).agg(
        experts=("expert", "size"),
        idle=("tokens", lambda tokens: int((tokens == 0).sum())),
        fewest=("tokens", "min"),
        most=("tokens", "max"),
        absmax=("absmax", "max"),
    )
    names = {"experts": "experts", "idle": "without tokens", "fewest": "fewest tokens", "most": "most"}
    columns = (*_EXPERTS[:2], *(Shown(name, words, ".0f") for name, words in names.items()), _EXPERTS[-1])
    _show(title, summary, columns)


def _spaces(title: str, frame: pd.DataFrame, everything: bool) -> None:
    if everything:
        _show(title, frame, _SPACES)
        return
    summary = frame.groupby("rule", sort=False, as_index=False).agg(
        space=("space", "size"),
        size=("size", "sum"),
        changed=("changed", "sum"),
        exponent_min=("exponent_min", "min"),
        exponent_max=("exponent_max", "max"),
        imbalance_before=("imbalance_before", "median"),
        imbalance_after=("imbalance_after", "median"),
        note=("note", _only),
    )
    columns = (_SPACES[1], Shown("space", "spaces", ".0f"), *_SPACES[2:])
    _show(f"{title}, by rule (medians; --all shows every space)", summary, columns)


def _gains(title: str, frame: pd.DataFrame, everything: bool) -> None:
    if everything:
        _show(title, frame, GAINS)
        return
    _show(f"{title}, by rule (--all shows every space)", _by_format(gains_by_rule(frame)), GAIN_RULES)


def _approximate(title: str, frame: pd.DataFrame, everything: bool) -> None:
    if not everything and len(frame) > _FEW:
        title = f"{title}: of {len(frame)} spaces the {_FEW} with the largest bound (--all shows all)"
        frame = frame.nlargest(_FEW, "bound")
    _show(title, frame, APPROXIMATE)


def _matrices(title: str, frame: pd.DataFrame, everything: bool) -> None:
    if everything:
        _show(title, frame, tuple(column for column in _MATRICES if column.name != "role"))
        return
    summary = frame.groupby("role", sort=False, as_index=False).agg(
        count=("tensor", "size"),
        **{name: (name, "median") for name in ("std_before", "std_after", "target_std", "left")},
    )
    _show(f"{title}, by role (medians)", summary, _MATRICES)


def _unreachable(title: str, frame: pd.DataFrame, everything: bool) -> None:
    if everything:
        _show(title, frame, (Shown("space", "space"), Shown("reason", "why")))
        return
    summary = frame.groupby("reason", sort=False, as_index=False).agg(first=("space", "first"), count=("space", "size"))
    _show(title, summary, (Shown("count", "spaces", ".0f"), Shown("first", "for example"), Shown("reason", "why")))


def _only(values: pd.Series) -> str:
    """Return the one text all rows share, or nothing."""
    distinct = {str(value) for value in values.dropna()}
    return distinct.pop() if len(distinct) == 1 else ""


def _whole(columns: Sequence[Shown]) -> Callable[[str, pd.DataFrame, bool], None]:
    """Return a view that shows every row."""

    def view(title: str, frame: pd.DataFrame, everything: bool) -> None:
        del everything
        _show(title, frame, columns)

    return view


def _first(noun: str, columns: Sequence[Shown]) -> Callable[[str, pd.DataFrame, bool], None]:
    """Return a view that shows the first rows of a table that is sorted already."""

    def view(title: str, frame: pd.DataFrame, everything: bool) -> None:
        if not everything and len(frame) > _FEW:
            title = f"{title}: the first {_FEW} of {len(frame)} {noun} (--all shows all)"
            frame = frame.head(_FEW)
        _show(title, frame, columns)

    return view


_VIEWS: tuple[tuple[str, str, Callable[[str, pd.DataFrame, bool], None]], ...] = (
    ("proof", "Proof", _whole(_PROOF)),
    ("damage", "Damage of the whole model, against the original unquantized one", _damage),
    ("gains", "Where the gain is predicted to come from", _gains),
    ("recipe_summary", "The recipe beside its extremes", _whole(RECIPE)),
    ("sensitivity", "Damage of each unit quantized alone", _first("units", SENSITIVITY)),
    ("additivity", "Do single damages add up?", _whole(ADDITIVITY)),
    ("correlation", "Spearman's correlation with that damage, 95 % intervals", _first("statistics", CORRELATION)),
    ("weight_error", "Error of the quantized weights", _weight_error),
    ("spaces", "Scales chosen", _spaces),
    ("approximate", "Equal up to eps: relative change of a norm's output, estimated from the weights", _approximate),
    ("matrices", "Standard deviations", _matrices),
    ("unreachable", "Cannot be scaled", _unreachable),
    ("reach", "What this plan can change", _whole(_REACH)),
    ("depth_law", "Standard deviation by layer (LIR is p = 0.5, flat is p = 0)", _whole(_DEPTH_LAW)),
    ("residual", "Hidden state at the entry of each layer", _largest("layers", "top1_ratio", _RESIDUAL)),
    ("activations", "Inputs of linear layers", _largest("inputs", "channel_spread", _ACTIVATIONS)),
    ("outlier_dimensions", "Outlier dimensions of LLM.int8", _largest("dimensions", "layer_share", _OUTLIERS)),
    ("experts", "Tokens of the experts", _experts),
    ("tensors", "Tensors", _worst("linear weights", _TENSORS)),
    ("heads", "Heads", _worst("heads", _PARTS)),
    ("channels", "Channels", _worst("channels", _PARTS)),
)
