"""README quotes what the committed result files say, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.readme_table import COUNTED, MEASURED, README, tables, with_tables


def test_readme_has_the_tables_of_the_committed_results():
    readme = README.read_text()
    assert readme == with_tables(readme, tables()), "run: python -m benchmarks.readme_table --write"


def test_older_tables_are_replaced():
    readme = f"head\n{COUNTED[0]}\n{COUNTED[1]}\nbetween\n{MEASURED[0]}\n| old |\n{MEASURED[1]}\ntail\n"
    expected = f"head\n{COUNTED[0]}\nbytes\n{COUNTED[1]}\nbetween\n{MEASURED[0]}\n| new |\n{MEASURED[1]}\ntail\n"
    assert with_tables(readme, {MEASURED: "| new |", COUNTED: "bytes"}) == expected


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="must contain"):
        with_tables("no marks", {MEASURED: ""})
