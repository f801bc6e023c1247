"""What the modules need of the training strategy, the same under `auto`, DDP and DeepSpeed, and the DeepSpeed strategy
itself: one engine for each trained network."""

from prism_pl.strategy.checks import check_strategy, check_trainer, prepare_stock
from prism_pl.strategy.engine_config import EngineOptions
from prism_pl.strategy.multi_engine import MultiEngineDeepSpeedStrategy
from prism_pl.strategy.players import building, check_gradients, step_network, training_only
from prism_pl.strategy.ranks import (
    global_max,
    global_min,
    global_sum,
    metrics_over_ranks,
    own_part,
    share,
    sums_over_ranks,
    whole_groups,
    world_size,
)
from prism_pl.strategy.sharding import gathered, inside, is_sharded

__all__ = [
    "EngineOptions",
    "MultiEngineDeepSpeedStrategy",
    "building",
    "check_gradients",
    "check_strategy",
    "check_trainer",
    "gathered",
    "global_max",
    "global_min",
    "global_sum",
    "inside",
    "is_sharded",
    "metrics_over_ranks",
    "own_part",
    "prepare_stock",
    "share",
    "step_network",
    "sums_over_ranks",
    "training_only",
    "whole_groups",
    "world_size",
]
