"""How benchmarks show what they measured."""

import pandas as pd

from aliprod import report


def titled(title: str, rows: pd.DataFrame) -> str:
    """Markdown: a table under its title, its index as the first column."""
    return f"{title}\n\n{report.markdown(rows.reset_index())}\n"
