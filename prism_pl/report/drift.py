"""How far each checkpoint's responses lie from the supervision's: table and figure of the drift meter."""

from collections.abc import Sequence
from pathlib import Path

from prism_pl.report.evaluation_figures import Panel, interval_panels
from prism_pl.report.figures import Figures
from prism_pl.report.runs import Run
from prism_pl.report.tables import Evaluations, metrics_table

LIKELIHOOD = {
    "teacher_nll_caption": Panel("NLL of its captions", "nats a token"),
    "teacher_nll_reasoning": Panel("NLL of its reasoning", "nats a token"),
    "teacher_nll_answer": Panel("NLL of its answers", "nats a token"),
}
STRUCTURE = {
    "descriptive_items/distance": Panel("descriptive items, W1", "items"),
    "reasoning_steps/distance": Panel("reasoning steps, W1", "steps"),
    "response_length/distance": Panel("length, W1", "tokens"),
}
RESPONSES = {
    "embedding_energy": Panel("embeddings, energy distance", "distance"),
    "probe_auc": Panel("probe", "AUC", reference=0.5),
    "probe_auc_length_matched": Panel("probe, same length", "AUC", reference=0.5),
}
PANELS = LIKELIHOOD | STRUCTURE | RESPONSES
COLUMNS = {
    "NLL caption": ("teacher_nll_caption", 1),
    "NLL reasoning": ("teacher_nll_reasoning", 1),
    "NLL answer": ("teacher_nll_answer", 1),
    "items W1": ("descriptive_items/distance", 1),
    "steps W1": ("reasoning_steps/distance", 1),
    "tokens W1": ("response_length/distance", 1),
    "energy": ("embedding_energy", 1),
    "AUC": ("probe_auc", 1),
    "AUC, same length": ("probe_auc_length_matched", 1),
}
NOTE = (
    "NLL: of the supervision's responses under the checkpoint, nats a token. W1: Wasserstein-1 distance. Energy: "
    "energy distance between embeddings of both sides' responses by {embedder}, in units of the supervision's spread. "
    "AUC: of a fresh probe that tells the checkpoint's responses from the supervision's on prompts it has not seen; "
    "0.5: it cannot; `same length`: where length cannot help it. Measured on at most {prompts} prompts; 95% intervals "
    "over prompts. Those of AUC are narrower than that: they leave the probes as they were trained, and where there "
    "was nothing to find 5 in 6 of them held 0.5."
)
GREEDY = (
    "Decoded at temperature 0 ({}): a checkpoint's most likely response beside samples of the supervision. A probe can "
    "tell those apart where the two distributions are one, so 0.5 is not what an aligned checkpoint has to reach; "
    "sample at temperature 1 for that (`--model.sampling.temperature 1`)."
)


def drift(figures: Figures, runs: Sequence[Run], evaluations: Evaluations, split: str, drawn: bool) -> list[str]:
    """Table, and figure where `drawn`; nothing where no evaluation has the drift meter's numbers.

    Raises:
        ValueError: the checkpoints were embedded by different networks.
    """
    measured = {label: e for label, e in evaluations.items() if e.settings.get("drift")}
    if not measured:
        return []
    embedders = {e.settings["drift"]["embedder"]["path"] for e in measured.values()}
    if len(embedders) > 1:
        raise ValueError(
            f"the evaluations embed responses by different networks ({', '.join(sorted(embedders))}), so their "
            "distances do not compare: evaluate all with one --model.drift.embedder.path"
        )
    prompts = {e.settings["drift"]["num_prompts"] for e in measured.values()}
    limit = "all" if None in prompts else max(prompts)
    embedder = "/".join(Path(embedders.pop()).parts[-2:])  # a hub name, or a folder without its place on this machine
    note = NOTE.format(embedder=f"`{embedder}`", prompts=limit).replace("at most all", "all")
    greedy = [label for label, e in measured.items() if e.settings.get("sampling", {}).get("temperature") == 0]
    note += " " + GREEDY.format(", ".join(greedy)) if greedy else ""
    caption = (
        f"Drift from the supervision, {split} prompts, 95% intervals; the probe's hold less; n/a: nothing to measure"
    )
    shown = interval_panels(figures, runs, split, PANELS, f"drift-{split}", caption) if drawn else []
    return [*shown, *metrics_table(measured, split, COLUMNS), "", note]
