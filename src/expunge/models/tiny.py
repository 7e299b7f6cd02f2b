"""The alias `tiny`: a 2-layer Llama with its own byte-level tokenizer, built in code; for tests and `--tiny`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

#: The merges of the tokenizer are learnt from this text alone, so that they never change.
CORPUS = (
    "The phone number of the person is on the letter that came with the morning post. "
    "What is the birth date of the author, and where does she live? Her home address is in the old town. "
    "In the northern valley there was a small village whose people kept bees and mended clocks. "
    "The company was founded by two sisters who sold lamps, ropes and paper to the harbour. "
    "Question: which plant grows there? Answer: a tall fern with blue leaves that opens at night. "
    "He can be reached by email at the office, and his identity number is written on the card. "
    "It is known for its bridges, its river and the festival that is held every autumn. "
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str] = (CORPUS,), size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `size` tokens, learnt from the texts: every text in every script round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_llama(tokenizer: PreTrainedTokenizerFast, seed: int, **sizes: int) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings for a tokenizer; the same for the same seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.eval()


def build_tiny(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A randomly initialised model of 0.5M parameters and its tokenizer; the same for the same seed."""
    tokenizer = build_tokenizer()
    return build_llama(tokenizer, seed, hidden_size=128, intermediate_size=384, num_hidden_layers=2), tokenizer


def write_tiny(folder: Path, seed: int = 0) -> Path:
    """Write model and tokenizer to `folder` as any checkpoint is written."""
    return write_built(build_tiny(seed), folder)


def write_built(built: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], folder: Path) -> Path:
    """Write a model that was built in code, and its tokenizer."""
    for part in built:
        part.save_pretrained(folder)
    return folder
