"""An evaluation on the screen."""

from prism_pl.evaluation_tables import ALL_FAMILIES
from prism_pl.report.evaluations import Evaluation
from prism_pl.report.tables import COLUMNS, cell


def print_evaluation(evaluation: Evaluation) -> None:
    """A table a split, a row a family. The file has the other intervals."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = 140
    for split, families in evaluation.tables.items():
        columns = {c: spec for c, spec in COLUMNS.items() if spec[0] in families[ALL_FAMILIES]}
        title = f"{evaluation.name}: {split} (shares in percent; accuracy with its 95% interval over prompts)"
        shown = RichTable(title=Text(title))
        shown.add_column("family", no_wrap=True)
        for column in ("prompts", *columns):
            shown.add_column(column, justify="right", no_wrap=column == "accuracy")
        for family, table in families.items():
            prompts = str(table["accuracy"]["prompts"])
            cells = [cell(table, *spec, with_interval=c == "accuracy") for c, spec in columns.items()]
            # As Text: Rich would read [40.0, 60.0] as markup.
            shown.add_row(*map(Text, (family, prompts, *cells)), end_section=family == ALL_FAMILIES)
        console.print(shown)
