"""Owns what the model card says of a folder that was converted from another.

Does not know the form of a card (`chatglm.cards`), nor how the folder comes about.
"""

from pathlib import Path

from chatglm.cards import Card, format_card, read_base
from chatglm.converting.planning import Form, Plan

LOADING = """\
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModel.from_pretrained(".", trust_remote_code=True, dtype="auto").eval()"""


def describe_conversion(source: Path, plan: Plan, form: Form, lora: str | None) -> str:
    """Return the card of a result.

    Args:
        source: the folder that it was made from.
        plan: of the result.
        form: of the result.
        lora: folder of the adapter that was merged in, or None.
    """
    base = read_base(source)
    bits = form.packed_format.bits
    with_adapter = "" if lora is None else " with a LoRA adapter merged into its weights"
    packed = f", quantized to {bits} bits" if bits else ""
    return format_card(
        Card(
            title=f"{base.name}{' with an adapter' if lora else ''}{packed}",
            summary=f"This is {base.name}{with_adapter}{packed}.",
            base=base,
            precision=describe_precision(plan, form),
            making=describe_making(form, lora),
            loading=LOADING,
            tags=("custom_code", *((f"{bits}-bit",) if bits else ())),
        )
    )


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


def describe_making(form: Form, lora: str | None) -> dict[str, str]:
    """Return the rows about the command."""
    command = "quantize" if form.packed_format.bits else "merge"
    rows = {"command": f"`chatglm {command}`", "weight files": form.kind}
    if lora is not None:
        rows["adapter"] = Path(lora).expanduser().resolve().name
    return rows
