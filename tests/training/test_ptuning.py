"""P-Tuning: only the prefix is trained, and both of its layouts give the same answers."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from chatglm.cli import main
from chatglm.training.settings import KeyProblem
from chatglm.training.stages.ptuning import PtuningSettings

# Transformers 5.23 has new names for checkpointing; peft still says the old ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
    pytest.mark.usefixtures("pictures"),
]

PREFIX = "transformer.prefix_encoder."


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("bits", [0, 4])
def test_a_prefix_is_written_in_both_layouts(
    projection: bool, bits: int, tiny_repo: Path, tmp_path: Path
) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text(
        "".join(json.dumps({"prompt": f"{i}", "response": "yes"}) + "\n" for i in "123")
    )
    words = ["--model", tiny_repo, "--train_data", data, "--output", output, "--max_steps", 3]
    words += ["--pre_seq_len", 5, "--bits", bits, "--prefix_projection", projection]
    words += ["--disable_tqdm", "--eval_data", data, "--logging_steps", 1]
    assert main(["train", "ptuning", *map(str, words)]) == 0
    weights = torch.load(output / "pytorch_model.bin", weights_only=True)
    assert all(name.startswith(PREFIX) and t.dtype == torch.float32 for name, t in weights.items())
    config = AutoConfig.from_pretrained(
        tiny_repo, pre_seq_len=5, prefix_projection=projection, trust_remote_code=True
    )
    official = AutoModelForCausalLM.from_pretrained(
        tiny_repo, config=config, trust_remote_code=True
    )
    own = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    official.transformer.prefix_encoder.load_state_dict(own)
    base = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)
    ids = torch.tensor([[5, 6, 7, config.gmask_token_id, config.bos_token_id]])
    with torch.no_grad():
        plain = base(ids).logits
        expected = official.eval()(ids).logits
        found = PeftModel.from_pretrained(base, output / "peft").eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-3)
    written = json.loads((output / "config.json").read_text())
    assert (written["pre_seq_len"], written["prefix_projection"]) == (5, projection)


@pytest.mark.parametrize("fields", [{"pre_seq_len": -1}, {"lora_rank": 4}])
def test_what_a_prefix_cannot_have_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(KeyProblem):
        PtuningSettings(output="out", **fields).check()  # type: ignore[arg-type]
