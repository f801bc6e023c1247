"""Reports of finished runs: one Markdown file with figures, made only from what the runs wrote.

* `evaluations`: a read `evaluation.json`;
* `runs`: a run's folder, its stages and evaluations, found by what they contain;
* `tables`, `comparisons`: checkpoints beside each other, and paired differences;
* `figures`, `training`, `cost`, `samples`: the other sections;
* `command`: `python -m prism_pl report`.

Light until a command runs: no torch anywhere, and numpy, matplotlib and tensorboard only where they are used.
"""
