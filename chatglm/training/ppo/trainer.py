"""Owns PPO: a policy practises, and becomes likelier to say what is rewarded.

    chatglm train ppo --train_data prompts.jsonl --reward_model out/reward --output out/ppo
    chatglm train ppo --config ppo.yaml --reward_function rewards.py:judge --lora_rank 8

A step: answers are sampled, scored, and held against the reference, which is the policy as it was
in the beginning; each token gets an advantage; some epochs of mini-batches make what was better
than expected likelier (`math` has the equations). Everything random in a step follows from the
seed and its number, so a run that was killed goes on as if it had not been; on a GPU bit for bit
only with `full_determinism`.

Runs on one device, or on several by DistributedDataParallel (`accelerate launch`, `torchrun`).

Shapes: `B` rows of a process in a step, `A` answer columns.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from transformers import enable_full_determinism, get_scheduler, set_seed

from chatglm.training.data.batches import Examples, read_examples
from chatglm.training.data.rendering import Renderer
from chatglm.training.models import find_core, load_tokenizer, save_trained
from chatglm.training.ppo.checkpoints import (
    RunState,
    load_policies,
    read_optimizer,
    read_state,
    write_checkpoint,
)
from chatglm.training.ppo.math import (
    KlController,
    clip_policy_loss,
    clip_scores,
    clip_value_loss,
    estimate_advantages,
    estimate_kl,
    explain_variance,
    find_ratios,
    masked_mean,
    place_rewards,
    whiten,
)
from chatglm.training.ppo.rewards import (
    Reward,
    RewardModel,
    Sampled,
    load_function,
    load_reward_model,
)
from chatglm.training.ppo.rollouts import (
    Prompt,
    Prompts,
    Sampler,
    build_answers,
    describe_answers,
    describe_references,
    find_ended,
    judge_answers,
    pick_rows,
)
from chatglm.training.ppo.settings import PpoArguments, PpoSettings, read_arguments
from chatglm.training.ppo.value_head import ActorCritic, Answers, Judgement, Reference, list_trained
from chatglm.training.progress import Samples
from chatglm.training.run_log import RunLog
from chatglm.training.settings import KeyProblem, require
from chatglm.training.stage import Stage
from chatglm.training.trainer import check_loss, find_half, prepare_output

# What is drawn from a seed apart from the steps, which have the numbers from 0 on.
EVALUATION_SEED = 2**32 - 1
TEXTS_SEED_SHIFT = 1
MOST_CUT = 0.5  # of the scores of a step, beyond which there is hardly anything to learn from
WHOLE_MODELS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "MULTI_HPU", "MULTI_MLU")


class Experience(NamedTuple):
    """What is learned from; `(B, A)` but for the answers.

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


def main(settings: PpoSettings, given: dict[str, Any]) -> dict[str, Any]:
    """Train, and return the last figures.

    Args:
        settings: ours.
        given: the keys of `PpoArguments` that were set.

    Raises:
        ValueError: for settings, rows, rewards or a folder that cannot be used, or if a loss is no
            number.
    """
    arguments = read_arguments(given)
    accelerator = build_accelerator(settings, arguments)
    checkpoint = prepare_output(settings, given)
    if arguments.full_determinism:
        enable_full_determinism(arguments.seed)
    set_seed(arguments.seed)  # new adapters are drawn at random
    trainer = PpoTrainer(settings, arguments, accelerator, checkpoint)
    return trainer.train()


def build_accelerator(settings: PpoSettings, arguments: PpoArguments) -> Accelerator:
    """Return what knows devices, processes, number formats and where figures go.

    Raises:
        KeyProblem: for a tracker that is not installed, or a number format or a way to distribute
            that cannot be used.
    """
    installed = [str(name) for name in get_available_trackers()]
    for name in arguments.trackers:
        wanted = "none, or something that is installed"
        require(name in installed, "report_to", name, f"{wanted} ({', '.join(installed) or '-'})")
    half = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    project = ProjectConfiguration(settings.output, str(Path(settings.output) / "runs"))
    try:
        accelerator = Accelerator(
            mixed_precision=half,
            cpu=arguments.use_cpu,
            log_with=[*arguments.trackers] or None,
            project_config=project,
        )
    except ValueError as error:
        raise KeyProblem(f"the configuration cannot be used: {error}") from error
    kind = accelerator.distributed_type.value
    require(kind in WHOLE_MODELS, "the distributed type", kind, "one with a whole model a process")
    return accelerator


def load_reward(
    settings: PpoSettings, arguments: PpoArguments, core: Any, tokenizer: Any, device: torch.device
) -> Reward:
    """Return what scores answers.

    Raises:
        ValueError: for a function or a model that cannot be used.
    """
    if settings.reward_function:
        return load_function(settings.reward_function)
    half = find_half(arguments)
    scorer = load_reward_model(settings.reward_model, core.config, tokenizer, half)
    return RewardModel(scorer.to(device), arguments.per_device_train_batch_size)


def silence_dropout(policy: nn.Module) -> None:
    """Leave nothing out at random: a policy has to say the same of an answer twice."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


class PpoTrainer:
    """Everything that a run works with, and its steps.

    Args:
        settings, arguments: of the run.
        accelerator: knows devices and processes.
        checkpoint: to go on from.

    Raises:
        ValueError: as `main`.
    """

    def __init__(
        self,
        settings: PpoSettings,
        arguments: PpoArguments,
        accelerator: Accelerator,
        checkpoint: Path | None,
    ) -> None:
        self.settings, self.arguments, self.accelerator = settings, arguments, accelerator
        self.folder, self.device = Path(settings.output), accelerator.device
        self.tokenizer = load_tokenizer(settings)
        half = find_half(arguments)
        policy, beginning = load_policies(settings, half, checkpoint, self.device)
        core = find_core(policy)
        self.reward = load_reward(settings, arguments, core, self.tokenizer, self.device)
        self._read_data(Renderer(core, self.tokenizer, settings.max_length, settings.long_rows))
        self._prepare_model(policy, beginning)
        self._prepare_run(checkpoint)
        self.sampler = Sampler(
            core,
            settings.max_new_tokens,
            settings.temperature,
            settings.top_p,
            settings.rollout_batch_size,
        )

    def _read_data(self, renderer: Renderer) -> None:
        """Open the files, and count the steps."""
        settings, arguments = self.settings, self.arguments
        files = (settings.train_data, settings, renderer, settings.max_new_tokens)
        self.prompts = Prompts(*files)
        held_out = (settings.eval_data, *files[1:])
        self.held_out = Prompts(*held_out) if settings.eval_data else None
        texts = (settings.ptx_data, settings, renderer)
        self.texts = read_examples(*texts) if settings.ptx_data else None
        self.mini_batch = (
            arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        )
        self.num_rows = self.mini_batch * settings.num_mini_batches
        rows = self.num_rows * self.accelerator.num_processes
        passes = math.ceil(arguments.num_train_epochs * len(self.prompts) / rows)
        self.max_steps = arguments.max_steps if arguments.max_steps > 0 else passes

    def _prepare_model(self, policy: Any, beginning: list[Tensor] | None) -> None:
        """Put the policy onto its device, with head, reference and optimizer."""
        arguments = self.arguments
        silence_dropout(policy)
        if arguments.gradient_checkpointing:
            options = {"use_reentrant": False}  # the other way needs inputs with gradients
            find_core(policy).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        actor = ActorCritic(policy)
        rates = (arguments.learning_rate, self.settings.value_learning_rate)
        optimizer = torch.optim.AdamW(
            actor.group_parameters(*rates, arguments.weight_decay),
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
        )
        self.scheduler = get_scheduler(
            arguments.lr_scheduler_type, optimizer, arguments.warmup_steps, self.max_steps
        )
        self.model, self.optimizer = self.accelerator.prepare(actor, optimizer)
        self.actor: ActorCritic = self.accelerator.unwrap_model(self.model)
        self.reference = Reference(self.actor, beginning)
        self.stateful = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        if self.accelerator.scaler is not None:
            self.stateful["scaler"] = self.accelerator.scaler

    def _prepare_run(self, checkpoint: Path | None) -> None:
        """Set what counts on from step to step, to where a checkpoint has it."""
        settings, arguments, accelerator = self.settings, self.arguments, self.accelerator
        state = RunState(0, settings.kl_coefficient, accelerator.num_processes, [])
        if checkpoint is not None:
            state = read_state(checkpoint, accelerator.num_processes)
            read_optimizer(checkpoint, self.stateful)
            self.actor.load_head(checkpoint)
        self.step, self.num_texts = state.global_step, 0
        self.kl = KlController(state.kl_coefficient, settings.kl_target, settings.kl_gain)
        purge = {"tensorboard": {"purge_step": self.step + 1}} if checkpoint else {}
        accelerator.init_trackers("ppo", init_kwargs=purge)
        begun = None if checkpoint is None else self.step
        shape = (self.max_steps, arguments.logging_steps, not arguments.disable_tqdm)
        self.log = RunLog(self.folder, accelerator, begun, *shape)
        self.log.pending = state.pending
        self.has_warned = False

    # The loop.

    def train(self) -> dict[str, Any]:
        """Take all steps that are left, write the model, and return the last figures.

        Raises:
            ValueError: if a loss is no number, or the reward fails.
        """
        try:
            if self.step == 0:
                self.evaluate()
            while self.step < self.max_steps:
                self.log.add(self.step + 1, *self.take_step())
                self.step += 1
                self.evaluate()
                if self.is_due(self.arguments.save_steps):
                    self.save()
            self.write_outputs()
        finally:
            self.log.close()
        return self.log.find_latest()

    def is_due(self, steps: int) -> bool:
        """Tell whether something that is done every so many steps, and at the end, is due."""
        return self.step % steps == 0 or self.step == self.max_steps

    def take_step(self) -> tuple[dict[str, float], int]:
        """Practise, weigh, learn; returns the figures and the tokens of all processes."""
        self.seed(self.step)
        prompts = self.pick_prompts()
        answers, sampled, scores = self.practise(prompts)
        if (self.step + 1) % self.arguments.logging_steps == 0:
            example = (sampled.prompts[0], sampled.answers[0], scores[0].item())
            self.log.write_sample(self.step + 1, *example)
        experience, figures = self.weigh(answers, scores)
        figures |= self.learn(experience)
        figures["learning_rate"] = float(self.scheduler.get_last_lr()[0])
        figures["kl_coefficient"] = self.kl.coefficient
        self.kl.update(figures["kl"])
        self.scheduler.step()
        return figures, int(self.total(answers.prompt_mask.sum() + answers.answer_mask.sum()))

    def seed(self, number: int) -> None:
        """Begin a stretch of random numbers that only the seed, a number and the process decide."""
        place = (self.arguments.seed, number, self.accelerator.process_index)
        set_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def pick_prompts(self) -> list[Prompt]:
        """Return the prompts of this process in this step."""
        start = self.step * self.accelerator.num_processes + self.accelerator.process_index
        rows = pick_rows(
            len(self.prompts), self.arguments.seed, start * self.num_rows, self.num_rows
        )
        return [self.prompts[row] for row in rows]

    # Practise.

    def practise(self, prompts: list[Prompt]) -> tuple[Answers, Sampled, Tensor]:
        """Answer prompts; returns the answers, their texts beside them, and their scores `(B,)`."""
        self.model.eval()
        with self.accelerator.autocast():
            answers = self.sampler([prompt.ids for prompt in prompts])
        sampled = describe_answers(prompts, answers, self.tokenizer)
        scores = self.reward(sampled)
        if self.settings.subtract_reference:
            room = self.settings.max_new_tokens
            scores -= self.reward(describe_references(prompts, self.prompts.renderer, room))
        scores = scores.to(self.device)
        return answers, sampled, scores

    def judge(self, answers: Answers, needs_entropy: bool = False) -> tuple[Judgement, Tensor]:
        """Return what the policy says about answers, and the KL of each token, `(B, A)`.

        Raises:
            ValueError: if a probability is no number.
        """
        self.model.eval()
        settings = self.settings
        options = (answers, self.arguments.per_device_train_batch_size, settings.temperature)
        judged = judge_answers(self.actor, *options, needs_entropy)
        check_loss(judged.log_probs.sum(), self.step, self.folder)
        with self.reference.put_in_place() as reference:
            reference_log_probs = judge_answers(reference, *options).log_probs
        mask, estimator = answers.answer_mask, settings.kl_estimator
        return judged, estimate_kl(judged.log_probs, reference_log_probs, mask, estimator)

    # Weigh.

    def weigh(self, answers: Answers, scores: Tensor) -> tuple[Experience, dict[str, float]]:
        """Turn answers and their scores `(B,)` into what is learned from, and figures."""
        judged, kl = self.judge(answers, needs_entropy=True)
        settings, mask = self.settings, answers.answer_mask
        trimmed, share_cut = self.trim_scores(scores, answers)
        rewards = place_rewards(trimmed, kl, mask, self.kl.coefficient)
        if settings.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, total=self.total)
        advantages, returns = estimate_advantages(
            rewards, judged.values, mask, settings.gamma, settings.gae_lambda
        )
        explained = explain_variance(judged.values, returns, mask, self.total).item()
        figures = self.name_figures(self.sum_figures(answers, scores, kl)) | {
            "entropy": masked_mean(judged.entropy, mask, self.total).item(),
            # Far below 0 where all returns are alike, which says nothing and hides the rest.
            "explained": max(-1.0, explained),
            "scores_cut": share_cut,
        }
        if settings.whiten_advantages:
            advantages = whiten(advantages, mask, total=self.total)
        return Experience(answers, judged.log_probs, judged.values, advantages, returns), figures

    def trim_scores(self, scores: Tensor, answers: Answers) -> tuple[Tensor, float]:
        """Bring scores `(B,)` into the range that is learned from; tells what share was cut off."""
        ended = find_ended(answers, self.sampler.end_id)
        scores = scores - self.settings.missing_end_penalty * ~ended
        if self.settings.whiten_scores:
            scores = whiten(scores, torch.ones_like(ended), total=self.total)
        trimmed = clip_scores(scores, self.settings.score_clip)
        is_cut = (trimmed != scores).float()
        share_cut = masked_mean(is_cut, torch.ones_like(ended), self.total).item()
        self.warn_of_cuts(share_cut)
        return trimmed, share_cut

    def warn_of_cuts(self, share: float) -> None:
        """Say once that most scores are the same after they were cut off."""
        if share > MOST_CUT and not self.has_warned:
            self.has_warned = True
            self.log.say(
                f"{share:.0%} of the scores are beyond score_clip={self.settings.score_clip:g} and "
                "count as that: raise it, or set whiten_scores"
            )

    def sum_figures(self, answers: Answers, scores: Tensor, kl: Tensor) -> Tensor:
        """Return sums over answers, and their number; see `name_figures`."""
        ended = find_ended(answers, self.sampler.end_id)
        columns = (scores, kl.sum(1), answers.answer_mask.sum(1), ended, torch.ones_like(scores))
        return torch.stack([column.float().sum() for column in columns])

    def name_figures(self, sums: Tensor) -> dict[str, float]:
        """Return the means over the answers of all processes, from sums `(5,)` of this one."""
        sums = self.total(sums)
        names = ("reward", "kl", "answer_length", "ended")
        return dict(zip(names, (sums[:-1] / sums[-1]).tolist()))

    def total(self, values: Tensor) -> Tensor:
        """Add up over processes."""
        summed: Any = self.accelerator.reduce(values, reduction="sum")
        return summed

    # Learn.

    def learn(self, experience: Experience) -> dict[str, float]:
        """Go over the answers in mini-batches, and return the mean figures of those."""
        self.model.train()
        self.num_texts = 0
        done: list[dict[str, float]] = []
        for rows in self.draw_mini_batches():
            figures = self.learn_rows(experience, rows)
            done.append(figures)
            if self.is_too_far(figures):
                break
        return {key: float(np.mean([one[key] for one in done])) for key in done[0]}

    def draw_mini_batches(self) -> Iterator[Tensor]:
        """Yield the rows of each mini-batch, in a new order in every epoch."""
        for _ in range(self.settings.num_ppo_epochs):
            yield from torch.randperm(self.num_rows).to(self.device).split(self.mini_batch)

    def is_too_far(self, figures: dict[str, float]) -> bool:
        """Tell whether the policy has left the one that sampled the answers too far behind."""
        limit = self.settings.update_kl_limit
        return 0 < limit < figures["update_kl"]

    def learn_rows(self, experience: Experience, rows: Tensor) -> dict[str, float]:
        """Take an optimizer step on a mini-batch, unless it is too far; returns its figures.

        Losses are means over the tokens of the whole mini-batch, in all processes, however it is
        split.
        """
        num_tokens = self.total(experience.answers.answer_mask[rows].sum())
        texts_loss = self.learn_texts()
        parts = experience.answers.split(rows, self.arguments.per_device_train_batch_size)
        sums = torch.zeros(4, device=self.device)
        for number, part in enumerate(parts, start=1):
            with self.hold_gradients(number < len(parts)):
                sums += self.learn_part(experience.pick(part), num_tokens)
        names = ("policy_loss", "value_loss", "clipped", "update_kl")
        figures = dict(zip(names, (self.total(sums) / num_tokens).tolist())) | texts_loss
        figures["loss"] = figures["policy_loss"]
        figures["loss"] += self.settings.value_coefficient * figures["value_loss"]
        if not self.is_too_far(figures):
            self.take_optimizer_step()
        self.optimizer.zero_grad()
        return figures

    def hold_gradients(self, is_held: bool) -> Any:
        """Keep gradients in their processes while more are to be added to them."""
        return self.accelerator.no_sync(self.model) if is_held else nullcontext()

    def learn_part(self, part: Experience, num_tokens: Tensor) -> Tensor:
        """Add the gradients of some rows; returns sums over their tokens, `(4,)`."""
        settings, mask = self.settings, part.answers.answer_mask
        needs_entropy = settings.entropy_coefficient > 0
        judged = self.model(*part.answers, settings.temperature, needs_entropy)
        ratios = find_ratios(judged.log_probs, part.log_probs, mask)
        policy, clipped = clip_policy_loss(ratios, part.advantages, mask, settings.clip_range)
        value = clip_value_loss(
            judged.values, part.values, part.returns, mask, settings.value_clip_range
        )
        losses = policy + settings.value_coefficient * value
        if needs_entropy:
            losses = losses - settings.entropy_coefficient * judged.entropy.masked_fill(~mask, 0)
        self.add_gradients(losses.sum() / num_tokens)
        update_kl = estimate_kl(part.log_probs, judged.log_probs, mask, "k3")
        return torch.stack([x.sum().float() for x in (policy, value, clipped, update_kl)]).detach()

    def learn_texts(self) -> dict[str, float]:
        """Add the gradients of as many answers of `ptx_data`, if there is any; returns their loss.

        They are held back, and go to other processes with those of the practice.
        """
        if self.texts is None:
            return {}
        texts = self.draw_texts(self.texts)
        num_tokens = self.total(texts.answer_mask.sum())
        losses: list[Tensor] = []
        rows = torch.arange(self.mini_batch, device=self.device)
        for part in texts.split(rows, self.arguments.per_device_train_batch_size):
            picked = texts.pick(part)
            with self.hold_gradients(True):
                log_probs = self.model(*picked).log_probs.masked_fill(~picked.answer_mask, 0)
                losses.append(-log_probs.sum() / num_tokens)
                self.add_gradients(self.settings.ptx_coefficient * losses[-1])
        return {"ptx_loss": self.total(torch.stack(losses).detach().sum()).item()}

    def draw_texts(self, texts: Examples) -> Answers:
        """Return the next answers of `ptx_data` for a mini-batch of this process."""
        in_step = self.num_rows * self.settings.num_ppo_epochs
        start = self.step * self.accelerator.num_processes + self.accelerator.process_index
        start = start * in_step + self.num_texts
        self.num_texts += self.mini_batch
        seed = self.arguments.seed + TEXTS_SEED_SHIFT
        examples = [texts[i] for i in pick_rows(len(texts), seed, start, self.mini_batch)]
        pairs = ([e.prompt_ids for e in examples], [e.answer_ids for e in examples])
        return build_answers(*pairs, self.sampler.pad_id, self.device)

    def add_gradients(self, loss: Tensor) -> None:
        """Add the gradients of a process's share of a loss.

        Raises:
            ValueError: if the loss is no number, naming the last good checkpoint.
        """
        check_loss(loss, self.step, self.folder)
        # The gradients of processes are averaged, and their shares are to be added.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def take_optimizer_step(self) -> None:
        """Change the parameters, by gradients of a bounded norm.

        Raises:
            ValueError: if a gradient is no number; float16 then only takes a smaller scale.
        """
        trained: list[nn.Parameter] = list_trained(self.actor)
        limit = self.arguments.max_grad_norm or math.inf
        norm: Any = self.accelerator.clip_grad_norm_(trained, limit)
        if self.accelerator.scaler is None:
            check_loss(norm, self.step, self.folder)
        self.optimizer.step()

    # Look.

    def evaluate(self) -> None:
        """Answer the sample prompts and the held-out ones, if it is time to."""
        settings, steps = self.settings, self.arguments.eval_steps
        if settings.sample_prompts and self.is_due(settings.sample_steps or steps):
            samples = Samples(settings.sample_prompts, 0, self.tokenizer, self.folder)
            main = self.accelerator.is_main_process
            state = SimpleNamespace(is_world_process_zero=main, global_step=self.step)
            samples.answer(self.actor.policy, state)
        if self.held_out is not None and self.is_due(steps):
            self.log.write(self.step, self.measure(self.held_out))

    def measure(self, held_out: Prompts) -> dict[str, float]:
        """Return reward, KL and lengths of answers to held-out prompts, sampled as in practice."""
        self.seed(EVALUATION_SEED)
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        mine = range(rank, len(held_out), size)
        sums = torch.zeros(5, device=self.device)
        for start in range(0, len(mine), self.num_rows):
            prompts = [held_out[row] for row in mine[start : start + self.num_rows]]
            answers, _, scores = self.practise(prompts)
            sums += self.sum_figures(answers, scores, self.judge(answers)[1])
        return {f"eval_{key}": value for key, value in self.name_figures(sums).items()}

    # What is left behind.

    def save(self) -> None:
        """Write a checkpoint, and draw the curves so far."""
        if self.accelerator.is_main_process:
            size = self.accelerator.num_processes
            state = RunState(self.step, self.kl.coefficient, size, self.log.pending)
            limit = self.arguments.save_total_limit
            parts = (self.actor, self.settings, self.stateful, state, limit)
            write_checkpoint(self.folder, *parts)
        self.log.draw()
        self.accelerator.wait_for_everyone()

    def write_outputs(self) -> None:
        """Write the trained model with its value head."""
        if self.accelerator.is_main_process:
            save_trained(self.actor.policy, self.settings, self.folder)
            self.actor.save_head(self.folder)


STAGE = Stage("ppo", PpoSettings, PpoArguments, main)
