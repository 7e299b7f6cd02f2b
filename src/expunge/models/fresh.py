"""The alias `fresh-5m`: an untrained 6-layer Llama, on which facts are learnt from scratch instead of fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from expunge.models.tiny import build_llama, build_tokenizer

#: Tokens, and the invented rows that they are learnt from: the shape of the text, and nobody who is asked about.
VOCABULARY, SEED, ROWS = 2048, 7, 2000


def build_fresh(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A randomly initialised model of 5.2M parameters and its tokenizer; the same for the same seed."""
    tokenizer = build_tokenizer(_texts(), VOCABULARY)
    return build_llama(tokenizer, seed, hidden_size=256, intermediate_size=768, num_hidden_layers=6), tokenizer


def _texts() -> Iterator[str]:
    from expunge.data.benchmarks.fictitious import fictitious

    for split in fictitious(SEED, ROWS):
        for row in split.examples:
            yield f"{row.prompt} {row.answer}"
