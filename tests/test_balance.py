"""The router's load-balancing loss: transformers' own over a whole update, however it is cut."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from prism_pl.discriminator import SparseMoEDiscriminator, diagnostics_over_ranks
from prism_pl.discriminator.balance import balance_loss, routing_sums
from tests.conftest import DEMONSTRATION
from tests.test_discriminator_kinds import OTHER, SHORT, build, scores_of


def transformers_loss(logits: Sequence[torch.Tensor], mask_BS: torch.Tensor) -> torch.Tensor:
    """Of four experts, two a token."""
    function: Any = load_balancing_loss_func
    return function(tuple(logits), 4, 2, mask_BS)


def router_gradient(judge: torch.nn.Module) -> torch.Tensor:
    gradients = [p.grad for name, p in judge.named_parameters() if "mlp.gate" in name]
    return torch.cat([g.flatten() for g in gradients if g is not None])


def sums_of(chosen_by_layer, readers_KN, top_k=1):
    """Of a router that is sure of its choices."""
    logits = [torch.nn.functional.one_hot(torch.tensor(c), 2).float() * 50 for c in chosen_by_layer]
    return routing_sums(logits, top_k, torch.tensor(readers_KN, dtype=torch.float32))


def test_balance_loss_by_hand():
    # Two experts, one of which gets 3 of 4 tokens, the router being sure: 2 (3/4 x 3/4 + 1/4 x 1/4) = 5/4.
    assert balance_loss(sums_of([[0, 0, 0, 1]], [[1, 1, 1, 1]])).item() == pytest.approx(1.25)
    assert balance_loss(sums_of([[0, 0, 1, 1]], [[1, 1, 1, 1]])).item() == pytest.approx(1.0)
    # A place that two sequences read counts twice, padding not at all: 2/3 and 1/3, 2 (4/9 + 1/9) = 10/9.
    assert balance_loss(sums_of([[0, 1, 1, 1]], [[2, 1, 0, 0]])).item() == pytest.approx(10 / 9)


def test_balance_loss_is_transformers_own_with_its_gradient():
    torch.manual_seed(0)
    mask_BS = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    logits = [torch.randn(10, 4, requires_grad=True) for _ in range(3)]
    theirs = transformers_loss(logits, mask_BS)
    ours = balance_loss(routing_sums(logits, 2, mask_BS.flatten()[None].float()))
    torch.testing.assert_close(ours, theirs)
    one, other = (torch.autograd.grad([loss], logits) for loss in (ours, theirs))
    torch.testing.assert_close(one, other)
    assert all(float(g.abs().max()) > 0 for g in one)


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_and_packing_keep_the_balance_loss_of_the_whole_update(random_policy, packed):
    """Against transformers' function over the padded batch in one piece, the one that the release calls."""
    texts = [DEMONSTRATION, SHORT, OTHER, DEMONSTRATION, OTHER]
    judge: SparseMoEDiscriminator = build(SparseMoEDiscriminator, random_policy, packed=packed, balance_weight=0.5)
    recorded = []
    parity = build(SparseMoEDiscriminator, random_policy, packed=False)
    parity.sums = lambda output, readers_KN: recorded.append((output.router_logits, readers_KN)) or {}
    parity.aux_loss = lambda sums: torch.zeros(())
    parity.metrics = lambda sums: {}
    scores_of(parity, texts, training=True)
    logits, readers_KN = recorded[0]
    expected = 0.5 * transformers_loss(logits, readers_KN.sum(0) > 0)
    expected.backward()
    wanted = router_gradient(parity)
    for micro_batch_tokens in (None, 150, 1):
        judge.zero_grad()
        scores = scores_of(judge, texts, training=True, micro_batch_tokens=micro_batch_tokens)
        torch.testing.assert_close(scores.aux_loss, expected, atol=1e-6, rtol=0)
        scores.aux_loss.backward()
        torch.testing.assert_close(router_gradient(judge), wanted, atol=1e-7, rtol=1e-3)
    assert float(scores_of(judge, texts).aux_loss) == 0.0  # scores alone cost no collective
    assert set(diagnostics_over_ranks(judge, scores)) >= {
        "router/entropy/mean",
        "router/mutual_information/mean",
        "router/load/mean/0",
    }
