"""A6: an adapter of peft acts in every method that generates, whatever its kind.

`PeftModel.chat` is the method of the model within, and what is learned in place of a prompt is put
in by peft's own `generate`: chat answered as the bare base.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from conftest import ROOT
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from scripted_model import embedded_model, embedded_tokenizer

QUESTION = "What is water?"
BRIEF: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LAYERS: dict[str, Any] = {**TASK, "target_modules": ["query_key_value"]}
VIRTUAL: dict[str, Any] = {**TASK, "num_virtual_tokens": 4}
PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: PromptTuningConfig(**VIRTUAL),
    "p_tuning": lambda: PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=16),
    "prefix": lambda: PrefixTuningConfig(**VIRTUAL),
    "prefix_network": lambda: PrefixTuningConfig(
        **VIRTUAL, prefix_projection=True, encoder_hidden_size=16
    ),
}
FEEDFORWARD = {"feedforward_modules": ["dense_4h_to_h"]}
TUNERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(**LAYERS),
    "adalora": lambda: AdaLoraConfig(**LAYERS, total_step=10),
    "ia3": lambda: IA3Config(
        **TASK, target_modules=["query_key_value", "dense_4h_to_h"], **FEEDFORWARD
    ),
    "vera": lambda: VeraConfig(**LAYERS, r=8),
    "norms": lambda: LNTuningConfig(**TASK, target_modules=["input_layernorm"]),
}

pytestmark = [
    # peft says the old names of checkpointing, for which transformers 5.23 has new ones.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
]


def adapt(config: Any, seed: int = 0) -> Any:
    """The embedded model in peft's, with an adapter that has learned something."""
    torch.manual_seed(seed)  # what peft begins with is drawn too
    model = get_peft_model(copy.deepcopy(embedded_model()), config).eval()
    teach(model, "default", seed)
    return model


def teach(model: Any, adapter: str, seed: int) -> None:
    """Change what an adapter has learned, as a training would; a prefix is far from its start."""
    torch.manual_seed(seed)
    deviation = 4 if model.peft_config[adapter].peft_type == "PREFIX_TUNING" else 0.7
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f".{adapter}" in name:
            parameter.data += torch.randn_like(parameter) * deviation


def ids_of(model: Any, **options: Any) -> list[int]:
    inputs = embedded_tokenizer()(QUESTION, return_tensors="pt")
    return model.generate(**inputs, **BRIEF, **options)[0].tolist()


def ask_all(model: Any) -> set[str]:
    """The answers of all methods, which should be one."""
    tokenizer = embedded_tokenizer()
    inputs = tokenizer(QUESTION, return_tensors="pt")
    answers = {
        model.chat(tokenizer, QUESTION, **BRIEF)[0],
        list(model.stream_chat(tokenizer, QUESTION, **BRIEF))[-1][0],
    }
    for ids in (ids_of(model), list(model.stream_generate(**inputs, **BRIEF))[-1][0].tolist()):
        decoded = tokenizer.decode(ids[inputs["input_ids"].shape[1] :])
        answers.add(model.process_response(decoded))
    return answers


def bare_answer() -> str:
    return embedded_model().chat(embedded_tokenizer(), QUESTION, **BRIEF)[0]


@pytest.mark.parametrize("kind", [*PROMPTS, *TUNERS])
def test_an_adapter_acts_in_every_method(kind: str) -> None:
    model = adapt({**PROMPTS, **TUNERS}[kind]())
    answers = ask_all(model)
    assert len(answers) == 1 and answers != {bare_answer()}
    with model.disable_adapter():
        assert ask_all(model) == {bare_answer()}
    assert ask_all(model) == answers
    if kind in TUNERS:
        assert ask_all(model.base_model) == answers


@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora"])
def test_a_saved_adapter_acts(kind: str, tmp_path: Path) -> None:
    model = adapt({**PROMPTS, **TUNERS}[kind]())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(embedded_model()), tmp_path).eval()
    assert ask_all(loaded) == ask_all(model)


@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_the_adapter_that_is_set_acts(kind: str) -> None:
    model = adapt({**PROMPTS, **TUNERS}[kind]())
    first = ask_all(model)
    model.add_adapter("other", {**PROMPTS, **TUNERS}[kind]())
    model.set_adapter("other")
    teach(model, "other", 5)
    assert ask_all(model) != first
    model.set_adapter("default")
    assert ask_all(model) == first


def test_virtual_tokens_stand_where_tokens_would() -> None:
    """A prompt of the embeddings of words is these words before the question."""
    model, tokenizer = adapt(PROMPTS["prompt"]()), embedded_tokenizer()
    words = tokenizer("How are you today", add_special_tokens=False)["input_ids"][:4]
    embeddings = embedded_model().get_input_embeddings().weight[words]
    model.prompt_encoder["default"].embedding.weight.data.copy_(embeddings)
    inputs = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    longer = torch.cat((torch.tensor([words]), inputs), dim=1)
    wanted = embedded_model().generate(longer, **BRIEF)[0, longer.shape[1] :].tolist()
    assert ids_of(model)[inputs.shape[1] :] == wanted
    assert model.chat(tokenizer, QUESTION, **BRIEF)[0] == model.process_response(
        tokenizer.decode(wanted)
    )
    beams = embedded_model().generate(longer, num_beams=3, **BRIEF)[0, longer.shape[1] :]
    assert ids_of(model, num_beams=3)[inputs.shape[1] :] == beams.tolist()


def test_the_prefix_of_our_own_training_is_that_of_peft(tmp_path: Path) -> None:
    """`chatglm train ptuning` writes both: the official layout and a folder for peft."""
    config = ChatGLMConfig.from_pretrained(ROOT, pre_seq_len=5)
    native = ChatGLMForConditionalGeneration.from_pretrained(
        ROOT, config=config, dtype=torch.float32
    ).eval()
    torch.manual_seed(1)
    states = 4 * torch.randn_like(native.transformer.prefix_encoder.embedding.weight)
    native.transformer.prefix_encoder.embedding.weight.data.copy_(states)
    model = adapt(PrefixTuningConfig(**TASK, num_virtual_tokens=5))
    model.prompt_encoder["default"].embedding.weight.data.copy_(states)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(embedded_model()), tmp_path).eval()
    answers = ask_all(native)
    assert ask_all(loaded) == answers != {bare_answer()}
    texts = ("A drink.", "水。")
    scores = [m.score(embedded_tokenizer(), QUESTION, texts) for m in (native, loaded)]
    torch.testing.assert_close(scores[1].log_probs, scores[0].log_probs, rtol=1e-5, atol=1e-4)
    bare = embedded_model().score(embedded_tokenizer(), QUESTION, texts)
    assert not torch.allclose(scores[0].log_probs, bare.log_probs, atol=0.1)


@pytest.mark.parametrize("kind", PROMPTS)
def test_packing_the_model_within_keeps_the_adapter(kind: str) -> None:
    model = adapt(PROMPTS[kind]())
    packed = model.quantize(8, activations="exact")
    assert packed is model and packed.get_base_model().config.quantization_bit == 8
    assert packed.dequantize() is model
    inner = model.get_base_model()
    assert inner.quantize(8) is inner


@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
def test_scores_through_embeddings_are_refused(kind: str) -> None:
    model = adapt(PROMPTS[kind]())
    with pytest.raises(ValueError, match="cannot be scored through an adapter of P"):
        model.score(embedded_tokenizer(), QUESTION, "Water.")


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_task_in_which_nothing_would_act_is_refused(kind: str) -> None:
    config = PROMPTS[kind]()
    config.task_type = "SEQ_2_SEQ_LM"
    model = get_peft_model(copy.deepcopy(embedded_model()), config).eval()
    for name in ("chat", "stream_chat"):
        with pytest.raises(ValueError, match="'SEQ_2_SEQ_LM' would not act here"):
            getattr(model, name)(embedded_tokenizer(), QUESTION)


def test_methods_are_still_the_class_s() -> None:
    model = embedded_model()
    assert model.chat.__func__ is type(model).chat
    assert model.chat.__self__ is model
    assert type(model).chat.__doc__
