"""README quotes what the committed result files say, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.readme_table import BEGIN, END, README, table, with_table


def test_readme_has_the_table_of_the_committed_results():
    readme = README.read_text()
    assert readme == with_table(readme, table()), "run: python -m benchmarks.readme_table --write"


def test_an_older_table_is_replaced():
    readme = f"head\n{BEGIN}\n| old |\n{END}\ntail\n"
    assert with_table(readme, "| new |") == f"head\n{BEGIN}\n| new |\n{END}\ntail\n"


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="must contain"):
        with_table("no marks", "")
