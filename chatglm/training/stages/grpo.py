"""Owns group relative policy optimization: answers in groups, without a value model.

    chatglm train grpo --train_data questions.jsonl --reward_model reward --output grpo
    chatglm train grpo --config grpo.yaml --reward_function judges.py:is_right --num_generations 8

Each question is answered several times, and an answer's advantage is how much better than the
others of its group it is rewarded. Rewards are those of PPO: a reward model, functions of texts, or
all of them in a sum (`reward_weights`, the model's first). `beta` holds the policy near where it
began. Answers are drawn as PPO's are, each with a seed of its own; the question of a group is read
once where they are rows.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from chatglm.answering import answer_prompts, derive_seed, only_options, uses_seeds
from chatglm.training.beside import BesideTrainer
from chatglm.training.data.reading import Data, read_both
from chatglm.training.data.rendering import SHORTEST_PROMPT, Renderer
from chatglm.training.defaults import LORA_DEFAULTS, STAGE_DEFAULTS
from chatglm.training.models import PromptFormat, find_core
from chatglm.training.ppo.rewards import (
    Reward,
    RewardModel,
    Sampled,
    load_function,
    load_reward_model,
)
from chatglm.training.ppo.rollouts import Prompts
from chatglm.training.precision import get_compute_dtype
from chatglm.training.settings import KeyProblem
from chatglm.training.stage import TrainerStage
from chatglm.training.stage_settings import GrpoSettings
from chatglm.training.stages.trl_stages import (
    AlignmentTrainer,
    add_beside,
    build_trainer,
    build_trl_arguments,
    check_head,
    importing_trl,
    read_beside,
    write_rows,
)

with importing_trl():
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

PAGED = "paged"


def build_grpo_arguments(
    arguments_class: type, settings: GrpoSettings, given: Mapping[str, Any], **defaults: Any
) -> GRPOConfig:
    """Return trl's arguments; arguments and errors as of `build_trl_arguments`."""
    if str(given.get("cache_implementation")).startswith(PAGED):
        raise KeyProblem("cache_implementation cannot be paged: it reads questions causally")
    return build_trl_arguments(arguments_class, settings, given, **defaults)


def read_questions(
    source: PromptFormat, tokenizer: Any, settings: GrpoSettings, arguments: GRPOConfig
) -> Data:
    """Return the rendered questions of the settings' files.

    Raises:
        ValueError: for keys that do not go together, and files and rows that cannot be used.
    """
    if arguments.cast_lm_head_to_fp32 and source.config.tie_word_embeddings:
        raise KeyProblem("cast_lm_head_to_fp32 needs a head that is not tied to the embeddings")
    renderer = Renderer(source, tokenizer, settings.max_length, settings.long_rows)
    room = _find_room(arguments, renderer)
    read = read_both(settings, lambda paths: Prompts(paths, settings, renderer, room))
    _check_groups(read[0], arguments)
    return Data(renderer, *read, read_beside(settings, renderer))


def build_grpo_trainer(
    model: Any, tokenizer: Any, settings: GrpoSettings, arguments: GRPOConfig, data: Data
) -> "GroupTrainer":
    """Return the trainer of a model on questions that were read."""
    core, held_out = find_core(model), data.held_out
    check_head(core)
    trainer = build_trainer(
        GroupTrainer,
        model,
        settings,
        reward_funcs=load_rewards(settings, arguments, core.config, tokenizer),
        args=arguments,
        train_dataset=write_prompt_rows(data.train, "train", arguments),
        eval_dataset=write_prompt_rows(held_out, "eval", arguments) if held_out else None,
        processing_class=tokenizer,
    )
    return add_beside(trainer, settings, data)


def _find_room(arguments: GRPOConfig, renderer: Renderer) -> int:
    """Return how many tokens an answer may have.

    Raises:
        KeyProblem: if they leave no place for a question.
    """
    room = arguments.max_completion_length or 0
    if not 0 < room <= renderer.max_length - SHORTEST_PROMPT:
        raise KeyProblem(
            f"max_completion_length must be from 1 to {renderer.max_length - SHORTEST_PROMPT}, "
            f"which leaves a question {SHORTEST_PROMPT} of max_length={renderer.max_length} "
            f"tokens, got {arguments.max_completion_length}"
        )
    return room


def _check_groups(train: Prompts, arguments: GRPOConfig) -> None:
    """Refuse fewer questions than are answered at once: there would be nothing to train on."""
    wanted = (arguments.generation_batch_size or 0) // (arguments.num_generations or 1)
    if len(train) < wanted:
        raise KeyProblem(
            f"generation_batch_size={arguments.generation_batch_size} in groups of "
            f"num_generations={arguments.num_generations} takes {wanted} questions at once, and "
            f"there are {len(train)}: lower the first, or raise the second"
        )


def write_prompt_rows(prompts: Prompts, name: str, arguments: GRPOConfig) -> Any:
    """Return questions as trl's dataset: the text, its ids, and what the data answers."""

    def describe(number: int) -> dict[str, Any]:
        ids, text, reference = prompts[number]
        return {"prompt": text, "prompt_ids": ids, "reference": reference}

    return write_rows(prompts.rows.lengths, describe, name, arguments)


def load_rewards(
    settings: GrpoSettings, arguments: GRPOConfig, policy_config: Any, tokenizer: Any
) -> list["TrlReward"]:
    """Return what answers are rewarded by, the reward model first.

    Raises:
        ValueError: for a folder or a function that cannot be used.
    """
    rewards = []
    if settings.reward_model:
        compute_dtype = get_compute_dtype(arguments)
        what = (settings.reward_model, policy_config, tokenizer, compute_dtype, settings.any_base)
        scorer = load_reward_model(*what)
        rows = arguments.per_device_train_batch_size
        rewards.append(TrlReward(RewardModel(scorer.to(arguments.device), rows), "reward_model"))
    for entry_point in settings.reward_function:
        name = entry_point.rpartition(":")[2]
        rewards.append(TrlReward(load_function(entry_point), name))
    return rewards


class TrlReward:
    """A reward as trl calls one.

    Args:
        reward: ours.
        name: what its figures are called.
    """

    def __init__(self, reward: Reward, name: str) -> None:
        self.reward = reward
        self.__name__ = name

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        prompt_ids: list[list[int]],
        reference: list[str],
        **kwargs: Any,
    ) -> list[float]:
        """Return a score for each answer."""
        sampled = Sampled(prompt_ids, completion_ids, prompts, completions, reference)
        return self.reward(sampled).tolist()


class GroupTrainer(BesideTrainer, AlignmentTrainer, GRPOTrainer):
    """trl's trainer of group relative optimization on rendered questions.

    A question's answers are drawn by seeds that follow from the run's seed, the step, the process
    and how often the question was asked in it.
    """

    _asked: tuple[Any, Counter[int]] = (None, Counter())

    def count_tokens(self, inputs: dict[str, Any]) -> int:
        """Return how many tokens questions and answers have, pads left out."""
        return int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())

    def _get_train_sampler(self, *args: Any) -> Any:
        """Return trl's sampler, its order made to follow from the epoch, whoever has seen it.

        Its own goes on from epoch to epoch, and a resumed run would begin again with the first.
        """
        sampler: Any = super()._get_train_sampler(*args)
        if sampler.shuffle:
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(sampler.seed + epoch)
        return sampler

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Answer questions, keeping their ids for the step that would encode them."""
        self._prompt_ids = [row["prompt_ids"] for row in inputs]
        self._seeds = self._find_seeds([row["row"] for row in inputs])
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Return the ids of the questions as they were rendered."""
        return self._prompt_ids, None, {}

    def _find_seeds(self, numbers: list[int]) -> list[int]:
        """Return the seeds of answers to the questions of some numbers, which may be there twice.

        In a step that answers several times the counts go on.
        """
        place = (self.args.seed, int(self.model.training), self.state.global_step)
        if self._asked[0] != place or not self.model.training:
            self._asked = (place, Counter())
        seeds = []
        for number in numbers:
            count = self._asked[1][number]
            seeds.append(derive_seed(*place, self.args.process_index, number, count))
            self._asked[1][number] += 1
        return seeds

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Return the ids of an answer to each question, and no probabilities.

        trl's own way remains where weights lie in parts on several processes, and for options that
        only `generate` knows.
        """
        core, options = find_core(self.model), self.generation_kwargs
        is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        with only_options(core, options):
            if is_whole and uses_seeds(core, options):
                return answer_prompts(core, prompt_ids, options, self._seeds), None
        trainer: Any = super()
        return trainer._generate_single_turn(prompt_ids, *args, **kwargs)


STAGE = TrainerStage(
    "grpo",
    GrpoSettings,
    GRPOConfig,
    read_questions,
    build_grpo_trainer,
    build_arguments=build_grpo_arguments,
    defaults=STAGE_DEFAULTS["grpo"],
    lora_defaults=LORA_DEFAULTS["grpo"],
    figures=("reward", "rewards/*", "reward_std", "completions/*", "kl", "entropy", "loss"),
)
