"""The fields of config.json that set nothing in the network: those without bearing, those that must not be set, others.

`families` has the fields that a family reads. Any other field is one of these:

* without bearing on the logits, whatever its value: `NO_BEARING`, or the family's `ignored`;
* supported with some values only, those that change nothing: `ONLY`, or the family's `supported`;
* unknown. It is passed over with a warning, or refused if its name belongs to a part of the network: `is_of_network`.

The tables are complete for what `transformers` knows: `tests/test_published.py` inspects its classes, and sets each
field to another value to see that its logits stay.
"""

import re
from collections.abc import Mapping
from typing import Any

# Who wrote the file, and for what.
_NOTES = {"architectures", "model_type", "name_or_path", "_name_or_path", "_commit_hash", "transformers_version"}
_NOTES |= {"transformers.js_config", "tokenizer_class", "finetuning_task", "task_specific_params", "auto_map"}
_NOTES |= {"unsloth_version", "unsloth_fixed", "unsloth_training_precision", "is_llama_config", "pretraining_tp"}
# Sizes of what surrounds the model. Of the context, max_position_embeddings is what counts.
_SIZES = {"n_ctx", "max_sequence_length", "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"}
# How it is stored and computed. auto_map must be empty: `family_of` sees to it.
_COMPUTING = {"dtype", "torch_dtype", "use_bfloat16", "torchscript", "tf_legacy_loss", "xla_device", "use_cache"}
_COMPUTING |= {"_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "cache_implementation"}
_COMPUTING |= {"_attn_implementation_internal", "_experts_implementation_internal", "experts_implementation"}
_COMPUTING |= {"_flash_attn_2_enabled", "use_flash_attention", "use_flash_attn", "chunk_size_feed_forward"}
_COMPUTING |= {"use_memory_efficient_attention", "output_past"}
# Token ids, which the tokenizer's files or `generate` read, and texts around them.
_TOKENS = {f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "unk", "cls", "mask", "decoder_start")}
_TOKENS |= {"n_special", "predict_special_tokens", "prefix", "forced_bos_token_id", "forced_eos_token_id"}
# What is given back besides logits.
_OUTPUTS = {"output_attentions", "output_hidden_states", "output_scores", "return_dict", "return_dict_in_generate"}
_OUTPUTS |= {"use_return_dict", "tie_last_hidden_states"}
# Other heads than that of a language model.
_HEADS = {"id2label", "label2id", "num_labels", "_num_labels", "problem_type", "classifier_dropout"}
_HEADS |= {"summary_activation", "summary_first_dropout", "summary_last_dropout", "summary_proj_to_labels"}
_HEADS |= {"summary_type", "summary_use_proj"}
# Encoders and decoders in one.
_ENCODERS = {"is_decoder", "is_encoder_decoder", "tie_encoder_decoder"}
_TRAINING = {"initializer_range", "gradient_checkpointing", "neftune_noise_alpha", "attention_dropout", "attn_pdrop"}
_TRAINING |= {"embd_pdrop", "resid_pdrop", "hidden_dropout", "residual_dropout", "embedding_dropout", "dropout"}
_TRAINING |= {"attention_probs_dropout_prob", "hidden_dropout_prob", "resid_dropout", "embd_dropout", "attn_dropout"}
_TRAINING |= {"embed_dropout"}
# How text is generated: read from generation_config.json.
_GENERATION = {"assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens"}
_GENERATION |= {"diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "epsilon_cutoff"}
_GENERATION |= {"encoder_repetition_penalty", "eta_cutoff", "exponential_decay_length_penalty", "length_penalty"}
_GENERATION |= {"max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_assistant_tokens"}
_GENERATION |= {"num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences", "min_p"}
_GENERATION |= {"remove_invalid_values", "repetition_penalty", "suppress_tokens", "target_lookbehind", "temperature"}
_GENERATION |= {"top_k", "top_p", "typical_p"}
# Which matrices have biases is seen in the weights, where each tensor must be there, and no other.
_BIASES = {"attention_bias", "mlp_bias", "use_bias", "qkv_bias"}

NO_BEARING = frozenset().union(
    *(_NOTES, _SIZES, _COMPUTING, _TOKENS, _OUTPUTS, _HEADS, _ENCODERS, _TRAINING, _GENERATION, _BIASES)
)
"""Fields that change no logit, in all families that do not read them."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_causal": (True, None),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}, []),
    "rope_interleaved": (False, None),
    "sliding_window": (None, 0),
    "use_sliding_window": (False, None),
    "use_bidirectional_attention": (False, None),
    "qk_layernorm": (False, None),
    "use_qk_norm": (False, None),
    "alibi": (False, None),
}
"""Fields that change nothing with these values, in all families that do not read them, and are refused with others."""

QUANTIZED = ("quantization_config", "quantization", "compression_config")
"""Fields of models whose weights are stored as small whole numbers."""

# Words in names. The long ones are also the beginnings of words.
_WORDS = re.compile(
    r"(?:^|_)(?:(?:attention|window|sliding|causal|alibi|rope|rotary|theta|norm|layernorm|activation|gelu|scal|softcap"
    r"|multiplier|expert|router|position|bias|parallel|gated)[a-z0-9]*|attn|heads?|kv|qk|ntk|yarn|freqs?|rms|act|eps"
    r"|epsilon|glu|scale|cap|logits?|moe|layer_types|mask)(?:_|$)"
)


def is_of_network(name: str) -> bool:
    """Whether an unknown field plainly belongs to attention, positions, norms, activations, scaling or experts."""
    return _WORDS.search(name.lower()) is not None
