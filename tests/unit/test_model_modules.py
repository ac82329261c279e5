"""Which modules a model came from, where a process holds several copies of its files."""

import pytest
from torch import nn

pytest.importorskip("chatglm", reason="needs the package")

from conftest import build_model

from chatglm.model_modules import import_model_module


def test_a_model_and_its_wrapper_lead_to_the_copy_that_made_it() -> None:
    model = build_model()
    decoding = import_model_module(model, "decoding_chatglm")
    package = type(model).__module__.rpartition(".")[0]
    assert decoding.__name__ == f"{package}.decoding_chatglm"
    assert (
        import_model_module(nn.Sequential(nn.Linear(2, 2), model), "decoding_chatglm") is decoding
    )


def test_a_stranger_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^Linear holds no class of modeling_chatglm\.py: load"):
        import_model_module(nn.Linear(2, 2), "decoding_chatglm")
