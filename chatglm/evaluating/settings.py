"""Owns what an evaluation can be told: its keys, their meaning, which values they can have.

Imports neither torch nor transformers. Does not know what is done with them.
"""

from dataclasses import dataclass, field

from chatglm.training.settings import Settings, require

TASKS = ("perplexity", "choices", "generation")
SCORED = ("pairs", "answers")
SPLITS = ("dev", "val", "test")
LANGUAGES = ("zh", "en")
ANSWERS = ("letter", "text", "text_mean")


@dataclass
class EvalSettings(Settings):
    """What an evaluation can be told beside what every stage can.

    Attributes:
        task: "perplexity" of the answers of rows, "choices" of a multiple-choice test, or
            "generation" of answers that are compared with those of rows.
        adapter: folders of LoRA adapters in order, or of a P-Tuning prefix in the official layout
            or peft's.
        per_device_eval_batch_size: rows of a pass.
        device: as "cpu" or "cuda:1"; "" is the best one of this machine.
        seed: of what is drawn.
        split: of a test: "dev", "val" or "test". `eval_data` names the folder they are in.
        shots: answered questions before each question.
        subjects: of the test; all if none is named.
        language: of the words around questions, "zh" or "en"; "" is that of the questions.
        answer_by: "letter": the likeliest of the letters of the listed options; "text": the
            likeliest of the options' texts as a whole answer; "text_mean": the same by the mean
            over its tokens.
        max_new_tokens: of a generated answer.
        do_sample: draw answers instead of taking the likeliest tokens.
        top_p, temperature: of what is drawn.
        num_beams: of a beam search.
        matrix: measure several models, each in several number formats, side by side; what was
            measured is kept, and `resume` goes on with it.
        models: of the matrix beside `model` and its `adapter`: folders of models, or of adapters,
            which go onto `model`.
        matrix_bits: its number formats: 0 for weights as they are (`dtype`), 8, 4.
    """

    task: str = "perplexity"
    per_device_eval_batch_size: int = 8
    device: str = ""
    seed: int = 42
    split: str = "val"
    shots: int = 0
    subjects: list[str] = field(default_factory=list)
    language: str = ""
    answer_by: str = "letter"
    max_new_tokens: int = 128
    do_sample: bool = False
    top_p: float = 0.7
    temperature: float = 0.95
    num_beams: int = 1
    matrix: bool = False
    models: list[str] = field(default_factory=list)
    matrix_bits: list[int] = field(default_factory=lambda: [0, 8, 4])

    def check(self) -> None:
        """Refuse values that no task can work with, and those of a training.

        Raises:
            KeyProblem: as in `Settings`.
        """
        super().check()
        require(self.task in TASKS, "task", self.task, " or ".join(TASKS))
        require(self.split in SPLITS, "split", self.split, " or ".join(SPLITS))
        require(self.answer_by in ANSWERS, "answer_by", self.answer_by, " or ".join(ANSWERS))
        languages = ("", *LANGUAGES)
        require(self.language in languages, "language", self.language, " or ".join(LANGUAGES))
        for key in ("learn_turns", "default_system") if self.task == "choices" else ():
            require(not getattr(self, key), key, getattr(self, key), "left out: a test has no rows")
        for key in ("per_device_eval_batch_size", "max_new_tokens", "num_beams"):
            require(getattr(self, key) > 0, key, getattr(self, key), "1 or more")
        require(self.shots >= 0, "shots", self.shots, "0 or more")
        is_own_shot = self.shots and self.split == "dev"
        require(not is_own_shot, "shots", self.shots, "0 for the split dev, which has the shots")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "more than 0")
        refuse_training(self, () if self.matrix else ("resume",))
        is_one = self.task != "choices" or len(self.eval_data) < 2
        require(is_one, "eval_data", self.eval_data, "the one folder of a test")
        require(bool(self.eval_data), "eval_data", self.eval_data, "files, or a test's folder")
        self._check_matrix()

    def _check_matrix(self) -> None:
        """Refuse a matrix of nothing, and its keys where there is none."""
        bits, models = self.matrix_bits, self.models
        require(self.matrix or not models, "models", models, "left out, or matrix be true")
        is_set = bool(bits) and set(bits) <= {0, 4, 8} and len(set(bits)) == len(bits)
        require(is_set, "matrix_bits", bits, "some of 0, 8 and 4, each once")
        has_own = self.matrix or bits == [0, 8, 4]
        require(has_own, "matrix_bits", bits, "left out, or matrix be true")
        is_one = not (self.matrix and self.bits)
        require(is_one, "bits", self.bits, "left out: a matrix has matrix_bits")


@dataclass
class ScoreSettings(Settings):
    """What the scoring by a reward model can be told beside what every stage can.

    Attributes:
        model: folder of the reward model, a whole one or adapters, which name their base.
        adapter: folder of the reward model's adapters, if `model` is another place of their base.
        task: "pairs" of a better and a worse answer, or "answers", of which those of one question
            are ranked.
        per_device_eval_batch_size: rows of a pass.
        device: as "cpu" or "cuda:1"; "" is the best one of this machine.
    """

    task: str = "pairs"
    per_device_eval_batch_size: int = 8
    device: str = ""

    def check(self) -> None:
        """Refuse values that no task can work with, and those of a training.

        Raises:
            KeyProblem: as in `Settings`.
        """
        super().check()
        require(self.task in SCORED, "task", self.task, " or ".join(SCORED))
        size = self.per_device_eval_batch_size
        require(size > 0, "per_device_eval_batch_size", size, "1 or more")
        require(bool(self.model), "model", self.model, "the folder of a reward model")
        require(len(self.adapter) < 2, "adapter", self.adapter, "one folder, of a reward model")
        refuse_training(self, ("resume",))
        require(bool(self.eval_data), "eval_data", self.eval_data, "files of rows")


def refuse_training(settings: Settings, others: tuple[str, ...] = ()) -> None:
    """Refuse the keys of a training.

    Args:
        settings: of an evaluation.
        others: keys that are refused besides.

    Raises:
        KeyProblem: naming one that is set.
    """
    for key in ("lora_rank", "train_data", *others):
        value = getattr(settings, key)
        require(not value, key, value, "left out: an evaluation trains nothing")


__all__ = ["ANSWERS", "LANGUAGES", "SCORED", "SPLITS", "TASKS", "EvalSettings", "ScoreSettings"]
