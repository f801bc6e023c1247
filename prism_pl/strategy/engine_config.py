"""DeepSpeed's configuration of one engine, from our options. What would train wrongly is refused with one line."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from prism_pl.errors import did_you_mean

# Two engines have two sets of buckets: a quarter of Lightning's 200M elements each.
BUCKET = 50_000_000

# What belongs elsewhere, and where.
NOT_HERE = {
    "gradient_clipping": "set max_grad_norm (and discriminator_max_grad_norm) of the module, or in the stages with "
    "automatic optimisation trainer.gradient_clip_val",
    "gradient_accumulation_steps": "set model.init_args.micro_batch_tokens, which splits a batch exactly",
    "train_batch_size": "set the data's batch_size, which is of each process",
    "train_micro_batch_size_per_gpu": "set the data's batch_size, which is of each process",
    "optimizer": "name the optimiser in the module",
    "scheduler": "set schedule and warmup of the module",
    "fp16": "its scaled gradients would be clipped as they stand: set trainer.precision to bf16-mixed",
    "bf16": "set trainer.precision to bf16-mixed, or precision of one engine",
}
# Of `zero_optimization` at stage 3.
UNSUPPORTED_AT_3 = {
    "zero_hpz_partition_size": "second copies of the weights are not kept in step with what is saved",
    "zero_quantized_weights": "the rollouts would be of rounded weights",
    "mics_shard_size": "a part of the ranks does not hold all of the weights",
}


@dataclass(frozen=True)
class EngineOptions:
    """How one network is trained. None takes what the strategy says for all.

    Attributes:
        stage: of ZeRO. 0 keeps everything on every rank, 1 shards the optimiser's state, 2 also the gradients, 3 also
            the weights. At 0 and 1 gradients are reduced over ranks once a step; at 2 and 3, where a rank keeps its
            part of them alone, in each micro-batch's backward pass.
        offload_optimizer: keep the optimiser's state in the CPU's memory, and step there.
        offload_params: at stage 3, keep the shards of the weights in the CPU's memory.
        precision: `bf16` computes in bf16 and steps on float32 master weights; `32` is float32 throughout.
        config: further keys of DeepSpeed's configuration, put over ours.
    """

    stage: Literal[0, 1, 2, 3] | None = None
    offload_optimizer: bool | None = None
    offload_params: bool | None = None
    precision: Literal["32", "bf16"] | None = None
    config: dict[str, Any] | None = None

    def over(self, common: "EngineOptions") -> "EngineOptions":
        """These options, and those of `common` where these say nothing; `config` is merged key by key."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        chosen["config"] = merged(common.config or {}, self.config or {})
        return replace(common, **chosen)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings, the second put over the first."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def check_names(engines: Mapping[str, Any], networks: list[str]) -> None:
    """ValueError for options of a network that the module does not have."""
    for name in engines:
        if name not in networks:
            raise ValueError(
                f"trainer.strategy.init_args.engines names {name!r}, and the module's networks are "
                f"{', '.join(networks)}.{did_you_mean(name, networks)}"
            )


def engine_config(name: str, options: EngineOptions, *, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of the engine of network `name`.

    Args:
        options: complete, see `EngineOptions.over`.

    ValueError for what DeepSpeed would take and train wrongly, or refuse in its own words.
    """
    check_options(name, options)
    stage = options.stage
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        # Below stage 2 DeepSpeed cannot reduce while the backward pass goes on unless it counts the passes itself.
        "overlap_comm": on_gpu and stage in (2, 3),
    }
    if options.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if options.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants one, for its own throughput log
        "gradient_accumulation_steps": 1,
        # We say when a step is, so that any number of backward passes may come before it. At stage 0 DeepSpeed's
        # accumulation is plain addition, and managing it lets us look at the gradients' norm between reduction and
        # step.
        "managed_gradient_accumulation": stage == 0,
        "gradient_clipping": 0.0,  # set before each step
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {
            "enabled": options.precision == "bf16",
            # Without the check a bf16 engine would step on an infinite gradient.
            "check_grad_overflow": True,
            # Else stage 1 adds up `.grad` after each backward pass and clears it in the engine's forward, which never
            # runs: a step's first micro-batch would count as often as there are micro-batches.
            "immediate_grad_update": True,
        },
    }
    return merged(ours, options.config or {})


def check_options(name: str, options: EngineOptions) -> None:
    """ValueError for options that do not go together, naming the engine."""
    where = f"the engine of {name}"
    if options.stage not in (0, 1, 2, 3):
        raise ValueError(f"{where}: stage is {options.stage}, give 0, 1, 2 or 3")
    if options.precision == "bf16" and options.stage == 0:
        raise ValueError(
            f"{where}: bf16 at stage 0 takes a step of its own when it is built. Set stage 1, or strategy ddp.yaml"
        )
    if options.offload_params and options.stage != 3:
        raise ValueError(f"{where}: offload_params at stage {options.stage}: only stage 3 shards weights")
    if options.offload_optimizer and options.stage == 0:
        raise ValueError(f"{where}: offload_optimizer at stage 0: set stage 1 or more")
    for key, way_out in NOT_HERE.items():
        if key in (options.config or {}):
            raise ValueError(f"{where}: config holds {key}: {way_out}")
    zero = (options.config or {}).get("zero_optimization", {})
    if "stage" in zero:
        raise ValueError(f"{where}: config holds zero_optimization.stage: set stage beside config")
    for key, reason in UNSUPPORTED_AT_3.items():
        if options.stage == 3 and zero.get(key):
            raise ValueError(f"{where}: ZeRO-3 with {key} is not supported ({reason}): leave it out, or set stage 2")
