"""`data pairs`: warm-start pairs of the data's demonstrations and a policy's rollouts, by `modules.pairs.PairModule`.

python -m prism_pl data pairs --config pairs.yaml --model.policy.path runs/sft/export
"""

from prism_pl import cli


def run(args: list[str]) -> None:
    """Sample and write; what follows is predict's command line."""
    cli.run(["predict", *args])
