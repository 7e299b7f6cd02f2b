"""Whole merges: against a merge in memory, whatever the shards and dtypes, and what is left behind."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expunge.errors import UserError
from expunge.merging.checkpoint import Checkpoint
from expunge.merging.linear import linear
from expunge.merging.run import merge_models
from expunge.merging.ties import ties
from merging_models import (
    assert_equal,
    in_memory,
    llama,
    moved,
    rewrite,
    save,
    weights,
)

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.mark.parametrize(
    ("density", "parameters"),
    [(0.8, {}), (0.3, {"scale": 0.6}), (1.0, {"sign": "frequency"}), (0.5, {"normalize": "count"})],
)
def test_streamed_equals_in_memory(three, density, parameters):
    merge_models(
        [three / "a", three / "b"],
        three / "out",
        base=three / "base",
        weights=[1.0, 0.5],
        density=density,
        parameters=parameters,
    )
    assert_equal(weights(three / "out"), in_memory(three, density, **parameters), 1e-7)


def test_ties_over_the_whole_model_equals_ties_of_the_flattened_model(three):
    base, one, two = (weights(three / name) for name in ("base", "a", "b"))
    with torch.no_grad():  # make some tensors differ more than others, or one threshold would be like many
        rewrite(three / "a", lambda tensors: [tensors[name].add_(0.1) for name in tensors if "mlp" in name])
    one = weights(three / "a")
    order = list(Checkpoint.open(three / "base").tensors)
    flat = [torch.cat([model[name].reshape(-1) - base[name].reshape(-1) for name in order]) for model in (one, two)]
    merged = ties(flat, [1.0, 1.0], [0.2, 0.4])
    merge_models(
        [three / "a", three / "b"],
        three / "out",
        base=three / "base",
        density=[0.2, 0.4],
        parameters={"scope": "model"},
    )
    found = weights(three / "out")
    for name, piece in zip(order, merged.split([base[name].numel() for name in order]), strict=True):
        torch.testing.assert_close(found[name], base[name] + piece.view_as(base[name]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shards_in", ["50KB", "1KB"])
@pytest.mark.parametrize("shard_bytes", [20_000, 1])
def test_shards_change_nothing(three, shards_in, shard_bytes):
    inputs = {name: AutoModelForCausalLM.from_pretrained(three / name) for name in ("a", "b", "base")}
    for name, model in inputs.items():
        save(model, three / f"{name}-sharded", max_shard_size=shards_in)
    whole = merge_models([three / "a", three / "b"], three / "one", base=three / "base", density=0.8)
    merge_models(
        [three / "a-sharded", three / "b-sharded"],
        three / "many",
        base=three / "base-sharded",
        density=0.8,
        shard_bytes=shard_bytes,
    )
    assert (three / "many" / "model.safetensors.index.json").is_file()
    assert (three / "one" / "model.safetensors").is_file()
    assert_equal(weights(three / "many"), weights(three / "one"))
    loaded = [AutoModelForCausalLM.from_pretrained(three / name) for name in ("one", "many")]
    ids = torch.arange(12)[None]
    assert torch.equal(loaded[0](ids).logits, loaded[1](ids).logits)
    assert whole.tensors == len(weights(three / "one"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32_and_written_in_their_dtype(tmp_path, dtype):
    base = llama(0)
    save(moved(base, 1), tmp_path / "a", dtype)
    save(moved(base, 2), tmp_path / "b", dtype)
    save(base, tmp_path / "base", dtype)
    merge_models(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "out", base=tmp_path / "base", weights=[1.0, 0.5], density=0.8
    )
    assert_equal(weights(tmp_path / "out"), in_memory(tmp_path, 0.8, dtype=dtype))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_mixed_dtypes_are_written_in_the_widest_and_the_config_says_so(tmp_path):
    base = llama(0)
    save(moved(base, 1), tmp_path / "a")
    save(moved(base, 2), tmp_path / "b")
    save(base, tmp_path / "base", torch.bfloat16)
    merge_models(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "out", base=tmp_path / "base", weights=[1.0, 0.5], density=0.8
    )
    assert_equal(weights(tmp_path / "out"), in_memory(tmp_path, 0.8), 1e-7)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_linear_needs_no_base(three):
    merge_models([three / "a", three / "b"], three / "out", method="linear", weights=[3.0, 1.0])
    one, two = weights(three / "a"), weights(three / "b")
    expected = {name: linear([tensor, two[name]], [3.0, 1.0], [1.0, 1.0]) for name, tensor in one.items()}
    assert_equal(weights(three / "out"), expected)
    merge_models([three / "a", three / "b"], three / "based", base=three / "base", method="linear", weights=[3.0, 1.0])
    assert_equal(weights(three / "based"), expected, 5e-7)


def test_task_arithmetic_with_a_negative_weight(three):
    settings = {"method": "linear", "weights": [1.0, -1.0], "parameters": {"normalize": False}}
    merge_models([three / "a", three / "b"], three / "out", base=three / "base", **settings)
    base, one, two = (weights(three / name) for name in ("base", "a", "b"))
    assert_equal(weights(three / "out"), {name: base[name] + one[name] - two[name] for name in base}, 1e-6)


def test_tied_weights_are_merged_once(tmp_path):
    base = llama(0, tied=True)
    specialists = [moved(base, 1), moved(base, 2)]
    for model, name in zip([base, *specialists], ["base", "a", "b"], strict=True):
        save(model, tmp_path / name)
    # one of them stores the tied weight a second time, as some exporters do
    rewrite(
        tmp_path / "a", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    merge_models([tmp_path / "a", tmp_path / "b"], tmp_path / "out", base=tmp_path / "base")
    assert "lm_head.weight" not in weights(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_statistics_in_closed_form(tmp_path):
    base = llama(0)
    save(base, tmp_path / "base")
    for name in ("a", "b"):
        save(base, tmp_path / name)

    def change(tensors, values):
        tensors["model.norm.weight"][:4] += torch.tensor(values)

    rewrite(tmp_path / "a", lambda tensors: change(tensors, [3.0, 4.0, 0.0, 0.0]))
    rewrite(tmp_path / "b", lambda tensors: change(tensors, [1.0, -2.0, 2.0, 0.0]))
    result = merge_models([tmp_path / "a", tmp_path / "b"], tmp_path / "out", base=tmp_path / "base")
    # merged: 2, 4, 2; mean: 2, 1, 1
    assert result.statistics["delta_norms"] == pytest.approx([5.0, 3.0])
    assert result.statistics["merged_norm"] == pytest.approx(24**0.5)
    assert result.statistics["cosine_to_mean"] == pytest.approx((4 + 4 + 2) / (24 * 6) ** 0.5)
    assert result.statistics["sign_conflict"] == pytest.approx(1 / 3)


def test_models_equal_to_the_base_have_no_direction(tmp_path):
    for name in ("base", "a"):
        save(llama(0), tmp_path / name)
    result = merge_models([tmp_path / "a"], tmp_path / "out", base=tmp_path / "base")
    assert result.statistics["merged_norm"] == 0
    assert result.statistics["cosine_to_mean"] is None
    assert result.statistics["sign_conflict"] is None
    assert_equal(weights(tmp_path / "out"), weights(tmp_path / "base"))


def test_everything_that_belongs_to_a_model_comes_along(tmp_path):
    from expunge.models.tiny import write_tiny

    for seed, name in enumerate(["base", "a", "b"]):
        write_tiny(tmp_path / name, seed)
    (tmp_path / "base" / "README.md").write_text("the base's own card")
    (tmp_path / "base" / "training_args.bin").write_bytes(b"no weights")
    merge_models(
        [tmp_path / "a", tmp_path / "b"],
        tmp_path / "out",
        base=tmp_path / "base",
        density=0.8,
        parameters={"scale": 0.5},
    )
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "out"))
    assert before.get_vocab() == after.get_vocab()
    assert before.chat_template == after.chat_template
    config = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == config
    assert not (tmp_path / "out" / "training_args.bin").exists()
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert record["method"] == "ties"
    assert record["parameters"]["scale"] == 0.5
    for entry in [record["base"], *record["models"]]:
        digest = hashlib.sha256(
            (tmp_path / entry["name"].rpartition("/")[2] / "model.safetensors").read_bytes()
        ).hexdigest()
        assert entry["sha256"] == {"model.safetensors": digest}
        assert digest in card
    written = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert record["weights_sha256"] == {"model.safetensors": written}
    assert sorted(record["files"]) == sorted(entry.name for entry in (tmp_path / "out").iterdir())
    assert "the base's own card" not in card


def test_the_same_merge_gives_the_same_bytes(three):
    for name in ("one", "two"):
        merge_models([three / "a", three / "b"], three / name, base=three / "base", density=0.8)
    for file in (three / "one").iterdir():
        assert file.read_bytes() == (three / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("parameters", [{}, {"scope": "model"}])
def test_progress_counts_every_element_once_per_pass(three, parameters):
    seen = []
    merge_models(
        [three / "a", three / "b"],
        three / "out",
        base=three / "base",
        density=0.5,
        parameters=parameters,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


def test_buffers_are_copied_if_they_agree_and_refused_if_not(three):
    for name in ("a", "b", "base"):
        rewrite(three / name, lambda tensors: tensors.update({"model.steps": torch.tensor([7])}))
    merge_models([three / "a", three / "b"], three / "out", base=three / "base")
    assert weights(three / "out")["model.steps"].tolist() == [7]
    rewrite(three / "b", lambda tensors: tensors.update({"model.steps": torch.tensor([8])}))
    with pytest.raises(UserError, match=r"model\.steps .* differs"):
        merge_models([three / "a", three / "b"], three / "two", base=three / "base")


def test_odd_sizes_in_mixed_dtypes_stay_aligned(tmp_path):
    from expunge.merging.writer import CheckpointWriter

    source = {
        "a": torch.randn(3).bfloat16(),
        "b": torch.randn(5),
        "c": torch.tensor(True),
        "d": torch.zeros(0),
        "e": torch.tensor(2.5),
    }
    save_file(source, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    with CheckpointWriter(tmp_path / "out", checkpoint.tensors) as target:
        for name in target.order:
            target.write(name, checkpoint.read(name))
        target.publish({}, "")
    assert_equal(weights(tmp_path / "out"), source)
