"""The teacher-forced pass against plain forwards and closed forms."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from expunge.errors import UserError
from expunge.metrics.base import METRICS
from expunge.models.tiny import build_tiny
from expunge.scoring import batches
from expunge.scoring import scores as scores_module
from expunge.scoring.scores import score, token_statistics
from expunge.scoring.tables import SCORES
from scoring_rows import END, lively, random_rows, row

NUMBERS = ("logprob", "entropy", "mean_logprob", "std_logprob")


@pytest.fixture(scope="module")
def model():
    return lively(build_tiny()[0])


def flat(table: pa.Table, column: str) -> np.ndarray:
    return table.column(column).combine_chunks().flatten().to_numpy(zero_copy_only=False)


def plain_scores(model, row):
    """The same numbers from one unpadded forward with all logits, in float64 after the model."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(row.input_ids[None].astype(np.int64))).logits[0].double()
    logp = logits.log_softmax(-1)[row.prompt_tokens - 1 : -1]
    targets = torch.tensor(row.input_ids[row.prompt_tokens :].astype(np.int64))
    p = logp.exp()
    mean = (p * logp).sum(-1)
    std = (p * (logp - mean[:, None]) ** 2).sum(-1).sqrt()
    return {
        "logprob": logp.gather(-1, targets[:, None])[:, 0].numpy(),
        "hit": (logp.argmax(-1) == targets).numpy(),
        "entropy": -mean.numpy(),
        "mean_logprob": mean.numpy(),
        "std_logprob": std.numpy(),
    }


def test_equals_plain_forwards(model):
    rows = random_rows(17)
    table = score(model, rows, batch_size=4)
    assert table.schema == SCORES
    expected = [plain_scores(model, r) for r in rows]
    for name in NUMBERS:
        np.testing.assert_allclose(flat(table, name), np.concatenate([e[name] for e in expected]), atol=1e-5)
    np.testing.assert_array_equal(flat(table, "hit"), np.concatenate([e["hit"] for e in expected]))


def test_rows_keep_their_order_and_identity(model):
    rows = random_rows(9)
    table = score(model, rows, batch_size=2)
    assert table.column("example_id").to_pylist() == [r.example.id for r in rows]
    assert table.column("answer_tokens").to_pylist() == [r.answer_tokens for r in rows]
    assert table.column("token_ids").to_pylist() == [r.input_ids[r.prompt_tokens :].tolist() for r in rows]


@pytest.mark.parametrize(("batch_size", "token_budget"), [(1, None), (3, None), (16, None), (16, 60), (1000, 1)])
def test_batching_changes_nothing(model, batch_size, token_budget):
    rows = random_rows(13, seed=1)
    first = score(model, rows, batch_size=5)
    other = score(model, rows, batch_size=batch_size, token_budget=token_budget)
    for name in NUMBERS:
        np.testing.assert_allclose(flat(first, name), flat(other, name), atol=1e-5)
    np.testing.assert_array_equal(flat(first, "hit"), flat(other, "hit"))


def test_a_long_neighbour_changes_nothing(model):
    short = random_rows(1, seed=2, longest=6)[0]
    long = row("long", list(range(3, 203)), list(range(203, 303)), [END])
    alone, beside = score(model, [short], batch_size=2), score(model, [long, short], batch_size=2)
    for name in NUMBERS:
        np.testing.assert_allclose(
            alone.column(name).to_pylist()[0], beside.column(name).to_pylist()[1], atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("chunk_bytes", [1, 2**14, 2**30])
def test_chunks_of_the_vocabulary_statistics_change_nothing(monkeypatch, chunk_bytes):
    logits, targets = torch.randn(50, 300) * 4, torch.randint(0, 300, (50,))
    expected = token_statistics(logits.clone(), targets)
    monkeypatch.setitem(scores_module._CHUNK_BYTES, "cpu", chunk_bytes)
    for ours, theirs in zip(token_statistics(logits.clone(), targets), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_statistics_of_known_distributions():
    size = 49152
    uniform, certain = torch.zeros(size), torch.full((size,), -torch.inf)
    certain[7] = 3.0
    half = torch.full((size,), -torch.inf)
    half[[5, 9]] = 1.0
    quarter = torch.full((size,), -torch.inf)
    quarter[0], quarter[1] = np.log(3.0), 0.0  # p = 3/4, 1/4
    got = token_statistics(torch.stack([uniform, certain, half, quarter]), torch.tensor([0, 7, 9, 1]))
    spread = np.log(3) * np.sqrt(3) / 4  # |log p0 − log p1| · sqrt(p0 p1)
    np.testing.assert_allclose(got.logprob, [-np.log(size), 0, -np.log(2), -np.log(4)], atol=1e-5)
    np.testing.assert_allclose(got.entropy, [np.log(size), 0, np.log(2), np.log(4) - 0.75 * np.log(3)], atol=1e-5)
    np.testing.assert_allclose(got.std_logprob, [0, 0, 0, spread], atol=1e-5)
    # of equal maxima the first wins: uniform hits token 0, the two halves don't hit the second
    assert got.hit.tolist() == [True, True, False, False]


def test_ruled_out_and_broken_tokens():
    logits = torch.zeros(2, 4)
    logits[0, 2] = -torch.inf
    logits[1, 2] = torch.nan
    got = token_statistics(logits, torch.tensor([2, 0]))
    assert got.logprob[0] == -torch.inf
    assert torch.isnan(got.logprob[1])
    np.testing.assert_allclose(got.entropy[0], np.log(3), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_measured_in_float32(dtype):
    logits, targets = torch.randn(20, 64).to(dtype), torch.randint(0, 64, (20,))
    got = token_statistics(logits, targets)
    expected = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert got.logprob.dtype == torch.float32
    np.testing.assert_allclose(got.logprob, expected, atol=1e-5)


def test_empty_inputs(model):
    assert score(model, [], batch_size=4).schema == SCORES
    nothing = row("nothing", [5, 6], [], [])
    done: list[int] = []
    table = score(model, [nothing, *random_rows(3)], batch_size=2, progress=done.append)
    assert table.column("logprob").to_pylist()[0] == []
    assert len(table) == 4
    assert sum(done) == 4


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    weights = model.get_input_embeddings().weight.clone()
    try:
        score(model, random_rows(3), batch_size=2)
        assert [module.training for module in model.modules()] == before
        assert torch.equal(model.get_input_embeddings().weight, weights)
    finally:
        model.eval()


def test_a_row_beyond_the_context_is_a_user_error(model):
    with pytest.raises(UserError, match=r"1026 tokens.*1024") as caught:
        score(model, [row("long", [5], [6] * 1024, [END])], batch_size=1)
    assert "data.max_length=1024" in caught.value.hint


def test_batches_are_alike_in_length_and_bounded(monkeypatch):
    rows = random_rows(50, seed=3)
    lengths = [len(r.input_ids) for r in rows]
    plain = batches.scoring_batches(rows, 8, vocabulary=100)
    assert sorted(i for batch in plain for i in batch) == list(range(50))
    assert [len(batch) for batch in plain] == [8] * 6 + [2]
    ordered = [lengths[i] for batch in plain for i in batch]
    assert ordered == sorted(ordered, reverse=True)
    narrow = batches.scoring_batches(rows, 8, vocabulary=100, token_budget=150)
    assert all(len(batch) * max(lengths[i] for i in batch) <= 150 for batch in narrow)
    monkeypatch.setattr(batches, "LOGITS_BYTES", 60 * 100 * 4)
    shallow = batches.scoring_batches(rows, 8, vocabulary=100)
    assert all(sum(rows[i].supervised_tokens for i in batch) <= 60 for batch in shallow)
    assert sorted(i for batch in shallow for i in batch) == list(range(50))


def greedy(model, prefix: list[int], count: int) -> list[int]:
    """Token by token, no cache, no batch."""
    tokens = list(prefix)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prefix) :]


def rows_with_known_suffixes(model, count: int):
    """Answers that the model itself would give from some token on, and what stands before is random."""
    generator = np.random.default_rng(0)
    for i, start in enumerate(random_rows(count, seed=4, longest=9)):
        length = int(generator.integers(1, 9))
        broken = int(generator.integers(0, length + 1))
        prompt = start.input_ids[: start.prompt_tokens].tolist()
        noise = generator.integers(3, 500, size=broken).tolist()
        yield row(f"k{i}", prompt, noise + greedy(model, prompt + noise, length - broken), [END])


def test_extraction_strength_is_what_greedy_decoding_extracts(model):
    rows = list(rows_with_known_suffixes(model, 12))
    ours = METRICS.get("extraction_strength").function(score(model, rows, batch_size=4))
    expected = []
    for r in rows:
        ids, total = r.input_ids.tolist(), r.answer_tokens
        prompt, answer = ids[: r.prompt_tokens], ids[r.prompt_tokens : r.prompt_tokens + total]
        shortest = min(k for k in range(total + 1) if greedy(model, prompt + answer[:k], total - k) == answer[k:])
        expected.append(1 - shortest / total)
    np.testing.assert_allclose(ours, expected)
    assert {0.0, 1.0} < set(expected), "the rows must cover nothing, something and everything"
