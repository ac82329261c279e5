"""Owns what the model card says of a folder that was adopted.

Does not know the form of a card (`chatglm.cards`), nor what adopting changes (`plan`).
"""

from pathlib import Path

from chatglm.adopting.kinds import Kind
from chatglm.cards import Card, format_card, read_base
from chatglm.converting.describing import LOADING

LOADING_PREFIX = """\
from transformers import AutoConfig

config = AutoConfig.from_pretrained(".", trust_remote_code=True)
print(config.pre_seq_len)  # of the prefix in this folder, for the model that it was trained with"""


def describe_adopted(folder: Path, kind: Kind, prefix: str = "") -> str:
    """Return the card of a folder.

    Args:
        folder: as it was.
        kind: of it.
        prefix: the name of a folder whose P-Tuning prefix was put into it.
    """
    base = read_base(folder)
    fields = kind.fields
    bits = fields.get("quantization_bit")
    weights = f"{bits} bits" if bits else str(fields.get("torch_dtype") or fields.get("dtype"))
    what = base.name if kind.is_model else f"the P-Tuning prefix {base.name}"
    more = f" and the P-Tuning prefix {prefix}" if prefix else ""
    return format_card(
        Card(
            title=f"{base.name}{' with a prefix' if prefix else ''}",
            summary=f"This is {what}{more}, with model files for today's transformers.",
            base=base,
            precision={"weights": weights},
            making={"command": "`chatglm adopt`", "weight files": "as they were"},
            loading=LOADING if kind.is_model else LOADING_PREFIX,
            tags=("custom_code",),
        )
    )


__all__ = ["describe_adopted"]
