"""The systems: one LightningModule a stage."""

from modules.align import AdversarialAlignModule
from modules.evaluate import EvaluateModule
from modules.pairs import PairModule
from modules.pass_rates import PassRateModule
from modules.rlvr import RLVRModule
from modules.sft import SFTModule
from modules.warmup import DiscriminatorModule

__all__ = [
    "AdversarialAlignModule",
    "DiscriminatorModule",
    "EvaluateModule",
    "PairModule",
    "PassRateModule",
    "RLVRModule",
    "SFTModule",
]
