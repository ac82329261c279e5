"""Owns the measuring of a model: perplexity, multiple choice, or the texts of its answers.

    chatglm train eval --eval_data held_out.jsonl --output out/perplexity
    chatglm train eval --task choices --eval_data ceval --shots 5 --output out/ceval
    chatglm train eval --task generation --eval_data dev.jsonl --adapter lora --output out/texts

The model may be a whole folder, packed (`bits`), with LoRA adapters or with a P-Tuning prefix
(`adapter`). The figures go to `eval.json` in the output folder. Nothing is trained.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed
from transformers.trainer_utils import EvalPrediction

from chatglm import door
from chatglm.answering import derive_seed
from chatglm.checking.quick import require_text
from chatglm.data.dialects import read_answers
from chatglm.data.files import RecordFiles, open_records
from chatglm.evaluating import metrics
from chatglm.evaluating.multiple_choice import (
    mark_subject,
    mark_test,
    read_subjects,
)
from chatglm.evaluating.ranking import ChoiceRanker
from chatglm.evaluating.scoring import BatchedModel
from chatglm.evaluating.settings import EvalSettings
from chatglm.loading import choose_device, choose_dtype
from chatglm.training.data.batches import Examples
from chatglm.training.data.rendering import Renderer
from chatglm.training.json_lines import write_lines
from chatglm.training.models import find_base, load_policy, load_tokenizer, read_format
from chatglm.training.resuming import open_output
from chatglm.training.trainer import summarize_losses

RESULT_FILE = "eval.json"
PREDICTIONS_FILE = "generated_predictions.txt"
SUBMISSION_FILE = "submission.json"


class EvaluatedModel:
    """A model that is evaluated, and what goes with it.

    Args:
        settings: which model, and how it is asked.

    Raises:
        ValueError: for a folder that is not whole, or a length that it does not have.
    """

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings
        self.tokenizer = load_tokenizer(settings)
        self.renderer = Renderer(
            read_format(settings), self.tokenizer, settings.max_length, settings.long_rows
        )

    @cached_property
    def model(self) -> BatchedModel:
        """The model itself, loaded when it is first asked: rows are rendered before.

        Raises:
            ValueError: if it cannot be loaded as the settings say.
        """
        batch_size = self.settings.per_device_eval_batch_size
        return BatchedModel(load_evaluated(self.settings), self.renderer.pad_id, batch_size)


class Perplexity:
    """How well a model foresees the answers of rows.

    Args:
        settings: of the evaluation.

    Raises:
        ValueError: for files or rows that cannot be used.
    """

    def __init__(self, settings: EvalSettings) -> None:
        self.records = read_records(settings)

    def measure(self, evaluated: EvaluatedModel, folder: Path) -> dict[str, Any]:
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

    def measure(self, evaluated: EvaluatedModel, folder: Path) -> dict[str, Any]:
        """Write the answers beside those of the rows, and return their scores.

        Raises:
            ValueError: for rows that are too long.
        """
        room, renderer = self.settings.max_new_tokens, evaluated.renderer
        prompts = Examples(self.records, lambda record: renderer.render_prompt(record, room))
        set_seed(self.settings.seed)
        options = build_options(self.settings, renderer.pad_id)
        asked = [prompts[i] for i in range(len(prompts))]
        seeds = [derive_seed(self.settings.seed, row) for row in prompts.kept]
        answers = evaluated.model.generate(asked, options, seeds)
        labels = [renderer.encode_text(self.records[i].answer) for i in prompts.kept]
        pairs = list(zip(_decode(evaluated, answers), _decode(evaluated, labels)))
        write_predictions(pairs, folder / PREDICTIONS_FILE)
        empty = sum(not prediction for prediction, _ in pairs)
        skipped = self.records.num_skipped + prompts.num_skipped
        counts = {"rows": len(pairs), "empty": empty, "skipped": skipped}
        return {**metrics.average_scores(pairs), **counts}


class Choices:
    """How many questions of a test a model answers rightly.

    Args:
        settings: of the evaluation.

    Raises:
        ValueError: for a folder or files that are no such test.
    """

    def __init__(self, settings: EvalSettings) -> None:
        folder = settings.eval_data[0]
        self.settings = settings
        self.subjects, self.problems = read_subjects(
            Path(folder),
            settings.split,
            settings.shots,
            settings.subjects,
            settings.bad_rows == "skip",
        )

    def measure(self, evaluated: EvaluatedModel, folder: Path) -> dict[str, Any]:
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
        write_json(submission, folder / SUBMISSION_FILE)
        return {**mark_test(marks), "bad_rows": len(self.problems), "subjects": marks}


MEASURES = {"perplexity": Perplexity, "choices": Choices, "generation": Generation}


def measure_one(settings: EvalSettings, given: dict[str, Any]) -> dict[str, Any]:
    """Measure one model, write `eval.json`, and return what is in it.

    Args:
        settings: ours.
        given: nothing.

    Raises:
        ValueError: for settings, data, a model or a folder that cannot be used.
        ImportError: if a package that compares texts is missing.
    """
    task = MEASURES[settings.task](settings)
    with open_output(settings, given):
        folder = Path(settings.output)
        figures = {"task": settings.task, **task.measure(EvaluatedModel(settings), folder)}
        write_json(figures, folder / RESULT_FILE)
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


def write_predictions(pairs: Sequence[tuple[str, str]], path: Path) -> None:
    """Write the lines of the official scripts, of predictions and labels."""
    write_lines(({"labels": label, "predict": prediction} for prediction, label in pairs), path)


def _decode(evaluated: EvaluatedModel, rows: Sequence[list[int]]) -> list[str]:
    """Return texts as the official scripts write them: labels go through ids as well."""
    decode = evaluated.tokenizer.decode
    return [decode(row, skip_special_tokens=True).strip() for row in rows]


def write_json(fields: dict[str, Any], path: Path) -> None:
    """Write a JSON object to be read by people too."""
    path.write_text(json.dumps(fields, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_evaluated(settings: EvalSettings) -> Any:
    """Return the model that the settings describe, on its device, in evaluation mode.

    Raises:
        ValueError: for a device, a folder, adapters or a prefix that do not fit.
    """
    device = choose_device(settings.device or None)
    dtype = choose_dtype(settings.dtype or None, device)
    if not door.runs_folder_code():
        require_text(find_base(settings))
    return load_policy(settings, dtype, is_trained=False).to(device).eval()


__all__ = [
    "MEASURES",
    "RESULT_FILE",
    "EvaluatedModel",
    "load_evaluated",
    "measure_one",
    "write_json",
]
