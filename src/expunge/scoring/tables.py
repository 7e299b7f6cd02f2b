"""Schemas of the tables that the passes write and the metrics read. No torch here: reports read them too."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

#: One row per example (and per candidate, where a view gives an example several prompts or answers). List columns run
#: over the supervised tokens, terminator (EOS, end of turn) included; `answer_tokens` is their number without the
#: terminator, so `logprob[:answer_tokens]` is the answer alone.
SCORES = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("candidate", pa.int32(), nullable=False),  # 0, 1, … within an example
        pa.field("task", pa.string(), nullable=False),
        pa.field("is_text", pa.bool_(), nullable=False),  # plain text: every token is supervised, no prompt
        pa.field("group", pa.string()),  # whom or what the row is about, where it says so (subject, document)
        pa.field("answer_tokens", pa.int32(), nullable=False),
        pa.field("answer_zlib", pa.int32(), nullable=False),  # bytes of the answer's text after zlib
        pa.field("truncated", pa.int32(), nullable=False),  # tokens cut off by max_length
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprob", pa.list_(pa.float32()), nullable=False),  # log p(token | before), natural log
        pa.field("hit", pa.list_(pa.bool_()), nullable=False),  # the token is the argmax
        pa.field("entity", pa.list_(pa.bool_()), nullable=False),  # in an entity that the row names; empty: names none
        pa.field("entropy", pa.list_(pa.float32()), nullable=False),  # of the next-token distribution, nats
        pa.field("mean_logprob", pa.list_(pa.float32()), nullable=False),  # E_p[log p] over the vocabulary
        pa.field("std_logprob", pa.list_(pa.float32()), nullable=False),  # sd of log p under p over the vocabulary
    ]
)

#: One row per example (and per candidate or sample) of a generation pass.
GENERATIONS = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("candidate", pa.int32(), nullable=False),  # 0, 1, … within an example
        pa.field("task", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),  # as the user wrote it, without template
        pa.field("answer", pa.string(), nullable=False),  # what was to be said
        pa.field("generated", pa.string(), nullable=False),
        pa.field("new_tokens", pa.int32(), nullable=False),
        pa.field("stopped", pa.bool_(), nullable=False),  # ended by itself, not by the token limit
    ]
)

#: One row per example: how far a model's next-token distributions are from the target model's, at the same tokens.
DIVERGENCE = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("answer_tokens", pa.int32(), nullable=False),
        pa.field("kl", pa.list_(pa.float32()), nullable=False),  # KL(target ‖ model) per supervised token, nats
    ]
)

#: One row per example and decoder layer (0-based), of a model beside the target and the reference. A measure of the
#: split as a whole stands under the example_id "".
#:   uds_reference, uds_model    what patching the reference's / the model's layer into the target costs in log-prob
#:   krs_mse, krs_patched_mse    distance of logits to the target's, plain / with the window around the layer restored
#:   cka, cka_target             similarity of the model's / the target's hidden states to the reference's
LAYERS = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("measure", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)

#: One row per tensor of a model beside the target's.
WEIGHTS = pa.schema(
    [
        pa.field("tensor", pa.string(), nullable=False),
        pa.field("parameters", pa.int64(), nullable=False),
        pa.field("norm", pa.float64(), nullable=False),  # ‖θ_target‖
        pa.field("drift", pa.float64(), nullable=False),  # ‖θ − θ_target‖
        pa.field("crossed_int8", pa.float64()),  # part of the weights whose code changes; null: not quantized
        pa.field("crossed_int4", pa.float64()),
        pa.field("crossed_nf4", pa.float64()),
    ]
)

SCHEMAS = {
    "scores": SCORES,
    "generations": GENERATIONS,
    "divergence": DIVERGENCE,
    "layers": LAYERS,
    "weights": WEIGHTS,
}

Suite = Literal["quick", "standard", "full"]
SUITES: tuple[Suite, ...] = ("quick", "standard", "full")

#: Every table that a metric may need, `kind` or `kind/view`, and the smallest suite for which it is made. A view is
#: another way to ask the rows of a split (see expunge.data.views).
TABLES: dict[str, Suite] = {
    "scores": "quick",
    "generations": "quick",
    "scores/paraphrase": "standard",  # paraphrased questions, original answers
    "scores/paraphrased_answer": "standard",
    "scores/perturbed_answer": "standard",  # wrong answers of the same form, options of a multiple choice
    "generations/paraphrase": "standard",
    "generations/jailbreak": "standard",
    "divergence": "standard",
    "generations/related": "standard",  # probes about the same facts: reverse, one-hop, multi-hop, same answer
    "generations/sampled": "full",
    "layers": "full",
    "weights": "full",
}

#: metrics.json and `expunge eval --json`: a list of records with these keys, in this order. `anchored` is
#: (value − reference) / (target − reference): 1 knows as the target does, 0 as the reference, below 0 less than that.
RECORD_KEYS = (
    "variant",
    "split",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "unscored",
    "direction",
    "anchored",
    "anchored_low",
    "anchored_high",
    "over_unlearned",
    "note",
)

#: values.parquet: one row per variant × split × metric × example; `value` is null where unscored.
VALUES = pa.schema(
    [
        pa.field("variant", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
    ]
)
