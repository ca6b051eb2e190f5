# SPDX-License-Identifier: Apache-2.0
"""Llama without its causal mask, for transformers 4.51 to 5.x. Loaded with trust_remote_code=True.

The same as LlamaModel with `is_causal: false` in config.json, which transformers understands since 5.2; older
versions ignore that setting and are silently causal. Nothing of how transformers makes its masks is used,
because that has changed three times: eager and sdpa attention are given a finished 4-D mask, which every
version passes on as it is, and flash attention reads `is_causal` from the layers and the padding from the 2-D
mask.
"""

import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel


class LlamaBidirectionalConfig(LlamaConfig):
    model_type = "llama_bidirec"


class LlamaBidirectionalModel(LlamaModel):
    config_class = LlamaBidirectionalConfig

    def __init__(self, config):
        config.is_causal = False
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.is_causal = False

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, **kwargs
    ):
        """attention_mask [N, L]: 1 for tokens and 0 for padding, on either side; None: all are tokens.

        There is no cache: a token's state depends on later tokens, so `past_key_values` is refused and
        use_cache ignored.
        """
        if past_key_values is not None:
            raise ValueError("a bidirectional model has no key-value cache: leave past_key_values out")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be [batch, length], not {tuple(attention_mask.shape)}")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        attention = self.config._attn_implementation
        if attention in ("eager", "sdpa"):
            # Never None, not even without padding: sdpa in older versions takes a missing mask for a causal
            # one.
            num_texts, length = inputs_embeds.shape[:2]
            mask = inputs_embeds.new_zeros(num_texts, 1, 1, length)
            if attention_mask is not None:
                is_padding = attention_mask[:, None, None, :].to(mask.device) == 0
                mask = mask.masked_fill(is_padding, torch.finfo(mask.dtype).min)
            attention_mask = mask.expand(num_texts, 1, length, length)
        elif "flash" not in attention:
            raise ValueError(
                f"attn_implementation={attention!r} is untested: use eager, sdpa or flash_attention_2"
            )
        kwargs["use_cache"] = False
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
