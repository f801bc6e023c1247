"""The difficulty filter: what was measured, and what each stage kept of it."""

import json
from collections.abc import Sequence
from statistics import fmean

from prism_pl.pass_rates import KEPT_IDS, PASS_RATES, histogram, read_pass_rates
from prism_pl.report.runs import Run
from prism_pl.report.tables import markdown_table
from prism_pl.report.training import with_stages


def difficulty(runs: Sequence[Run]) -> list[str]:
    """Tables of the measured pass rates, and of the rows that stages were trained on; nothing where there are none."""
    measured = []
    for run in runs:
        for name, folder in run.filters.items():
            rates = list(read_pass_rates(folder / PASS_RATES).values())
            label = name if len(runs) == 1 else f"{run.name}/{name}"
            none, all_of_them = rates.count(0.0), rates.count(1.0)
            shares = [f"{fmean(rates):.3f}", str(none), str(all_of_them), histogram(rates)]
            measured.append([label, str(len(rates)), *shares])
    kept = []
    for _, stage, label in with_stages(runs):
        file = stage.folder / KEPT_IDS
        if file.exists():
            content = json.loads(file.read_text())
            low, high = content["keep"]
            kept.append([label, str(len(content["ids"])), f"[{low:g}, {high:g}]", str(content["pass_rates"])])
    header = ["measured in", "prompts", "mean pass rate", "none right", "all right", "pass rate x prompts"]
    lines = [*markdown_table(header, measured), ""] if measured else []
    if kept:
        lines += [*markdown_table(["stage", "rows kept", "pass rates", "of"], kept), ""]
    return lines
