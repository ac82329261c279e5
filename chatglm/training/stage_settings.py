"""Owns the keys of each stage on a trainer that not every stage has, and what they mean.

Imports neither torch nor transformers, so that keys are told and checked at once. Does not know
what a stage does with them.
"""

from dataclasses import dataclass, field

from chatglm.training.settings import KeyProblem, RowSettings, Settings, require


@dataclass
class StreamSettings(RowSettings):
    """What stages on transformers' Trainer can be told of sets that are too big.

    Attributes:
        streaming: read rows when their turn comes instead of looking at all of them first; needs
            max_steps.
    """

    streaming: bool = False

    def check(self) -> None:
        """Refuse keys that need all rows beside a stream.

        Raises:
            KeyProblem: naming the key.
        """
        super().check()
        for key in ("group_by_length", "val_ratio", "max_samples"):
            value = getattr(self, key)
            is_fine = not (self.streaming and value)
            require(is_fine, key, value, "left out beside streaming: it needs all rows")


@dataclass
class PretrainSettings(StreamSettings):
    """What pre-training can be told beside what every stage can.

    Attributes:
        mask_share: share of the pieces that lose a span inside; the others lose their end.
        span_ratio: the span's share of its piece, on average.
        suffix_ratio: the least share of its piece that is taken as its end; the most is all but
            one token.
    """

    mask_share: float = 0.5
    span_ratio: float = 0.15
    suffix_ratio: float = 0.5

    def check(self) -> None:
        """Refuse shares that are none."""
        super().check()
        require(0 <= self.mask_share <= 1, "mask_share", self.mask_share, "in [0, 1]")
        require(0 < self.span_ratio <= 0.5, "span_ratio", self.span_ratio, "in (0, 0.5]")
        require(0 < self.suffix_ratio <= 1, "suffix_ratio", self.suffix_ratio, "in (0, 1]")


@dataclass
class SftSettings(StreamSettings):
    """What supervised fine-tuning can be told beside what every stage can.

    Attributes:
        packing: put several documents into a row, which wastes no padding.
        max_source_length: tokens that a prompt is cut to at its end, as in the official scripts:
            one less, and the two markers behind it; 0 cuts nothing.
        max_target_length: the same of an answer: two less, and its end token; 0 cuts nothing.
    """

    packing: bool = False
    max_source_length: int = 0
    max_target_length: int = 0

    def check(self) -> None:
        """Refuse lengths that leave nothing too.

        Raises:
            KeyProblem: as every stage's, or for such a length.
        """
        super().check()
        for key, least in (("max_source_length", 2), ("max_target_length", 3)):
            value = getattr(self, key)
            require(value == 0 or value >= least, key, value, f"0, or {least} or more")
        is_fine = not (self.streaming and self.packing)
        require(is_fine, "packing", self.packing, "left out beside streaming: it needs all rows")


@dataclass
class PtuningSettings(SftSettings):
    """What P-Tuning can be told beside what supervised fine-tuning can.

    Attributes:
        adapter: folder of a prefix to go on from: a checkpoint of the official scripts or of this
            stage, what this stage writes, or an adapter of peft's prefix tuning.
        pre_seq_len: columns of the prefix; 0 for those of the prefix to go on from, 128 of a new
            one.
        prefix_projection: learn it through a two-layer network, which is thrown away afterwards;
            by default only where the prefix to go on from has one.
    """

    pre_seq_len: int = 0
    prefix_projection: bool | None = None

    def check(self) -> None:
        """Refuse values that a prefix cannot have, and LoRA beside it."""
        super().check()
        require(self.pre_seq_len >= 0, "pre_seq_len", self.pre_seq_len, "0 or more")
        if self.lora_rank:
            raise KeyProblem("lora_rank does not go with a prefix: use the stage sft")
        require(len(self.adapter) < 2, "adapter", self.adapter, "one folder, of a prefix")

    @property
    def uses_lora(self) -> bool:
        """Nothing of it: the adapter to go on from is a prefix."""
        return False


@dataclass
class RewardSettings(RowSettings):
    """What the training of a reward model can be told: nothing but what every stage can."""

    def check(self) -> None:
        """Refuse questions to a model that gives scores.

        Raises:
            KeyProblem: as every stage's, or for `sample_prompts`.
        """
        super().check()
        if self.sample_prompts:
            raise KeyProblem(
                "sample_prompts cannot be answered by a reward model: leave the key out"
            )


@dataclass
class BesideSettings(Settings):
    """What stages that learn preferences can be told about plain answers beside.

    Attributes:
        sft_data: files of answers that are learned beside, as in `sft`, against forgetting.
        sft_share: share of the rows of a step that they are, in loss and number, as 0.333.
    """

    sft_data: list[str] = field(default_factory=list)
    sft_share: float = 0.0

    def check(self) -> None:
        """Refuse one of the keys without the other, and a share that is none."""
        super().check()
        require(0 <= self.sft_share < 1, "sft_share", self.sft_share, "from 0 to below 1")
        if bool(self.sft_data) != bool(self.sft_share):
            raise KeyProblem(
                f"sft_data names {len(self.sft_data)} files and sft_share is {self.sft_share}: set "
                "both, as sft_share: 0.333 for a third of all rows, or neither"
            )


@dataclass
class DpoSettings(RowSettings, BesideSettings):
    """What preference optimization can be told beside the keys of `DPOConfig`, as `beta`."""


@dataclass
class GrpoSettings(BesideSettings):
    """What group relative optimization can be told beside the keys of `GRPOConfig`.

    Attributes:
        reward_model: folder that `chatglm train reward` wrote.
        reward_function: functions, "module:function" or "file.py:function", called with prompts,
            answers and references, three lists of texts.
    """

    reward_model: str = ""
    reward_function: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse settings without a reward too.

        Raises:
            KeyProblem: as every stage's, or if nothing rewards.
        """
        super().check()
        if not (self.reward_model or self.reward_function):
            raise KeyProblem("nothing rewards an answer: set reward_model or reward_function")


__all__ = [
    "BesideSettings",
    "DpoSettings",
    "GrpoSettings",
    "PretrainSettings",
    "PtuningSettings",
    "RewardSettings",
    "SftSettings",
    "StreamSettings",
]
