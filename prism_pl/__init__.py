"""PRISM in PyTorch Lightning: SFT, adversarial on-policy alignment, and RL with verifiable rewards for vision-language models."""

__version__ = "0.1.0"
