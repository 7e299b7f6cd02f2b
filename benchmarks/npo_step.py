"""One NPO step: cached reference, one shared forward, few logits; against two models, separate forwards, full logits.

Both sides take the same rows, NPO + retain NLL (+ retain KL with --kl), bfloat16 autocast, gradient clipping and fused
AdamW. The other side holds a second model for the reference, pads forget and retain rows apart, and keeps all logits,
as public unlearning code does. Each side runs in a process of its own for its peak memory (growth since the imports),
and both in turn in one process for the times. The losses of the first steps must agree, or no speed is reported.
Run: python benchmarks/npo_step.py [--quick] [--lora 16] [--kl] [--model tiny]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid

from common import compared, in_turn, memory_result, options_of, parse, print_result, sentence
from expunge.data.collate import Batch
from expunge.methods.base import build_objective
from training import Make, Ours, Setting, Training, check_losses, peak_memory

BETA = 0.1


def two_models(training: Training) -> Callable[[int], Tensor]:
    """The loss as it is commonly written."""
    model, kl = training.model, training.job.term_weights["kl"] > 0
    reference, _ = training.start()

    def token_logprobs(network: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logits = network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        logp = logits.float().log_softmax(-1)
        keep = batch.supervised[:, :-1]
        return logp, logp.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * keep, keep

    def loss(number: int) -> Tensor:
        forget, retain = (training.side(number, side) for side in ("forget", "retain"))
        _, current, _ = token_logprobs(model, forget)
        with torch.no_grad():
            _, start, _ = token_logprobs(reference, forget)
        total = (-2 / BETA * logsigmoid(-BETA * (current.sum(-1) - start.sum(-1)))).mean()
        logp, kept, keep = token_logprobs(model, retain)
        total = total - kept.sum() / keep.sum()
        if kl:
            with torch.no_grad():
                reference_logp, _, _ = token_logprobs(reference, retain)
            total = total + kl_div(logp[keep], reference_logp[keep], log_target=True, reduction="sum") / keep.sum()
        return total

    return loss


def main() -> None:
    """Parse, run, print; the last line is the result as JSON."""
    parser = options_of(__doc__)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters instead of all parameters")
    parser.add_argument("--kl", action="store_true", help="add the retain KL term")
    parser.add_argument("--rows", type=int, default=32, help="forget rows, and as many retain rows")
    parser.add_argument("--batch", type=int, default=8, help="rows of each side in a step")
    parser.add_argument("--steps", type=int, help="8, or 3 with --quick")
    options = parse(parser)
    setting = Setting.of(
        options,
        objective=build_objective("npo", {"beta": BETA}),
        terms={"nll": 1.0, "kl": float(options.kl)},
        rows=options.rows,
        batch=options.batch,
        lora=options.lora,
    )
    makes: dict[str, Make] = {"ours": Ours, "baseline": two_models}
    peaks = peak_memory(options, setting, makes)
    if peaks is None:
        return
    first = check_losses(setting, makes)
    trainings = {name: Training(setting) for name in makes}
    ours = Ours(trainings["ours"])
    losses: dict[str, Callable[[int], Tensor]] = {"ours": ours, "baseline": two_models(trainings["baseline"])}
    sides = {name: trainings[name].step(loss) for name, loss in losses.items()}
    for side in sides.values():  # the first allocates
        side(0)
    steps = options.steps or (3 if options.quick else 8)
    result = compared(in_turn(sides, range(1, steps + 1), options.device))
    print(f"a step: {sentence(result)}")
    print(f"the pass of the start model, once before training: {ours.reference_seconds:.1f} s")
    given = {name: getattr(options, name) for name in ("lora", "kl", "rows", "batch")}
    print_result("npo_step", options, {**result, **memory_result(peaks), "first_losses": first, **given})


if __name__ == "__main__":
    main()
