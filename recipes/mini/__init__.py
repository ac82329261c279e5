"""ChatGLM-mini: data, vocabulary, training and measurement of a tiny bilingual model."""
