"""Attributions by activations, MemFlex and known regions against direct computations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.localize.base import build_attribution
from expunge.localize.choose import mask_of
from expunge.localize.klue import Contexts
from expunge.localize.locate import locate
from expunge.localize.quality import agreement, auc, energy_inside, inside, overlap
from expunge.localize.readers import READ_UNITS, readers_of
from expunge.localize.units import units_of
from localize_evidence import MODELS, ROWS, UNITS, dense, evidence, model, region_of, scores, shapes
from localize_models import architecture
from merging_models import llama
from scoring_rows import lively

# ---- activations


def inputs_and_columns(network: Any, unit: str, row: Encoded) -> list[tuple[Tensor, Tensor]]:
    """Per layer, from a pass of one unpadded row: what enters the matrix [tokens, in], and its columns [out, in]."""
    blocks = network.transformer.h if hasattr(network, "transformer") else network.model.layers
    if unit == "head":
        modules = [block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj for block in blocks]
    else:
        modules = [block.mlp.c_proj if hasattr(block.mlp, "c_proj") else block.mlp.down_proj for block in blocks]
    seen: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])) for module in modules]
    with torch.no_grad():
        network(input_ids=torch.from_numpy(row.input_ids).long()[None])
    for handle in handles:
        handle.remove()
    turned = [m.weight.T if type(m).__name__ == "Conv1D" else m.weight for m in modules]
    return list(zip(seen, (weight.detach() for weight in turned), strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", READ_UNITS)
@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_activations_are_mean_lengths_of_what_units_write(tokens: str, unit: str, name: str) -> None:
    network = model(name)
    found = scores("activations", evidence(network, unit), tokens=tokens)
    for layer, own in enumerate(found):
        written = []
        for row in ROWS["forget"]:
            values, columns = inputs_and_columns(network, unit, row)[layer]
            size = values.shape[1] // len(own)
            first = row.prompt_tokens - 1 if tokens == "answer" else 0
            last = len(row.input_ids) - (tokens == "answer")
            for value in values[first:last]:
                parts = [columns[:, i : i + size] @ value[i : i + size] for i in range(0, len(value), size)]
                written.append(torch.stack(parts).norm(dim=1))
        torch.testing.assert_close(own, torch.stack(written).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["GPTNeoX", "Phi3", "OPT", "Qwen3"])
@pytest.mark.parametrize("by", ["activations", "klue"])
def test_other_architectures_are_read(by: str, kind: str) -> None:
    for unit in ("value_vector", "neuron", "head"):
        found = scores(by, evidence(architecture(kind), unit))
        assert all(own.isfinite().all() and own.std() > 0 for own in found)


def test_a_neuron_has_the_score_of_its_value_vector() -> None:
    for by in ("activations", "klue"):
        vectors, neurons = (scores(by, evidence(model("llama"), unit)) for unit in ("value_vector", "neuron"))
        for vector, neuron in zip(vectors, neurons, strict=True):
            torch.testing.assert_close(vector, neuron)


# ---- KLUE


def slopes(network: Any, unit: str, ids: np.ndarray, prompt: int, whole: bool) -> list[Tensor]:
    """Per layer, ∂p(answer)/∂ε where every unit's activation is multiplied by 1 + ε at every token, at ε = 0."""
    readers = readers_of(evidence(network, unit))
    factors = [torch.zeros(reader.family.count, requires_grad=True) for reader in readers]

    def scale(factor: Tensor, size: int) -> Any:
        return lambda _, args: (args[0] * (1 + factor.repeat_interleave(size)),)

    handles = [
        reader.linear.module.register_forward_pre_hook(scale(factor, reader.slab.size))
        for reader, factor in zip(readers, factors, strict=True)
    ]
    tokens = torch.from_numpy(ids).long()
    logits = network(input_ids=tokens[None]).logits[0, prompt - 1 : -1]
    for handle in handles:
        handle.remove()
    loss = cross_entropy(logits.double(), tokens[prompt:], reduction="sum" if whole else "mean")
    return list(torch.autograd.grad((-loss).exp(), factors))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", ["value_vector", "head"])
@pytest.mark.parametrize("probability", ["token", "answer"])
def test_klue_is_the_slope_of_the_answer_less_that_under_other_prompts(probability: str, unit: str, name: str) -> None:
    network, given, alpha = model(name), ROWS["forget"], 0.7
    longest = max(len(row.input_ids) for row in given)
    settings = {"alpha": alpha, "contexts": len(given) - 1, "probability": probability}
    found = scores("klue", evidence(network, unit), **settings)
    expected = [torch.zeros_like(own) for own in found]
    for row in given:
        for other in given:  # all of the other prompts, so that no lot is drawn
            answer = row.input_ids[row.prompt_tokens :]
            prompt = other.input_ids[: other.prompt_tokens][-(longest - len(answer)) :]
            own = slopes(network, unit, np.concatenate([prompt, answer]), len(prompt), probability == "answer")
            weight = 1 if other is row else -alpha / (len(given) - 1)
            for total, slope in zip(expected, own, strict=True):
                total += weight / len(given) * slope
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=float(wanted.abs().max()) * 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_klue_of_answers_that_do_not_depend_on_the_prompt_is_zero(name: str) -> None:
    network = lively(MODELS[name]())
    for reader in readers_of(evidence(network, "head")):  # no attention: a token is predicted from the last one alone
        torch.nn.init.zeros_(reader.linear.weight)
    given = []
    for row in ROWS["forget"]:  # prompts of one length (GPT-2 knows positions) that end with the same token
        prompt = np.append(row.input_ids[:2], 7).astype(np.int32)
        ids = np.concatenate([prompt, row.input_ids[row.prompt_tokens :]])
        given.append(replace(row, input_ids=ids, prompt_tokens=3))
    alone, less = (scores("klue", evidence(network, "value_vector", {"forget": given}), alpha=a) for a in (0.0, 1.0))
    for own, left in zip(alone, less, strict=True):
        assert own.abs().max() > 0
        assert left.abs().max() < 1e-4 * own.abs().max()


def test_contexts_are_other_prompts_cut_to_the_longest_row() -> None:
    given = [*ROWS["forget"], replace(ROWS["forget"][0], prompt_tokens=ROWS["forget"][0].prompt_tokens)]
    contexts = Contexts(given, 3, seed=5)
    prompts = {row.input_ids[: row.prompt_tokens].tobytes() for row in given}
    assert len(prompts) == len(given) - 1
    for number, context in enumerate(contexts):
        for row, made in zip(given, context, strict=True):
            assert made.input_ids[made.prompt_tokens :].tolist() == row.input_ids[row.prompt_tokens :].tolist()
            assert len(made.input_ids) <= max(len(row.input_ids) for row in given)
            assert made.input_ids[: made.prompt_tokens].tobytes() != row.input_ids[: row.prompt_tokens].tobytes()
        assert number < 3
    other = [row.input_ids.tolist() for context in Contexts(given, 3, seed=6) for row in context]
    assert other != [row.input_ids.tolist() for context in contexts for row in context]


# ---- MemFlex


def mean_gradients(network: Any, given: list[Encoded]) -> dict[str, Tensor]:
    """∇ of the mean loss of all answer tokens, row by row in float64."""
    named = dict(network.named_parameters())
    total = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in named.items()}
    for row in given:
        ids = torch.from_numpy(row.input_ids).long()
        logits = network(input_ids=ids[None]).logits[0, row.prompt_tokens - 1 : -1]
        loss = cross_entropy(logits.double(), ids[row.prompt_tokens :], reduction="sum")
        for key, own in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            total[key] += own.double()
    tokens = sum(row.supervised_tokens for row in given)
    return {key: value / tokens for key, value in total.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", UNITS)
def test_memflex_weighs_the_gradient_by_its_direction(unit: str, name: str) -> None:
    network = model(name)
    given, memflex = evidence(network, unit), build_attribution("memflex", {"cosine": 2.0})
    found = locate(memflex, given, 0.5, "model")
    noisy = {split: list(memflex._noisy(given, split)) for split in ROWS}
    forget, retain = (mean_gradients(network, noisy[split]) for split in ("forget", "retain"))
    for place, family in enumerate(found.families):
        for unit_number in {0, family.count // 2, family.count - 1}:
            chosen = [torch.zeros(own.count, dtype=torch.bool) for own in found.families]
            chosen[place][unit_number] = True
            if unit == "weight":
                bits = {family.name: torch.ones(1, 1, dtype=torch.bool)}  # the direction is that of the matrix
            else:
                bits = dict(mask_of(found.families, chosen).inside)
            f, r = (torch.cat([own[key][b.expand_as(own[key])] for key, b in bits.items()]) for own in (forget, retain))
            size = f[unit_number].abs() if unit == "weight" else f.abs().mean()
            expected = size * (1 - cosine_similarity(f, r, dim=0))
            assert float(found.scores[place][unit_number]) == pytest.approx(float(expected), rel=2e-3, abs=1e-9)


def test_memflex_puts_what_the_rule_drops_behind_what_it_keeps() -> None:
    given = evidence(model("llama"), "module")
    plain = torch.cat(scores("memflex", given, cosine=2.0))
    cut = scores("memflex", given, cosine=2.0, magnitude=0.02)
    kept = torch.cat(cut) > 0
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(torch.cat(cut)[kept], plain[kept])
    behind = torch.cat(cut)[~kept]
    assert (behind.argsort() == plain[~kept].argsort()).all()
    assert (torch.cat(scores("memflex", given, cosine=-1.0)) <= 0).all()


def test_memflex_noise_hits_half_of_the_answer_at_most() -> None:
    given = evidence(model("llama"), "module")
    made = list(build_attribution("memflex", {"copies": 4})._noisy(given, "forget"))
    assert len(made) == 4 * len(ROWS["forget"])
    changed = 0
    for number, row in enumerate(made):
        before = ROWS["forget"][number // 4]
        places = np.flatnonzero(row.input_ids != before.input_ids)
        end = before.prompt_tokens + before.answer_tokens
        assert len(places) <= before.answer_tokens // 2
        assert all(before.prompt_tokens <= place < end for place in places)
        assert not np.isin(row.input_ids[places], [1, 2]).any()  # beginning and end of a text
        changed += len(places)
    assert changed > 0


# ---- known regions


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", UNITS)
def test_oracle_finds_its_region_and_complement_nothing_of_it(unit: str, name: str) -> None:
    network = model(name)
    region = region_of(network, unit, 0.5 if unit == "layer" else 0.3)
    given = evidence(network, unit, region=region)
    density = 0.5 if unit == "layer" else 0.3
    oracle = locate(build_attribution("oracle", {}), given, density, "model")
    assert oracle.mask.digest == region.digest
    assert auc(oracle.scores, region, oracle.families) == 1
    assert overlap(oracle.mask, region, shapes(network)) == 1

    other = locate(build_attribution("complement", {}), given, density, "model")
    assert not (dense(other.mask, network) & dense(region, network)).any()
    wanted = round(density * sum(family.count for family in other.families))
    assert sum(int(own.sum()) for own in inside(other.mask, other.families)) == wanted
    assert auc(other.scores, region, other.families) == 0


@pytest.mark.parametrize(("by", "density", "side"), [("oracle", 0.5, "inside"), ("complement", 0.95, "outside")])
@pytest.mark.parametrize("strata", ["model", "layer"])
def test_a_control_never_leaves_its_side_of_the_region(by: str, density: float, side: str, strata: Any) -> None:
    network = model("llama")
    given = evidence(network, "value_vector", region=region_of(network, "value_vector", 0.1))
    with pytest.raises(UserError, match=f"{by} chooses {side} the known region, and of") as refused:
        locate(build_attribution(by, {}), given, density, strata)
    allowed = float(refused.value.hint.split("--density ")[1].split(",")[0])
    assert locate(build_attribution(by, {}), given, allowed, "model").mask.inside


def test_complements_of_other_seeds_and_random_are_other_units() -> None:
    network = model("llama")
    region = region_of(network, "value_vector", 0.1)
    masks = [
        locate(
            build_attribution(by, {}), evidence(network, "value_vector", seed=seed, region=region), 0.1, "model"
        ).mask
        for by, seed in (("complement", 1), ("complement", 1), ("complement", 2), ("random", 1))
    ]
    digests = [mask.digest for mask in masks]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert overlap(masks[0], masks[3], shapes(network)) < 0.5


# ---- mistakes of users


def test_mistakes_are_one_sentence() -> None:
    network, small = model("llama"), llama(0, intermediate_size=16)
    region = region_of(network, "value_vector")
    one = {"forget": [ROWS["forget"][0]] * 3}
    cases = [
        (lambda: build_attribution("oracle", {}).saliency(evidence(network, "head")), "needs a region"),
        (lambda: scores("complement", evidence(network, "head", region=region)), "no weight of any head"),
        (lambda: scores("oracle", evidence(small, "value_vector", region=region)), "of another model"),
        (lambda: agreement(region, region, shapes(small)), "of another model"),
        (lambda: agreement(region, region, shapes(model("gpt2"))), "of another model"),
        (lambda: auc([], region, units_of(small, "value_vector")), "of another model"),
        (lambda: energy_inside([(n, p, p + 1) for n, p in small.named_parameters()], region), "of another model"),
        (lambda: scores("klue", evidence(network, "value_vector", one)), "no two different prompts"),
        (lambda: scores("klue", evidence(network, "layer")), "can't tell units"),
        (lambda: scores("activations", evidence(network, "module")), "can't tell units"),
        (lambda: build_attribution("activations", {}).saliency(evidence(network, "layer")), "can't be read"),
        (lambda: scores("memflex", evidence(network, "layer", {"forget": ROWS["forget"]})), "retain"),
    ]
    for run, words in cases:
        with pytest.raises(UserError, match=words) as raised:
            run()
        assert raised.value.hint
        assert "\n" not in raised.value.message


@pytest.mark.parametrize("by", ["activations", "klue", "memflex", "oracle", "complement"])
def test_the_model_stays_as_it_was(by: str) -> None:
    network = lively(MODELS["llama"]())
    network.train()
    region = region_of(network, "value_vector")
    frozen = network.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    weights = {name: own.detach().clone() for name, own in network.named_parameters()}
    first, second = (scores(by, evidence(network, "value_vector", region=region, batch_size=b)) for b in (2, 5))
    for own, again in zip(first, second, strict=True):
        torch.testing.assert_close(own, again, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(own, weights[name]) for name, own in network.named_parameters())
    assert all(own.grad is None and own.requires_grad == (own is not frozen) for own in network.parameters())
    assert all(module.training for module in network.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("by", ["activations", "klue", "memflex"])
def test_half_precision_and_half_weights_give_nearly_the_same(by: str) -> None:
    network = lively(MODELS["llama"]())
    exact = torch.cat(scores(by, evidence(network, "value_vector")))
    half = torch.cat(scores(by, evidence(network, "value_vector", half=True)))
    narrow = torch.cat(scores(by, evidence(network.to(torch.bfloat16), "value_vector")))
    for own in (half, narrow):
        assert own.dtype == torch.float32
        assert float(torch.corrcoef(torch.stack([exact, own]))[0, 1]) > 0.97
