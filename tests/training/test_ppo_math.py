"""PPO's mathematics against numbers worked out by hand, and against what must hold for any."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from chatglm.training.ppo.math import (
    KlController,
    clip_policy_loss,
    clip_scores,
    clip_value_loss,
    compute_ratios,
    estimate_advantages,
    estimate_kl,
    explain_variance,
    masked_mean,
    masked_sum,
    masked_variance,
    measure_entropy,
    place_rewards,
    select_log_probs,
    whiten,
)

NAN = math.nan


def tensor(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def mask(*rows: str) -> Tensor:
    """A mask drawn as text: `x` for tokens, `.` for pads."""
    return torch.tensor([[sign == "x" for sign in row] for row in rows])


def draw_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards and values `(5, 7)`, with NaN in the pads, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    is_token = torch.arange(7) < torch.tensor([[7], [1], [4], [6], [3]])
    rewards, values = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    return rewards.masked_fill(~is_token, NAN), values.masked_fill(~is_token, NAN), is_token


def test_masked_moments_by_hand() -> None:
    values, is_token = tensor([1, 2, NAN], [6, NAN, NAN]), mask("xx.", "x..")
    assert masked_sum(values, is_token) == 9
    assert masked_mean(values, is_token) == 3
    # ((1 - 3)^2 + (2 - 3)^2 + (6 - 3)^2) / 3 = (4 + 1 + 9) / 3
    assert masked_variance(values, is_token) == pytest.approx(14 / 3)
    assert masked_mean(values, torch.zeros_like(is_token)) == 0


def test_processes_whiten_alike() -> None:
    values, masks = (tensor([1, 2, 6]), tensor([0, 5, 4])), (mask("xxx"), mask(".xx"))
    slots: list[Any] = [None, None]
    meeting = threading.Barrier(2, timeout=10)

    def run(process: int) -> Tensor:
        def total(mine: Tensor) -> Tensor:
            slots[process] = mine
            meeting.wait()
            added = slots[0] + slots[1]
            meeting.wait()
            return added

        return whiten(values[process], masks[process], total=total)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(run, range(2)))
    whole = whiten(torch.cat(values, 1), torch.cat(masks, 1))
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_whitening_by_hand() -> None:
    values, is_token = tensor([1, 3, NAN], [5, NAN, NAN]), mask("xx.", "x..")
    deviation = math.sqrt(8 / 3)  # mean 3, variance (4 + 0 + 4) / 3
    expected = tensor([-2 / deviation, 0, 0], [2 / deviation, 0, 0])
    torch.testing.assert_close(whiten(values, is_token), expected, rtol=1e-8, atol=1e-8)
    shifted = (expected + 3).masked_fill(~is_token, 0)
    torch.testing.assert_close(whiten(values, is_token, shift_mean=False), shifted)


@pytest.mark.parametrize("seed", range(3))
def test_whitened_numbers_have_mean_zero_and_variance_one(seed: int) -> None:
    values, _, is_token = draw_case(seed)
    whitened = whiten(7 * values + 3, is_token)
    assert masked_mean(whitened, is_token) == pytest.approx(0, abs=1e-9)
    assert masked_variance(whitened, is_token) == pytest.approx(1, abs=1e-6)
    assert (whitened[~is_token] == 0).all()


def test_log_probs_by_hand() -> None:
    logits = tensor([[0, math.log(3)], [math.log(4), 0]])  # (1, 2, 2)
    ids = torch.tensor([[1, 1]])
    expected = tensor([math.log(3 / 4), math.log(1 / 5)])
    torch.testing.assert_close(select_log_probs(logits, ids).double(), expected)
    # At temperature 2 the weights are square roots: 1 and sqrt 3, 2 and 1.
    cooler = tensor([math.log(math.sqrt(3) / (1 + math.sqrt(3))), math.log(1 / 3)])
    torch.testing.assert_close(select_log_probs(logits, ids, 2.0).double(), cooler)


def test_entropy_by_hand() -> None:
    logits = tensor([[0.0, 0, 0, 0], [math.log(2), 0, -1e9, -1e9]])
    expected = tensor([math.log(4), math.log(3) - 2 / 3 * math.log(2)])
    torch.testing.assert_close(measure_entropy(logits).double(), expected)
    uneven = tensor([[math.log(9), 0]])  # weights 3 and 1 at temperature 2
    wanted = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert measure_entropy(uneven, 2.0).item() == pytest.approx(wanted)


def test_kl_estimates_by_hand() -> None:
    policy, reference = tensor([math.log(0.5), NAN]), tensor([math.log(0.25), NAN])
    is_token, difference = mask("x."), math.log(2)
    for estimator, expected in (
        ("k1", difference),
        ("k2", difference**2 / 2),
        ("k3", 0.5 - 1 + difference),
    ):
        found = estimate_kl(policy, reference, is_token, estimator)
        torch.testing.assert_close(found, tensor([expected, 0]))
    with pytest.raises(ValueError, match="k1, k2, k3, got k4"):
        estimate_kl(policy, reference, is_token, "k4")


def test_the_mean_of_k1_and_of_k3_is_the_kl() -> None:
    policy, reference = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    kl = (policy * (policy / reference).log()).sum()
    everything = mask("xxx")
    for estimator in ("k1", "k3"):
        tokens = estimate_kl(policy.log()[None], reference.log()[None], everything, estimator)
        torch.testing.assert_close((policy * tokens).sum(), kl)
        assert estimator == "k1" or bool((tokens >= 0).all())


def test_scores_are_clipped() -> None:
    torch.testing.assert_close(clip_scores(tensor(-7, 1, 9), 5), tensor(-5, 1, 5))
    torch.testing.assert_close(clip_scores(tensor(-7, 1, 9), 0), tensor(-7, 1, 9))


def test_the_score_is_on_the_last_real_token() -> None:
    kl, is_token = tensor([1, 2, 3], [4, NAN, NAN], [NAN, NAN, NAN]), mask("xxx", "x..", "...")
    rewards = place_rewards(tensor(10, 20, 30), kl, is_token, 0.5)
    torch.testing.assert_close(rewards, tensor([-0.5, -1, 8.5], [18, 0, 0], [0, 0, 0]))


def test_advantages_by_hand() -> None:
    rewards, values = tensor([1, 0, 2, NAN]), tensor([0.5, 1, -1, NAN])
    # delta_3 = 2 - (-1) = 3                           A_3 = 3
    # delta_2 = 0 + 0.9 * (-1) - 1 = -1.9              A_2 = -1.9 + 0.45 * 3 = -0.55
    # delta_1 = 1 + 0.9 * 1 - 0.5 = 1.4                A_1 = 1.4 + 0.45 * (-0.55) = 1.1525
    advantages, returns = estimate_advantages(rewards, values, mask("xxx."), 0.9, 0.5)
    torch.testing.assert_close(advantages, tensor([1.1525, -0.55, 3, 0]))
    torch.testing.assert_close(returns, tensor([1.6525, 0.45, 2, 0]))


@pytest.mark.parametrize("gamma", (1.0, 0.9))
def test_advantages_at_lambda_1_are_discounted_returns_less_values(gamma: float) -> None:
    rewards, values, is_token = draw_case(0)
    advantages, returns = estimate_advantages(rewards, values, is_token, gamma, 1.0)
    for row in range(5):
        length = int(is_token[row].sum())
        for t in range(length):
            left = sum(gamma ** (u - t) * rewards[row, u] for u in range(t, length))
            torch.testing.assert_close(returns[row, t], left)
            torch.testing.assert_close(advantages[row, t], left - values[row, t])


def test_advantages_at_lambda_0_are_single_steps() -> None:
    rewards, values, is_token = draw_case(1)
    advantages, _ = estimate_advantages(rewards, values, is_token, 0.9, 0.0)
    following = torch.cat((values[:, 1:], torch.zeros(5, 1)), 1).nan_to_num(0)
    expected = (rewards + 0.9 * following - values).masked_fill(~is_token, 0)
    torch.testing.assert_close(advantages, expected)


def test_pads_behind_an_answer_change_nothing() -> None:
    rewards, values, is_token = draw_case(2)
    together, _ = estimate_advantages(rewards, values, is_token)
    assert together.isfinite().all()
    for row in range(5):
        length = int(is_token[row].sum())
        alone, _ = estimate_advantages(
            rewards[row : row + 1, :length],
            values[row : row + 1, :length],
            is_token[row : row + 1, :length],
        )
        assert torch.equal(together[row, :length], alone[0])
        assert (together[row, length:] == 0).all()


def test_policy_loss_by_hand() -> None:
    ratios = tensor([1.5, 0.5, 1.5, 0.5, 1.1, NAN])
    advantages = tensor([2, 2, -2, -2, 1, NAN])
    losses, clipped = clip_policy_loss(ratios, advantages, mask("xxxxx."), 0.2)
    # -min(3, 2.4), -min(1, 1.6), -min(-3, -2.4), -min(-1, -1.6), -min(1.1, 1.1)
    torch.testing.assert_close(losses, tensor([-2.4, -1, 3, 1.6, -1.1, 0]))
    assert clipped.tolist() == [[True, False, False, True, False, False]]


def test_a_clipped_token_has_no_gradient() -> None:
    log_probs = tensor([math.log(1.5), math.log(1.1)]).requires_grad_()
    ratios = compute_ratios(log_probs, torch.zeros(1, 2), mask("xx"))
    losses, _ = clip_policy_loss(ratios, tensor([2, 2]), mask("xx"), 0.2)
    losses.sum().backward()
    # d(-A rho) / d(log p) = -A rho = -2.2 where it is not clipped.
    torch.testing.assert_close(log_probs.grad, tensor([0, -2.2]))


def test_value_loss_by_hand() -> None:
    values, old, returns = tensor([1, 3, NAN]), tensor([0, 2.9, NAN]), tensor([2, 1, NAN])
    # max((1 - 2)^2, (0.5 - 2)^2) / 2 = 1.125; max((3 - 1)^2, (3 - 1)^2) / 2 = 2
    losses = clip_value_loss(values, old, returns, mask("xx."), 0.5)
    torch.testing.assert_close(losses, tensor([1.125, 2, 0]))
    free = clip_value_loss(values, old, returns, mask("xx."), 0)
    torch.testing.assert_close(free, tensor([0.5, 2, 0]))


def test_no_nan_of_a_pad_gets_into_a_gradient() -> None:
    is_token = mask("xx..")
    log_probs, values = (tensor([0.1, 0.2, NAN, NAN]).requires_grad_() for _ in range(2))
    other = tensor([0.3, 0.1, NAN, NAN])
    ratios = compute_ratios(log_probs, other, is_token)
    losses = clip_policy_loss(ratios, other, is_token, 0.2)[0]
    losses = losses + clip_value_loss(values, other, other, is_token, 0.2)
    losses = losses + estimate_kl(other, log_probs, is_token, "k3")
    losses.sum().backward()
    for parameter in (log_probs, values):
        assert parameter.grad is not None
        assert (parameter.grad[~is_token] == 0).all()
        assert (parameter.grad[is_token] != 0).all()


def test_explained_variance_by_hand() -> None:
    returns, is_token = tensor([0, 2, 4, NAN]), mask("xxx.")
    assert explain_variance(returns, returns, is_token) == pytest.approx(1)
    assert explain_variance(tensor([5, 5, 5, NAN]), returns, is_token) == pytest.approx(0, abs=1e-6)
    # Left are (0, 1, 2), of variance 2 / 3; the returns' is 8 / 3.
    assert explain_variance(tensor([0, 1, 2, NAN]), returns, is_token) == pytest.approx(0.75)


def test_the_adaptive_coefficient_by_hand() -> None:
    controller = KlController(0.1, target=6.0, gain=0.1)
    controller.update(6.6)  # an error of 0.1
    assert controller.coefficient == pytest.approx(0.1 * 1.01)
    controller.update(60.0)  # no more than 0.2
    assert controller.coefficient == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(0.0)  # no less than -0.2
    assert controller.coefficient == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)


def test_the_fixed_coefficient_stays() -> None:
    controller = KlController(0.1)
    controller.update(60.0)
    assert controller.coefficient == 0.1
