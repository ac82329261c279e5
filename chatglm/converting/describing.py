"""Owns what the model card says of a folder that was converted from another.

Does not know the form of a card (`chatglm.cards`), nor how the folder comes about.
"""

from collections.abc import Sequence
from pathlib import Path

from chatglm.cards import Card, format_card, read_base
from chatglm.converting.planning import Form, Plan

LOADING = """\
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModel.from_pretrained(".", trust_remote_code=True, dtype="auto").eval()"""


def describe_conversion(
    source: Path, plan: Plan, form: Form, lora: Sequence[Path], command: str
) -> str:
    """Return the card of a result.

    Args:
        source: the folder that it was made from.
        plan: of the result.
        form: of the result.
        lora: folders of the adapters that were merged in, in order.
        command: that made it.
    """
    base = read_base(source)
    bits = form.packed_format.bits
    several = f"{len(lora)} LoRA adapters" if len(lora) > 1 else "a LoRA adapter"
    with_adapter = f" with {several} merged into its weights" if lora else ""
    packed = f", quantized to {bits} bits" if bits else ""
    return format_card(
        Card(
            title=f"{base.name}{_count_adapters(lora)}{packed}",
            summary=f"This is {base.name}{with_adapter}{packed}.",
            base=base,
            precision=describe_precision(plan, form),
            making=describe_making(form, lora, command),
            loading=LOADING,
            tags=("custom_code", *((f"{bits}-bit",) if bits else ())),
        )
    )


def _count_adapters(lora: Sequence[Path]) -> str:
    return f" with {'an adapter' if len(lora) == 1 else f'{len(lora)} adapters'}" if lora else ""


def describe_precision(plan: Plan, form: Form) -> dict[str, str]:
    """Return the rows about number formats."""
    dtype = str(plan.fields["torch_dtype"])
    bits, group_size, embeddings = form.packed_format
    if not bits:
        return {"weights": dtype}
    columns = f"every {group_size} columns" if group_size else "every row"
    return {
        "matrices of the blocks": f"{bits} bits, with a scale for {columns}",
        "embedding and head": f"{bits} bits" if embeddings else dtype,
        "everything else": f"{dtype}, or the float32 that it came in",
    }


def describe_making(form: Form, lora: Sequence[Path], command: str) -> dict[str, str]:
    """Return the rows about the command."""
    rows = {"command": f"`{command}`", "weight files": form.kind}
    if lora:
        rows["adapter" if len(lora) == 1 else "adapters"] = ", ".join(path.name for path in lora)
    return rows
