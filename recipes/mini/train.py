"""Trains the small ChatGLM at the top of this repository, from nothing.

    python -m recipes.mini.train --data DIR --work DIR [--steps N] [--device cuda]

Resumable: the state is saved every `SAVE_EVERY` steps and a second call goes on from it. Loss and
time go to `log.jsonl`.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recipes.mini.corpus import (
    IGNORED_LABEL,
    ROOT,
    Sampler,
    collate,
    load_dialogues,
    split_dialogues,
)

SEED = 20261122
STEPS = 8000
WARM_UP_STEPS = 150
FALL_SHARE = 0.3
LEARNING_RATE = 1e-3
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
SAVE_EVERY = 100
LOG_EVERY = 20
HELD_OUT_EXAMPLES = 256


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: it warms up, stays, and falls linearly to a hundredth."""
    fall_steps = max(1, int(steps * FALL_SHARE))
    fall = max(0.01, min(1.0, (steps - step) / fall_steps))
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * fall


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def answer_loss(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the mean loss of the answers' tokens; only their logits are computed."""
    input_ids, attention_mask, labels = (tensor.to(model.device) for tensor in batch)
    outputs = model.transformer(input_ids, attention_mask=attention_mask, use_cache=False)
    targets = labels[:, 1:]
    is_target = targets != IGNORED_LABEL
    logits = model.lm_head(outputs.last_hidden_state[:, :-1][is_target])  # (targets, V)
    return nn.functional.cross_entropy(logits, targets[is_target])


@torch.no_grad()
def held_out_loss(model: Any, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Return the mean answer loss over held-out batches of equal size."""
    return sum(answer_loss(model, batch).item() for batch in batches) / len(batches)


def build_held_out(sampler: Sampler, pad_id: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Draw the fixed held-out batches."""
    rng = random.Random(SEED)
    examples = [sampler.draw_example(rng) for _ in range(HELD_OUT_EXAMPLES)]
    examples.sort(key=lambda example: sum(map(len, example)))
    return [collate(examples[i : i + 32], pad_id) for i in range(0, len(examples), 32)]


def save_state(path: Path, **state: Any) -> None:
    """Save everything a resumed run needs; a kill leaves the old file whole."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load a saved state and return its step and the seconds spent; zeros if there is none."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True, map_location=next(model.parameters()).device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor], rate: float
) -> float:
    """Take one step and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = answer_loss(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def append_line(path: Path, **fields: Any) -> None:
    """Append a JSON line and show it."""
    line = json.dumps(fields)
    print(line, flush=True)  # noqa: T201 - the progress of a command
    with path.open("a") as log:
        log.write(line + "\n")


def train(
    model: Any, sampler: Sampler, held_out: list[Any], work: Path, steps: int, workers: int = 0
) -> None:
    """Train up to `steps`, from a saved state if there is one."""
    optimizer = build_optimizer(model)
    step, spent = resume(work / "state.pt", model, optimizer)
    began = time.monotonic() - spent
    batches: Iterator[Any] = sampler.iter_batches(SEED, step, workers)
    losses, tokens = [], 0
    while step < steps:
        batch = next(batches)
        losses.append(train_step(model, optimizer, batch, learning_rate(step, steps)))
        tokens += int(batch[1].sum())
        step += 1
        seconds = time.monotonic() - began
        if step % LOG_EVERY == 0:
            loss = sum(losses) / len(losses)
            append_line(work / "log.jsonl", step=step, loss=loss, tokens=tokens, seconds=seconds)
            losses, tokens = [], 0
        if step % SAVE_EVERY == 0 or step == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(work / "state.pt", step=step, seconds=seconds, **state)
            loss = held_out_loss(model, held_out)
            append_line(work / "log.jsonl", step=step, held_out_loss=loss, seconds=seconds)


def main() -> None:
    """Train, then write the weights to the work folder."""
    parser = argparse.ArgumentParser(description="Train the small ChatGLM from nothing.")
    parser.add_argument("--data", type=Path, required=True, help="folder of recipes.mini.sources")
    parser.add_argument("--work", type=Path, required=True, help="folder of state and log")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw examples (0)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # of the GPU's matrix units; nothing on a CPU
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    seen, held_out = split_dialogues(load_dialogues(args.data))
    samplers = [Sampler(part, tokenizer, model.build_prompt) for part in (seen, held_out)]
    batches = build_held_out(samplers[1], tokenizer.pad_token_id)
    model = model.to(device).train()
    train(model, samplers[0], batches, args.work, args.steps, args.workers)


if __name__ == "__main__":
    main()
