"""lm-evaluation-harness with a ChatGLM, as a model of its own kind.

    pip install lm-eval
    python examples/lm_eval_harness.py FOLDER

Contexts stand before `<sop>` and are read in both directions, continuations behind it; that is what
`model.score` does. The harness's own way (`--model hf`) puts both into what is read in both
directions, where each token is seen by the one before it: its figures would mean nothing, and
nothing would say so. For a task of your own or one of the harness's, pass `ChatGLM(FOLDER)` as
`model` to `lm_eval.simple_evaluate`.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    {
        "question": "中国的首都是哪里？",
        "choices": ["中国的首都是北京。", "中国的首都是巴黎。", "中国的首都是伦敦。"],
        "answer": 0,
    },
    {
        "question": "法国的首都是哪里？",
        "choices": ["法国的首都是东京。", "法国的首都是巴黎。", "法国的首都是罗马。"],
        "answer": 1,
    },
]


class ChatGLM(LM):
    """What the harness asks of a model.

    Args:
        folder: of a ChatGLM.
        batch_size: most rows of a pass.
        max_new_tokens: of answers to tasks that do not say.
    """

    def __init__(self, folder: str, batch_size: int = 8, max_new_tokens: int = 128) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        ).eval()
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log probability, and whether it is the likeliest one."""
        prompts, answers = zip(*(request.args for request in requests))
        options = {"end_token": False, "batch_size": self.batch_size}
        scores = self.model.score(self.tokenizer, prompts, answers, **options)
        return list(zip(scores.log_probs.tolist(), scores.is_greedy.tolist()))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log probability of whole texts, in parts where one is longer than the window.

        Each part has the text before it as its context, up to half of the window.
        """
        size = self.model.config.max_sequence_length // 2 - 2
        start = [self.model.config.gmask_token_id, self.model.config.bos_token_id]
        totals = []
        for request in requests:
            ids = self.tokenizer(request.args[0], add_special_tokens=False)["input_ids"]
            rows = [
                (ids[max(0, i - size) : i] + start, ids[i : i + size])
                for i in range(0, len(ids), size)
            ]
            totals.append(float(self.model.score_ids(rows, self.batch_size).log_probs.sum()))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each prompt, up to the first of its stop texts."""
        answers = []
        for request in requests:
            prompt, asked = request.args
            options: dict[str, Any] = {
                "max_new_tokens": asked.get("max_gen_toks", self.max_new_tokens),
                "do_sample": asked.get("do_sample", False),
                "stop": [text for text in asked.get("until", []) if text],
            }
            if options["do_sample"]:
                options["temperature"] = asked.get("temperature", 1.0)
            answers.append(self.model.chat(self.tokenizer, prompt, **options)[0])
        return answers


def describe_task(file: Path) -> dict[str, Any]:
    """Write the questions to a file, and return a task of them."""
    lines = [json.dumps(question, ensure_ascii=False) for question in QUESTIONS]
    file.write_text("\n".join(lines), encoding="utf-8")
    return {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }


def main(folder: str) -> dict[str, Any]:
    """Evaluate a model on two questions, and return the harness's results."""
    with tempfile.TemporaryDirectory() as place:
        task = describe_task(Path(place, "capitals.jsonl"))
        results = lm_eval.simple_evaluate(model=ChatGLM(folder), tasks=[task], bootstrap_iters=0)
    assert results is not None
    print(results["results"])
    return results["results"]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")
