"""Owns the keys of PPO: what they are, what they mean, which values they can have.

Does not know what is done with them.
"""

from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from chatglm.training.settings import KeyProblem, coerce, require
from chatglm.training.stage_settings import BesideSettings

# `math.estimate_kl` has their equations.
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass
class PpoSettings(BesideSettings):
    """What PPO can be told beside what every stage can.

    Attributes:
        reward_model: folder of the `reward` stage, a whole model or adapters.
        reward_function: instead of it, "module:function" or "file.py:function", called with lists
            of prompts, answers and references.
        max_new_tokens: most tokens of an answer, `<eop>` included.
        temperature: that answers are sampled, and probabilities taken, at.
        top_p: share of the probability that is sampled from. Below 1 the ratios are not those of
            the distribution that was sampled from; leave it at 1.
        rollout_batch_size: rows that are sampled at once; 0 is all of a step's.
        num_mini_batches: optimizer steps that share the answers of a step.
        num_ppo_epochs: how often each answer is learned from.
        clip_range: how far a token's probability counts, as a share of what it was.
        value_clip_range: how far a value may move; 0 for any.
        value_coefficient: weight of the value head's loss.
        entropy_coefficient: what a nat of entropy is worth; 0 for nothing.
        value_learning_rate: of the value head, which begins from nothing.
        gamma: what a reward is worth one token earlier.
        gae_lambda: 0 trusts the value head, 1 the rewards alone.
        kl_coefficient: what a nat of KL from the reference costs, in units of the score; where an
            adaptive one begins.
        kl_estimator: "k1", "k2" or "k3" (`math.estimate_kl`).
        kl_target: nats of an answer that the coefficient is moved for; 0 keeps it fixed.
        kl_gain: how much it is moved at most, times 0.2.
        update_kl_limit: nats of a token from the policy that sampled, at which the learning from a
            step's answers ends; 0 for none.
        score_clip: scores are cut off beyond it; 0 for none.
        whiten_scores, whiten_rewards, whiten_advantages: bring them to variance 1 in each step, and
            all but rewards to mean 0.
        subtract_reference: take the score of the data's own answer from each, so that no question
            is worth more than another.
        missing_end_penalty: taken from the score of an answer without `<eop>`.
        ptx_data: files of answers that are learned beside, as many as are sampled; `sft_data` with
            `sft_share` is the same in another measure.
        ptx_coefficient: weight of their loss.
    """

    reward_model: str = ""
    reward_function: str = ""
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    rollout_batch_size: int = 0
    num_mini_batches: int = 4
    num_ppo_epochs: int = 4
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    value_learning_rate: float = 1e-4
    gamma: float = 1.0
    gae_lambda: float = 0.95
    kl_coefficient: float = 0.05
    kl_estimator: str = "k1"
    kl_target: float = 0.0
    kl_gain: float = 0.1
    update_kl_limit: float = 0.0
    score_clip: float = 5.0
    whiten_scores: bool = False
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    subtract_reference: bool = False
    missing_end_penalty: float = 0.0
    ptx_data: list[str] = field(default_factory=list)
    ptx_coefficient: float = 1.0

    def check(self) -> None:
        """Refuse values that cannot be worked with.

        Raises:
            KeyProblem: naming the key, the value, and what is possible.
        """
        super().check()
        rewards = [key for key in (self.reward_model, self.reward_function) if key]
        require(len(rewards) == 1, "reward_model or reward_function", rewards, "given, one of them")
        for key in ("max_new_tokens", "num_mini_batches", "num_ppo_epochs"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("temperature", "clip_range", "value_learning_rate"):
            require(getattr(self, key) > 0, key, getattr(self, key), "more than 0")
        for key in ("gamma", "gae_lambda", "top_p"):
            require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "from 0 to 1")
        for item in fields(PpoSettings):
            value = getattr(self, item.name)
            if isinstance(value, float | int):
                require(value >= 0, item.name, value, "0 or more")
        is_estimator = self.kl_estimator in KL_ESTIMATORS
        require(is_estimator, "kl_estimator", self.kl_estimator, f"one of {KL_ESTIMATORS}")
        require(self.top_p > 0, "top_p", self.top_p, "more than 0")
        if self.ptx_data and self.sft_data:
            raise KeyProblem("ptx_data and sft_data are learned in the same place: set one of them")
        if self.early_stopping_patience:
            raise KeyProblem(
                "early_stopping_patience is not for ppo, which writes its last policy: look at "
                "eval_reward and eval_kl in log.jsonl, and take the checkpoint of the best step"
            )
        is_quiet = self.lora_dropout == 0
        require(is_quiet, "lora_dropout", self.lora_dropout, "0: ratios would begin off 1")


@dataclass
class PpoArguments:
    """Keys that `transformers.TrainingArguments` has too, and that mean here what they mean there.

    A step is a batch of answers and all that is learned from it. In it each process samples
    `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches` answers.

    Attributes:
        learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon: of AdamW.
        max_grad_norm: gradients are brought to this norm; 0 leaves them.
        lr_scheduler_type, warmup_steps: how the learning rates go, from step to step.
        num_train_epochs: how often to go over the prompts.
        max_steps: instead of it; -1 if it is not.
        per_device_train_batch_size: answers that are learned from at once.
        gradient_accumulation_steps: of those, for one optimizer step.
        gradient_checkpointing: save memory for time.
        bf16, fp16: compute in bfloat16 or float16.
        seed: of everything random.
        full_determinism: the same bits every time on a GPU too, but slower.
        logging_steps: steps that share a line of the log.
        eval_steps: how often held-out prompts are answered.
        save_steps, save_total_limit: how often a checkpoint is written, and how many are kept.
        report_to: where figures go beside the files: tensorboard, wandb and others, or none.
        disable_tqdm: show no bar.
        use_cpu: leave the GPU alone.
    """

    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    bf16: bool = False
    fp16: bool = False
    seed: int = 42
    full_determinism: bool = False
    logging_steps: int = 1
    eval_steps: int = 50
    save_steps: int = 50
    save_total_limit: int | None = 3
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    disable_tqdm: bool = False
    use_cpu: bool = False

    @property
    def trackers(self) -> list[str]:
        """Where figures go, without "none"."""
        return [name for name in self.report_to if name != "none"]


def read_arguments(given: dict[str, Any]) -> PpoArguments:
    """Return the library's keys of PPO.

    Raises:
        KeyProblem: for a value that one cannot have.
    """
    hints = get_type_hints(PpoArguments)
    arguments = PpoArguments(**{key: coerce(key, given[key], hints[key]) for key in given})
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
        require(getattr(arguments, key) >= 1, key, getattr(arguments, key), "1 or more")
    for key in ("eval_steps", "save_steps"):
        require(getattr(arguments, key) >= 1, key, getattr(arguments, key), "1 or more")
    for key in ("learning_rate", "num_train_epochs"):
        require(getattr(arguments, key) > 0, key, getattr(arguments, key), "more than 0")
    require(not (arguments.bf16 and arguments.fp16), "bf16 and fp16", "both", "one of them")
    return arguments


__all__ = ["KL_ESTIMATORS", "PpoArguments", "PpoSettings", "read_arguments"]
