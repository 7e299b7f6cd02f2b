"""Small models of many architectures for the tests of localization: GQA, fused matrices, Conv1D, experts, no heads."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4}
GROUPED = HEADS | {"num_key_value_heads": 2}
OWN = {"vocab_size": 64, "n_layer": 2, "n_head": 4}
SETTINGS = {
    "Llama": SIZES | HEADS,
    "GroupedLlama": SIZES | GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "Qwen3": SIZES | GROUPED | {"head_dim": 16},
    "Phi": SIZES | HEADS,
    "Phi3": SIZES | GROUPED,
    "Glm": SIZES | GROUPED | {"head_dim": 8},
    "GPT2": OWN | {"n_embd": 32},
    "GPTJ": OWN | {"n_embd": 32, "rotary_dim": 4},
    "GPTNeoX": SIZES | HEADS,
    "Bloom": OWN | {"hidden_size": 32},
    "Persimmon": SIZES | HEADS,
    "Mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
    "OPT": SIZES | HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Starcoder2": SIZES | GROUPED,
    "Mixtral": SIZES | GROUPED | {"num_local_experts": 2},
    "Falcon": SIZES | HEADS,
    "Mamba": SIZES | {"state_size": 4},
}


def architecture(kind: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A model of two layers and hidden size 32 whose biases and norms are random too."""
    name = kind.removeprefix("Grouped")
    model_type = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    settings = SETTINGS[kind] | {"bos_token_id": None, "eos_token_id": None} | changes
    torch.manual_seed(seed)
    model = model_type(getattr(transformers, f"{name}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model
