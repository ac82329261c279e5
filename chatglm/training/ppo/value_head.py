"""Owns the policy that PPO trains: a language model, and a value head on its last hidden states.

    [gMASK] <sop>  a_1  a_2 .. a_T             row: prompt, then answer
             |      |    |
           h_1    h_2  h_3                     last hidden states, one column earlier
           / \\
    logits    value                            of a_1, and V(s_1), what is still to be earned

One network serves both, as in Ziegler et al. 2019: a critic of its own would be as large as the
policy, with an optimizer state, and would double what a step computes; adapters on the policy serve
the head too. What speaks for the critic, a value loss that does not pull at the policy's layers, is
left to `value_coefficient`. The head starts from zeros, so the first advantages are sums of rewards
and nothing drawn at random. Does not know rewards or losses.

Shapes: `B` rows, `P` prompt columns, `A` answer columns, `H` hidden, `V` vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chatglm.checkpoints.recognize import VALUE_HEAD_FILE
from chatglm.training.models import find_core
from chatglm.training.ppo.math import measure_entropy, select_log_probs


class Answers(NamedTuple):
    """Prompts, padded on the left, and answers to them, padded on the right.

    Attributes:
        prompt_ids: `(B, P)`.
        prompt_mask: `(B, P)`, boolean, true for real tokens.
        answer_ids: `(B, A)`.
        answer_mask: `(B, A)`, boolean, true up to `<eop>`, which is an answer's last token.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    answer_ids: Tensor
    answer_mask: Tensor

    def pick(self, rows: Tensor) -> "Answers":
        """Return some rows, without the columns that then hold nothing but pads."""
        prompt_ids, prompt_mask, answer_ids, answer_mask = (part[rows] for part in self)
        start = self.prompt_ids.shape[1] - int(prompt_mask.sum(1).max())
        stop = int(answer_mask.sum(1).max())
        return Answers(
            prompt_ids[:, start:],
            prompt_mask[:, start:],
            answer_ids[:, :stop],
            answer_mask[:, :stop],
        )

    def split(self, rows: Tensor, size: int) -> tuple[Tensor, ...]:
        """Return rows `(N,)` in parts of some size, each of like length: little is padded."""
        lengths = (self.prompt_mask.sum(1) + self.answer_mask.sum(1))[rows]
        return rows[lengths.argsort(stable=True)].split(size)


class PolicyOutput(NamedTuple):
    """What a model says about the tokens of answers; undefined for pads.

    Attributes:
        log_probs: log p(a_t | s_t) at the temperature, `(B, A)`.
        values: V(s_t), `(B, A)`.
        entropy: of p(. | s_t) at the temperature in nats, `(B, A)`; 0 unless it was asked for.
    """

    log_probs: Tensor
    values: Tensor
    entropy: Tensor


class ActorCritic(nn.Module):
    """A language model with a value head.

    Args:
        policy: the model, with adapters or without.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = nn.Linear(find_core(policy).config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        temperature: float = 1.0,
        needs_entropy: bool = False,
    ) -> PolicyOutput:
        """Return what the policy and its value head say about answers.

        Args:
            prompt_ids, prompt_mask, answer_ids, answer_mask: as in `Answers`.
            temperature: that answers are drawn at.
            needs_entropy: whether the entropy is worked out, which takes as much memory as the
                logits do; it is 0 otherwise.
        """
        core = find_core(self.policy)
        hidden_states = core.base_model(
            input_ids=torch.cat((prompt_ids, answer_ids), dim=1),
            attention_mask=torch.cat((prompt_mask, answer_mask), dim=1).long(),
            use_cache=False,
            return_dict=True,
        ).last_hidden_state[:, -answer_ids.shape[1] - 1 : -1]  # (B, A, H)
        logits = core.get_output_embeddings()(hidden_states)  # (B, A, V)
        log_probs = select_log_probs(logits, answer_ids, temperature)
        entropy = torch.zeros_like(log_probs)
        if needs_entropy:
            entropy = measure_entropy(logits, temperature)
        return PolicyOutput(log_probs, self._estimate_values(hidden_states), entropy)

    def _estimate_values(self, hidden_states: Tensor) -> Tensor:
        """Return the values `(B, A)`, in float32 whatever the policy is computed in."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.value_head(hidden_states.float()).squeeze(-1)

    def group_parameters(
        self, learning_rate: float, value_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Return what is trained for an optimizer: matrices, which decay, the rest, the head."""
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() > 1]
        others = [p for p in trained if p.dim() <= 1]
        groups = [
            {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": others, "lr": learning_rate, "weight_decay": 0.0},
            {"params": list(self.value_head.parameters()), "lr": value_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def save_head(self, folder: Path) -> None:
        """Write the value head into a folder, beside the policy."""
        save_file(self.value_head.state_dict(), folder / VALUE_HEAD_FILE)

    def load_head(self, folder: Path) -> None:
        """Read the value head of a folder."""
        self.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))


class Reference:
    """The policy as it was in the beginning, which it shall not run away from.

    It lives in the policy's own modules, so it is computed exactly alike and costs little: new
    adapters are switched off, in any other case what is trained is exchanged, while the reference
    is asked, for a frozen copy of what it was.

    Args:
        model: of which `policy` is, or was, the beginning.
        beginning: the values that its trained parameters had, in their order; None for new
            adapters.
    """

    def __init__(self, model: ActorCritic, beginning: list[Tensor] | None) -> None:
        self.model, self.beginning = model, beginning

    @contextmanager
    def put_in_place(self) -> Iterator[ActorCritic]:
        """Make the policy what it was in the beginning, for as long as the context is open."""
        if self.beginning is None:
            with self.model.policy.disable_adapter():
                yield self.model
            return
        trained = list_trained(self.model.policy)
        now = [parameter.data for parameter in trained]
        _exchange(trained, self.beginning)
        try:
            yield self.model
        finally:
            _exchange(trained, now)


def list_trained(policy: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, in the order of the modules."""
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def copy_trained(policy: nn.Module, device: torch.device) -> list[Tensor]:
    """Return a copy of the values of what is trained, on a device."""
    return [p.detach().to(device, copy=True) for p in list_trained(policy)]


def _exchange(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values):
        parameter.data = value


__all__ = ["ActorCritic", "Answers", "PolicyOutput", "Reference", "copy_trained", "list_trained"]
