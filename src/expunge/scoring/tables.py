"""Schemas of the tables that the passes write and the metrics read. No torch here: reports read them too."""

from __future__ import annotations

import pyarrow as pa

#: One row per example. List columns run over the supervised tokens, terminator (EOS, end of turn) included;
#: `answer_tokens` is their number without the terminator, so `logprob[:answer_tokens]` is the answer alone.
SCORES = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("answer_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.int32(), nullable=False),  # tokens cut off by max_length
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprob", pa.list_(pa.float32()), nullable=False),  # log p(token | before), natural log
        pa.field("hit", pa.list_(pa.bool_()), nullable=False),  # the token is the argmax
        pa.field("entropy", pa.list_(pa.float32()), nullable=False),  # of the next-token distribution, nats
        pa.field("mean_logprob", pa.list_(pa.float32()), nullable=False),  # E_p[log p] over the vocabulary
        pa.field("std_logprob", pa.list_(pa.float32()), nullable=False),  # sd of log p under p over the vocabulary
    ]
)

#: One row per example of the generation pass.
GENERATIONS = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),  # as the user wrote it, without template
        pa.field("answer", pa.string(), nullable=False),  # what was to be said
        pa.field("generated", pa.string(), nullable=False),
        pa.field("new_tokens", pa.int32(), nullable=False),
        pa.field("stopped", pa.bool_(), nullable=False),  # ended by itself, not by the token limit
    ]
)

SCHEMAS = {"scores": SCORES, "generations": GENERATIONS}

#: metrics.json and `expunge eval --json`: a list of records with these keys, in this order.
RECORD_KEYS = ("variant", "split", "metric", "value", "ci_low", "ci_high", "n", "unscored", "direction")

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
