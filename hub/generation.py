"""`generation_config.json`: what it asks of the choice of tokens, with the defaults of transformers' `generate`."""

from collections.abc import Mapping
from typing import Any

from .keys import Section, harmless, only, used

_NONE = {  # in effect only where they are set
    name: only(None, *neutral)
    for name, neutral in {
        "min_new_tokens": (0,),
        "max_time": (),
        "stop_strings": (),
        "min_p": (0.0,),
        "top_h": (),
        "bad_words_ids": ([],),
        "force_words_ids": ([],),
        "constraints": ([],),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
        "exponential_decay_length_penalty": (),
        "suppress_tokens": ([],),
        "begin_suppress_tokens": ([],),
        "sequence_bias": (),
        "guidance_scale": (1.0,),
        "watermarking_config": (),
        "dola_layers": (),
        "penalty_alpha": (0.0,),
    }.items()
}
_NEUTRAL = {  # in effect unless they have this value
    name: only(value)
    for name, value in {
        "num_beams": 1,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
        "min_length": 0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "remove_invalid_values": False,
        "token_healing": False,
        "num_return_sequences": 1,
    }.items()
}
_HARMLESS = {
    # Of beams alone, or overruled by the number of new tokens that is always given here
    "ignored": ("length_penalty", "early_stopping", "max_length", "renormalize_logits"),
    "outputs": (
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        "return_dict_in_generate",
    ),
    "tokens": ("bos_token_id", "decoder_start_token_id", "pad_token_id"),
    # Caches, and drafts that are only kept where the model would have said the same
    "runtime": (
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
        *("compile_config", "disable_compile", "continuous_batching_config", "use_mtp", "is_assistant"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
    ),
    "bookkeeping": ("_from_model_config", "transformers_version"),
}
GENERATION = Section(
    {
        "do_sample": used("flag", False),
        "temperature": used("number", 1.0),
        "top_k": used("whole", 50),
        "top_p": used("number", 1.0),
        "repetition_penalty": used("positive", 1.0),
        "max_new_tokens": used("count", None),
        "eos_token_id": used("any", None),
        **_NONE,
        **_NEUTRAL,
        **{name: harmless(reason) for reason, names in _HARMLESS.items() for name in names},
    }
)


def read_generation(document: Mapping[str, Any] | None) -> dict[str, Any]:
    """The used entries; those that are null are unset.

    Raises ValueError naming every entry that asks for what is not done here: beams, forbidden words, lengths.
    """
    given = {name: value for name, value in (document or {}).items() if value is not None}
    settings = GENERATION.read(given, "generation_config.json")
    stops = settings["eos_token_id"]
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not all(isinstance(stop, int) and not isinstance(stop, bool) for stop in stops):
        raise ValueError(f"generation_config.json: 'eos_token_id' is {str(stops)[:60]}, expected ids")
    return settings | {"eos_token_id": tuple(stops)}
