"""Owns PPO: a policy answers, and becomes likelier to say what is rewarded.

    chatglm train ppo --train_data prompts.jsonl --reward_model out/reward --output out/ppo
    chatglm train ppo --config ppo.yaml --reward_function rewards.py:judge --lora_rank 8

A step has three parts. Rollout: answers are sampled and scored (`experience`). Advantages: answers
are held against the reference, which is the policy as it was in the beginning, and each token gets
an advantage (`experience`; `math` has the equations). Update: some epochs of mini-batches make what
was better than expected likelier (`update`). Everything random in a step follows from the seed and
its number, so a run that was killed goes on as if it had not been; on a GPU bit for bit only with
`full_determinism`.

Runs on one device, or on several by DistributedDataParallel (`accelerate launch`, `torchrun`).
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from transformers import enable_full_determinism, get_scheduler, set_seed

from chatglm.training.checkpoint_callback import check_length, follow_schedule
from chatglm.training.checkpoints import telling_full_disk
from chatglm.training.data.batches import Examples, pick_rows, read_examples
from chatglm.training.data.reading import read_both
from chatglm.training.data.rendering import Renderer
from chatglm.training.models import (
    check_adapters,
    check_weights,
    enable_checkpointing,
    find_core,
    keeps_weights,
    load_tokenizer,
    read_format,
    save_trained,
)
from chatglm.training.paths import check_paths
from chatglm.training.ppo.checkpoints import (
    RunState,
    load_policies,
    read_optimizer,
    read_state,
    write_checkpoint,
)
from chatglm.training.ppo.experience import ExperienceMaker
from chatglm.training.ppo.math import KlController
from chatglm.training.ppo.rewards import Reward, RewardModel, load_function, load_reward_model
from chatglm.training.ppo.rollouts import Prompt, Prompts, Sampler
from chatglm.training.ppo.run import Run, build_accelerator
from chatglm.training.ppo.settings import PpoArguments, PpoSettings, read_arguments
from chatglm.training.ppo.update import PolicyUpdater
from chatglm.training.ppo.value_head import ActorCritic, Reference
from chatglm.training.precision import get_compute_dtype
from chatglm.training.progress import Samples, frame_prompts
from chatglm.training.resuming import note_finished, open_output
from chatglm.training.run_log import RunLog
from chatglm.training.stage import Stage
from chatglm.training.telling import Teller

# Evaluations draw from the seed with this number; the steps have the numbers from 0 on.
EVALUATION_SEED = 2**32 - 1
# The questions of all steps are one sequence, those of every evaluation another.
STEPS, EVALUATIONS = 0, 1


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
    check_weights(settings, keeps_weights(settings))
    check_paths(settings)
    check_adapters(settings)
    accelerator = build_accelerator(settings, arguments)
    with (
        open_output(settings, given, arguments) as begun,
        telling_full_disk(Path(settings.output)),
    ):
        if begun.figures is not None:
            return begun.figures
        if arguments.full_determinism:
            enable_full_determinism(arguments.seed)
        # New adapters are drawn at random.
        set_seed(arguments.seed)
        trainer = PpoTrainer(settings, arguments, accelerator, begun.checkpoint)
        figures = trainer.train()
        note_finished(settings, arguments, trainer.run.step, figures)
        return figures


def load_reward(
    settings: PpoSettings, arguments: PpoArguments, core: Any, tokenizer: Any, device: torch.device
) -> Reward:
    """Return the model that scores answers.

    Raises:
        ValueError: for a model that cannot be used.
    """
    compute_dtype = get_compute_dtype(arguments)
    what = (settings.reward_model, core.config, tokenizer, compute_dtype, settings.any_base)
    scorer = load_reward_model(*what)
    return RewardModel(scorer.to(device), arguments.per_device_train_batch_size)


def silence_dropout(policy: nn.Module) -> None:
    """Leave nothing out at random: a policy has to say the same of an answer twice."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


class Data(NamedTuple):
    """What a run reads.

    Attributes:
        prompts: to be answered.
        held_out: to be answered in evaluations; None if there are none.
        texts: answers of `sft_data` or `ptx_data`, learned beside; None if there are none.
    """

    prompts: Prompts
    held_out: Prompts | None
    texts: Examples | None


def read_data(settings: PpoSettings, renderer: Renderer) -> Data:
    """Open the files of the settings.

    Raises:
        ValueError: for files or rows that cannot be used.
    """
    room = settings.max_new_tokens
    prompts, held_out = read_both(settings, lambda paths: Prompts(paths, settings, renderer, room))
    beside = settings.sft_data or settings.ptx_data
    return Data(prompts, held_out, read_examples(beside, settings, renderer) if beside else None)


def count_steps(run: Run, num_prompts: int) -> int:
    """Return the steps of a whole run."""
    arguments = run.arguments
    in_step = run.batch_size * run.accelerator.num_processes
    passes = math.ceil(arguments.num_train_epochs * num_prompts / in_step)
    return arguments.max_steps if arguments.max_steps > 0 else passes


class PpoTrainer:
    """The loop of a run, and its parts.

    Args:
        settings, arguments: of the run.
        accelerator: knows devices and processes.
        checkpoint: to go on from.

    Attributes:
        run: settings, processes, and the step.
        data: what is read.
        actor: the policy with its value head.
        maker: rolls the policy out, and computes advantages.
        updater: updates it by them.
        log: keeps the figures.

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
        self.run = Run(settings, arguments, accelerator)
        self.tokenizer = load_tokenizer(settings)
        # Rows and a function that rewards are looked at before a model is loaded.
        source, limit = read_format(settings), settings.max_length
        renderer = Renderer(source, self.tokenizer, limit, settings.long_rows)
        self.data = read_data(settings, renderer)
        self.teller = Teller("ppo", settings)
        self.teller.tell_rows(renderer, self.data.prompts, self.data.held_out)
        function = load_function(settings.reward_function) if settings.reward_function else None
        compute_dtype = get_compute_dtype(arguments)
        policy, beginning = load_policies(settings, compute_dtype, checkpoint, self.run.device)
        core = find_core(policy)
        reward = function or load_reward(settings, arguments, core, self.tokenizer, self.run.device)
        self.max_steps = count_steps(self.run, len(self.data.prompts))
        self._prepare_model(policy)
        self._prepare_run(checkpoint)
        self.maker = ExperienceMaker(
            self.run,
            self.model,
            self.actor,
            Reference(self.actor, beginning),
            Sampler(
                core,
                settings.max_new_tokens,
                settings.temperature,
                settings.top_p,
                settings.rollout_batch_size,
            ),
            reward,
            self.tokenizer,
            renderer,
            self.kl,
            self.log.say,
        )
        pad_id = self.maker.sampler.pad_id
        self.updater = PolicyUpdater(
            self.run, self.model, self.actor, self.optimizer, self.data.texts, pad_id
        )

    def _prepare_model(self, policy: Any) -> None:
        """Put the policy onto its device, with head and optimizer."""
        arguments, accelerator = self.run.arguments, self.run.accelerator
        silence_dropout(policy)
        if arguments.gradient_checkpointing:
            # Reentrant checkpoints need inputs with gradients, which embedded ids are not.
            enable_checkpointing(find_core(policy))
        actor = ActorCritic(policy)
        rates = (arguments.learning_rate, self.run.settings.value_learning_rate)
        optimizer = torch.optim.AdamW(
            actor.group_parameters(*rates, arguments.weight_decay),
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
        )
        self.scheduler = get_scheduler(
            arguments.lr_scheduler_type, optimizer, arguments.warmup_steps, self.max_steps
        )
        self.model, self.optimizer = accelerator.prepare(actor, optimizer)
        self.actor: ActorCritic = accelerator.unwrap_model(self.model)
        rows = self.run.batch_size * accelerator.num_processes
        self.teller.tell_run(self.actor, arguments, self.max_steps, rows)
        self.stateful = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        if accelerator.scaler is not None:
            self.stateful["scaler"] = accelerator.scaler

    def _prepare_run(self, checkpoint: Path | None) -> None:
        """Set what counts on from step to step, to where a checkpoint has it."""
        run, accelerator = self.run, self.run.accelerator
        settings, arguments = run.settings, run.arguments
        size = accelerator.num_processes
        state = RunState(0, settings.kl_coefficient, size, [], self.max_steps)
        if checkpoint is not None:
            state = read_state(checkpoint, size)
            check_length(checkpoint, state.global_step, self.max_steps)
            read_optimizer(checkpoint, self.stateful)
            self.actor.load_head(checkpoint)
        run.step = state.global_step
        if run.step < self.max_steps != state.max_steps > 0:
            place = SimpleNamespace(global_step=run.step, max_steps=self.max_steps)
            follow_schedule(self.optimizer, self.scheduler, state.max_steps, place)
        self.kl = KlController(state.kl_coefficient, settings.kl_target, settings.kl_gain)
        purge = {"tensorboard": {"purge_step": run.step + 1}} if checkpoint else {}
        accelerator.init_trackers("ppo", init_kwargs=purge)
        begun = None if checkpoint is None else run.step
        shape = (self.max_steps, arguments.logging_steps, not arguments.disable_tqdm)
        self.log = RunLog(run.folder, accelerator, begun, *shape)
        self.log.pending = state.pending

    def train(self) -> dict[str, Any]:
        """Take all steps that are left, write the model, and return the last figures.

        Raises:
            ValueError: if a loss is no number, or the reward fails.
        """
        run = self.run
        try:
            if run.step == 0:
                self.evaluate()
            while run.step < self.max_steps:
                self.log.add(run.step + 1, *self.take_step())
                run.step += 1
                self.evaluate()
                if self.is_due(run.arguments.save_steps):
                    self.save()
            self.write_outputs()
        finally:
            self.log.close()
        history, figures = self.log.history, self.log.find_latest()
        return self.teller.write_summary(history, figures, run.step, self.log.all_tokens)

    def is_due(self, steps: int) -> bool:
        """Tell whether something that is done every so many steps, and at the end, is due."""
        return self.run.step % steps == 0 or self.run.step == self.max_steps

    def take_step(self) -> tuple[dict[str, float], int]:
        """Roll out, compute advantages, update; returns the figures and all processes' tokens."""
        run = self.run
        run.seed(run.step)
        start = run.batches_before * run.batch_size
        seeds = run.seed_answers(STEPS, range(start, start + run.batch_size))
        answers, sampled, scores = self.maker.rollout(self.pick_prompts(), seeds)
        if (run.step + 1) % run.arguments.logging_steps == 0:
            example = (sampled.prompts[0], sampled.answers[0], scores[0].item())
            self.log.write_sample(run.step + 1, *example)
        experience, figures = self.maker.compute_advantages(answers, scores)
        figures |= self.updater.update(experience)
        figures["learning_rate"] = float(self.scheduler.get_last_lr()[0])
        figures["kl_coefficient"] = self.kl.coefficient
        self.kl.update(figures["kl"])
        self.scheduler.step()
        return figures, int(run.total(answers.prompt_mask.sum() + answers.answer_mask.sum()))

    def pick_prompts(self) -> list[Prompt]:
        """Return the prompts of this process in this step."""
        run, prompts = self.run, self.data.prompts
        start = run.batches_before * run.batch_size
        rows = pick_rows(len(prompts), run.arguments.seed, start, run.batch_size)
        return [prompts[row] for row in rows]

    def evaluate(self) -> None:
        """Answer the sample prompts and the held-out ones, if it is time to."""
        run, held_out = self.run, self.data.held_out
        settings, steps = run.settings, run.arguments.eval_steps
        if settings.sample_prompts and self.is_due(settings.sample_steps or steps):
            samples = Samples(frame_prompts(settings), 0, self.tokenizer, run.folder)
            main = run.accelerator.is_main_process
            state = SimpleNamespace(is_world_process_zero=main, global_step=run.step)
            samples.answer(self.actor.policy, state)
        if held_out is not None and self.is_due(steps):
            self.log.write(run.step, self.measure(held_out))

    def measure(self, held_out: Prompts) -> dict[str, float]:
        """Return reward, KL and lengths of answers to held-out prompts, sampled as in a step."""
        run, maker = self.run, self.maker
        run.seed(EVALUATION_SEED)
        rank, size = run.accelerator.process_index, run.accelerator.num_processes
        mine = range(rank, len(held_out), size)
        sums = torch.zeros(5, device=run.device)
        for start in range(0, len(mine), run.batch_size):
            rows = mine[start : start + run.batch_size]
            seeds = run.seed_answers(EVALUATIONS, rows)
            answers, _, scores = maker.rollout([held_out[row] for row in rows], seeds)
            sums += maker.sum_figures(answers, scores, maker.evaluate(answers)[1])
        return {f"eval_{key}": value for key, value in maker.name_figures(sums).items()}

    def save(self) -> None:
        """Write a checkpoint, and draw the curves so far."""
        run = self.run
        if run.accelerator.is_main_process:
            size = run.accelerator.num_processes
            done = (run.step, self.kl.coefficient, size, self.log.pending)
            state = RunState(*done, self.max_steps)
            limit = run.arguments.save_total_limit
            parts = (self.actor, run.settings, self.stateful, state, limit)
            write_checkpoint(run.folder, *parts)
        self.log.draw()
        run.accelerator.wait_for_everyone()

    def write_outputs(self) -> None:
        """Write the trained model with its value head."""
        run = self.run
        if run.accelerator.is_main_process:
            save_trained(self.actor.policy, run.settings, run.folder)
            self.actor.save_head(run.folder)


STAGE = Stage("ppo", PpoSettings, PpoArguments, main)
