"""Published benchmarks: how a row of their files becomes an example, and when an answer to it is right.

One file a benchmark; each names the repository, commit and file that its columns, prompt, split and rule come from.
`datamodules.BenchmarksDataModule` reads them, `modules.EvaluateModule` scores them.
"""

from prism_pl.benchmarks.base import Benchmark
from prism_pl.benchmarks.hallusionbench import HallusionBench
from prism_pl.benchmarks.judge import JudgeModel
from prism_pl.benchmarks.mathverse import MathVerse
from prism_pl.benchmarks.mathvision import MathVision
from prism_pl.benchmarks.mathvista import MathVista
from prism_pl.benchmarks.mmmu import MMMU
from prism_pl.benchmarks.mmmu_pro import MMMUPro
from prism_pl.benchmarks.wemath import WeMath

__all__ = [
    "MMMU",
    "Benchmark",
    "HallusionBench",
    "JudgeModel",
    "MMMUPro",
    "MathVerse",
    "MathVision",
    "MathVista",
    "WeMath",
]
