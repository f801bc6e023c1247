"""SFT: what stops it before a step."""

from functools import partial

import pytest
import torch

from modules.sft import SFTModule
from prism_pl.policy import PolicySpec
from tests.conftest import make_examples
from tests.stubs import Rows, equal, fit, weights


def test_a_gradient_that_is_not_finite_stops_before_the_step_and_names_the_rows(random_policy, tmp_path):
    module = SFTModule(PolicySpec(random_policy), partial(torch.optim.SGD, lr=0.1), schedule="constant", warmup=0)
    module.configure_model()
    before = weights(module.policy)
    # The loss stays finite; one gradient overflows on its way back. Clipping would make every weight NaN.
    next(p for p in module.policy.parameters() if p.requires_grad).register_hook(lambda grad: grad + float("inf"))
    with pytest.raises(ValueError, match=r"the policy's gradient norm is not finite \(inf\) .* row-0, row-1"):
        fit(module, Rows(make_examples(2)), tmp_path, gradient_clip_val=1.0)
    assert equal(weights(module.policy), before)
