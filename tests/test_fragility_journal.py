"""Finished units on disk: what is read back, what a crash may leave, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vrscope.errors import OutputError
from vrscope.fragility.journal import Journal, open_journal

SUBJECT = {"model": "f" * 64, "format": "nf4", "tokens": 512, "text": "a" * 64}


def write(path: Path, *units: str) -> None:
    with open_journal(path, SUBJECT, resume=True) as journal:
        for unit in units:
            journal.add(unit, {"damage": len(unit) / 3, "damage_sem": math.nan})


def test_what_was_added_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "units.jsonl"
    values = {"a": 0.1 + 0.2, "b": 5e-324, 'c\n\u2028"': 1 / 3}
    with open_journal(path, SUBJECT, resume=False) as journal:
        for unit, value in values.items():
            journal.add(unit, {"damage": value, "damage_sem": math.inf})
    with open_journal(path, SUBJECT, resume=True) as journal:
        assert {unit: figures["damage"] for unit, figures in journal.done.items()} == values
        assert journal.done["a"]["damage_sem"] == math.inf


def test_each_unit_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    path = tmp_path / "units.jsonl"
    with open_journal(path, SUBJECT, resume=False) as journal:
        for number in (1, 2, 3):
            journal.add(f"unit {number}", {"damage": 0.0})
            assert len(path.read_text().splitlines()) == 1 + number


def test_work_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt), open_journal(folder / "units.jsonl", SUBJECT, resume=False):
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [tmp_path / "there"] and not any((tmp_path / "there").iterdir())
    write(tmp_path / "there" / "units.jsonl", "first")
    with open_journal(tmp_path / "there" / "units.jsonl", SUBJECT, resume=True):
        pass
    assert (tmp_path / "there" / "units.jsonl").read_text().count("\n") == 2, "what was finished stays"


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_dropped_and_written_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "units.jsonl"
    write(path, "first", "second")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with open_journal(path, SUBJECT, resume=True) as journal:
        assert set(journal.done) == {"first"}
    write(path, "second")
    assert path.read_bytes() == whole


def test_a_torn_header_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "units.jsonl"
    write(path, "first")
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    write(path, "first")
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("key", "value"), [("format", "fp4"), ("tokens", 1024), ("model", "e" * 64), ("text", "b" * 64)]
)
def test_a_journal_of_other_work_is_refused_by_what_differs(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "units.jsonl"
    write(path, "first")
    before = path.read_bytes()
    with pytest.raises(OutputError, match=rf"units.jsonl: expected results for {key} .*--force") as refused:
        open_journal(path, {**SUBJECT, key: value}, resume=True)
    assert "\n" not in str(refused.value) and path.read_bytes() == before


def test_finished_units_are_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "units.jsonl"
    write(path, "first")
    with pytest.raises(OutputError, match="--resume"):
        open_journal(path, SUBJECT, resume=False)
    with open_journal(path, SUBJECT, resume=False, force=True) as journal:
        assert journal.done == {}
        journal.add("other", {"damage": 1.0})
    with open_journal(path, SUBJECT, resume=True) as journal:
        assert set(journal.done) == {"other"}


def test_work_that_ended_before_its_first_unit_leaves_nothing_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "units.jsonl"
    open_journal(path, SUBJECT, resume=False).__exit__()
    open_journal(path, {**SUBJECT, "format": "fp4"}, resume=False).__exit__()


@pytest.mark.parametrize("line", ["{}", "[]", '{"unit": "x", "damage": "much"}', "colour", "\x00"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "units.jsonl"
    write(path, "first", "second")
    lines = path.read_text().splitlines()
    lines[1] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(OutputError, match="line 2"):
        open_journal(path, SUBJECT, resume=True)


def test_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "units.jsonl"
    path.write_text(json.dumps({"some": "thing"}) + "\n")
    with pytest.raises(OutputError, match="expected results for"):
        open_journal(path, SUBJECT, resume=True)
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        open_journal(path, SUBJECT, resume=True)


def test_a_full_disk_is_one_line_and_the_unit_does_not_count(tmp_path: Path) -> None:
    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

    journal = Journal(tmp_path / "x", {}, Full())
    with pytest.raises(OutputError, match=r"No space left on device.*--resume"):
        journal.add("first", {"damage": 1.0})
    assert journal.done == {}
