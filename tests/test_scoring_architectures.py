"""The passes on small random models of many kinds: positions, sliding windows, soft capping, no attention at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from expunge.data.encode import encode
from expunge.data.example import Example
from expunge.data.template import resolve_template
from expunge.models.tiny import build_tiny
from expunge.scoring.batches import scoring_batches
from expunge.scoring.generate import generate
from expunge.scoring.prefix import common_tokens, shared_prefix
from expunge.scoring.scores import score
from scoring_rows import END, lively, random_rows, row
from test_scoring_scores import NUMBERS, flat, plain_scores

SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
KINDS = {
    "Llama": SMALL | HEADS,
    "Qwen3": SMALL | HEADS,
    "Mistral": SMALL | HEADS | {"sliding_window": 6},
    "Gemma2": SMALL | HEADS | {"sliding_window": 6, "final_logit_softcapping": 2.0},
    "GPT2": {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "GPTNeoX": SMALL | {"num_attention_heads": 4},
    "Mamba": {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def build(kind: str):
    config_type = getattr(transformers, f"{kind}Config")
    model_type = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")
    tokens = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": 0}
    torch.manual_seed(0)
    made = lively(model_type(config_type(**KINDS[kind], **tokens)).eval(), embeddings=True)
    # a scan carries its rounding on, and some processors round rows of another length otherwise: .0003 in float32
    return made.double() if kind == "Mamba" else made


def rows_with_prefix(size: int):
    """Rows that begin alike with `size` tokens; one of them has nothing else as its prompt."""
    start = list(range(20, 20 + size))
    return [
        row(
            f"p{i}",
            [*start, *(r.input_ids[: r.prompt_tokens].tolist() if i else [])],
            r.input_ids[-9:-1].tolist(),
            [END],
        )
        for i, r in enumerate(random_rows(9, seed=8, longest=15))
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [0, 12], ids=["nothing shared", "shared beginning"])
def test_scores_equal_plain_forwards(kind, prefix):
    model = build(kind)
    rows = rows_with_prefix(prefix) if prefix else random_rows(7, longest=20)
    shared = shared_prefix(model, rows, "cpu")
    assert shared.tokens == (0 if not prefix or kind == "Mamba" else prefix - 1)
    table = score(model, rows, batch_size=4)
    expected = [plain_scores(model, r) for r in rows]
    for name in NUMBERS:
        values = np.concatenate([e[name] for e in expected])
        assert values.std() > 0.01
        np.testing.assert_allclose(flat(table, name), values, atol=2e-5, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(flat(table, "hit"), np.concatenate([e["hit"] for e in expected]))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_one_prompt_at_a_time(kind):
    model, tokenizer = build(kind), build_tiny()[1]
    rows = random_rows(5, longest=12)
    together = generate(model, tokenizer, rows, max_new_tokens=6, batch_size=5)
    for i, r in enumerate(rows):
        tokens = r.input_ids[: r.prompt_tokens].tolist()
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            if tokens[-1] == END:
                break
        said = tokens[r.prompt_tokens :]
        expected = said[:-1] if said[-1] == END else said
        assert together.column("generated")[i].as_py() == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("prompts", "common"),
    [
        ([], 0),
        ([[1, 2, 3]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2, 3], [1, 2, 3, 4]], 2),
        ([[1, 2, 3, 9], [1, 2, 4, 9]], 2),
        ([[1, 2, 3, 9], [1, 2, 4, 9], [1, 7, 4, 9]], 1),
        ([[1, 2], [2, 2]], 0),
        ([[1], [1]], 0),
    ],
)
def test_common_tokens_stop_before_the_first_prediction(prompts, common):
    assert common_tokens([row(str(i), prompt, [5, 5], [END]) for i, prompt in enumerate(prompts)]) == common


def test_the_beginning_of_a_chat_template_goes_through_the_model_once():
    model, tokenizer = build_tiny()
    words = ["lamp", "fern", "harbour", "village", "bridge"]
    examples = [Example(id=w, prompt=f"{w}, what is known of it?", answer=f"It is a {w}.") for w in words]
    tokenizer.chat_template = "<|im_start|>system\nA letter of the office.<|im_end|>\n" + tokenizer.chat_template
    rows = encode(examples, tokenizer, resolve_template("chat", tokenizer), 128)
    seen: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        score(model, rows, batch_size=5)
    finally:
        handle.remove()
    shared = common_tokens(rows)
    assert shared > 20
    assert seen == [shared, 5 * (max(len(r.input_ids) for r in rows) - 1 - shared)]


def test_batches_do_not_fill_up_with_padding():
    long = [row(f"l{i}", [5] * 100, [6] * 99, [END]) for i in range(5)]
    short = [row(f"s{i}", [5] * 10, [6] * 9, [END]) for i in range(5)]
    sizes = [len(batch) for batch in scoring_batches(long + short, 16, vocabulary=10)]
    assert sizes == [5, 5]
    assert [len(batch) for batch in scoring_batches(short + long[:1], 16, vocabulary=10)] == [6]
