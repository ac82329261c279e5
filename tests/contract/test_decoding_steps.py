"""Each decoding step gives the network exactly its new tokens, on every release of transformers.

A cache that gets lost between two steps changes no answer, or few: only the passes show it. Every
way of generating is counted here, so that no release can rename what carries the cache unnoticed.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.cache_chatglm import ChatGLMCache
from chatglm_6b.environment_chatglm import CACHE_NAME, CACHE_NAMES, TESTED_TRANSFORMERS
from chatglm_6b.generation_chatglm import GLMGenerationMixin
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import REPO_SIZES, ROOT, build_model
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers.cache_utils import DynamicCache, StaticCache

# peft and old releases speak of checkpointing by names that newer ones have replaced.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

GMASK, SOP = 301, 304
PROMPT = [5, 197, 86, 97, 5, 197, 11, GMASK, SOP]
IDS = torch.tensor([PROMPT])
NEW = 8
DRAFTS = 3
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
ONE_BY_ONE = [len(PROMPT), *[1] * (NEW - 1)]
MODELS = pytest.mark.parametrize(
    "fields",
    [{}, {"pre_seq_len": 4}, {"position_encoding_2d": False}],
    ids=["2-D", "prefix", "1-D"],
)


class Passes(list[int]):
    """The new columns of every pass through a network."""

    def __init__(self, model: Any) -> None:
        def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            self.append((kwargs["inputs_embeds"] if ids is None else ids).shape[1])

        # At the door of the network: a hook on a block would turn a CPU's decoding program off.
        model.transformer.register_forward_pre_hook(note, with_kwargs=True)


def build(**fields: Any) -> tuple[Any, Passes]:
    model = build_model(spread=5, **fields)
    return model, Passes(model)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_p": 0.9, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "int8": {"cache_implementation": "quantized", "cache_config": {"backend": "int8"}},
}


@pytest.mark.parametrize("way", WAYS)
@MODELS
def test_every_step_passes_one_new_token(way: str, fields: dict[str, Any]) -> None:
    model, passes = build(**fields)
    model.generate(IDS, **GREEDY | WAYS[way])
    assert passes == ONE_BY_ONE


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda model: DynamicCache(),
    "own": lambda model: ChatGLMCache(),
    "int8": lambda model: ChatGLMCache(bits=8),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=len(PROMPT) + 2 * NEW),
}


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", CACHES)
@MODELS
def test_a_cache_goes_in_and_comes_out_under_either_name(
    kind: str, name: str, fields: dict[str, Any]
) -> None:
    model, passes = build(**fields)
    cache = CACHES[kind](model)
    output = model.generate(IDS, return_dict_in_generate=True, **{name: cache}, **GREEDY)
    assert output[CACHE_NAME] is cache and getattr(output, CACHE_NAME) is cache
    assert passes == ONE_BY_ONE
    assert int(cache.get_seq_length()) == len(PROMPT) + NEW - 1
    passes.clear()
    model.generate(output.sequences, **{name: cache}, **GREEDY)  # goes on where it was
    assert passes == [1] * NEW


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_forward_takes_and_returns_a_cache_under_either_name(name: str) -> None:
    model, _ = build()
    for network in (model, model.transformer):
        with torch.no_grad():
            whole = network(IDS, use_cache=False)
            cache = network(IDS[:, :-1], use_cache=True)[CACHE_NAME]
            output = network(IDS[:, -1:], **{name: cache})
        assert output[CACHE_NAME] is cache and cache.get_seq_length() == len(PROMPT)
        assert CACHE_NAME not in whole
        torch.testing.assert_close(output[0][:, -1], whole[0][:, -1], rtol=0, atol=1e-4)


def test_two_caches_are_refused() -> None:
    model, _ = build()
    two = {name: DynamicCache() for name in CACHE_NAMES}
    for call in (model, model.transformer, model.generate):
        with pytest.raises(ValueError, match="are two names of one argument"):
            call(IDS, **two)


def test_greedy_ids_are_those_of_whole_passes() -> None:
    model, _ = build()
    ids = IDS
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(ids, use_cache=False).logits[:, -1].clone()
            logits[:, model.config.eos_token_id] = float("-inf")
            ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
    for way in ("greedy", "static"):
        assert model.generate(IDS, **GREEDY | WAYS[way]).tolist() == ids.tolist()


@pytest.mark.parametrize("helper", ["prompt", "assistant"])
def test_drafts_are_read_once(helper: str) -> None:
    """A pass has the drafts and the token before them; what was read is not read again."""
    model, passes = build()
    greedy = {"do_sample": False, "max_new_tokens": NEW}  # 4.57 drafts under no least length
    plain = model.generate(IDS, **greedy)
    passes.clear()
    if helper == "prompt":
        options: dict[str, Any] = {"prompt_lookup_num_tokens": DRAFTS}
        read_by_helper = None
    else:
        assistant = build_model(spread=5, num_layers=2)
        assistant.generation_config.num_assistant_tokens = DRAFTS
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        options, read_by_helper = {"assistant_model": assistant}, Passes(assistant)
    assert torch.equal(model.generate(IDS, **options, **greedy), plain)
    assert len(PROMPT) <= passes[0] <= len(PROMPT) + DRAFTS + 1
    assert max(passes[1:]) <= DRAFTS + 1
    if read_by_helper is not None:
        # Its own cache: behind the first pass it reads what it drafts and what replaced drafts.
        assert read_by_helper[0] >= len(PROMPT) and max(read_by_helper[1:]) <= DRAFTS + 1


def test_a_prompt_of_embeddings_is_read_once() -> None:
    model, passes = build()
    embeds = model.get_input_embeddings()(IDS)
    model.generate(inputs_embeds=embeds, **GREEDY)
    assert passes == ONE_BY_ONE


def test_a_model_in_training_keeps_its_cache_while_it_generates() -> None:
    model, passes = build()
    expected = model.generate(IDS, **GREEDY)
    passes.clear()
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
    assert passes == ONE_BY_ONE


PEFT = {
    "prefix": (PrefixTuningConfig, 0),
    "prompt": (PromptTuningConfig, 4),
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft_puts_its_prefix_into_the_cache_once(kind: str) -> None:
    config, columns = PEFT[kind]
    model, passes = build()
    tuned = get_peft_model(model, config(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)).eval()
    output = tuned.generate(input_ids=IDS, return_dict_in_generate=True, **GREEDY)
    assert passes == [len(PROMPT) + columns, *[1] * (NEW - 1)]
    assert output[CACHE_NAME].get_seq_length() == 4 + len(PROMPT) + NEW - 1


def test_a_talk_reads_every_prompt_once() -> None:
    """`chat`, `stream_chat` and `stream_generate`, over the vocabulary of this repository."""
    fields = {**REPO_SIZES, "max_sequence_length": 256}
    tokenizer = ChatGLMTokenizer.from_pretrained(ROOT)
    names = ("pad", "mask", "gmask", "bos", "eos")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    model, passes = build(**fields | ids)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    _, history = model.chat(tokenizer, "hello", **options)
    first = list(passes)
    assert first[0] > 2 and first[1:] == [1] * (NEW - 1)
    passes.clear()
    for _ in model.stream_chat(tokenizer, "hello", **options):
        pass
    assert passes == first
    passes.clear()
    model.chat(tokenizer, "and now?", history=history, **options)
    assert passes[0] > first[0] and passes[1:] == [1] * (NEW - 1)
    passes.clear()
    for _ in model.stream_generate(IDS, **GREEDY):
        pass
    assert passes == ONE_BY_ONE


@pytest.mark.parametrize("way", ["greedy", "beams", "drafts"])
def test_a_lost_cache_is_told_with_the_versions(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """What 5.24 did to a model that knew the old name only."""
    prepare = GLMGenerationMixin.prepare_inputs_for_generation

    def forget_cache(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return prepare(self, *args, **{k: v for k, v in kwargs.items() if k not in CACHE_NAMES})

    monkeypatch.setattr(GLMGenerationMixin, "prepare_inputs_for_generation", forget_cache)
    model, _ = build()
    options = {**WAYS, "drafts": {"prompt_lookup_num_tokens": DRAFTS}}[way]
    words = rf"reads all tokens again: transformers [\d.]+.* up to {TESTED_TRANSFORMERS[-1]}"
    with pytest.raises(RuntimeWarning, match=words):  # the tests make errors of warnings
        model.generate(IDS, **GREEDY | options)


def test_generating_without_a_cache_on_purpose_is_silent() -> None:
    model, passes = build()
    model.generate(IDS, use_cache=False, **GREEDY)
    assert passes == list(range(len(PROMPT), len(PROMPT) + NEW))


SCRIPT = """
import sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module="torch|huggingface_hub")
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
short = {"max_new_tokens": 4, "do_sample": False}
_, history = model.chat(tokenizer, "hello", **short)
for _ in model.stream_chat(tokenizer, "hello", history, **short): pass
inputs = tokenizer("hello", return_tensors="pt")
model.generate(**inputs, num_beams=2, **short)
model.generate(**inputs, prompt_lookup_num_tokens=2, **short)
labels = inputs["input_ids"].clone()
labels[:, :-1] = -100
model(**inputs, labels=labels).loss.backward()
model.save_pretrained(sys.argv[2])
print("done")
"""


def test_no_deprecation_of_ours_reaches_a_user(tiny_repo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tiny_repo), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.endswith("done\n"), run.stderr
    assert "deprecat" not in run.stderr.lower()
