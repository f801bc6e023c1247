"""A small game of texts with a real discriminator, in which style or content can be planted."""

import math
import random

import torch

from prism_pl.chat import render

COLOURS, PLACES = ("red", "blue", "green"), ("top left", "bottom right", "the centre")


class Game:
    """Texts of both sides and a real discriminator: a linear score over what it could live on, the length, a word that
    demonstrations alone may have, and whether the caption is true of the image, trained by Bradley-Terry.

    Args:
        longer: items more in a demonstration.
        token: a line that demonstrations alone have.
        true: share of captions that are true, of demonstrations and of rollouts.
    """

    def __init__(self, longer: int = 0, token: str = "", true: tuple[float, float] = (0.5, 0.5)) -> None:
        self.longer, self.token, self.true = longer, token, true
        self.draw = random.Random(0)
        self.discriminator = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.zeros_(self.discriminator.weight)
        self.optimizer = torch.optim.SGD(self.discriminator.parameters(), lr=1.0)

    def response(self, demonstration: bool) -> tuple[str, list[float]]:
        items = self.draw.randint(2, 4) + self.longer * demonstration
        choose = self.draw.choice
        lines = [f"- a {choose(COLOURS)} {choose(range(10))} at {choose(PLACES)}" for _ in range(items)]
        lines += [self.token] * (demonstration and bool(self.token))
        right = self.draw.random() < self.true[not demonstration]
        features = [math.log(items), float(self.token in lines), float(right)]
        return render("\n".join(lines), f"1. it is {choose(range(10))}", "7"), features

    def step(self, num_prompts: int = 4, num_rollouts: int = 4) -> dict:
        demonstrations = [self.response(True) for _ in range(num_prompts)]
        rollouts = [self.response(False) for _ in range(num_prompts * num_rollouts)]
        chosen_P = self.discriminator(torch.tensor([f for _, f in demonstrations])).squeeze(-1)
        rolled_PG = self.discriminator(torch.tensor([f for _, f in rollouts])).view(num_prompts, num_rollouts)
        loss = -torch.nn.functional.logsigmoid(chosen_P[:, None] - rolled_PG).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {
            "rollouts": [text for text, _ in rollouts],
            "demonstrations": [text for text, _ in demonstrations],
            "valid": torch.ones(num_prompts, num_rollouts, dtype=torch.bool),
            "scores": {"perception": rolled_PG.detach()},
            "demonstration_scores": {"perception": chosen_P.detach()},
            "score_clip": 10.0,
            "ranks_per_group": 1,
        }
