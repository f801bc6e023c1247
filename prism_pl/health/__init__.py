"""Whether the game between policy and discriminator is healthy: what `callbacks.DiscriminatorHealth` computes.

features.py    length and surface of a text, the two things that a discriminator should not live on
shadow.py      classifiers that see nothing but those, trained beside the discriminator
panel.py       what one expert judged in a step, over all ranks, and its numbers over a window of steps
"""
