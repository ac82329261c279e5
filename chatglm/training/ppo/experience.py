"""Owns what PPO learns from: rollouts with their scores, and the advantage of each of their tokens.

Does not know how a policy is updated by them (`update`), nor where prompts come from.

Shapes: `B` answers of a process in a step, `A` answer columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chatglm.training.data.rendering import Renderer
from chatglm.training.ppo.math import (
    KlController,
    clip_scores,
    estimate_advantages,
    estimate_kl,
    explain_variance,
    masked_mean,
    place_rewards,
    whiten,
)
from chatglm.training.ppo.rewards import Reward, Sampled
from chatglm.training.ppo.rollouts import (
    Prompt,
    Sampler,
    describe_answers,
    describe_references,
    evaluate_answers,
    find_ended,
)
from chatglm.training.ppo.run import Run
from chatglm.training.ppo.value_head import ActorCritic, Answers, PolicyOutput, Reference

# If a larger share of a step's scores is clipped, there is hardly anything to learn from them.
MOST_CLIPPED = 0.5


class Experience(NamedTuple):
    """What a policy is updated by; `(B, A)` but for the answers.

    Attributes:
        answers: of a step.
        log_probs, values: of the policy that sampled them.
        advantages, returns: of each token.
    """

    answers: Answers
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def pick(self, rows: Tensor) -> "Experience":
        """Return some rows, without columns that are nothing but pads."""
        answers = self.answers.pick(rows)
        columns = answers.answer_ids.shape[1]
        return Experience(answers, *(part[rows, :columns] for part in self[1:]))


class Rollout(NamedTuple):
    """Answers that were sampled.

    Attributes:
        answers: as tensors.
        sampled: the same as texts and lists of ids.
        scores: what they are rewarded with, `(B,)`.
    """

    answers: Answers
    sampled: Sampled
    scores: Tensor


@dataclass
class ExperienceMaker:
    """Lets a policy answer, and works out what is to be learned from the answers.

    Attributes:
        run: settings, processes, and the step.
        model: the policy with its value head, as the processes share it.
        actor: the same as it is in this process.
        reference: the policy as it was in the beginning.
        sampler: draws answers from the policy.
        reward: scores them.
        tokenizer, renderer: make texts of ids, and ids of texts.
        kl: holds the coefficient of the KL penalty.
        warn: shows a sentence to whoever watches the run.
        has_warned: whether it was told that most scores are clipped.
    """

    run: Run
    model: nn.Module
    actor: ActorCritic
    reference: Reference
    sampler: Sampler
    reward: Reward
    tokenizer: Any
    renderer: Renderer
    kl: KlController
    warn: Callable[[str], None]
    has_warned: bool = False

    def rollout(self, prompts: Sequence[Prompt], seeds: Sequence[int] | None = None) -> Rollout:
        """Sample an answer to each prompt, each with a seed of its own, and score it."""
        self.model.eval()
        with self.run.accelerator.autocast():
            answers = self.sampler([prompt.ids for prompt in prompts], seeds)
        sampled = describe_answers(prompts, answers, self.tokenizer)
        scores = self.reward(sampled)
        if self.run.settings.subtract_reference:
            room = self.run.settings.max_new_tokens
            scores -= self.reward(describe_references(prompts, self.renderer, room))
        return Rollout(answers, sampled, scores.to(self.run.device))

    def evaluate(
        self, answers: Answers, needs_entropy: bool = False
    ) -> tuple[PolicyOutput, Tensor]:
        """Return what the policy says about answers, and the KL of each token, `(B, A)`.

        Raises:
            ValueError: if a probability is no number.
        """
        self.model.eval()
        settings = self.run.settings
        batch_size = self.run.arguments.per_device_train_batch_size
        options = (answers, batch_size, settings.temperature)
        output = evaluate_answers(self.actor, *options, needs_entropy)
        self.run.check(output.log_probs.sum())
        with self.reference.put_in_place() as reference:
            reference_log_probs = evaluate_answers(reference, *options).log_probs
        mask, estimator = answers.answer_mask, settings.kl_estimator
        return output, estimate_kl(output.log_probs, reference_log_probs, mask, estimator)

    def compute_advantages(
        self, answers: Answers, scores: Tensor
    ) -> tuple[Experience, dict[str, float]]:
        """Return what answers with scores `(B,)` teach, and the figures of the step so far."""
        output, kl = self.evaluate(answers, needs_entropy=True)
        settings, mask, total = self.run.settings, answers.answer_mask, self.run.total
        clipped, share_clipped = self.clip_scores(scores, answers)
        rewards = place_rewards(clipped, kl, mask, self.kl.coefficient)
        if settings.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, total=total)
        advantages, returns = estimate_advantages(
            rewards, output.values, mask, settings.gamma, settings.gae_lambda
        )
        explained = explain_variance(output.values, returns, mask, total).item()
        figures = self.name_figures(self.sum_figures(answers, scores, kl)) | {
            "entropy": masked_mean(output.entropy, mask, total).item(),
            # Where all returns are alike it is far below 0, which says nothing and hides the rest.
            "explained": max(-1.0, explained),
            "scores_cut": share_clipped,
        }
        if settings.whiten_advantages:
            advantages = whiten(advantages, mask, total=total)
        return Experience(answers, output.log_probs, output.values, advantages, returns), figures

    def clip_scores(self, scores: Tensor, answers: Answers) -> tuple[Tensor, float]:
        """Bring scores `(B,)` into the range that is learned from; tells what share was clipped."""
        settings, total = self.run.settings, self.run.total
        ended = find_ended(answers, self.sampler.end_id)
        scores = scores - settings.missing_end_penalty * ~ended
        if settings.whiten_scores:
            scores = whiten(scores, torch.ones_like(ended), total=total)
        clipped = clip_scores(scores, settings.score_clip)
        is_clipped = (clipped != scores).float()
        share = masked_mean(is_clipped, torch.ones_like(ended), total).item()
        self._warn_of_clipping(share)
        return clipped, share

    def _warn_of_clipping(self, share: float) -> None:
        """Say once that most scores are the same after they were clipped."""
        if share > MOST_CLIPPED and not self.has_warned:
            self.has_warned = True
            limit = self.run.settings.score_clip
            self.warn(
                f"{share:.0%} of the scores are beyond score_clip={limit:g} and count as that: "
                "raise it, or set whiten_scores"
            )

    def sum_figures(self, answers: Answers, scores: Tensor, kl: Tensor) -> Tensor:
        """Return sums over answers, and their number, `(5,)`; see `name_figures`."""
        ended = find_ended(answers, self.sampler.end_id)
        columns = (scores, kl.sum(1), answers.answer_mask.sum(1), ended, torch.ones_like(scores))
        return torch.stack([column.float().sum() for column in columns])

    def name_figures(self, sums: Tensor) -> dict[str, float]:
        """Return the means over the answers of all processes, from sums `(5,)` of this one."""
        sums = self.run.total(sums)
        names = ("reward", "kl", "answer_length", "ended")
        return dict(zip(names, (sums[:-1] / sums[-1]).tolist()))


__all__ = ["Experience", "ExperienceMaker", "Rollout"]
