"""Owns the names that other programs have for keys, and what each means here: one table.

The official scripts, the fork's, transformers 4 and trl, LLaMA-Factory and ms-swift. A name is the
key that it means, turns into keys by its value, has no effect because what it asks for is so
already, or is refused with the reason and the remedy. Does not know which keys a stage has.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

OFFICIAL, FORK, TRANSFORMERS = "the official scripts", "the fork", "transformers 4"
TRL, FACTORY, SWIFT = "trl", "LLaMA-Factory", "ms-swift"
# Held by a name's `accepts` where every value is accepted.
ANYTHING = "anything"
LEARNERS = ("pretrain", "sft", "ptuning", "reward", "dpo")
TRAININGS = (*LEARNERS, "ppo", "grpo")


class Name(NamedTuple):
    """What a name of another program means.

    Attributes:
        whose: the program.
        key: of ours or of the library, that it is; "" if it is none.
        turns: the keys that it turns into, by its value as a text in lower case; they hold unless
            they are set themselves.
        accepts: values that have no effect; `ANYTHING`, or none at all.
        why: there is no effect, or what is wrong with every other value, and what to do.
        stages: where this holds; none for all.
        is_share: whether the value is a share, from 0 to less than 1.
    """

    whose: str
    key: str = ""
    turns: Mapping[str, Mapping[str, Any]] = {}
    accepts: tuple[Any, ...] = ()
    why: str = ""
    stages: tuple[str, ...] = ()
    is_share: bool = False


def _means(whose: str, **names: str) -> dict[str, list[Name]]:
    return {name: [Name(whose, key=key)] for name, key in names.items()}


def _idle(whose: str, why: str, *names: str, accepts: Any = (ANYTHING,)) -> dict[str, list[Name]]:
    return {name: [Name(whose, accepts=accepts, why=why)] for name in names}


def _refused(whose: str, why: str, *names: str) -> dict[str, list[Name]]:
    return {name: [Name(whose, why=why)] for name in names}


_ADAPTED = {"lora": {"lora_rank": 8}, "full": {"lora_rank": 0}}
_ONLY = "lora or full: other ways to train a part of the model are not here; leave it out"
_HELD_OUT = "held-out rows are measured by the probability of their answers while training"
_COMPARED = f"{_HELD_OUT}; chatglm train eval --task generation compares answers"
_LOCAL = "models and data are files of this machine: name them with model and train_data"
_FORMAT = "prompts are the model's own, to the last id, as in chat"
_TABLE = "rows are read as they are needed and nothing is cached"
_ATTENTION = (
    "attention is torch's own; no other one reads a prefix in both directions: leave it out"
)
_PARTS = "sharding is settled by fsdp_config, deepspeed or accelerate's file: leave it out"
_HUB = "nothing is sent anywhere while training; chatglm publish puts a folder on the Hub"
_DEVICE = "the best device of this machine is taken; use_cpu leaves the GPU alone"
_WHOLE = "a folder that holds anything is refused all the same: name another output, or use resume"
_PICKED = "rows are chosen in the file of keys, not by a name in a list of datasets"

_OFFICIAL: dict[str, list[Name]] = {
    **_means(
        OFFICIAL,
        model_name_or_path="model",
        output_dir="output",
        train_file="train_data",
        validation_file="eval_data",
        quantization_bit="bits",
        ptuning_checkpoint="adapter",
        max_train_samples="max_samples",
    ),
    "test_file": [Name(OFFICIAL, key="eval_data")],
    "do_train": [
        Name(
            OFFICIAL,
            accepts=(True,),
            why="the stage trains; to measure only there is chatglm train eval",
            stages=TRAININGS,
        ),
        Name(OFFICIAL, accepts=(False,), why="eval trains nothing: name another stage"),
    ],
    "do_eval": [
        Name(OFFICIAL, accepts=(ANYTHING,), why="whatever eval_data names is measured, or nothing")
    ],
    "do_predict": [
        Name(
            OFFICIAL,
            accepts=(False,),
            why="answers are compared afterwards: chatglm train eval --task generation",
            stages=TRAININGS,
        ),
        Name(OFFICIAL, turns={"true": {"task": "generation"}, "false": {}}),
    ],
    "predict_with_generate": [
        Name(OFFICIAL, accepts=(ANYTHING,), why=_COMPARED, stages=TRAININGS),
        Name(OFFICIAL, turns={"true": {"task": "generation"}, "false": {"task": "perplexity"}}),
    ],
    "max_source_length": [
        Name(OFFICIAL, why="sft and ptuning have it; elsewhere set max_length, and long_rows: cut")
    ],
    "max_target_length": [
        Name(
            OFFICIAL,
            why="sft and ptuning have it; elsewhere set max_length, or max_new_tokens for answers "
            "that are generated",
        )
    ],
    "resume_from_checkpoint": [
        Name(
            OFFICIAL,
            turns={"true": {"resume": True}, "false": {}, "none": {}},
            why="true or false: resume goes on from the newest checkpoint in output, no other",
        )
    ],
    **_idle(OFFICIAL, _WHOLE, "overwrite_output_dir"),
    **_idle(OFFICIAL, _TABLE, "overwrite_cache", "preprocessing_num_workers"),
    **_idle(OFFICIAL, _COMPARED, "val_max_target_length", "generation_max_length"),
    **_idle(OFFICIAL, "rows are padded to a batch, and pads count nowhere", "pad_to_max_length"),
    **_idle(OFFICIAL, "the folder has one vocabulary and one way to read it", "use_fast_tokenizer"),
    **_idle(
        OFFICIAL,
        "pads are never learned: leave it out",
        "ignore_pad_token_for_loss",
        accepts=(True,),
    ),
    **_idle(
        OFFICIAL,
        "write it into the rows, in their column prefix or system",
        "source_prefix",
        accepts=("", None),
    ),
    **_idle(OFFICIAL, _LOCAL, "model_revision", accepts=("main",)),
    **_idle(OFFICIAL, _LOCAL, "use_auth_token", "token", accepts=(False, None)),
    **_idle(
        OFFICIAL,
        "positions are rotary and have no table",
        "resize_position_embeddings",
        accepts=(False, None),
    ),
    **_refused(OFFICIAL, _LOCAL, "dataset_name", "dataset_config_name", "cache_dir"),
    **_refused(OFFICIAL, "both are read from the folder of model", "config_name", "tokenizer_name"),
    **_refused(OFFICIAL, _COMPARED, "num_beams", "generation_num_beams", "max_predict_samples"),
    **_refused(
        OFFICIAL,
        "make a smaller file of held-out rows, or set max_samples",
        "max_eval_samples",
    ),
    **_refused(OFFICIAL, "an answer begins with nothing but <sop>", "forced_bos_token", "lang"),
}

_FORK: dict[str, list[Name]] = {
    **_means(
        FORK,
        train_filename="train_data",
        eval_filename="eval_data",
        lora_train_bias="lora_bias",
        num_epochs="num_train_epochs",
        train_batch_size="per_device_train_batch_size",
        eval_batch_size="per_device_eval_batch_size",
        deepspeed_config="deepspeed",
        actor_learning_rate="learning_rate",
        actor_weight_decay="weight_decay",
        actor_lora_rank="lora_rank",
        actor_model_path="model",
        sft_model_path="model",
        critic_learning_rate="value_learning_rate",
        reward_model_path="reward_model",
        reward_checkpoint="reward_model",
        actor_gradient_checkpointing="gradient_checkpointing",
        ppo_epochs="num_ppo_epochs",
        max_answer_seq_len="max_new_tokens",
        ppo_batch_numbers="num_mini_batches",
    ),
    "test_filename": [Name(FORK, key="eval_data")],
    "tokenizer_path": [Name(FORK, why="the vocabulary is read from the folder of model")],
    **_refused(
        FORK,
        "the critic is a value head on the policy, and has the policy's settings",
        "critic_weight_decay",
        "critic_lora_rank",
        "critic_zero_stage",
        "critic_dropout",
        "critic_model_path",
        "critic_gradient_checkpointing",
        "enable_joint_optimization",
    ),
    **_idle(
        FORK,
        "PPO drops nothing out, or its ratios would begin off 1",
        "actor_dropout",
        "disable_actor_dropout",
        accepts=(0, 0.0, True, None),
    ),
    **_refused(
        FORK,
        "PPO is for one process or DDP, with a whole model in each",
        "actor_zero_stage",
        "zero_stage",
        "offload",
        "offload_reference_model",
    ),
    **_idle(
        FORK,
        "there is no hybrid engine and no moving average of the policy",
        "enable_hybrid_engine",
        "enable_ema",
        accepts=(False,),
    ),
    **_idle(FORK, _DEVICE, "device_map", "local_rank"),
    **_refused(FORK, "documents share rows with packing: true", "concat_samples"),
    **_refused(FORK, "everything is written to output, under names of its own", "output_filename"),
}

_TRANSFORMERS: dict[str, list[Name]] = {
    **_means(
        TRANSFORMERS,
        evaluation_strategy="eval_strategy",
        per_gpu_train_batch_size="per_device_train_batch_size",
        per_gpu_eval_batch_size="per_device_eval_batch_size",
        no_cuda="use_cpu",
        sortish_sampler="group_by_length",
    ),
    "warmup_ratio": [Name(TRANSFORMERS, key="warmup_steps", is_share=True)],
    "adafactor": [Name(TRANSFORMERS, turns={"true": {"optim": "adafactor"}, "false": {}})],
    **_idle(
        TRANSFORMERS,
        "weights are written as safetensors; chatglm merge --format bin writes the others",
        "save_safetensors",
        accepts=(True,),
    ),
    **_refused(TRANSFORMERS, "TensorBoard's files go to output, in runs", "logging_dir"),
    **_idle(TRANSFORMERS, _DEVICE, "use_mps_device", "tpu_num_cores", "ray_scope"),
    **_idle(
        TRANSFORMERS,
        "torch computes in bf16 or fp16 by itself: leave it out",
        "fp16_opt_level",
        "half_precision_backend",
        "fp16_backend",
        accepts=("O1", "auto", "amp", "cuda_amp", None),
    ),
    **_idle(
        TRANSFORMERS,
        "the library dropped it: leave it out",
        "jit_mode_eval",
        "use_ipex",
        "tpu_metrics_debug",
        "use_legacy_prediction_loop",
        "include_inputs_for_metrics",
        "torchdynamo",
        "mp_parameters",
        "past_index",
        accepts=(False, None, "", -1),
    ),
    **_idle(TRANSFORMERS, "every line of the log has tokens/s", "include_tokens_per_second"),
    **_refused(TRANSFORMERS, _PARTS, "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"),
    **_refused(
        TRANSFORMERS,
        _HUB,
        "push_to_hub_model_id",
        "push_to_hub_organization",
        "push_to_hub_token",
    ),
    **_refused(
        TRANSFORMERS, "it is a part of accelerator_config", "dispatch_batches", "split_batches"
    ),
}

_TRL: dict[str, list[Name]] = {
    **_means(TRL, lora_r="lora_rank", lora_target_modules="lora_targets"),
    "use_peft": [Name(TRL, turns={"true": {"lora_rank": 16}, "false": {"lora_rank": 0}})],
    "load_in_8bit": [Name(TRL, turns={"true": {"bits": 8}, "false": {}})],
    "load_in_4bit": [Name(TRL, turns={"true": {"bits": 4}, "false": {}})],
    **_idle(
        TRL,
        _ATTENTION,
        "attn_implementation",
        accepts=("eager", "sdpa", None),
    ),
    **_idle(
        TRL,
        "only answers are learned",
        "completion_only_loss",
        "assistant_only_loss",
        accepts=(True, None),
    ),
}

_STAGE_NAMES = {"pt": "pretrain", "rm": "reward"}
_FACTORY: dict[str, list[Name]] = {
    **_means(
        FACTORY,
        dataset="train_data",
        eval_dataset="eval_data",
        lora_target="lora_targets",
        adapter_name_or_path="adapter",
        additional_target="modules_to_save",
        val_size="val_ratio",
        pref_beta="beta",
        pref_loss="loss_type",
        ppo_target="kl_target",
        ppo_score_norm="whiten_scores",
        ppo_whiten_rewards="whiten_rewards",
    ),
    "finetuning_type": [Name(FACTORY, turns=_ADAPTED, why=_ONLY)],
    "mask_history": [Name(FACTORY, turns={"true": {"learn_turns": "last"}, "false": {}})],
    "disable_gradient_checkpointing": [
        Name(FACTORY, turns={"true": {"gradient_checkpointing": False}, "false": {}})
    ],
    **_idle(FACTORY, f"{_FORMAT}: leave it out", "template", accepts=("chatglm", "default")),
    **_idle(FACTORY, "curves.png is drawn in any case", "plot_loss"),
    **_idle(FACTORY, _TABLE, "streaming", "buffer_size"),
    **_idle(
        FACTORY, "documents of a packed row never see one another", "neat_packing", accepts=(True,)
    ),
    **_idle(FACTORY, _ATTENTION, "flash_attn", accepts=("auto", "sdpa", "disabled", False, None)),
    **_idle(
        FACTORY,
        "the installed code runs, or the folder's with --trust-folder-code",
        "trust_remote_code",
    ),
    **_idle(
        FACTORY,
        "the tokens of a question see one another, so nothing is learned from them",
        "train_on_prompt",
        accepts=(False,),
    ),
    **_idle(
        FACTORY,
        "there is nothing of the kind for ChatGLM: leave it out",
        "use_unsloth",
        "shift_attn",
        "enable_liger_kernel",
        "upcast_layernorm",
        "use_galore",
        "use_badam",
        "pissa_init",
        accepts=(False,),
    ),
    **_refused(FACTORY, "bits packs with this model's own formats", "quantization_method"),
    **_refused(FACTORY, _PICKED, "mix_strategy", "interleave_probs"),
    **_refused(
        FACTORY, "the window of 2,048 tokens is what the model was made for", "rope_scaling"
    ),
    **_refused(FACTORY, "the reference is the model without its new adapters", "ref_model"),
    **_refused(FACTORY, "a finished adapter is merged by chatglm merge", "export_dir"),
}

_SWIFT: dict[str, list[Name]] = {
    **_means(
        SWIFT,
        model_id_or_path="model",
        val_dataset="eval_data",
        split_dataset_ratio="val_ratio",
        dataset_test_ratio="val_ratio",
        target_modules="lora_targets",
        quant_bits="bits",
        system="default_system",
        adapters="adapter",
    ),
    **{
        name: [Name(SWIFT, turns=_ADAPTED, why=_ONLY)]
        for name in ("train_type", "tuner_type", "sft_type")
    },
    "truncation_strategy": [
        Name(
            SWIFT,
            turns={
                "delete": {"long_rows": "skip"},
                "left": {"long_rows": "cut"},
                "raise": {"long_rows": "error"},
            },
            why="delete, left or raise: long_rows says what happens to long rows",
        )
    ],
    "loss_scale": [
        Name(
            SWIFT,
            turns={"default": {"learn_turns": "all"}, "last_round": {"learn_turns": "last"}},
            why="default or last_round: learn_turns says which answers are learned, each alike",
        )
    ],
    "torch_dtype": [
        Name(
            SWIFT,
            turns={"bfloat16": {"bf16": True}, "float16": {"fp16": True}, "float32": {}},
            why="bfloat16, float16 or float32: what is computed in is bf16 or fp16",
        )
    ],
    **_idle(SWIFT, f"{_FORMAT}: leave it out", "template_type", accepts=("chatglm", "default")),
    **_idle(SWIFT, "the folder says what its model is", "model_type", accepts=("chatglm",)),
    **_idle(SWIFT, _ATTENTION, "attn_impl", accepts=("eager", "sdpa", None)),
    **_idle(SWIFT, _TABLE, "lazy_tokenize", "dataset_num_proc"),
    **_idle(SWIFT, "output is taken as it is", "add_version", accepts=(False,)),
    **_idle(SWIFT, _LOCAL, "use_hf"),
    **_refused(SWIFT, "bits packs with this model's own formats", "quant_method"),
    **_refused(SWIFT, _ONLY, "freeze_parameters", "freeze_parameters_ratio"),
}

# Of two programs with the same name the first one's stays.
NAMES: dict[str, list[Name]] = {
    **_SWIFT,
    **_FACTORY,
    **_TRL,
    **_TRANSFORMERS,
    **_FORK,
    **_OFFICIAL,
}
# These are read as above though a library has keys of the names, which would do nothing or harm.
FIRST = frozenset(
    {
        "do_train",
        "do_eval",
        "do_predict",
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "generation_max_length",
        "generation_num_beams",
        "predict_with_generate",
        "sortish_sampler",
    }
)
# The keys by which programs name a stage, and the folder that names of files are of.
STAGE_KEYS = ("stage", "rlhf_type")
FOLDER_KEYS = ("data_dir", "dataset_dir")
STAGES_OF_OTHERS = _STAGE_NAMES
CUTOFF = "cutoff_len"


def find_name(name: str, stage: str) -> Name | None:
    """Return what a name means in a stage; None if nobody has it.

    Args:
        name: of another program.
        stage: as people type it.
    """
    return next((n for n in NAMES.get(name, ()) if not n.stages or stage in n.stages), None)


__all__ = ["ANYTHING", "FIRST", "FOLDER_KEYS", "NAMES", "STAGE_KEYS", "Name", "find_name"]
