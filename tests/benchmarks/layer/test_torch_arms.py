"""The torch candidates compute the same sum, and the guards see it when one of them does not."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from benchmarks.guards import GuardError, guard  # noqa: E402
from benchmarks.layer import torch_arms  # noqa: E402
from benchmarks.layer.problem import make_problem  # noqa: E402

PROBLEM = make_problem(16, 4, 3)


@pytest.mark.parametrize(
    "make",
    [
        torch_arms.peft_loop_arm,
        torch_arms.peft_names_arm,
        lambda p: torch_arms.flix_arm("flix", p),
        lambda p: torch_arms.flix_arm("flix", p, later=True),
    ],
)
def test_candidates_agree_with_the_definition(make):
    arm = make(PROBLEM)
    guard(arm, PROBLEM.expected(), absent=torch_arms.unused_gradients(arm, PROBLEM))


def test_a_loop_with_one_backward_at_its_end_is_caught():
    """The mistake that PEFT invites: the gradients of adapters that are inactive at the end are lost."""
    arm = torch_arms.peft_loop_arm(PROBLEM, backward_each=False)
    with pytest.raises(GuardError, match="was not computed"):
        guard(arm, PROBLEM.expected())


def test_detached_updates_are_caught():
    arm = torch_arms.flix_arm("flix", PROBLEM)
    arm.model.requires_grad_(False)
    with pytest.raises(GuardError, match="was not computed"):
        guard(arm, PROBLEM.expected())


def test_gradients_for_every_feature_are_caught():
    arm = torch_arms.flix_arm("flix", PROBLEM)
    plain = arm.run

    def run():
        y = plain()
        for parameter in arm.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return y

    arm.run = run
    with pytest.raises(GuardError, match="no row of the batch uses it"):
        guard(arm, PROBLEM.expected(), absent=torch_arms.unused_gradients(arm, PROBLEM))


def test_a_batch_is_the_same_however_many_features_are_registered():
    more = make_problem(16, 4, 3, 400)
    assert more.rows == PROBLEM.rows
    assert (more.x == PROBLEM.x).all()
