"""Owns the keys of a library that are refused, and why: they would be wrong here, or do nothing.

Does not know when they are asked for.
"""

# These keys of the library are refused, since they follow from the keys of ours beside them.
RESERVED = {"output_dir": "output", "resume_from_checkpoint": "resume", "do_train": "STAGE"}
RESERVED |= {"train_sampling_strategy": "group_by_length"}
_CAUSAL = (
    "it reads every token causally, but the tokens of ChatGLM's question see one another in both "
    "directions: the answers and their probabilities would be others"
)
_RENDERED = "rows are rendered exactly as chat() renders them, <eop> included"
_LOADED = "the model is loaded here: use model, bits and dtype"
_NO_KERNELS = "there are no Liger kernels for ChatGLM, and their fused losses are causal ones"
_NO_EXPERTS = "ChatGLM has no experts to balance"
# Why a key of trl's arguments is refused. A value that holds without the key may be written down.
REFUSED = {
    "model_init_kwargs": _LOADED,
    "trust_remote_code": "--trust-folder-code says whose code runs",
    "chat_template_path": _RENDERED,
    "chat_template_kwargs": _RENDERED,
    "eos_token": _RENDERED,
    "pad_token": _RENDERED,
    "dataset_num_proc": _RENDERED + ", once, before the training",
    "truncation_mode": "long_rows says what happens to long rows",
    "remove_unused_columns": "rewards and figures look at the other columns",
    "padding_free": "rows put behind one another would share one prefix; pad them",
    "parallelism_config": "it splits the columns of a row, each of which sees the whole question",
    "use_liger_kernel": _NO_KERNELS,
    "liger_kernel_config": _NO_KERNELS,
    "router_aux_loss_coef": _NO_EXPERTS,
    "label_smoothing_factor": "these losses have no labels; dpo has label_smoothing",
    "batch_eval_metrics": "the figures are taken over all held-out rows at once",
    "max_tool_calling_iterations": "ChatGLM calls no tools",
    "use_vllm": "vLLM: " + _CAUSAL,
    "use_transformers_paged": "continuous batching: " + _CAUSAL,
    "use_transformers_continuous_batching": "continuous batching: " + _CAUSAL,
    "transformers_continuous_batching_config": "continuous batching: " + _CAUSAL,
}
REFUSED_BEGINNING = "vllm_"

__all__ = ["REFUSED", "REFUSED_BEGINNING", "RESERVED"]
