"""llama-index with a ChatGLM.

    pip install llama-index-core
    python examples/llama_index_llm.py FOLDER

The class goes through the model's own `chat` and `stream_chat`. `HuggingFaceLLM` of
llama-index-llms-huggingface, which renders and encodes by itself, is not needed.
"""

import sys
from typing import Any

from llama_index.core import PromptTemplate
from llama_index.core.llms import (
    CompletionResponse,
    CompletionResponseGen,
    CustomLLM,
    LLMMetadata,
)
from llama_index.core.llms.callbacks import llm_completion_callback
from transformers import AutoModelForCausalLM, AutoTokenizer


class ChatGLM(CustomLLM):
    """A language model of llama-index.

    Attributes:
        model, tokenizer: of a ChatGLM folder.
        options: of `chat`, such as `do_sample` or `max_new_tokens`.
    """

    model: Any
    tokenizer: Any
    options: dict[str, Any] = {}

    @property
    def metadata(self) -> LLMMetadata:
        window = self.model.config.max_sequence_length
        return LLMMetadata(context_window=window, model_name="chatglm")

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a text."""
        answer, _ = self.model.chat(self.tokenizer, prompt, **{**self.options, **kwargs})
        return CompletionResponse(text=answer)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Answer a text bit by bit: the answer so far, and what is new of it."""

        def follow() -> CompletionResponseGen:
            shown, options = "", {**self.options, **kwargs}
            for answer, _ in self.model.stream_chat(self.tokenizer, prompt, **options):
                yield CompletionResponse(text=answer, delta=answer[len(shown) :])
                shown = answer

        return follow()


def build_llm(folder: str, **options: Any) -> ChatGLM:
    """Return the model of a folder."""
    return ChatGLM(
        model=AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
        options=options,
    )


def main(folder: str) -> list[str]:
    """Ask by a template, and as a stream; return both answers."""
    llm = build_llm(folder, do_sample=False, max_new_tokens=32)
    asked = llm.predict(PromptTemplate("{country}的首都是哪里？"), country="中国")
    streamed = "".join(part.delta or "" for part in llm.stream_complete("你好"))
    answers = [asked, streamed]
    print("\n".join(answers))
    return answers


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")
