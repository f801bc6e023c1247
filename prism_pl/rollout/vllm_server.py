"""Rollouts with vLLM on a second machine or GPU, behind `vllm serve`.

The server holds a copy of the policy's weights, so it samples from what the last `sync` sent. What can go wrong with
that is checked in the loop, see `prism_pl.rollout.contract`; what can go wrong with a connection is tried again, and a
call gives all of its rollouts or none.
"""

import logging
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from prism_pl.batch import Example
from prism_pl.lora import whole_parameters
from prism_pl.optim import check_finite
from prism_pl.processor import Processor
from prism_pl.rollout import vllm_nccl
from prism_pl.rollout.draws import Draws
from prism_pl.rollout.engine import GroupDone, Rollout, Sampling
from prism_pl.rollout.probe import Probe
from prism_pl.rollout.ranks import RankCheck, on_first_rank
from prism_pl.rollout.vllm_compat import version_of
from prism_pl.rollout.vllm_limits import check_fits, check_temperature
from prism_pl.rollout.vllm_server_chat import chat_request, rollouts_of
from prism_pl.rollout.vllm_server_client import Server
from prism_pl.rollout.vllm_server_facts import (
    ServerFacts,
    check_facts,
    check_same,
    image_options,
    launch_line,
)
from prism_pl.rollout.vllm_server_sync import (
    NCCLTransfer,
    PathTransfer,
    ServerWeights,
    Transfer,
    forget_prompts,
)
from prism_pl.rollout.vllm_sync import shapes_to_send
from prism_pl.strategy import is_sharded, world_size

logger = logging.getLogger(__name__)


class VLLMServerEngine:
    """Samples with a vLLM server that every rank of the run asks and the first rank keeps up to date.

    Run so far on two GPUs of one host with vLLM 0.24, weights by NCCL and by a folder, and on a CPU with vLLM 0.32.
    Experimental, as they were not run yet: several GPUs to a server, two hosts, 0.32's form of the transfer by NCCL,
    and vLLM 0.25 to 0.31, which are let in.

    Each request carries a seed of its own (`prism_pl.rollout.draws.Draws`), so a resumed run draws what the whole one
    would have drawn. The line that starts a server stands in the README and in the message where there is none.

    Args:
        url: of the server, such as http://other-machine:8000.
        transfer: how weights travel: `nccl` from GPU to GPU, `path` by a folder; `auto` takes `nccl` where policy and
            server are on GPUs, the server was started with vLLM's weight transfer and there is a vLLM on the trainer's
            side, else `path`. `nccl` needs the same vLLM on both sides, 0.24 or 0.32.
        folder: for `path`, one that both machines see under this name; None: a temporary one of this machine.
        nccl_address: for `nccl`, where the server finds this process, "host" or "host:port"; None: found out.
        retries: how often a request is tried again, with back-off, before the run stops; 8 wait two minutes in all.
        timeout: seconds for one answer, its time in the server's queue included.
        sleep: lend the server's memory during the training part of a step: for a server on the trainer's own GPU.
    """

    def __init__(
        self,
        url: str,
        transfer: Literal["auto", "nccl", "path"] = "auto",
        folder: str | None = None,
        nccl_address: str | None = None,
        retries: int = 8,
        timeout: float = 600.0,
        sleep: bool = False,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError(f"engine url is {url!r}: give the server's address, such as http://other-machine:8000")
        if retries < 0:
            raise ValueError(f"engine retries is {retries}: give 0 or more")
        if timeout <= 0:
            raise ValueError(f"engine timeout is {timeout}: give seconds above 0")
        self.url, self.kind, self.folder, self.nccl_address = url, transfer, folder, nccl_address
        self.retries, self.timeout, self.sleeps = retries, timeout, sleep
        self.weights: ServerWeights | None = None
        self.asleep = False

    def start(self, policy: Any, processor: Processor, *, rank: int) -> None:
        """Meet the server: ValueError where it serves another model, or lacks an option; ConnectionError where it is
        not there. Its weights come with the first `generate`."""
        self.close()
        if is_sharded(policy):
            # The first rank alone sends, and sharded weights are made whole by all ranks together.
            raise ValueError(
                "ZeRO-3 with the engine of a vLLM server is not supported: set the policy's stage to 2 "
                "(trainer.strategy.init_args.engines), or take VLLMEngine"
            )
        self.policy, self.processor = policy, processor
        self.draws = Draws(rank)
        self.ranks = RankCheck(self.draws)
        self.on_cpu = policy.get_input_embeddings().weight.device.type == "cpu"
        self.images = image_options(processor)
        line = launch_line(processor.source, "cpu" if self.on_cpu else "cuda", self.images)
        self.server = Server(self.url, self.retries, self.timeout, f"is it running? This starts it:\n  {line}")
        self.model, self.workers = self._meet()
        self.probe = Probe(self.dtype())
        # The first rank alone sends; the others have no way to the server's weights.
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self.weights = ServerWeights(policy, self.workers, self._transfer()) if first else None
        self.run, self.num_sent = secrets.token_hex(4), 0
        self.version: str | None = None
        self.stale = True

    @property
    def facts(self) -> ServerFacts:
        """What the server said of itself at the start."""
        return self.workers[0]

    def _meet(self) -> tuple[str, list[ServerFacts]]:
        """What the server calls its model, and what each of its workers says of itself. ValueError where it cannot
        sample for this policy."""
        model: str = self.server.get("/v1/models")["data"][0]["id"]
        workers = [ServerFacts.read(each, self.url) for each in self.server.rpc("prism_facts", retry=False)]
        for each in workers:
            check_facts(each, self.policy.config, self.images, self.sleeps, self.url)
        return model, workers

    def _meet_again(self) -> None:
        """ValueError where a server that may have been started anew is not what it was at the start. Every rank goes by
        what it was, and not every rank comes here."""
        model, workers = self._meet()
        check_same(self.workers, workers, self.url)
        if model != self.model:
            raise ValueError(
                f"the rollout server {self.url} was started anew and calls its model {model!r}, {self.model!r} before: "
                "start it as it was, or start the run again in its folder"
            )

    def _transfer(self) -> Transfer:
        able = not self.on_cpu and self.facts.device == "cuda" and self.facts.transfer == "nccl"
        if self.kind == "nccl" and not able:
            raise ValueError(
                "engine transfer is nccl, which needs the policy and the server on GPUs and the server started with "
                """--weight-transfer-config '{"backend": "nccl"}'; or set transfer: path"""
            )
        if able and self.kind == "auto" and not vllm_nccl.is_installed():
            logger.warning("rollout server %s: no vllm is installed here: weights go by a folder, not NCCL", self.url)
            able = False
        if self.kind == "path" or not able:
            return PathTransfer(self.server, self.folder, self.dtype())
        self._check_version()
        return NCCLTransfer(self.server, shapes_to_send(self.policy), self.dtype(), self.nccl_address)

    def _check_version(self) -> None:
        """ValueError where the trainer's vLLM is not the server's: each version tells the other side of a transfer by
        NCCL in its own way how weights are packed."""
        ours, theirs = vllm_nccl.installed_version(), self.facts.version
        if version_of(ours) != version_of(theirs):
            raise ValueError(
                f"the rollout server {self.url} is vLLM {theirs} and the trainer's is {ours}: weights go by NCCL only "
                "between equal versions. Install the same vllm on both sides, or set the engine's transfer: path"
            )

    def generate(
        self, examples: Sequence[Example], num_samples: int, sampling: Sampling, on_group: GroupDone | None = None
    ) -> list[Rollout]:
        """`num_samples` rollouts an example, prompt by prompt. A response ends at the end-of-turn token or, as Qwen's
        own generation configuration has it, at the end-of-text token. Greedy log-probabilities are of temperature 1.
        `on_group` is not called: a call gives all of its rollouts or none.

        Raises ConnectionError where the server is lost, and ValueError where it refuses or a prompt does not fit.
        """
        if self.stale:
            # A strategy may restore a checkpoint after the start.
            self._load(whole_parameters(self.policy))
        self.wake()
        rollouts = self._generate(examples, num_samples, sampling)
        self.probe.remember(examples)
        self.ranks.remember(rollouts, sampling)
        return rollouts

    def _generate(self, examples: Sequence[Example], num_samples: int, sampling: Sampling) -> list[Rollout]:
        check_temperature(sampling)
        greedy = sampling.temperature == 0
        seeds = self.draws.seeds(sampling, len(examples))
        requests = [
            chat_request(example, self.processor, 1 if greedy else num_samples, sampling, seed, self.model)
            for example, seed in zip(examples, seeds, strict=True)
        ]
        for example, (_, ids) in zip(examples, requests, strict=True):
            remedy = "start the server with a longer --max-model-len"
            check_fits(len(ids), sampling, self.facts.max_model_len, example.id, remedy)
        answers = self._ask([request for request, _ in requests])
        rollouts: list[Rollout] = []
        for example, (_, ids), answer in zip(examples, requests, answers, strict=True):
            drawn = rollouts_of(answer, ids, self.processor, example.id, self.url)
            total = torch.tensor([sum(rollout.sampler_logps) for rollout in drawn]).sum()
            check_finite(total, "the policy's next-token distribution", [example.id])
            rollouts += drawn * num_samples if greedy else drawn
        return rollouts

    def _ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers to all requests, from the weights that were sent: a server that was started anew in between
        answers from those it was started with, and is sent the policy's and asked again."""
        for _ in range(self.retries + 1):
            answers = self.server.post_all("/v1/chat/completions", requests)
            held = self._held()
            if held == {self.version}:
                return answers
            self._restore(held)
        raise ConnectionError(f"the rollout server {self.url} lost the policy's weights {self.retries + 1} times")

    def _restore(self, held: set[str | None]) -> None:
        """Send the weights again where the server lost them. Its answers are dropped."""
        if other := [version for version in held if version is not None]:
            raise ValueError(
                f"rollout contract: the server {self.url} holds the weights of another run ({other[0]}): a server "
                "serves one run at a time, start another one with another --port"
            )
        if world_size() > 1:  # ranks do not come to this place together
            raise self._lost()
        self._load(whole_parameters(self.policy))

    def _lost(self) -> ConnectionError:
        return ConnectionError(
            f"the rollout server {self.url} was started anew, without the policy's weights, in the middle of the run. "
            "Nothing that it answered since was used: start the run again in its folder, it goes on from its last "
            "checkpoint"
        )

    def dtype(self) -> torch.dtype:
        """In which the server computes."""
        return getattr(torch, self.facts.dtype)

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the policy's weights, forget every cache made with the old ones, and probe."""
        self.ranks.check_draws()
        self._load(named_parameters)
        self.probe.check(self._generate, self.policy, self.processor)

    def _load(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        self.version = on_first_rank(lambda: self._send(named_parameters))
        self.stale = self.asleep = False

    def _send(self, named_parameters: Iterable[tuple[str, Tensor]]) -> str:
        """What the server calls the weights that it now has."""
        assert self.weights is not None, "start the engine first"
        self._find_out_restart()
        if self.asleep:
            self.server.post("/wake_up?tags=weights")
        self.num_sent += 1
        version = f"{self.run}-{self.num_sent}"
        num_retried = self.server.num_retried
        self.weights.send(named_parameters, version)
        if self.server.num_retried > num_retried:
            self._meet_again()  # it may have been started anew on the way
        if self.asleep:
            self.server.post("/wake_up?tags=kv_cache")
        forget_prompts(self.server)
        return version

    def _find_out_restart(self) -> None:
        """Meet a server that knows none of this run's weights once more: it may have come back with other options."""
        assert self.weights is not None, "start the engine first"
        if None not in self._held():
            return
        self._meet_again()
        if self.num_sent == 0:
            return
        if not isinstance(self.weights.transfer, PathTransfer):  # NCCL has lost its group with the server's workers
            raise self._lost()
        logger.warning("rollout server %s: it was started anew; sending it the policy's weights again", self.url)

    def _held(self) -> set[str | None]:
        """What the server's workers call the weights that they have."""
        return {answer["version"] for answer in self.server.rpc("prism_version")}

    def sleep(self) -> None:
        """Drop the server's weights and cache until the next `sync`, `wake` or `generate`, where `sleep` asks for
        it."""
        if not self.sleeps or self.asleep:
            return
        on_first_rank(lambda: self.server.post("/sleep?level=2"))
        self.asleep = True

    def wake(self) -> None:
        """Wake up with the policy's weights as they are now. Nothing where the engine is awake."""
        if self.asleep:
            self._load(whole_parameters(self.policy))

    def metrics(self) -> dict[str, float]:
        """The probe's difference after the last sync, the share of draws that other ranks drew too, and how often the
        server had to be asked again."""
        retried = {"rollout/server_retries": float(self.server.num_retried)}
        return self.probe.metrics() | self.ranks.metrics() | retried

    def state_dict(self) -> dict[str, Any]:
        """What the next draws depend on, the same for every rank."""
        return self.draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on drawing where `state` was saved."""
        self.draws.load_state_dict(state)

    def close(self) -> None:
        """Leave the server, which goes on running. A closed engine may be started again."""
        if self.weights is not None:
            self.weights.transfer.close()
        self.weights, self.asleep = None, False
