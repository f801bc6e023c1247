"""All stages by one command: `python -m prism_pl pipeline --config pipeline.yaml`.

    schema.py    the YAML: stages, defaults, options; several files and the command line laid over each other
    graph.py     references such as {sft.export}: who is whose parent, in which order, and each stage's command line
    resolve.py   what a stage's command line comes to, read by the command's own parser
    plan.py      the ledger against the YAML: what is skipped, resumed, run anew, or stops
    jobs.py      a stage's command as a process of its own, its output kept in a log
    execute.py   the stages in turn or side by side, the ledger kept up to date
    results.py   what a finished stage left: hashes and measurements
    command.py   the command line

The ledger itself, which others read too, is `prism_pl.ledger`.
"""
