"""Every seam, ways in which a release of Transformers may change it, and a use that meets each."""

from __future__ import annotations

import transformers
import transformers.conversion_mapping as conversion_mapping
from cases import BERT, GPT2, VIT
from release_changes import (
    KIND,
    Change,
    OtherRegistry,
    all_of,
    asked,
    attention_called_without,
    closed,
    drop_entries,
    dropped,
    initialise_all,
    inverted_mask,
    inverted_softmax,
    mask_called_with,
    not_causal,
    nothing,
    other_field,
    renamed,
    replaced,
    unseen_cache,
    without,
)
from release_uses import (
    Use,
    converting,
    generating,
    importing_without,
    loading_stock,
    native_call,
    other_buffers,
    renamed_blocks,
    token_ids,
)
from transformers import (
    Cache,
    EncoderDecoderCache,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    initialization,
    masking_utils,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.models.bert.modeling_bert import BertModel, BertSelfAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Model
from transformers.models.vit.modeling_vit import ViTAttention
from transformers.utils import output_capturing

import hf_linattn
from hf_linattn.bench.generation import fill
from hf_linattn.integrations import seams
from hf_linattn.training import LinAttnCallback

TABLES = ("DYNAMIC_LAYER_TYPE_MAPPING", "LAYER_TYPE_CACHE_MAPPING", "STATIC_LAYER_TYPE_MAPPING")

# Seam -> ways in which a release may change it, each with a use that meets it.
MUTATIONS: dict[str, list[tuple[Change, Use]]] = {
    "names": [
        (nothing, lambda: importing_without("causal_mask_function")),
        (nothing, lambda: importing_without("CacheLayerMixin")),
        (nothing, lambda: importing_without("GPT2DoubleHeadsModel")),
    ],
    "attention functions": [
        (dropped(transformers.AttentionInterface, "get_interface"), converting()),
        (replaced(transformers.AttentionInterface, "get_interface", lambda self, name, other: other), native_call()),
    ],
    "mask functions": [
        (lambda p: p.delitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, KIND), converting()),
        (replaced(seams, "create_causal_mask", lambda config, embeds, cache, mask, positions: None), generating()),
        (replaced(masking_utils, "create_bidirectional_mask", lambda *args, **kwargs: None), converting(BERT)),
        (replaced(seams, "create_causal_mask", inverted_mask), native_call()),
    ],
    "arguments of a mask function": [
        (mask_called_with(attention_mask="padding_mask"), native_call()),
        (mask_called_with(mask_function="pattern"), converting(BERT)),
        (mask_called_with(overlay=True), native_call()),
        (all_of(mask_called_with(overlay=True), asked("always", "gpt2")), native_call()),
    ],
    "tracing": [(replaced(seams, "is_tracing", lambda: False), converting())],
    "softmax attention": [
        (
            replaced(seams, "sdpa_attention_forward", lambda m, q, k, v, mask, dropout, scale, is_causal: (q, None)),
            converting(),
        ),
        (replaced(seams, "sdpa_attention_forward", inverted_softmax), converting()),
    ],
    "dynamic cache": [
        (drop_entries(*TABLES[:2]), generating()),
        (drop_entries(*TABLES[:2]), lambda: lambda: hf_linattn.convert(GPT2.build(), KIND)),
    ],
    "static cache": [(drop_entries(TABLES[2]), generating())],
    "cache layers": [
        (replaced(Cache, "reorder_cache", lambda self, index: None), generating()),
        (replaced(Cache, "get_mask_sizes", lambda self, query, layer: (query, 0)), generating()),
        (replaced(Cache, "update", lambda self, key, value, **kwargs: (key, value)), generating()),
        (dropped(Cache, "crop"), generating()),
    ],
    "encoder decoder cache": [
        (lambda p: p.setattr(EncoderDecoderCache, "self_attention_cache", property(id), raising=False), converting()),
    ],
    "cache in use": [
        (unseen_cache, generating()),
        (
            all_of(replaced(Cache, "update", lambda self, key, *args, **kw: (key, args[0])), asked("always", "gpt2")),
            generating(),
        ),
    ],
    "cache argument": [
        (
            replaced(GPT2LMHeadModel, "forward", lambda self, input_ids=None, **kwargs: None),
            lambda: (lambda model: lambda: fill(model, token_ids(), 4))(GPT2.build()),
        ),
    ],
    "masks of generate": [
        (replaced(masking_utils, "create_masks_for_generate", lambda settings, embeds, mask: mask), generating()),
        (dropped(masking_utils, "create_masks_for_generate"), generating()),
    ],
    "recorded outputs": [
        (replaced(output_capturing, "_CAN_RECORD_REGISTRY", OtherRegistry()), converting()),
        (dropped(output_capturing, "_CAN_RECORD_REGISTRY"), converting()),
    ],
    "initialisation": [
        (replaced(initialization, "copy_", lambda tensor, other: tensor.copy_(other)), loading_stock()),
        (dropped(PreTrainedModel, "_init_weights"), converting()),
        (replaced(PreTrainedModel, "initialize_weights", initialise_all), converting()),
    ],
    "initialised weights": [
        (
            all_of(replaced(PreTrainedModel, "initialize_weights", lambda self: None), asked("always", "bert")),
            loading_stock(),
        ),
    ],
    "config": [
        (other_field, converting()),
        (dropped(PreTrainedConfig, "get_text_config"), converting()),
    ],
    "model methods": [
        (dropped(PreTrainedModel, "get_correct_attn_implementation"), converting()),
        (replaced(PreTrainedModel, "get_correct_attn_implementation", lambda self, *args: "sdpa"), converting()),
    ],
    "names given to models": [(replaced(PreTrainedModel, "post_init", lambda self: None), converting())],
    "saving": [(replaced(PreTrainedModel, "save_pretrained", lambda self, folder, **kwargs: None), converting(VIT))],
    "loading": [
        (
            lambda patch: patch.setattr(
                PreTrainedModel, "from_pretrained", classmethod(lambda cls, *args, **kwargs: (BERT.build(), {}))
            ),
            loading_stock(),
        ),
    ],
    "auto classes": [(lambda patch: patch.delitem(CONFIG_MAPPING._extra_content, "linattn_bert"), converting())],
    "preprocessing": [
        (lambda p: p.delitem(TOKENIZER_MAPPING._reverse_config_mapping, "LinAttnBertConfig"), converting()),
    ],
    "weight names": [
        (
            replaced(conversion_mapping, "get_checkpoint_conversion_mapping", lambda name: None),
            loading_stock(VIT),
        ),
    ],
    "attention modules": [
        (replaced(GPT2Attention, "forward", closed(GPT2Attention.forward)), converting()),
        (replaced(BertSelfAttention, "__init__", not_causal(BertSelfAttention.__init__)), converting(BERT)),
        (replaced(ViTAttention, "forward", closed(ViTAttention.forward)), converting(VIT)),
        (attention_called_without("scaling"), native_call()),
        (attention_called_without(seams.ARGUMENT), generating()),
        (attention_called_without("dropout"), converting(BERT)),
    ],
    "forward arguments": [
        (replaced(BertModel, "forward", renamed(BertModel.forward, "input_ids", "tokens")), converting(BERT)),
        (replaced(BertModel, "forward", lambda self, input_ids: None), converting(BERT)),
    ],
    "models": [
        (replaced(GPT2Model, "forward", without(GPT2Model.forward, "attention_mask")), native_call()),
        (replaced(GPT2Model, "forward", without(GPT2Model.forward, "position_ids")), converting()),
        (replaced(BertModel, "forward", without(BertModel.forward, "attention_mask")), converting(BERT)),
    ],
    "layers of a model": [(nothing, renamed_blocks)],
    "position buffers": [(nothing, other_buffers)],
    "scaling": [
        (
            all_of(attention_called_without("scaling"), asked("always", "gpt2")),
            native_call(scale_attn_by_inverse_layer_idx=True),
        ),
    ],
    "trainer events": [(dropped(TrainerCallback, "on_step_end"), lambda: LinAttnCallback)],
}
