"""Owns the measuring of a model: perplexity, multiple choice, or the texts of its answers.

    chatglm train eval --eval_data held_out.jsonl --output out/perplexity
    chatglm train eval --task choices --eval_data ceval --shots 5 --output out/ceval
    chatglm train eval --task generation --eval_data dev.jsonl --adapter lora --output out/texts

The model may be a whole folder, packed (`bits`), with LoRA adapters or with a P-Tuning prefix
(`adapter`). The figures go to `eval.json` in the output folder. Nothing is trained.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed
from transformers.trainer_utils import EvalPrediction

from chatglm.evaluating import metrics
from chatglm.evaluating.multiple_choice import (
    SPLITS,
    WORDINGS,
    mark_subject,
    mark_test,
    read_subjects,
)
from chatglm.evaluating.ranking import ANSWERS, ChoiceRanker
from chatglm.evaluating.scoring import BatchedModel
from chatglm.loading import choose_device, choose_dtype
from chatglm.training.data.batches import Examples
from chatglm.training.data.records import RecordFiles, open_records, read_answers
from chatglm.training.data.rendering import Renderer
from chatglm.training.models import ADAPTER_FILE, find_core, load_policy, load_tokenizer
from chatglm.training.prefixes import load_with_prefix
from chatglm.training.settings import Settings, require
from chatglm.training.stage import Stage
from chatglm.training.trainer import prepare_output, summarize_losses

RESULT_FILE = "eval.json"
PREDICTIONS_FILE = "generated_predictions.txt"
SUBMISSION_FILE = "submission.json"


@dataclass
class EvalSettings(Settings):
    """What an evaluation can be told beside what every stage can.

    Attributes:
        task: "perplexity" of the answers of rows, "choices" of a multiple-choice test, or
            "generation" of answers that are compared with those of rows.
        adapter: folder of LoRA adapters, or of a P-Tuning prefix in the official layout or peft's.
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
        do_sample: draw answers, with `top_p` and `temperature`, instead of taking the likeliest
            tokens.
        num_beams: of a beam search.
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

    def check(self) -> None:
        """Refuse values that no task can work with, and those of a training.

        Raises:
            KeyProblem: as in `Settings`.
        """
        super().check()
        require(self.task in TASKS, "task", self.task, " or ".join(TASKS))
        require(self.split in SPLITS, "split", self.split, " or ".join(SPLITS))
        require(self.answer_by in ANSWERS, "answer_by", self.answer_by, " or ".join(ANSWERS))
        languages = ("", *WORDINGS)
        require(self.language in languages, "language", self.language, " or ".join(WORDINGS))
        for key in ("per_device_eval_batch_size", "max_new_tokens", "num_beams"):
            require(getattr(self, key) > 0, key, getattr(self, key), "1 or more")
        require(self.shots >= 0, "shots", self.shots, "0 or more")
        is_own_shot = self.shots and self.split == "dev"
        require(not is_own_shot, "shots", self.shots, "0 for the split dev, which has the shots")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "more than 0")
        for key in ("lora_rank", "resume", "train_data"):
            value = getattr(self, key)
            require(not value, key, value, "left out: an evaluation trains nothing")
        require(bool(self.eval_data), "eval_data", self.eval_data, "files, or a test's folder")


@dataclass
class EvalArguments:
    """No keys of a library: all are in `EvalSettings`."""


class EvaluatedModel:
    """A model that is evaluated, and what goes with it.

    Args:
        settings: which model, and how it is asked.

    Raises:
        ValueError: if it cannot be loaded so.
    """

    def __init__(self, settings: EvalSettings) -> None:
        self.tokenizer = load_tokenizer(settings)
        model = load_evaluated(settings)
        self.renderer = Renderer(
            find_core(model), self.tokenizer, settings.max_length, settings.long_rows
        )
        batch_size = settings.per_device_eval_batch_size
        self.model = BatchedModel(model, self.renderer.pad_id, batch_size)


class Perplexity:
    """How well a model foresees the answers of rows.

    Args:
        settings: of the evaluation.

    Raises:
        ValueError: for files or rows that cannot be used.
    """

    def __init__(self, settings: EvalSettings) -> None:
        self.records = read_records(settings)

    def measure(self, evaluated: EvaluatedModel) -> dict[str, Any]:
        """Return loss, perplexity and accuracy over all tokens of answers, and for each file.

        Raises:
            ValueError: for rows that are too long, or scores that are no numbers.
        """
        examples = Examples(self.records, evaluated.renderer.render)
        measured = evaluated.model.measure_answers(examples, examples.lengths).numpy()
        sources = np.array([self.records[i].source.rpartition(":")[0] for i in examples.kept])
        files = {
            file: summarize_rows(measured[sources == file])
            for file in dict.fromkeys(sources.tolist())
        }
        skipped = self.records.num_skipped + examples.num_skipped
        return {**summarize_rows(measured), "skipped": skipped, "files": files}


class Generation:
    """How near a model's own answers are to those of rows.

    Args:
        settings: of the evaluation.

    Raises:
        ValueError: for files or rows that cannot be used.
        ImportError: if a package that compares texts is missing.
    """

    def __init__(self, settings: EvalSettings) -> None:
        metrics.load_packages()
        self.settings = settings
        self.records = read_records(settings)

    def measure(self, evaluated: EvaluatedModel) -> dict[str, Any]:
        """Write the answers beside those of the rows, and return their scores.

        Raises:
            ValueError: for rows that are too long.
        """
        room, renderer = self.settings.max_new_tokens, evaluated.renderer
        prompts = Examples(self.records, lambda record: renderer.render_prompt(record, room))
        set_seed(self.settings.seed)
        options = build_options(self.settings, renderer.pad_id)
        answers = evaluated.model.generate([prompts[i] for i in range(len(prompts))], options)
        labels = [renderer.encode_text(self.records[i].answer) for i in prompts.kept]
        pairs = list(zip(_decode(evaluated, answers), _decode(evaluated, labels)))
        self._write(pairs)
        empty = sum(not prediction for prediction, _ in pairs)
        skipped = self.records.num_skipped + prompts.num_skipped
        counts = {"rows": len(pairs), "empty": empty, "skipped": skipped}
        return {**metrics.average_scores(pairs), **counts}

    def _write(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Write the lines of the official scripts."""
        path = Path(self.settings.output) / PREDICTIONS_FILE
        lines = [{"labels": label, "predict": prediction} for prediction, label in pairs]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")


class Choices:
    """How many questions of a test a model answers rightly.

    Args:
        settings: of the evaluation.

    Raises:
        ValueError: for a folder or files that are no such test.
    """

    def __init__(self, settings: EvalSettings) -> None:
        count, folder = len(settings.eval_data), settings.eval_data[0]
        require(count == 1, "eval_data", settings.eval_data, "the one folder of a test")
        self.settings = settings
        self.subjects, self.problems = read_subjects(
            Path(folder),
            settings.split,
            settings.shots,
            settings.subjects,
            settings.bad_rows == "skip",
        )

    def measure(self, evaluated: EvaluatedModel) -> dict[str, Any]:
        """Write the picked letters, and return the marks of all, of categories and of subjects.

        Raises:
            ValueError: for a vocabulary without letters, questions that are too long, or scores
                that are no numbers.
        """
        settings = self.settings
        ranker = ChoiceRanker(
            evaluated.renderer, evaluated.model, settings.answer_by, settings.language
        )
        marks: dict[str, dict[str, Any]] = {}
        submission: dict[str, dict[str, str]] = {}
        for subject in self.subjects:
            picked, shots = ranker.answer(subject)
            pairs = zip(subject.questions, picked)
            submission[subject.name] = {q.key: letter for q, letter in pairs if letter}
            counts = {"shots": shots, "skipped": picked.count("")}
            marks[subject.name] = mark_subject(subject.questions, picked) | counts
        _write_json(submission, Path(settings.output) / SUBMISSION_FILE)
        return {**mark_test(marks), "bad_rows": len(self.problems), "subjects": marks}


TASKS = {"perplexity": Perplexity, "choices": Choices, "generation": Generation}


def main(settings: EvalSettings, given: dict[str, Any]) -> dict[str, Any]:
    """Measure, write `eval.json`, and return what is in it.

    Args:
        settings: ours.
        given: nothing.

    Raises:
        ValueError: for settings, data, a model or a folder that cannot be used.
        ImportError: if a package that compares texts is missing.
    """
    task = TASKS[settings.task](settings)
    prepare_output(settings, given)
    figures = {"task": settings.task, **task.measure(EvaluatedModel(settings))}
    _write_json(figures, Path(settings.output) / RESULT_FILE)
    return figures


def read_records(settings: EvalSettings) -> RecordFiles:
    """Return the records with answers of the settings' files."""
    return open_records(settings.eval_data, read_answers, settings)


def summarize_rows(measured: np.ndarray) -> dict[str, Any]:
    """Return the figures of rows `(N, 3)`, every token counted once."""
    figures = summarize_losses(EvalPrediction(measured, np.empty(0)))
    return {**figures, "tokens": int(measured[:, 1].sum()), "rows": len(measured)}


def build_options(settings: EvalSettings, pad_id: int) -> dict[str, Any]:
    """Return the options of `generate`."""
    # Without drawing, other values of these would only be warned about.
    drawing = {"top_p": 1.0, "temperature": 1.0}
    if settings.do_sample:
        drawing = {"top_p": settings.top_p, "temperature": settings.temperature}
    names = ("max_new_tokens", "do_sample", "num_beams")
    return {name: getattr(settings, name) for name in names} | drawing | {"pad_token_id": pad_id}


def _decode(evaluated: EvaluatedModel, rows: Sequence[list[int]]) -> list[str]:
    """Return texts as the official scripts write them: labels go through ids as well."""
    decode = evaluated.tokenizer.decode
    return [decode(row, skip_special_tokens=True).strip() for row in rows]


def _write_json(fields: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(fields, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_evaluated(settings: EvalSettings) -> Any:
    """Return the model that the settings describe, on its device, in evaluation mode.

    Raises:
        ValueError: for a device, a folder, adapters or a prefix that do not fit.
    """
    device = choose_device(settings.device or None)
    dtype = choose_dtype(settings.dtype or None, device)
    if settings.adapter and not (Path(settings.adapter) / ADAPTER_FILE).is_file():
        model = load_with_prefix(settings, dtype)
    else:
        model = load_policy(settings, dtype, is_trained=False)
    return model.to(device).eval()


STAGE = Stage("eval", EvalSettings, EvalArguments, main)


__all__ = ["STAGE", "EvalArguments", "EvalSettings", "load_evaluated", "main"]
