"""The random models of the benchmarks, and the timing of their phases."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import check_peers, full_size, peer_chatglm_cpp, peer_fastllm
from benchmarks.contender import Contender
from benchmarks.full_size import Recipe
from chatglm.benching import measuring
from chatglm.loading import load_model

NARROW = {"layers": 2, "hidden": 64}
HEAD = 130528 * 64


@pytest.fixture(scope="module")
def contender() -> Contender:
    threads = torch.get_num_threads()
    made = Contender(Recipe(**NARROW), threads)
    return made


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Halves of the weights and a scale a row; the head in float32; biases, norms.
        ({}, 2 * (12 * 64**2 // 2 + 9 * 64 * 4) + HEAD * 4),
        ({"bits": 8, "dtype": "float16"}, 2 * (12 * 64**2 + 9 * 64 * 2) + HEAD * 2),
        ({"group_size": 32, "embeddings": True}, 2 * (12 * 64**2 * 5 // 8) + HEAD * 5 // 8),
        ({"bits": 0, "dtype": "bfloat16"}, 2 * 12 * 64**2 * 2 + HEAD * 2),
    ],
)
def test_bytes_of_a_step_follow_from_the_shapes(options: dict[str, Any], expected: int) -> None:
    model = full_size.outline_model(Recipe(**NARROW, **options))
    half = {"float16": 2, "bfloat16": 2}.get(options.get("dtype", ""), 4)
    rest = (2 * (9 + 4) + 2) * 64 * half  # biases and norms
    if options.get("group_size"):  # a float32 scale for 32 weights: an eighth of a byte each
        expected = (2 * 12 * 64**2 + HEAD) * 5 // 8
    assert measuring.count_step_bytes(model) == expected + rest


@pytest.mark.parametrize("options", [{}, {"bits": 0, "dtype": "bfloat16"}])
def test_a_random_model_is_finite_and_alive(options: dict[str, Any]) -> None:
    model = full_size.make_model(Recipe(**NARROW, **options))
    prompt = measuring.draw_prompt(model, 9, 2)
    with torch.no_grad():
        logits = model(prompt).logits
    assert logits.isfinite().all() and logits.std() > 0
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_phases_give_a_time_for_each_token(contender: Contender) -> None:
    assert contender.prefill(12, batch=2)["seconds"] > 0
    for options in ({}, {"batch": 2}, {"top_p": 0.7}):
        assert len(contender.decode(40, 3, **options)["seconds"]) == 3
    facts = contender.describe()
    assert facts["kv_bytes"] == 2 * 2 * 64 * 4  # keys and values of two blocks in float32


def test_a_filled_cache_is_as_long_as_the_prompt_it_stands_for(contender: Contender) -> None:
    cache = measuring.fill_cache(contender.model, 40, batch_size=2)
    assert cache.get_seq_length() == 40
    prompt = measuring.draw_prompt(contender.model, 40, 2)
    with torch.no_grad():
        real = contender.model(prompt, use_cache=True).past_key_values
    assert [layer.keys.shape for layer in cache.layers] == [x.keys.shape for x in real.layers]
    assert cache.layers[1].keys.dtype == real.layers[1].keys.dtype


def test_a_prompt_has_room_for_its_markers(contender: Contender) -> None:
    prompt = measuring.draw_prompt(contender.model, 5, 3)
    assert prompt.shape == (3, 5)
    assert prompt[:, -2:].tolist() == [[130001, 130004]] * 3
    with pytest.raises(ValueError, match="3 tokens or more, got 2"):
        measuring.draw_prompt(contender.model, 2)


def test_an_answer_that_ends_early_is_no_measurement(contender: Contender) -> None:
    prompt = measuring.draw_prompt(contender.model, 6)
    with torch.no_grad():
        first = int(contender.model(prompt).logits[0, -1].argmax())
    with pytest.raises(ValueError, match="ended after 1 of 4 tokens"):
        measuring.time_answer(contender.model, prompt, 4, eos_token_id=first)


def test_a_saved_model_loads_and_answers_in_words(tmp_path: Path) -> None:
    folder = tmp_path / "random_model"
    folder.mkdir()
    stored = full_size.save_folder(folder, Recipe(**NARROW, dtype="float16"))
    model, tokenizer = load_model(folder, device="cpu")
    assert stored > HEAD * 2 and model.config.quantization_bit == 4
    inputs = tokenizer(model.build_prompt("你好"), return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert answer.max() < 8192
    assert isinstance(tokenizer.decode(answer), str)


def test_an_existing_folder_is_not_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["full_size", str(tmp_path)])
    assert full_size.main() == 2
    assert "is there already: name a new folder" in capsys.readouterr().err


def read_ggml(data: bytes) -> tuple[tuple[int, ...], dict[str, tuple[tuple[int, ...], int, bytes]]]:
    """Read a model file the way its format is described: head, vocabulary, aligned tensors."""
    import struct

    assert data[:4] == b"ggml"
    head = struct.unpack_from("<9i", data, 4)
    place = 4 + 9 * 4 + 6 * 4
    (length,) = struct.unpack_from("<i", data, place)
    place += 4 + length
    tensors = {}
    while place < len(data):
        (length,) = struct.unpack_from("<i", data, place)
        name = data[place + 4 : place + 4 + length].decode()
        place += 4 + length
        (dims,) = struct.unpack_from("<i", data, place)
        *sizes, kind = struct.unpack_from(f"<{dims + 1}i", data, place + 4)
        place += 4 * (dims + 2)
        place += -place % 16
        count = 1
        for size in sizes:
            count *= size
        nbytes = count // 32 * 18 if kind == 2 else 4 * count
        tensors[name] = (tuple(sizes), kind, data[place : place + nbytes])
        place += nbytes
    assert place == len(data)
    return head, tensors


def test_the_file_for_chatglm_cpp_has_its_layout(tmp_path: Path) -> None:
    shape = peer_chatglm_cpp.Shape(2, 99, hidden=64, inner=256, heads=2, vocabulary=160)
    file = tmp_path / "model.bin"
    read = peer_chatglm_cpp.write_model(file, shape, full_size.ROOT / "ice_text.model")
    head, tensors = read_ggml(file.read_bytes())
    assert head == (1, 2, 2, 160, 64, 2, 2, 2, 256)
    assert len(tensors) == 1 + 2 * 12 + 2
    assert read == sum(len(values) for _, _, values in tensors.values())
    sizes, kind, values = tensors["transformer.layers.1.mlp.dense_4h_to_h.weight"]
    assert (sizes, kind, len(values)) == ((64, 256), 2, 64 * 256 // 32 * 18)
    assert len(set(values)) > 100 and values[:2] == values[18:20]  # random integers, one scale
    assert tensors["transformer.final_layernorm.weight"][2][:4] == b"\0\0\x80?"  # 1.0


def test_a_file_of_given_weights_holds_them(tmp_path: Path) -> None:
    shape = peer_chatglm_cpp.Shape(1, 99, hidden=64, inner=256, heads=2, vocabulary=160)
    weights = {
        name: bytes([number]) * 4 * torch.Size(sizes).numel()
        for number, (name, sizes, _) in enumerate(peer_chatglm_cpp.iter_tensors(shape))
    }
    file = tmp_path / "model.bin"
    vocabulary = full_size.ROOT / "ice_text.model"
    read = peer_chatglm_cpp.write_model(file, shape, vocabulary, weights)
    assert read == sum(len(values) for values in weights.values())
    data = file.read_bytes()
    assert data[12:16] == bytes(4)  # the kind of the weights: float32
    for name, values in weights.items():
        place = data.index(name.encode())
        assert values in data[place : place + len(values) + 128], name


def test_a_folder_for_fastllm_is_what_other_readers_read(tmp_path: Path) -> None:
    shape = peer_chatglm_cpp.Shape(2, 0, hidden=64, inner=256, heads=2, vocabulary=160)
    read = peer_fastllm.write_folder(tmp_path, shape)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (160, 64)
    dense = tensors["transformer.layers.1.mlp.dense_4h_to_h.weight"]
    assert dense.shape == (64, 256) and 0.015 < float(dense.float().std()) < 0.025
    norm = tensors["transformer.final_layernorm.weight"]
    assert norm.dtype == torch.float16 and bool((norm == 1).all())
    assert read == (2 * 12 * 64**2 + 160 * 64) // 2
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_layers"], config["hidden_size"], config["vocab_size"]) == (2, 64, 160)


def test_equal_answers_are_counted_and_dull_ones_refused() -> None:
    expected = [[1, 2], [3, 4], [5, 6], [1, 8]]
    assert check_peers.compare(expected, [[1, 2], [3, 9], [], [2, 8]]) == (0.5, 0.25)
    with pytest.raises(ValueError, match="the prompts do not decide the answers"):
        check_peers.compare([[1], [1], [1], [2], [1]], [[1]] * 5)
