"""The model of the first ChatGLM-6B as a package, and the commands around it.

    import chatglm

    chatglm.register()  # from here on transformers' Auto classes load any folder of the family

Knows nothing about layers, masks or token ids: `chatglm.model` are the model's files themselves.
"""

from chatglm.door import folder_code, register

__version__ = "0.1.0"

__all__ = ["__version__", "folder_code", "register"]
