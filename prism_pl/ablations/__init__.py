"""Every variant of the method over several seeds, by one command: `python -m prism_pl ablations`.

    schema.py    the YAML: arms, seeds, scales
    arms.py      all arms and seeds as one pipeline in which equal stages stand once
    tables.py    what the evaluations of that pipeline say: arms by question family, differences to the first arm
    command.py   the command line

Planning, running, resuming and the ledger are the pipeline's own (`prism_pl.pipeline`).
"""
