"""What generation, caches and tokenizer lean on in other libraries, each hook by its name.

As in `test_model_hooks`: the name is the test's id, and docs/hooks.md has a row for each.
"""

import copy
import ctypes
import dataclasses
import inspect
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from chatglm_6b import environment_chatglm, generation_chatglm, modeling_chatglm
from chatglm_6b.cache_chatglm import LAYERS, ChatGLMCache, ReservedLayer
from chatglm_6b.drawing_chatglm import is_draw_known
from chatglm_6b.environment_chatglm import CACHE_NAME, find_settled
from chatglm_6b.generation_chatglm import (
    GLMGenerationMixin,
    HighestLogitsWarper,
    NucleusLogitsWarper,
)
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT, build_model, count_calls, import_from_package
from packaging.version import Version
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizer,
    StaticCache,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation import configuration_utils

# peft asks for an attribute by the name that it had before 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

IS_OLD = Version(transformers.__version__) < Version("5")
IDS = torch.tensor([[5, 197, 86, 97, 5, 197, 11, 301, 304]])
NEW = 4
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}


# Generation


@pytest.fixture(scope="module")
def generated() -> Any:
    """One sampled `generate`: what was called, what the head saw, which steps were programs."""
    calls: Counter[str] = Counter()
    found = SimpleNamespace(calls=calls, columns=[], steps=[], processors=[])
    model = build_model()
    model.lm_head.register_forward_pre_hook(lambda _, args: found.columns.append(args[0].shape[1]))
    engine, replace = environment_chatglm.find_engine(), generation_chatglm.replace_warpers

    def note_step(*args: Any, **kwargs: Any) -> Any:
        found.steps.append(decode(*args, **kwargs))
        return found.steps[-1]

    def note_processors(processors: Any) -> Any:
        found.processors = [type(p) for p in processors], [type(p) for p in replace(processors)]
        return replace(processors)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("_prepare_cache_for_generation", "_get_logits_processor"):
            count_calls(monkeypatch, GLMGenerationMixin, name, calls)
        if engine is not None:
            decode = engine.decode_step
            monkeypatch.setattr(engine, "decode_step", note_step)
        monkeypatch.setattr(generation_chatglm, "replace_warpers", note_processors)
        options = GREEDY | {"do_sample": True, "top_p": 0.8, "return_dict_in_generate": True}
        found.cache = model.generate(IDS, **options)[CACHE_NAME]
    return found


@pytest.mark.parametrize(
    "hook",
    [
        "GenerationMixin._prepare_cache_for_generation",
        "GenerationMixin._get_logits_processor",
    ],
)
def test_generate_asks_us(hook: str, generated: Any) -> None:
    assert generated.calls[hook.split(".")[1]] == 1, f"{hook} is not called"


@pytest.mark.parametrize("hook", ["DynamicCache.offloading"])
def test_generate_makes_our_cache(hook: str, generated: Any) -> None:
    assert type(generated.cache) is ChatGLMCache, f"{hook}: the default cache has changed"
    assert {type(layer) for layer in generated.cache.layers} == {ReservedLayer}
    assert DynamicCache().offloading is False, f"{hook} is gone"


@pytest.mark.parametrize("hook", ["process.GOMP_parallel", "process.sched_yield", "process.usleep"])
@pytest.mark.skipif(sys.platform != "linux", reason="other systems name them otherwise")
def test_decoding_steps_run_as_programs(hook: str, generated: Any) -> None:
    pytest.importorskip("llvmlite")
    runtime = import_from_package("chatglm.cpu.runtime")
    assert runtime.find_runtime() is not None, f"one of them is gone, perhaps {hook}"
    assert len(generated.steps) == NEW, "steps are not asked whether they can be programs"
    prompt, *steps = generated.steps
    assert prompt is None and all(step is not None for step in steps), "no step was a program"


@pytest.mark.parametrize("hook", ["process.malloc_trim"])
@pytest.mark.skipif(sys.platform != "linux", reason="other heaps are trimmed otherwise")
def test_the_heap_can_be_trimmed(hook: str) -> None:
    assert hasattr(ctypes.CDLL(None), "malloc_trim"), f"{hook} is gone"
    import_from_package("chatglm.cpu.memory").trim_heap()


@pytest.mark.parametrize("hook", ["GenerationMixin._supports_logits_to_keep"])
def test_the_head_sees_one_column_of_a_prompt(hook: str, generated: Any) -> None:
    """transformers finds `logits_to_keep` in the signature of `forward`."""
    assert generated.columns == [1] * NEW, f"{hook} does not find logits_to_keep"


WARPERS = {
    "logits_process.TopPLogitsWarper": (TopPLogitsWarper(0.5), NucleusLogitsWarper),
    "logits_process.TopKLogitsWarper": (TopKLogitsWarper(5), HighestLogitsWarper),
}


@pytest.mark.parametrize(
    "hook", ["logits_process.TopPLogitsWarper", "logits_process.TopKLogitsWarper"]
)
def test_nucleus_sampling_is_ours(hook: str, generated: Any) -> None:
    theirs, ours = WARPERS[hook]
    before, after = generated.processors
    assert before.count(type(theirs)) == 1, f"{hook} is not what generate makes of the option"
    assert after.count(ours) == 1 and type(theirs) not in after
    fields = {"top_p" if ours is NucleusLogitsWarper else "top_k", "filter_value"}
    assert fields <= vars(theirs).keys(), f"the fields of {hook} were renamed"


@pytest.mark.parametrize("hook", ["torch.multinomial"])
def test_torch_draws_as_it_is_known_to(hook: str) -> None:
    assert is_draw_known(), f"{hook} draws otherwise: rows leave each draw to it, 3 ms slower"


@pytest.mark.parametrize("hook", ["GenerationConfig.prefill_chunk_size"])
def test_the_options_that_could_cut_a_prompt_are_known(hook: str) -> None:
    """A new one has to be looked at: it may read prompts causally, and needs a refusal of ours."""
    parts = ("chunk", "prefill", "paged", "continuous", "piece")
    found = {name for name in vars(GenerationConfig()) if any(part in name for part in parts)}
    known = (
        {"prefill_chunk_size"}
        if IS_OLD
        else {
            "prefill_chunk_size",
            "continuous_batching_config",  # of generate_batch, which is refused
        }
    )
    assert found == known, f"{hook} was renamed, or has company"
    with pytest.raises(ValueError, match="reads prompts causally"):
        build_model().generate(IDS, prefill_chunk_size=2, **GREEDY)


@pytest.mark.parametrize("hook", ["GenerationConfig.cache_implementation"])
def test_the_kinds_of_caches_are_known(hook: str) -> None:
    known = {"static", "offloaded_static", "dynamic", "dynamic_full", "offloaded", "quantized"}
    known |= {"sliding_window", "hybrid", "hybrid_chunked"}
    known |= {"offloaded_hybrid", "offloaded_hybrid_chunked"}
    assert set(configuration_utils.ALL_CACHE_IMPLEMENTATIONS) <= known, f"{hook} takes a new value"
    source = inspect.getsource(GenerationMixin.generate)
    assert IS_OLD or '== "paged"' in source, f'{hook}="paged" was renamed'
    with pytest.raises(ValueError, match="reads prompts causally"):
        build_model().generate(IDS, cache_implementation="paged", **GREEDY)


@pytest.mark.parametrize(
    "hook", ["ContinuousMixin.generate_batch", "ContinuousMixin.init_continuous_batching"]
)
def test_no_way_into_continuous_batching_is_open(hook: str) -> None:
    found = {
        name
        for base in GenerationMixin.__mro__[1:]
        if base is not object
        for name in vars(base)
        if not name.startswith("_")
    }
    doors = {"generate_batch", "init_continuous_batching"}
    more = {"continuous_batching_context_manager", "destroy_cached_continuous_batching_manager"}
    assert found == (doors if IS_OLD else doors | more), f"{hook} was renamed, or has company"
    model = build_model()
    with pytest.raises(NotImplementedError, match="reads prompts causally"):
        getattr(model, hook.split(".")[1])([[5, 6]])
    if not IS_OLD:
        with (
            pytest.raises(NotImplementedError, match="reads prompts causally"),
            model.continuous_batching_context_manager(),
        ):
            pass


@pytest.mark.parametrize("hook", ["GenerationMixin._validate_model_kwargs"])
def test_positions_of_a_prompt_are_handed_through(hook: str) -> None:
    """It takes what `prepare_inputs_for_generation` has in its signature, ours among it."""
    model = build_model()
    position_ids = torch.stack((torch.arange(9), torch.zeros(9, dtype=torch.long))).unsqueeze(0)
    output = model.generate(IDS, position_ids=position_ids, **GREEDY)
    assert output.shape[1] == IDS.shape[1] + NEW, hook


# Caches


@pytest.mark.parametrize("hook", ["cache_utils.DynamicLayer"])
def test_the_methods_of_a_cache_s_layer_are_known(hook: str) -> None:
    """A layer of integers has to do each of them to integers and scales."""
    ours = {"batch_repeat_interleave", "batch_select_indices", "crop", "get_seq_length"}
    ours |= {"offload", "prefetch", "reorder_cache", "reset", "update"}
    theirs = {"get_mask_sizes", "get_max_cache_shape", "get_max_length", "lazy_initialization"}
    theirs |= {"is_compileable", "is_croppable", "is_sliding", "layer_type", "supports_early_init"}
    found = {name for name in dir(DynamicLayer) if not name.startswith("_")}
    assert found - ours - theirs == set(), f"{hook} can do more: is it right for integers?"
    assert ours <= found, f"a method of {hook} was renamed"


@pytest.mark.parametrize("hook", ["Cache.layer_class_to_replicate"])
def test_a_cache_makes_layers_of_our_kind(hook: str) -> None:
    for bits, layer_class in LAYERS.items():
        cache = ChatGLMCache(bits=bits)
        cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
        assert type(cache.layers[0]) is layer_class, f"{hook} is not read"


@pytest.mark.parametrize("hook", ["Cache.noted_tokens", "Cache.num_virtual_tokens"])
def test_foreign_caches_keep_what_is_noted_on_them(hook: str) -> None:
    """Without, columns that are cached would count as virtual: other positions, other answers."""
    name = hook.split(".")[1]
    static = StaticCache(config=build_model().config, max_cache_len=16)
    for cache in (DynamicCache(), static, ChatGLMCache()):
        setattr(cache, name, IDS)
        cache.update(torch.ones(1, 4, 3, 16), torch.ones(1, 4, 3, 16), 0, {})
        assert getattr(copy.deepcopy(cache), name, None) is not None, hook
        assert getattr(cache, name) is IDS, hook


@pytest.mark.parametrize("hook", ["Cache.update(cache_position)"])
def test_a_static_cache_is_written_where_we_say(hook: str) -> None:
    """Releases before 5.13 need to be told; a column in a wrong place gives other answers."""
    model = build_model()
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(IDS, **GREEDY, **static), model.generate(IDS, **GREEDY)), hook


@pytest.mark.parametrize("hook", ["modeling_outputs.past_key_values"])
def test_outputs_have_one_name_for_the_cache(hook: str) -> None:
    for name in ("BaseModelOutputWithPast", "SequenceClassifierOutputWithPast"):
        found = {f.name for f in dataclasses.fields(getattr(modeling_chatglm, name))}
        assert CACHE_NAME in found, f"{hook}: {name} has none of {CACHE_NAME}"
    with torch.no_grad():
        assert type(build_model()(IDS, use_cache=True)[CACHE_NAME]) is ChatGLMCache, hook


@pytest.mark.parametrize(
    "hook", ["PeftModel.prepare_inputs_for_generation", "PrefixTuning.DynamicCache"]
)
def test_a_prefix_of_peft_is_virtual_and_put_in_once(hook: str) -> None:
    model = build_model()
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    tuned = get_peft_model(model, config).eval()
    positions: list[Any] = []
    model.transformer.rotary_emb.register_forward_pre_hook(
        lambda _, args: positions.append(args[0])
    )
    with torch.no_grad():
        output = tuned.generate(input_ids=IDS, return_dict_in_generate=True, **GREEDY)
    cache = output[CACHE_NAME]
    assert cache.get_seq_length() == 4 + IDS.shape[1] + NEW - 1, f"{hook}: inserted again, or never"
    assert cache.num_virtual_tokens == 4, hook
    tuned.get_base_model()(IDS)
    assert torch.equal(positions[0], positions[-1]), f"{hook}: the prefix shifts the positions"


@pytest.mark.parametrize(
    "hook",
    [
        "PeftModel.__getattr__",
        "PeftModel.active_peft_config",
        "PeftConfig.is_prompt_learning",
        "Cache.is_noted_ahead",
    ],
)
def test_a_method_of_a_learned_prompt_s_model_runs_there(hook: str) -> None:
    """Embeddings of tokens in place of a prompt are as good as the tokens."""
    model = build_model()
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    tuned = get_peft_model(model, config).eval()
    words = torch.tensor([[7, 90, 41]])
    tuned.prompt_encoder["default"].embedding.weight.data.copy_(
        model.get_input_embeddings().weight[words[0]]
    )
    longer = torch.cat((words, IDS), dim=1)
    wanted = model.generate(longer, **GREEDY)[0, longer.shape[1] :]
    streamed = list(tuned.stream_generate(input_ids=IDS, **GREEDY))[-1][0, IDS.shape[1] :]
    assert tuned.chat.__self__ is tuned, f"{hook}: methods are handed out in another way"
    assert torch.equal(streamed, wanted), f"{hook}: the prompt is left out, or its positions are"


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(ROOT)


@pytest.mark.parametrize(
    "hook",
    [
        "PreTrainedTokenizer._convert_id_to_token",
        "PreTrainedTokenizer._decode",
        "PreTrainedTokenizer.prepare_for_model",
        "PreTrainedTokenizer.truncate_sequences",
    ],
)
def test_the_tokenizer_s_methods_are_called(
    hook: str, tokenizer: ChatGLMTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    count_calls(monkeypatch, ChatGLMTokenizer, hook.split(".")[1], calls)
    slow = {"return_length": True}  # goes the way of the base class
    ids = tokenizer("a few more words", truncation=True, max_length=5, **slow)["input_ids"]
    tokenizer.decode(ids)
    tokenizer.convert_ids_to_tokens(ids)
    assert calls, f"{hook} is not called"
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id] and len(ids) == 5


@pytest.mark.parametrize("hook", ["TextStreamer.put"])
def test_a_streamer_gets_what_stays(hook: str, tokenizer: ChatGLMTokenizer) -> None:
    """The space of the second token is taken back by the third, and belongs to a later line."""
    tokens = tokenizer("a ?\n b", add_special_tokens=False)["input_ids"]
    shown: list[str] = []
    streamer = TextStreamer(tokenizer, clean_up_tokenization_spaces=True)
    streamer.on_finalized_text = lambda piece, stream_end=False: shown.append(piece)
    for index in tokens:
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert "".join(shown) == "a?\n b", f"{hook} is not noticed"


@pytest.mark.parametrize("hook", ["PreTrainedTokenizer.clean_up_tokenization"])
def test_all_that_is_cleaned_up_is_known(hook: str, tokenizer: ChatGLMTokenizer) -> None:
    letters = " .?!,'ntmsverld;:-\"`x\n"
    for mark in (f" {a}{b}{c}x" for a in letters for b in letters for c in letters):
        assert find_settled(mark, True) == tokenizer.clean_up_tokenization(mark), (
            f"{hook}: {mark!r}"
        )


@pytest.mark.parametrize("hook", ["PreTrainedTokenizer._convert_token_to_id"])
def test_the_base_class_looks_up_ids_by_it(hook: str, tokenizer: ChatGLMTokenizer) -> None:
    look_up = PreTrainedTokenizer.convert_tokens_to_ids
    assert look_up(tokenizer, ["<sop>", "<unk>"]) == tokenizer.convert_tokens_to_ids(
        ["<sop>", "<unk>"]
    ), hook


@pytest.mark.parametrize(
    "hook",
    ["PreTrainedTokenizer.split_special_tokens", "PreTrainedTokenizer._batch_encode_plus"],
)
def test_what_a_user_types_is_text(hook: str, tokenizer: ChatGLMTokenizer) -> None:
    """One text or a batch of them; 4 passes the option on for one text only."""
    one = tokenizer("<eop>", split_special_tokens=True)["input_ids"]
    batch = tokenizer(["<eop>"], split_special_tokens=True)["input_ids"][0]
    assert one == batch and tokenizer.eop_token_id not in one, f"{hook} is not handed on"
    assert tokenizer.eop_token_id in tokenizer("<eop>")["input_ids"]


@pytest.mark.parametrize("hook", ["apply_chat_template.tokenizer_kwargs"])
def test_what_a_message_has_is_text(hook: str, tokenizer: ChatGLMTokenizer) -> None:
    messages = [{"role": "user", "content": "a <eop> b"}]
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = ids["input_ids"] if hasattr(ids, "keys") else ids
    assert tokenizer.eop_token_id not in ids, f"{hook} is not handed on"
    assert tokenizer.decode(ids).startswith("a <eop> b"), f"{hook}: escapes stay in the text"


@pytest.mark.parametrize("hook", ["PreTrainedTokenizer.model_specific_special_tokens"])
def test_tokens_of_our_own_names_are_saved(hook: str, tmp_path: Path) -> None:
    first = ChatGLMTokenizer.from_pretrained(ROOT, gmask_token="[sMASK]")
    first.save_pretrained(tmp_path)
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert again.gmask_token == "[sMASK]", f"{hook} is not read"
    assert "[sMASK]" not in again.all_special_tokens, hook


@pytest.mark.parametrize("hook", ["GenerationConfig._from_model_config"])
def test_defaults_that_nobody_chose_are_known(hook: str) -> None:
    """What the package door completes is what a configuration was made up from, and no other."""
    assert build_model().generation_config._from_model_config is True, f"{hook} is gone"
    assert not getattr(GenerationConfig(top_k=3), "_from_model_config", False)


@pytest.mark.parametrize("hook", ["process.syscall"])
@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
def test_the_system_can_be_asked_for_tiles(hook: str) -> None:
    assert hasattr(ctypes.CDLL(None), "syscall"), f"{hook} is gone"
