"""The keys that every `config.json` of transformers may have, whatever the model, and what its names stand for."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...kernels.activations import ACTIVATIONS
from ..keys import Key, harmless, only, used

# transformers' names of activations -> ours; the other names of transformers.activations.ACT2CLS are refused.
HIDDEN_ACT = {
    **{name: name for name in ("gelu", "mish", "quick_gelu", "relu", "sigmoid", "silu", "swish", "tanh")},
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_tanh"),
}
assert set(HIDDEN_ACT.values()) <= set(ACTIVATIONS)


def _all(key: Key, *names: str) -> dict[str, Key]:
    return dict.fromkeys(names, key)


# Generation parameters: old files hold them all, in every section; transformers drops them on reading.
_GENERATION = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p use_cache
"""

# PreTrainedConfig of transformers 5 and what 4.x wrote; a model's own keys go over these.
COMMON: dict[str, Key] = {
    "model_type": used("text", None),
    "architectures": used("texts", None),
    **_all(
        harmless("bookkeeping"),
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "auto_map", "tokenizer_class"),
        *("finetuning_task", "task_specific_params", "prefix", "custom_pipelines", "unsloth_version", "unsloth_fixed"),
    ),
    **_all(harmless("training"), "problem_type", "initializer_range", "gradient_checkpointing", "attention_dropout"),
    **_all(harmless("outputs"), "output_hidden_states", "output_attentions", "return_dict", "use_return_dict"),
    **_all(harmless("generation"), *_GENERATION.split()),
    **_all(harmless("tokens"), "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
    **_all(
        harmless("runtime"),
        *("dtype", "torch_dtype", "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_experts_implementation"),
    ),
    # Nothing to tie, decode or cross-attend in the models that do not list these themselves.
    **_all(
        harmless("ignored"),
        *("is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size"),
        *("tie_encoder_decoder", "tie_word_embeddings", "label2id", "id2label", "num_labels"),
    ),
    "pruned_heads": only({}, None),
    "per_layer_config": only(None),
    "tie_last_hidden_states": only(None),
    "quantization_config": only(None),
}


def num_classes(values: Mapping[str, Any]) -> int:
    """The outputs of a classifier: as many as `id2label` has, else `num_labels`, else two (PreTrainedConfig)."""
    return len(values["id2label"]) if values["id2label"] is not None else values["num_labels"] or 2


def names_of(labels: Sequence[str]) -> dict[str, Any]:
    """`id2label` and `label2id`; where classes share a name, `label2id` keeps the first, `id2label` all of them."""
    numbers: dict[str, int] = {}
    for i, label in enumerate(labels):
        numbers.setdefault(label, i)
    return {"id2label": {str(i): label for i, label in enumerate(labels)}, "label2id": numbers}


def labels_of(id2label: Mapping[str, str] | None) -> tuple[str, ...] | None:
    """Class names in order; ValueError where the numbers are not 0, 1, 2, ..."""
    if not id2label:
        return None
    numbers = {int(key): label for key, label in id2label.items() if str(key).isdecimal()}
    if len(numbers) != len(id2label) or sorted(numbers) != list(range(len(numbers))):
        raise ValueError(f"id2label has {len(id2label)} entries that are not numbered from 0: {sorted(id2label)[:6]}")
    return tuple(numbers[i] for i in range(len(numbers)))
