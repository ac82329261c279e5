"""Pre-training: what is taken out of a text, and that it is learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm.cli import main
from chatglm.data.dialects import read_texts
from chatglm.data.files import RecordFiles
from chatglm.training.data.rendering import Renderer
from chatglm.training.settings import KeyProblem
from chatglm.training.stages.pretrain import BlankMaker, Blanks, PretrainSettings

TEXT = "The sun rises in the east and sets in the west. 太阳从东边升起，从西边落下。" * 3
LIMIT = 40


@pytest.fixture(scope="module")
def model(tiny_repo: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)


def build_blanks(model: Any, repo: Path, folder: Path, seed: int = 0, **fields: Any) -> Blanks:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "a", "sun moon")))
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    config = model.config
    special_ids = (config.mask_token_id, config.gmask_token_id, config.bos_token_id)
    records = RecordFiles([str(path)], read_texts)
    settings = PretrainSettings(output="out", **fields)
    maker = BlankMaker(Renderer(model, tokenizer, LIMIT), settings, special_ids)
    return Blanks(records, maker, seed)


def restore(blanks: Blanks, prompt_ids: list[int], answer_ids: list[int]) -> list[int]:
    """Put what was taken out back into its blank."""
    assert prompt_ids[-1] == blanks.maker.bos_id and answer_ids[-1] == blanks.maker.renderer.end_id
    (place,) = [
        i for i, t in enumerate(prompt_ids) if t in (blanks.maker.mask_id, blanks.maker.gmask_id)
    ]
    return [*prompt_ids[:place], *answer_ids[:-1], *prompt_ids[place + 1 : -1]]


@pytest.mark.parametrize("mask_share", [0.0, 0.5, 1.0])
def test_nothing_of_a_text_is_lost(
    mask_share: float, model: Any, tiny_repo: Path, tmp_path: Path
) -> None:
    blanks = build_blanks(model, tiny_repo, tmp_path, mask_share=mask_share)
    restored = [restore(blanks, *blanks[i]) for i in range(len(blanks))]
    whole = [i for piece in restored[:-1] for i in piece]
    # A last piece of one token has nothing to take out and is left.
    length = len(blanks.maker.renderer.encode_text(TEXT))
    assert (
        whole
        == blanks.maker.renderer.encode_text(TEXT)[: length - (length % blanks.maker.room == 1)]
    )
    assert restored[-1] == blanks.maker.renderer.encode_text("sun moon")
    assert all(len(blanks[i].input_ids) <= LIMIT for i in range(len(blanks)))
    kinds = [blanks.maker.mask_id in blanks[i].prompt_ids for i in range(len(blanks))]
    assert mask_share == 0.5 or set(kinds) == {bool(mask_share)}


def test_blanks_are_drawn_anew_in_every_epoch_and_again_from_the_seed(
    model: Any, tiny_repo: Path, tmp_path: Path
) -> None:
    blanks = build_blanks(model, tiny_repo, tmp_path)
    first = [blanks[i] for i in range(len(blanks))]
    blanks.epoch = 1
    assert [blanks[i] for i in range(len(blanks))] != first
    blanks.epoch = 0
    assert [blanks[i] for i in range(len(blanks))] == first
    other = build_blanks(model, tiny_repo, tmp_path, seed=1)
    assert [other[i] for i in range(len(other))] != first


def test_spans_and_ends_have_the_lengths_that_are_asked_for(
    model: Any, tiny_repo: Path, tmp_path: Path
) -> None:
    fields = {"span_ratio": 0.2, "suffix_ratio": 0.6}
    spans, ends = (
        build_blanks(model, tiny_repo, tmp_path, mask_share=share, **fields) for share in (1.0, 0.0)
    )
    shares: dict[str, list[float]] = {"spans": [], "ends": []}
    for epoch in range(200):
        spans.epoch = ends.epoch = epoch
        for name, blanks in (("spans", spans), ("ends", ends)):
            shares[name].append((len(blanks[0].answer_ids) - 1) / blanks.maker.room)
    assert 0.15 < sum(shares["spans"]) / 200 < 0.25
    assert max(shares["spans"]) <= 0.41
    assert min(shares["ends"]) >= 0.58 and max(shares["ends"]) < 1


@pytest.mark.parametrize(
    "fields", [{"mask_share": 2.0}, {"span_ratio": 0.0}, {"suffix_ratio": 0.0}]
)
def test_shares_that_are_none_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(KeyProblem, match=next(iter(fields))):
        PretrainSettings(output="out", **fields).check()  # type: ignore[arg-type]


@pytest.mark.usefixtures("pictures")
def test_a_text_is_learned(
    tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "texts.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"text": TEXT}) + "\n")
    words = ["--model", tiny_repo, "--train_data", data, "--eval_data", data, "--output", output]
    words += ["--max_steps", 30, "--learning_rate", 3e-3, "--max_length", 64, "--disable_tqdm"]
    assert main(["train", "pretrain", *map(str, words)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["eval_perplexity"] < 1000
    again = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert torch.isfinite(again.lm_head.weight).all()
