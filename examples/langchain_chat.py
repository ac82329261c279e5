"""langchain with a ChatGLM: as a chat model that streams, and as a plain language model.

    pip install langchain-core
    python examples/langchain_chat.py FOLDER

Both classes go through the model's own `chat` and `stream_chat`, so that the prompt, the end of an
answer and its tidying are those of the model. With langchain-huggingface see
`langchain_pipeline.py`.
"""

import sys
from collections.abc import Iterator
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import LLM, BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from transformers import AutoModelForCausalLM, AutoTokenizer

Rounds = list[tuple[str, str]]


def load(folder: str) -> dict[str, Any]:
    """Return a model and its tokenizer."""
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    }


def split_messages(messages: list[BaseMessage]) -> tuple[str, Rounds]:
    """Return the last question, and the rounds before it.

    A system message stands in front of the first question: the format has no place of its own.

    Raises:
        ValueError: for messages that do not take turns, or are not of texts.
    """
    texts = [(message.type, message.content) for message in messages]
    lead = ""
    if texts and texts[0][0] == "system":
        lead = f"{texts.pop(0)[1]}\n"
    kinds = [kind for kind, _ in texts]
    if kinds != ["human", "ai"] * (len(kinds) // 2) + ["human"]:
        raise ValueError(f"messages must take turns and end with a question, got {kinds}")
    spoken = [str(text) for _, text in texts]
    spoken[0] = lead + spoken[0]
    return spoken[-1], list(zip(spoken[:-1:2], spoken[1::2]))


class ChatGLMChat(BaseChatModel):
    """A chat model of langchain.

    Attributes:
        model, tokenizer: of a ChatGLM folder.
        options: of `chat`, such as `do_sample` or `max_new_tokens`.
    """

    model: Any
    tokenizer: Any
    options: dict[str, Any] = {}

    @property
    def _llm_type(self) -> str:
        return "chatglm"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        question, rounds = split_messages(messages)
        options = {**self.options, **kwargs, "stop": stop}
        answer, _ = self.model.chat(self.tokenizer, question, rounds, **options)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(answer))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        question, rounds = split_messages(messages)
        options = {**self.options, **kwargs, "stop": stop}
        shown = ""
        for answer, _ in self.model.stream_chat(self.tokenizer, question, rounds, **options):
            chunk = ChatGenerationChunk(message=AIMessageChunk(answer[len(shown) :]))
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk
            shown = answer


class ChatGLMText(LLM):
    """A plain language model of langchain: a text in, the answer out. Attributes as above."""

    model: Any
    tokenizer: Any
    options: dict[str, Any] = {}

    @property
    def _llm_type(self) -> str:
        return "chatglm"

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        options = {**self.options, **kwargs, "stop": stop}
        return self.model.chat(self.tokenizer, prompt, **options)[0]


def main(folder: str) -> list[str]:
    """Ask through a chain, as a stream and as plain text; return the three answers."""
    parts = load(folder)
    options = {"do_sample": False, "max_new_tokens": 32}
    chat = ChatGLMChat(**parts, options=options)
    template = ChatPromptTemplate.from_messages([("human", "{country}的首都是哪里？")])
    chained = str((template | chat).invoke({"country": "中国"}).content)
    streamed = "".join(str(chunk.content) for chunk in chat.stream("你好"))
    plain = ChatGLMText(**parts, options=options).invoke("你好")
    answers = [chained, streamed, plain]
    print("\n".join(answers))
    return answers


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")
