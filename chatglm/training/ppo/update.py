"""Owns how a policy is updated by experience: mini-batches, losses, gradients, the optimizer.

Does not know where the experience comes from (`experience`).

Shapes: `B` answers of a process in a step, `A` answer columns.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chatglm.training.beside import SEED_SHIFT, count_beside, weigh_beside
from chatglm.training.data.batches import Examples, pick_rows
from chatglm.training.ppo.experience import Experience
from chatglm.training.ppo.math import clip_policy_loss, clip_value_loss, compute_ratios, estimate_kl
from chatglm.training.ppo.rollouts import build_answers
from chatglm.training.ppo.run import Run
from chatglm.training.ppo.value_head import ActorCritic, Answers, list_trained


@dataclass
class PolicyUpdater:
    """Makes a policy likelier to say what was better than expected.

    Attributes:
        run: settings, processes, and the step.
        model: the policy with its value head, as the processes share it.
        actor: the same as it is in this process.
        optimizer: of the trained parameters.
        texts: answers that are learned beside; None if there are none.
        pad_id: the pad token.
        num_texts: how many of the texts were learned in this step.
    """

    run: Run
    model: nn.Module
    actor: ActorCritic
    optimizer: Any
    texts: Examples | None
    pad_id: int
    num_texts: int = 0

    def update(self, experience: Experience) -> dict[str, float]:
        """Go over the answers in mini-batches, and return the mean figures of those."""
        self.model.train()
        self.num_texts = 0
        done: list[dict[str, float]] = []
        for rows in self.draw_mini_batches():
            figures = self.update_mini_batch(experience, rows)
            done.append(figures)
            if self.is_too_far(figures):
                break
        return {key: float(np.mean([one[key] for one in done])) for key in done[0]}

    def draw_mini_batches(self) -> Iterator[Tensor]:
        """Yield the rows of each mini-batch, in a new order in every epoch."""
        run = self.run
        for _ in range(run.settings.num_ppo_epochs):
            yield from torch.randperm(run.batch_size).to(run.device).split(run.mini_batch_size)

    def is_too_far(self, figures: dict[str, float]) -> bool:
        """Tell whether the policy has left the one that sampled the answers too far behind."""
        limit = self.run.settings.update_kl_limit
        return 0 < limit < figures["update_kl"]

    def update_mini_batch(self, experience: Experience, rows: Tensor) -> dict[str, float]:
        """Take an optimizer step on a mini-batch, unless it is too far; returns its figures.

        Losses are means over the tokens of the whole mini-batch, in all processes, however it is
        split.
        """
        run = self.run
        num_tokens = run.total(experience.answers.answer_mask[rows].sum())
        texts_loss = self.add_texts()
        parts = experience.answers.split(rows, run.arguments.per_device_train_batch_size)
        sums = torch.zeros(4, device=run.device)
        for number, part in enumerate(parts, start=1):
            with self.hold_gradients(number < len(parts)):
                sums += self.add_part(experience.pick(part), num_tokens)
        names = ("policy_loss", "value_loss", "clipped", "update_kl")
        figures = dict(zip(names, (run.total(sums) / num_tokens).tolist())) | texts_loss
        figures["loss"] = figures["policy_loss"]
        figures["loss"] += run.settings.value_coefficient * figures["value_loss"]
        if not self.is_too_far(figures):
            self.take_optimizer_step()
        self.optimizer.zero_grad()
        return figures

    def hold_gradients(self, is_held: bool) -> Any:
        """Keep gradients in their processes while more are to be added to them."""
        return self.run.accelerator.no_sync(self.model) if is_held else nullcontext()

    def add_part(self, part: Experience, num_tokens: Tensor) -> Tensor:
        """Add the gradients of some answers; returns sums over their tokens, `(4,)`."""
        settings, mask = self.run.settings, part.answers.answer_mask
        needs_entropy = settings.entropy_coefficient > 0
        output = self.model(*part.answers, settings.temperature, needs_entropy)
        ratios = compute_ratios(output.log_probs, part.log_probs, mask)
        policy, clipped = clip_policy_loss(ratios, part.advantages, mask, settings.clip_range)
        value = clip_value_loss(
            output.values, part.values, part.returns, mask, settings.value_clip_range
        )
        losses = policy + settings.value_coefficient * value
        if needs_entropy:
            losses = losses - settings.entropy_coefficient * output.entropy.masked_fill(~mask, 0)
        self.add_gradients(losses.sum() / num_tokens)
        update_kl = estimate_kl(part.log_probs, output.log_probs, mask, "k3")
        return torch.stack([x.sum().float() for x in (policy, value, clipped, update_kl)]).detach()

    def add_texts(self) -> dict[str, float]:
        """Add the gradients of answers that are learned beside, if any; returns their loss.

        They are held back, and go to other processes with those of the rollouts.
        """
        if self.texts is None:
            return {}
        run = self.run
        share, coefficient, name = run.settings.sft_share, run.settings.ptx_coefficient, "ptx_loss"
        num_rows = run.mini_batch_size
        if share:
            num_rows, coefficient = count_beside(num_rows, share), weigh_beside(share)
            name = "sft_loss"
        texts = self.draw_texts(self.texts, num_rows)
        num_tokens = run.total(texts.answer_mask.sum())
        losses: list[Tensor] = []
        rows = torch.arange(num_rows, device=run.device)
        for part in texts.split(rows, run.arguments.per_device_train_batch_size):
            picked = texts.pick(part)
            with self.hold_gradients(True):
                log_probs = self.model(*picked).log_probs.masked_fill(~picked.answer_mask, 0)
                losses.append(-log_probs.sum() / num_tokens)
                self.add_gradients(coefficient * losses[-1])
        return {name: run.total(torch.stack(losses).detach().sum()).item()}

    def draw_texts(self, texts: Examples, num_rows: int) -> Answers:
        """Return the next answers that are learned beside a mini-batch of this process."""
        run = self.run
        in_step = num_rows * run.settings.num_mini_batches * run.settings.num_ppo_epochs
        start = run.batches_before * in_step + self.num_texts
        self.num_texts += num_rows
        seed = run.arguments.seed + SEED_SHIFT
        examples = [texts[i] for i in pick_rows(len(texts), seed, start, num_rows)]
        pairs = ([e.prompt_ids for e in examples], [e.answer_ids for e in examples])
        return build_answers(*pairs, self.pad_id, run.device)

    def add_gradients(self, loss: Tensor) -> None:
        """Add the gradients of a process's share of a loss.

        Raises:
            ValueError: if the loss is no number, naming the last good checkpoint.
        """
        self.run.check(loss)
        # The gradients of processes are averaged, and their shares are to be added.
        self.run.accelerator.backward(loss * self.run.accelerator.num_processes)

    def take_optimizer_step(self) -> None:
        """Change the parameters, by gradients of a bounded norm.

        Raises:
            ValueError: if a gradient is no number; float16 then only takes a smaller scale.
        """
        trained: list[nn.Parameter] = list_trained(self.actor)
        limit = self.run.arguments.max_grad_norm or math.inf
        norm: Any = self.run.accelerator.clip_grad_norm_(trained, limit)
        if self.run.accelerator.scaler is None:
            self.run.check(norm)
        self.optimizer.step()


__all__ = ["PolicyUpdater"]
