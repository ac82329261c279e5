"""Sentence embeddings from a ChatGLM, with sentence-transformers.

    pip install sentence-transformers
    python examples/sentence_embeddings.py FOLDER

`SentenceTransformer(FOLDER)` is refused by that library ("Modality 'text' is not supported"), which
looks for a model whose output is `last_hidden_state`, and AutoModel gives one that writes. The
module below hands it the mean of the last hidden states over a text's tokens. All of them are read
in both directions, as what stands before `<sop>` is. ChatGLM was never trained to tell texts apart,
and a model that was is better at it: use this to look at what it knows, or as a start for training.
"""

import sys
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["你好！", "您好，很高兴认识您。", "What is the capital of France?"]


class ChatGLMEncoder(nn.Module):
    """Texts to embeddings, `(B, H)`.

    Args:
        folder: of a ChatGLM.
        max_length: tokens of a text; what is behind is cut off.
    """

    def __init__(self, folder: str, max_length: int = 512) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        )
        self.network: Any = model.base_model.eval()
        self.max_seq_length = max_length

    def preprocess(self, inputs: list[str], **kwargs: Any) -> dict[str, Tensor]:
        """Return ids and mask of texts, without `[gMASK] <sop>`: all is context then."""
        return self.tokenizer(
            list(inputs),
            add_special_tokens=False,
            split_special_tokens=True,
            truncation=True,
            max_length=self.max_seq_length,
            padding=True,
            return_tensors="pt",
        )

    tokenize = preprocess

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Add the mean of the real tokens' states."""
        mask = features["attention_mask"]
        states = self.network(
            input_ids=features["input_ids"], attention_mask=mask, use_cache=False
        ).last_hidden_state
        weights = mask.unsqueeze(-1).to(states)  # (B, S, 1)
        features["sentence_embedding"] = (states * weights).sum(1) / weights.sum(1)
        return features

    def get_embedding_dimension(self) -> int:
        return self.network.config.hidden_size

    get_sentence_embedding_dimension = get_embedding_dimension


def build_encoder(folder: str) -> SentenceTransformer:
    """Return a model of sentence-transformers, on the device where the network is."""
    return SentenceTransformer(modules=[ChatGLMEncoder(folder)], device="cpu")


def main(folder: str) -> Tensor:
    """Compare three sentences, and return their cosines, `(3, 3)`."""
    encoder = build_encoder(folder)
    embeddings = encoder.encode(TEXTS, convert_to_tensor=True)
    cosines = encoder.similarity(embeddings, embeddings)
    print(cosines)
    return cosines


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")
