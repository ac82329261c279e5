"""Owns the mathematics of PPO: from logits and scores to advantages and losses, as pure functions.

Does not know models, text or devices. Whatever stands where `mask` is false, a NaN too, has no
influence on any result, and results are 0 there.

An answer is the tokens a_1 .. a_T of a row, T its own length; s_t is what stands before a_t.

Shapes: `B` rows, `A` answer columns (an answer, then pads), `V` vocabulary. `mask` is `(B, A)`,
boolean, true for the tokens of answers, each of which is one run of columns.

Sources: Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage
Estimation (GAE); Schulman et al. 2017, Proximal Policy Optimization Algorithms (PPO); Ziegler et
al. 2019, Fine-Tuning Language Models from Human Preferences (Ziegler); Schulman 2020, Approximating
KL Divergence (KL).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chatglm.training.ppo.settings import KL_ESTIMATORS

WHITENING_EPSILON = 1e-8
# The adaptive controller takes no error of the KL for a larger share of the target than this one
# (Ziegler, section 2.2).
LARGEST_KL_ERROR = 0.2

# A function that adds up a tensor over processes; of one process the sum is the tensor itself.
Total = Callable[[Tensor], Tensor]


def keep_local(values: Tensor) -> Tensor:
    """Return the sum over one process, which is what it has."""
    return values


def _silence(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Put zeros where nothing counts, before anything is worked out: a NaN has no gradient then."""
    return tuple(tensor.masked_fill(~mask, 0) for tensor in tensors)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return sum_i m_i x_i, a number.

    Args:
        values: of the shape of `mask`.
        mask: which ones count.
    """
    return values.masked_fill(~mask, 0).sum()


def masked_mean(values: Tensor, mask: Tensor, total: Total = keep_local) -> Tensor:
    """Return mu = sum_i m_i x_i / sum_i m_i, a number; 0 if nothing counts.

    Args:
        values: of the shape of `mask`.
        mask: which ones count.
        total: adds up over processes.
    """
    return total(masked_sum(values, mask)) / total(mask.sum()).clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor, total: Total = keep_local) -> Tensor:
    """Return sum_i m_i (x_i - mu)^2 / sum_i m_i, a number, the variance of a whole population.

    Args:
        values, mask, total: as for `masked_mean`.
    """
    return masked_mean((values - masked_mean(values, mask, total)) ** 2, mask, total)


def whiten(
    values: Tensor, mask: Tensor, shift_mean: bool = True, total: Total = keep_local
) -> Tensor:
    """Return (x - mu) / sigma, of mean 0 and variance 1; with mu added again on demand.

    Args:
        values: of the shape of `mask`.
        mask: which ones count.
        shift_mean: false leaves the mean where it was, as for rewards, whose sign says something
            (Ziegler's code).
        total: adds up over processes, so that all whiten alike.
    """
    mean = masked_mean(values, mask, total)
    deviation = (masked_variance(values, mask, total) + WHITENING_EPSILON).sqrt()
    whitened = (values - mean) / deviation
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0)


def select_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log p(a_t | s_t) = z_a - log sum_v exp z_v with z = logits / temperature, `(B, A)`.

    Args:
        logits: `(B, A, V)`, each column's for the token in it.
        ids: `(B, A)`.
        temperature: that the tokens are drawn at.
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def measure_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return H_t = -sum_v p_v log p_v of each column's distribution in nats, `(B, A)`.

    Args:
        logits: `(B, A, V)`.
        temperature: that tokens are drawn at.
    """
    log_probs = (logits.float() / temperature).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def estimate_kl(
    log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor, estimator: str = "k1"
) -> Tensor:
    """Estimate KL(policy || reference) from each token that the policy has drawn, `(B, A)`.

    With d = log policy(a_t | s_t) - log reference(a_t | s_t) (KL):

        k1 = d                 its mean is the KL; of one token it is often negative
        k2 = d^2 / 2           never negative; its mean is near the KL while that is small
        k3 = exp(-d) - 1 + d   never negative, and its mean is the KL

    Args:
        log_probs, reference_log_probs: `(B, A)`.
        mask: `(B, A)`.
        estimator: "k1", "k2" or "k3".

    Raises:
        ValueError: for another estimator.
    """
    log_probs, reference_log_probs = _silence(mask, log_probs, reference_log_probs)
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return (-difference).expm1() + difference
    raise ValueError(f"the KL estimator must be one of {', '.join(KL_ESTIMATORS)}, got {estimator}")


def clip_scores(scores: Tensor, limit: float) -> Tensor:
    """Return min(max(score, -limit), limit), `(B,)`; as they are if the limit is 0."""
    return scores.clamp(-limit, limit) if limit > 0 else scores


def place_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Return r_t = -beta KL_t, and the answer's score on its last token beside it, `(B, A)`.

    Ziegler, equation 2, with the KL's share paid where it arises.

    Args:
        scores: `(B,)`, of whole answers.
        kl: `(B, A)`, an estimate for each token.
        mask: `(B, A)`; an answer without any token gets nothing.
        kl_coefficient: beta.
    """
    is_last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    (kl,) = _silence(mask, kl)
    rewards = -kl_coefficient * kl
    return rewards + torch.where(is_last, scores.unsqueeze(1), torch.zeros_like(rewards))


def estimate_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns by generalized advantage estimation, `(B, A)` each.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                 V behind the last token is 0
        A_t = delta_t + gamma lambda A_{t+1} = sum_l (gamma lambda)^l delta_{t+l}
        R_t = A_t + V(s_t)

    GAE, equations 11 to 16. The sums end with the answer: pads have neither value nor reward.

    Args:
        rewards, values: `(B, A)`; V(s_t) was estimated before a_t was known.
        mask: `(B, A)`.
        gamma: what a reward is worth one token earlier.
        gae_lambda: 0 trusts the values, 1 the rewards alone.
    """
    rewards, values = _silence(mask, rewards, values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    backwards: list[Tensor] = []
    for column in reversed(range(values.shape[1])):
        delta = rewards[:, column] + gamma * next_value - values[:, column]
        advantage = (delta + gamma * gae_lambda * next_advantage) * mask[:, column]
        backwards.append(advantage)
        next_value, next_advantage = values[:, column], advantage
    advantages = torch.stack(backwards[::-1], dim=1)  # (B, A)
    return advantages, advantages + values


def compute_ratios(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return rho_t = policy(a_t | s_t) / old policy(a_t | s_t), `(B, A)`; 1 for pads."""
    log_probs, old_log_probs = _silence(mask, log_probs, old_log_probs)
    return (log_probs - old_log_probs).exp()


def clip_policy_loss(
    ratios: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return each token's loss, and whether it was cut off, `(B, A)` each.

        L_t = -min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t)

    PPO, equation 7, as something to make small.

    Args:
        ratios: rho, `(B, A)`.
        advantages: `(B, A)`.
        mask: `(B, A)`.
        clip_range: epsilon.
    """
    advantages, ratios = _silence(mask, advantages, ratios)
    plain = -advantages * ratios
    clipped = -advantages * ratios.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(plain, clipped), clipped > plain


def clip_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
) -> Tensor:
    """Return each token's loss of the value head, `(B, A)`.

        L_t = max((V_t - R_t)^2, (clip(V_t, V_old - epsilon, V_old + epsilon) - R_t)^2) / 2

    As in the code of PPO's authors (OpenAI Baselines, ppo2); its text has no clipped values.

    Args:
        values: as they are, `(B, A)`.
        old_values: as they were when the answers were sampled, `(B, A)`.
        returns: R, `(B, A)`.
        mask: `(B, A)`.
        clip_range: epsilon; 0 clips nothing.
    """
    values, old_values, returns = _silence(mask, values, old_values, returns)
    losses = (values - returns) ** 2
    if clip_range > 0:
        near = torch.maximum(
            torch.minimum(values, old_values + clip_range), old_values - clip_range
        )
        losses = torch.maximum(losses, (near - returns) ** 2)
    return losses / 2


def explain_variance(
    values: Tensor, returns: Tensor, mask: Tensor, total: Total = keep_local
) -> Tensor:
    """Return 1 - var(R - V) / var(R): 1 if the values foresee the returns, 0 if they say nothing.

    Args:
        values, returns: `(B, A)`.
        mask: `(B, A)`.
        total: adds up over processes.
    """
    left = masked_variance(returns - values, mask, total)
    return 1 - left / (masked_variance(returns, mask, total) + WHITENING_EPSILON)


@dataclass
class KlController:
    """Holds the coefficient of the KL penalty, and moves it if there is a target.

    With a target (Ziegler, section 2.2):

        e = clip((KL - target) / target, -0.2, 0.2)
        beta <- beta (1 + K e)

    Attributes:
        coefficient: beta.
        target: KL in nats of a whole answer; 0 keeps beta fixed.
        gain: K.
    """

    coefficient: float
    target: float = 0.0
    gain: float = 0.1

    def update(self, kl: float) -> None:
        """Move the coefficient after a batch.

        Args:
            kl: nats from the reference, summed over an answer's tokens, mean of the answers.
        """
        if self.target > 0:
            error = (kl - self.target) / self.target
            error = min(max(error, -LARGEST_KL_ERROR), LARGEST_KL_ERROR)
            self.coefficient *= 1 + self.gain * error


__all__ = [
    "KlController",
    "clip_policy_loss",
    "clip_scores",
    "clip_value_loss",
    "compute_ratios",
    "estimate_advantages",
    "estimate_kl",
    "explain_variance",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "measure_entropy",
    "place_rewards",
    "select_log_probs",
    "whiten",
]
