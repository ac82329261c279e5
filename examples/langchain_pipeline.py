"""langchain's own Hugging Face classes with a ChatGLM: a pipeline, and a chat around it.

    pip install langchain-huggingface
    python examples/langchain_pipeline.py FOLDER

`ChatHuggingFace` renders messages to a text by the tokenizer's chat template and hands that to a
pipeline, which encodes it again: the tokenizer knows such a text by the `[gMASK]<sop>` at its end.
The pipeline decodes by itself, so punctuation is as the model wrote it; `model.chat` tidies its
answers (`langchain_chat.py`).
"""

import sys

from langchain_core.messages import AIMessage, HumanMessage
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def build_llm(folder: str) -> HuggingFacePipeline:
    """Return a pipeline of a folder in langchain's clothes, which answers without the question."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    model.generation_config.update(do_sample=False, top_p=1.0, temperature=1.0, max_new_tokens=32)
    model.generation_config.max_length = None
    made = pipeline(
        "text-generation", model=model, tokenizer=tokenizer, return_full_text=False, device="cpu"
    )
    return HuggingFacePipeline(pipeline=made)


def main(folder: str) -> list[str]:
    """Ask a text, and in a second round a message; return both answers."""
    llm = build_llm(folder)
    plain = llm.invoke("你好")
    # Without the tokenizer it would load another one, and not trust the folder.
    chat = ChatHuggingFace(llm=llm, tokenizer=llm.pipeline.tokenizer)
    messages = [HumanMessage("你好"), AIMessage(plain), HumanMessage("中国的首都是哪里？")]
    answers = [plain, str(chat.invoke(messages).content)]
    print("\n".join(answers))
    return answers


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")
