"""Runs every command and code block of the README, in both languages, in a clone with a model.

The clone is a copy of the repository's code in a temporary folder. Its weights are the
repository's own; as long as these are not there, random ones of the same shapes take their place.
Beside it lie small stand-ins for what a reader brings along: a checkpoint of the 6B form with 28
thin layers, and a P-Tuning checkpoint.
"""

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from conftest import MODEL_FILES, ROOT
from transformers import AutoModel, AutoTokenizer

from chatglm import cli, door

READMES = ("README.md", "README_zh.md")
INDEX = "pytorch_model.bin.index.json"
DATA = ("*.jinja", "*config.json", "ice_text.model")
THIN = {"hidden_size": 16, "num_attention_heads": 2, "inner_hidden_size": 32}
TOKENS = ("vocab_size", *(f"{name}_token_id" for name in ("bos", "eos", "mask", "gmask", "pad")))
PREFIX_LENGTH = 128

# Commands that are not run as they are written, and what is done instead.
NOT_RUN = {
    "make chat": "installs PyTorch from the network; a dry run, and the piped chat below",
    'make chat ARGS="--bits 4 --seed 1"': "as before",
    "make test": "installs PyTorch from the network and runs these tests; a dry run",
    "py -m venv .venv": "Windows; .venv is stood for by the Python that runs the tests",
    ".venv\\Scripts\\python -m pip install --editable .": "Windows; installs PyTorch",
    ".venv\\Scripts\\python -m chatglm chat": "Windows; the same module is run by the piped chat",
}


class Block(NamedTuple):
    """A fenced block: its language, its text, and how often that language stood before it."""

    language: str
    text: str
    number: int


def read_blocks(readme: str) -> list[Block]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    blocks: list[Block] = []
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        number = sum(block.language == language for block in blocks)
        blocks.append(Block(language, body, number))
    return blocks


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def same_code(block: Block) -> str:
    """What must not differ between languages: comments may, and so may what is only shown."""
    if block.language == "python":
        return ast.dump(ast.parse(block.text))
    return "\n".join(commands(block.text)) if block.language != "text" else ""


BLOCKS = read_blocks(READMES[0])
PYTHON = [block.text for block in BLOCKS if block.language == "python"]
SHELL = [block.text for block in BLOCKS if block.language == "bash"]


def test_both_languages_have_the_same_blocks() -> None:
    assert len(PYTHON) >= 10 and len(SHELL) >= 6
    assert {block.language for block in BLOCKS} == {"python", "bash", "powershell", "text"}
    english, chinese = (
        [(block.language, same_code(block)) for block in read_blocks(readme)] for readme in READMES
    )
    assert english == chinese


def test_what_is_not_run_is_still_in_the_readme() -> None:
    lines = {line for b in BLOCKS if b.language != "python" for line in commands(b.text)}
    assert set(NOT_RUN) <= lines
    windows = {line for b in BLOCKS if b.language == "powershell" for line in commands(b.text)}
    assert windows <= set(NOT_RUN)


# The clone and its neighbours


def random_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in float16, both of the tied ones."""
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**config))
    # A random, tied model repeats what it has read; `<sop>` is pushed away, since it is no text.
    border = model.lm_head.weight[config["bos_token_id"]]
    model.transformer.final_layernorm.bias.data = -20 * border.data / border.data.norm()
    return {name: tensor.half().clone() for name, tensor in model.state_dict().items()}


def write_shards(folder: Path, weights: dict[str, torch.Tensor], index: dict[str, Any]) -> None:
    """Write the shards that an index names; what the model has no place for is a buffer of ones."""
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shard in index["weight_map"].items():
        shards.setdefault(shard, {})[name] = weights.get(name, torch.ones(2).half())
    for shard, tensors in shards.items():
        torch.save(tensors, folder / shard)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_clone(folder: Path) -> None:
    """Copy what a clone holds and link its weights, or make some while there are none."""
    for pattern in (*MODEL_FILES, *DATA):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    aside = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "chatglm", folder / "chatglm", ignore=aside)
    for path in ROOT.glob("pytorch_model*"):
        (folder / path.name).symlink_to(path)
    if not (ROOT / INDEX).is_file():
        weights = random_weights(read_json(ROOT / "config.json"))
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model-1-of-1.bin")}
        write_json(folder / INDEX, index)
        write_shards(folder, weights, index)
        # Such weights know no end: with them, one id in four is the end of an answer.
        settings = read_json(folder / "generation_config.json")
        ends = [*settings["eos_token_id"], *range(7, 8192, 4)]
        write_json(folder / "generation_config.json", settings | {"eos_token_id": ends})


def make_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """A folder as it is downloaded: eight shards, old configuration and code that would not run."""
    shutil.copy(ROOT / "ice_text.model", folder)
    index = read_json(ROOT / "chatglm" / "presets" / "chatglm-6b" / INDEX)
    weights = random_weights(config)
    assert weights.keys() < index["weight_map"].keys()
    write_shards(folder, weights, index)
    write_json(folder / INDEX, index)
    auto_map = {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    old = {"architectures": ["ChatGLMModel"], "auto_map": auto_map, "model_type": "chatglm"}
    sizes = {name: config[name] for name in ("vocab_size", "num_layers", *THIN)}
    write_json(folder / "config.json", old | sizes)
    (folder / "modeling_chatglm.py").write_text("import icetk\n", encoding="utf-8")


def make_ptuning_checkpoint(folder: Path) -> None:
    config = read_json(ROOT / "config.json")
    states = PREFIX_LENGTH, 2 * config["num_layers"] * config["hidden_size"]
    weights = {"transformer.prefix_encoder.embedding.weight": torch.randn(states)}
    torch.save(weights, folder / "pytorch_model.bin")


class Session:
    """One shell and one Python, as a reader has them open in the clone."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python = folder, python
        self.names: dict[str, Any] = {}
        self.num_run = 0
        self.outputs: dict[str, str] = {}

    def run_python_until(self, number: int) -> dict[str, Any]:
        """Run the Python blocks up to that one, each once, and return the names they set."""
        while self.num_run <= number:
            exec(compile(PYTHON[self.num_run], f"README block {self.num_run}", "exec"), self.names)
            # The blocks that trust this folder's code are of people who have not registered.
            door._is_registered = False
            self.num_run += 1
        return self.names

    def run_shell(self, command: str, python: str | None = None) -> str:
        """Run a command line once, with a Python in the place of .venv's; return its output."""
        if command not in self.outputs:
            line = command.replace(".venv/bin/python", shlex.quote(python or self.python))
            done = subprocess.run(
                ["sh", "-c", line], cwd=self.folder, capture_output=True, encoding="utf-8"
            )
            assert done.returncode == 0, done.stderr
            self.outputs[command] = done.stdout
        return self.outputs[command]


@pytest.fixture(scope="module")
def session(quick_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    base = tmp_path_factory.mktemp("readme")
    for name in ("clone", "chatglm-6b", "ptuning"):
        (base / name).mkdir()
    make_clone(base / "clone")
    make_checkpoint(
        base / "chatglm-6b",
        read_json(ROOT / "config.json") | THIN | {"num_layers": 28},
    )
    make_ptuning_checkpoint(base / "ptuning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(door, "_is_registered", False)  # a block opens it
        patch.chdir(base / "clone")
        torch.manual_seed(0)
        yield Session(base / "clone", quick_python)


# What must be so after each Python block


def greedy_alone(names: dict[str, Any], question: str) -> list[int]:
    """The ids that a question gets without any other in the batch."""
    inputs = names["tokenizer"](question, return_tensors="pt", split_special_tokens=True)
    outputs = names["model"].generate(**inputs, do_sample=False, max_length=64)
    return outputs[0, inputs["input_ids"].shape[1] :].tolist()


def assert_chat(names: dict[str, Any]) -> None:
    assert [question for question, _ in names["history"]] == ["你好", "你能做什么？"]
    assert names["history"][-1][1] == names["response"]
    assert names["model"].dtype == torch.float32 and not names["model"].training


def assert_greedy(names: dict[str, Any]) -> None:
    assert isinstance(names["response"], str) and "\n" not in names["response"]


def assert_stream(names: dict[str, Any]) -> None:
    assert names["history"] == [("How are you?", names["response"])]


def assert_batch(names: dict[str, Any]) -> None:
    start = names["inputs"]["input_ids"].shape[1]
    assert names["inputs"]["attention_mask"][0].tolist()[0] == 0  # the first row is padded
    for row, question in zip(names["outputs"][:, start:].tolist(), names["questions"]):
        alone = greedy_alone(names, question)
        shared = min(len(alone), len(row))  # max_length counts the padding too
        assert shared > 0 and row[:shared] == alone[:shared]
    assert len(names["answers"]) == 2


def assert_template(names: dict[str, Any]) -> None:
    tokenizer, ids = names["tokenizer"], names["inputs"]["input_ids"]
    assert ids.tolist() == tokenizer(["你好"])["input_ids"]
    assert names["outputs"].shape[1] > ids.shape[1]


def assert_quantized(names: dict[str, Any]) -> None:
    assert names["model"].config.quantization_bit == 4
    weight = names["model"].transformer.layers[0].attention.dense.weight
    assert (weight.dtype, weight.shape[1] * 2) == (torch.int8, weight.shape[0])


def assert_quantized_while_loading(names: dict[str, Any]) -> None:
    assert_quantized(names)
    config = names["model"].config
    assert (config.quantization_group_size, config.quantization_embeddings) == (32, False)
    scale = names["model"].transformer.layers[0].attention.dense.weight_scale
    assert scale.shape == (config.hidden_size, config.hidden_size // 32)


def assert_prefix(names: dict[str, Any]) -> None:
    stored = torch.load("../ptuning/pytorch_model.bin", weights_only=True)
    loaded = names["model"].transformer.prefix_encoder.embedding.weight
    assert torch.equal(loaded, stored["transformer.prefix_encoder.embedding.weight"])
    model, ids = names["model"], names["tokenizer"]("你好", return_tensors="pt")
    with torch.no_grad():
        attention = model(**ids, output_attentions=True).attentions[0]
    assert attention.shape[-1] == PREFIX_LENGTH + ids["input_ids"].shape[1]


def assert_lora_training(names: dict[str, Any]) -> None:
    trained = {n for n, p in names["model"].named_parameters() if p.grad is not None}
    assert len(trained) == 2 * names["base"].config.num_layers
    assert all("query_key_value.lora_" in name for name in trained)
    tokenizer = names["tokenizer"]
    answer = names["labels"][0][names["labels"][0] != -100].tolist()
    assert answer[-1] == tokenizer.eop_token_id
    assert tokenizer.decode(answer) == "你好！很高兴见到你。".replace("！", "!")


def assert_lora_chat(names: dict[str, Any]) -> None:
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"
    assert names["history"] == [("你好", names["response"])]


def assert_checkpoint(names: dict[str, Any]) -> None:
    model = names["model"]
    assert (model.config.num_layers, model.config.quantization_bit) == (28, 4)
    stored = torch.load("../chatglm-6b/pytorch_model-00001-of-00008.bin", weights_only=True)
    bias = "transformer.layers.0.attention.dense.bias"
    assert torch.equal(model.state_dict()[bias], stored[bias])
    assert names["tokenizer"].bos_token_id == model.config.bos_token_id
    assert type(model).__module__ == "chatglm.model.modeling_chatglm"


CHECKS: list[Callable[[dict[str, Any]], None]] = [
    assert_checkpoint,
    assert_chat,
    assert_greedy,
    assert_stream,
    assert_batch,
    assert_template,
    assert_quantized,
    assert_quantized_while_loading,
    assert_prefix,
    assert_lora_training,
    assert_lora_chat,
]


def test_every_python_block_has_a_check() -> None:
    assert len(CHECKS) == len(PYTHON)


# peft 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("number", range(len(CHECKS)), ids=lambda n: CHECKS[n].__name__)
def test_python_block(number: int, session: Session) -> None:
    assert_state = CHECKS[number]
    assert_state(session.run_python_until(number))


# What must be so after each command


def commands_with(text: str) -> list[str]:
    found = [line for block in SHELL for line in commands(block) if text in line]
    assert found, f"no command of the README has {text!r}"
    return found


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("command", [line for line in NOT_RUN if line.startswith("make ")])
def test_make_goals(command: str) -> None:
    """In the order that a fresh clone needs: environment, installation, then the work."""
    dry = subprocess.run(
        [*shlex.split(command), "--dry-run", "VENV=build/no-such-venv"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"},
    )
    assert dry.returncode == 0, dry.stderr
    run = "python -m pytest" if command == "make test" else "chatglm chat"
    given = " --bits 4 --seed 1" if "ARGS" in command else ""
    steps = ("-m venv build/no-such-venv", "--editable", f"build/no-such-venv/bin/{run}{given}")
    places = [dry.stdout.find(step) for step in steps]
    assert places == sorted(places) and places[0] >= 0, dry.stdout


def test_a_piped_question_is_answered(session: Session) -> None:
    (command,) = commands_with("--greedy")
    output = session.run_shell(command, sys.executable)  # the one that imports all by itself
    tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
    model = AutoModel.from_pretrained(".", trust_remote_code=True).float()
    answer, _ = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=64)
    assert answer and output == answer + "\n"


def test_help_lists_the_options_of_the_readme(session: Session) -> None:
    (command,) = commands_with("--help")
    output = session.run_shell(command)
    used = set(re.findall(r" (--[a-z-]+)", "\n".join(commands_with(" chat ")))) - {"--help"}
    assert used and all(option in output for option in used)


def test_a_checkpoint_answers_a_piped_question(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, since a new one would import torch a third time."""
    (command,) = commands_with("chat ../chatglm-6b ")
    question, _, call = command.removeprefix("echo ").partition(" | .venv/bin/python -m chatglm ")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n"))
    assert cli.main(shlex.split(call)) == 0
    answer, errors = capsys.readouterr()
    assert answer.endswith("\n") and "chatglm:" not in errors
    session.outputs[command] = answer


def test_a_dry_run_of_publishing_lists_the_folder(session: Session) -> None:
    (publishing,) = commands_with(" publish ")
    (quantizing,) = commands_with("../chatglm-mini-int8 --bits")
    session.run_shell(quantizing)
    output = session.run_shell(publishing)
    written = {path.name for path in (session.folder.parent / "chatglm-mini-int8").iterdir()}
    written.remove("origin.json")  # it has places on this machine
    assert {line.split()[-1] for line in output.splitlines()[: len(written)]} == written
    assert "left out:\n  origin.json  (names places on this machine)\n" in output
    assert "nothing was sent" in output


def test_a_folder_is_adopted_and_comes_back(session: Session) -> None:
    """And a new folder, and one with a prefix in it, load by themselves."""
    folder = session.folder.parent / "chatglm-6b"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    planning, adopting, undoing, copying, joining = commands_with(" adopt ")
    planned = session.run_shell(planning).splitlines()[:-1]
    assert planned and {path.name for path in folder.iterdir()} == before.keys()
    assert session.run_shell(adopting).splitlines()[:-1] == planned
    AutoModel.from_pretrained(folder, trust_remote_code=True)
    session.run_shell(undoing)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for command, name in ((copying, "chatglm-6b-new"), (joining, "chatglm-mini-prefix")):
        session.run_shell(command)
        new = folder.with_name(name)
        model = AutoModel.from_pretrained(new, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
    assert model.config.pre_seq_len == PREFIX_LENGTH


def test_every_command_succeeds(session: Session) -> None:
    """Those that no test above has run are run now, in their order."""
    for command in [line for block in SHELL for line in commands(block)]:
        if command not in NOT_RUN:
            session.run_shell(command)
        assert command in session.outputs or command in NOT_RUN
