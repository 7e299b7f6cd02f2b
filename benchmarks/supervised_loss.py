"""NLL at the supervised positions, forward and backward; against full logits with a float32 cross-entropy.

Both sides run the same model, with gradients of all parameters, over the same padded batches of TOFU-like rows in
bfloat16 autocast. The other side makes the logits of every position [B, L, V], turns them into float32, and ignores
the labels of prompt and padding, as transformers' own loss does. `packed_ratio` is what training gets: the rows of the
batch packed into lines. `head_ratio` is the same without the decoder: from hidden states [B, L, d] to the gradients of
states and output embedding. Each side runs in a process of its own for its
peak memory, both in turn in one process for the times. Losses and gradients must agree, or no speed is reported.
Run: python benchmarks/supervised_loss.py [--quick] [--model tiny] [--template chat]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common import (
    Side,
    agree,
    autocast,
    build_model,
    compared,
    free,
    in_turn,
    memory_result,
    options_of,
    parse,
    peaks,
    print_peak,
    print_result,
    sentence,
)
from expunge.data.collate import Batch, pad_right
from expunge.models.forward import pick_positions
from expunge.models.packing import supports_packing
from expunge.models.passes import Forward
from expunge.models.token_logprobs import token_logprobs

IGNORED = -100


def full_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean NLL of the supervised tokens, from logits [B, L, V] of all positions."""
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels[batch.supervised] = batch.targets
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def whole(options: argparse.Namespace, batches: list[Batch], model: Any) -> dict[str, Side]:
    """Forward and backward of the whole model."""
    model.config.use_cache = False
    packs = supports_packing(model)
    model.train()

    def ours(batch: Batch) -> Tensor:
        return -token_logprobs(Forward(model, batch).logits, batch.targets).mean()

    def packed(batch: Batch) -> Tensor:
        return -token_logprobs(Forward(model, batch, packs=packs).logits, batch.targets).mean()

    def baseline(batch: Batch) -> Tensor:
        return full_loss(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, batch)

    return steps_of(options, batches, {"ours": ours, "packed": packed, "baseline": baseline}, model.zero_grad)


def shape(model: Any) -> tuple[int, int]:
    """Width and vocabulary of the output embedding."""
    head = model.get_output_embeddings()
    return head.in_features, head.out_features


def head_alone(options: argparse.Namespace, batches: list[Batch], shape: tuple[int, int]) -> dict[str, Side]:
    """The output embedding and the loss, over random states."""
    width, vocabulary = shape
    torch.manual_seed(0)
    given = {"device": options.device, "dtype": options.weights}
    head = nn.Linear(width, vocabulary, bias=False, **given)
    states = [torch.randn(*batch.input_ids.shape, width, **given).requires_grad_() for batch in batches]
    states_of = {id(batch): state for batch, state in zip(batches, states, strict=True)}

    def ours(batch: Batch) -> Tensor:
        return -token_logprobs(head(pick_positions(states_of[id(batch)], batch.supervised)), batch.targets).mean()

    def baseline(batch: Batch) -> Tensor:
        return full_loss(head(states_of[id(batch)]), batch)

    def forget_gradients() -> None:
        head.zero_grad()
        for state in states:
            state.grad = None

    return steps_of(options, batches, {"ours": ours, "baseline": baseline}, forget_gradients)


def steps_of(
    options: argparse.Namespace,
    batches: list[Batch],
    losses: Mapping[str, Callable[[Batch], Tensor]],
    forget_gradients: Callable[[], object],
) -> dict[str, Side]:
    """Forward and backward of each loss; gives the loss."""

    def side(loss: Callable[[Batch], Tensor]) -> Side:
        def step(number: int) -> float:
            forget_gradients()
            with autocast(options.device):
                value = loss(batches[number % len(batches)])
            value.backward()
            return value.item()

        return step

    return {name: side(loss) for name, loss in losses.items()}


def gradient_norm(parameters: Any) -> float:
    """Of all gradients together."""
    norms = [parameter.grad.float().norm() for parameter in parameters if parameter.grad is not None]
    return float(torch.stack(norms).norm())


def measure(sides: dict[str, Side], options: argparse.Namespace) -> dict[str, Any]:
    """Times of both sides; the call before them allocates."""
    for side in sides.values():
        side(0)
    times = in_turn(sides, range(1, options.steps + 1), options.device)
    found = compared(times)
    if "packed" in times:
        packed = compared(times, "packed")
        found |= {f"packed_{key}": packed[key] for key in ("ratio", "ratio_of_pairs", "cpu_ratio")}
    return found


def set_up(options: argparse.Namespace, device: torch.device) -> tuple[Any, list[Batch], dict[str, Any]]:
    """The model, its batches (rows in the order of a file), and what part of the positions is what."""
    model, rows = build_model(
        options.model, 4 * options.batch, device=device, dtype=options.weights, template=options.template
    )
    groups = [range(start, start + options.batch) for start in range(0, len(rows), options.batch)]
    batches = [pad_right([rows[i] for i in group], list(group), 0) for group in groups]
    positions = sum(batch.input_ids.numel() for batch in batches)
    real = sum(int(batch.attention_mask.sum()) for batch in batches)
    share = {
        "supervised_share": round(sum(len(batch.targets) for batch in batches) / positions, 3),
        "padding_share": round(1 - real / positions, 3),
    }
    return model, [batch.to(options.device) for batch in batches], share


def child(options: argparse.Namespace) -> None:
    """One side alone, with the whole model or with its head, for its peak memory."""
    place, _, name = options.side.rpartition("-")

    def work() -> None:
        # for the head alone the model only says how large it is
        model, batches, _ = set_up(options, torch.device("meta") if place else options.device)
        sides = head_alone(options, batches, shape(model)) if place else whole(options, batches, model)
        for number in range(3):
            sides[name](number)

    print_peak(work, options.device)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Both comparisons of time, after the check that both sides compute the same."""
    model, batches, result = set_up(options, options.device)
    sides, first = whole(options, batches, model), {}
    for name, side in sides.items():
        loss = side(0)
        first[name] = [loss, gradient_norm(model.parameters())]
    agree(first, 0.01, "losses and gradient norms")
    result |= {"first_loss_and_gradient_norm": first, "vocabulary": shape(model)[1], **measure(sides, options)}
    alone = head_alone(options, batches, shape(model))
    model.zero_grad()
    del model, sides
    free()
    agree({name: [side(0)] for name, side in alone.items()}, 0.01, "losses of the head alone")
    return result | {f"head_{key}": value for key, value in measure(alone, options).items()}


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    parser = options_of(__doc__)
    parser.add_argument("--batch", type=int, help="rows of a batch: 16, or 8 with --quick")
    parser.add_argument("--steps", type=int, help="12, or 4 with --quick")
    options = parse(parser)
    options.batch = options.batch or (8 if options.quick else 16)
    options.steps = options.steps or (4 if options.quick else 12)
    if options.side:
        return child(options)
    found = peaks(("ours", "baseline", "head-ours", "head-baseline"))
    result = measured(options)
    for label, start in (("whole model", ""), ("head and loss alone", "head_")):
        print(f"{label}: {sentence(result, start)}")
    print(f"whole model, rows packed into lines: {result['packed_ratio']} × ({result['packed_cpu_ratio']} ×)")
    of_head = memory_result({name: found[f"head-{name}"] for name in ("ours", "baseline")})
    memory = memory_result(found) | {f"head_{key}": value for key, value in of_head.items()}
    print_result("supervised_loss", options, {**result, **memory, "batch": options.batch})
    return None


if __name__ == "__main__":
    main()
