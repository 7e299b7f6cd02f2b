"""Reading answers out of the middle: the layers above some depth are left out, and the head reads what is below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil, log
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from expunge.attacks.base import ModelAttack, Point, World, attack, setting
from expunge.attacks.states import States, all_but_first, gradients_allowed, layer_states, remembered, replaced_states
from expunge.errors import UserError
from expunge.models.forward import capture_head_input, decoder_layers, evaluating, supervised_head, truncated
from expunge.models.reference import Head
from expunge.models.token_logprobs import token_logprobs

Depth = Annotated[float, Field(gt=0, le=1)]
#: Every fifth row chooses the probe that the others trained.
_HELD_OUT = 5
#: Steps between two looks at the held-out rows, tokens of them that are looked at, and tokens in one piece.
_LOOK, _LOOKED_AT, _PIECE = 20, 512, 128
#: Ridge penalty beside the mean square of a feature.
_RIDGE = 1e-2
_DEPTHS = "parts of the depth at which to read, e.g. 0.5: after half of the layers"


@attack(
    name="logit_lens",
    idea="let the model's own norm and head read the hidden states after an earlier layer",
    paper="-",
    kind="behaviour",
    budget="part of the layers that run",
)
class LogitLens(ModelAttack):
    """The forward ends after layer ℓ and goes on with norm and head; at depth 1 it is the model itself."""

    depths: tuple[Depth, ...] = setting((0.5, 0.75, 0.9, 0.95), description=_DEPTHS, min_length=1)

    def points(self) -> list[Point]:
        """One point per depth, lowest first."""
        return _points(self.depths)

    @contextmanager
    def applied(self, model: nn.Module, point: Point, world: World) -> Iterator[nn.Module]:
        """Within it the upper layers don't run. Raises UserError for an architecture without a list of layers."""
        with truncated(model, _layer(model, point)):
            yield model


@attack(
    name="trained_lens",
    idea="train a probe on retain rows to read the hidden states after an earlier layer",
    paper="2406.09179",
    kind="behaviour",
    budget="part of the layers that run",
    needs=("retain",),
)
class TrainedLens(ModelAttack):
    """An affine translator h ← h + hA + b after layer ℓ, before the model's own norm and head; all else is frozen.

    Published probes train a new head instead, V·d numbers that a few hundred retain answers can't determine: tokens
    that stand in no retain answer would keep their random rows. A translator has d·d + d, and since the head is
    shared, what it learns on retain tokens holds for the others. It starts from the better of the identity (the logit
    lens) and the ridge regression onto the model's own last states, learns the answers, and is taken from where every
    fifth row, which it does not learn, was read best. A probe that reads nothing from the target says nothing.
    """

    depths: tuple[Depth, ...] = setting((0.5, 0.75, 0.9, 1.0), description=_DEPTHS, min_length=1)
    steps: int = setting(100, description="steps of AdamW, after the regression", ge=0)
    lr: float = setting(1e-4, description="learning rate", gt=0)
    batch_tokens: int = setting(256, description="answer tokens per step", gt=0)
    rows: int = setting(256, description="retain rows that it is trained on, the first ones of the split", gt=0)
    candidates: int = setting(
        8192, description="tokens in a step's softmax: all that the rows answer with, and others drawn anew", gt=1
    )

    def points(self) -> list[Point]:
        """One point per depth, lowest first."""
        return _points(self.depths)

    @contextmanager
    def applied(self, model: nn.Module, point: Point, world: World) -> Iterator[nn.Module]:
        """Within it the trained probe reads. Raises UserError without retain rows or a list of layers."""
        rows = [row for row in world.rows.get("retain", ()) if row.supervised_tokens][: self.rows]
        if not rows:
            raise UserError("the trained lens needs retain rows", "name a retain split, or use logit_lens")
        layer, last = _layer(model, point), len(decoder_layers(model)) - 1
        layers = sorted({last, *(_layer(model, other) for other in self.points())})

        def read() -> tuple[States, States]:
            learnt = [row for place, row in enumerate(rows) if place % _HELD_OUT or len(rows) < _HELD_OUT]
            held_out = rows[::_HELD_OUT]
            one, other = (layer_states(model, part, layers, all_but_first) for part in (learnt, held_out))
            return one, other

        learnt, held_out = remembered(self, model, world, read)
        probe = self._trained(model, learnt, held_out, layers.index(layer), world.seed)
        with replaced_states(model, {layer: probe}), truncated(model, layer):
            yield model

    def _trained(self, model: nn.Module, learnt: States, held_out: States, place: int, seed: int) -> Translator:
        """The translator of the layer at `place` of the states; the same for the same seed."""
        draw = torch.Generator().manual_seed(seed)
        own, following = learnt.layers[place][learnt.supervised], learnt.following[learnt.supervised]
        head = _head(model, own)
        softmax = PartialSoftmax.over(head, following, self.candidates)
        with gradients_allowed(), evaluating(model):
            starts = [Translator.identity(own), Translator.regression(learnt.layers[place], learnt.layers[-1])]
            best, probe = min(
                ((_held_out_nll(model, head, start, held_out, place), start) for start in starts), key=_nll
            )
            weights = [probe.change.clone().requires_grad_(), probe.shift.clone().requires_grad_()]
            optimizer = torch.optim.AdamW(weights, lr=self.lr, weight_decay=0.0)
            for step in range(1, self.steps + 1):
                batch = torch.randint(len(own), (self.batch_tokens,), generator=draw).to(own.device)
                vectors, _ = after_layers(model, Translator(*weights)(own[batch]))
                loss = softmax.nll(vectors, following[batch], draw)
                # the model's own weights may want gradients, and get none
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = gradient
                optimizer.step()
                if step % _LOOK == 0 or step == self.steps:
                    now = Translator(*(weight.detach().clone() for weight in weights))
                    best, probe = min((best, probe), (_held_out_nll(model, head, now, held_out, place), now), key=_nll)
        return probe


@dataclass(frozen=True)
class Translator:
    """h + hA + b, in float32, given back in the dtype of h."""

    change: Float[Tensor, "d d"]
    shift: Float[Tensor, " d"]

    def __call__(self, states: Float[Tensor, "*at d"]) -> Float[Tensor, "*at d"]:
        wide = states.float()
        return (wide + wide @ self.change + self.shift).to(states.dtype)

    @classmethod
    def identity(cls, states: Float[Tensor, "N d"]) -> Translator:
        """A = 0, b = 0."""
        width = states.shape[1]
        return cls(torch.zeros(width, width, device=states.device), torch.zeros(width, device=states.device))

    @classmethod
    def regression(cls, states: Float[Tensor, "N d"], others: Float[Tensor, "N d"]) -> Translator:
        """The A, b that turn `states` into `others` with the least squares, A kept small (ridge)."""
        x, y = states.double(), others.double() - states.double()
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        square = x.T @ x
        ridge = _RIDGE * square.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        change = torch.linalg.solve(square + ridge * torch.eye(len(square), device=x.device, dtype=x.dtype), x.T @ y)
        return cls(change.float(), (mean_y - mean_x @ change).float())


def _points(depths: Sequence[float]) -> list[Point]:
    return [Point(f"depth{100 * depth:g}", depth, {"depth": depth}) for depth in sorted(depths)]


def _layer(model: nn.Module, point: Point) -> int:
    """The last layer that runs (0-based)."""
    return max(1, ceil(round(len(decoder_layers(model)) * point.settings["depth"], 6))) - 1


def _nll(pair: tuple[float, Translator]) -> float:
    return pair[0]


@torch.no_grad()
def _held_out_nll(model: nn.Module, head: Head, probe: Translator, held_out: States, place: int) -> float:
    """Mean negative log-likelihood of the supervised tokens, nats, over the whole vocabulary."""
    states, following = held_out.layers[place][held_out.supervised], held_out.following[held_out.supervised]
    total = 0.0
    for start in range(0, len(states[:_LOOKED_AT]), _PIECE):
        piece = slice(start, min(start + _PIECE, _LOOKED_AT))
        vectors, _ = after_layers(model, probe(states[piece]))
        total -= float(token_logprobs(head(vectors), following[piece]).sum())
    return total / len(states[:_LOOKED_AT])


def after_layers(
    model: nn.Module, states: Float[Tensor, "N d"], with_logits: bool = False
) -> tuple[Float[Tensor, "N d"], Tensor]:
    """What enters the head when these are the states after the last layer (the model's own final norm, whatever its
    name), and the logits if wanted. A forward of N rows of one token, of which the first layer returns the states,
    and there are no others."""
    vectors: list[Tensor] = []
    wanted = torch.arange(len(states) if with_logits else 0, device=states.device)
    tokens = torch.zeros(len(states), 1, dtype=torch.int64, device=states.device)
    with (
        replaced_states(model, {0: lambda _: states[:, None]}),
        truncated(model, 0),
        capture_head_input(model, vectors),
        supervised_head(model, wanted),
    ):
        logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    return vectors[0][:, 0], logits


@dataclass(frozen=True)
class PartialSoftmax:
    """Cross entropy over part of the vocabulary: the tokens that are answers, and a draw of the others in each step,
    weighted so that the sum over the vocabulary is right in the mean."""

    head: Head
    answers: Int[Tensor, " A"]  # distinct, sorted
    others: Int[Tensor, " O"]
    drawn: int

    @classmethod
    def over(cls, head: Head, targets: Int[Tensor, " N"], candidates: int) -> PartialSoftmax:
        answers = targets.unique()
        rest = torch.ones(len(head.weight), dtype=torch.bool, device=targets.device)
        rest[answers] = False
        others = rest.nonzero()[:, 0]
        # answers alone would leave out what competes with them: as many others at least
        return cls(head, answers, others, min(len(others), max(candidates - len(answers), len(answers))))

    def nll(self, vectors: Float[Tensor, "N d"], targets: Int[Tensor, " N"], draw: torch.Generator) -> Tensor:
        """Mean negative log-likelihood of the targets, nats."""
        others = self.others
        if self.drawn < len(others):
            others = others[torch.randperm(len(others), generator=draw)[: self.drawn].to(others.device)]
        tokens = torch.cat([self.answers, others])
        bias = None if self.head.bias is None else self.head.bias[tokens]
        logits = replace(self.head, weight=self.head.weight[tokens], bias=bias)(vectors).float()
        if len(others):
            each = torch.zeros_like(logits[0])
            each[len(self.answers) :] = log(len(self.others) / len(others))
            logits = logits + each
        return nn.functional.cross_entropy(logits, torch.searchsorted(self.answers, targets))


def _head(model: nn.Module, states: Float[Tensor, "N d"]) -> Head:
    head = Head.of(model, copied=False)
    with torch.no_grad(), evaluating(model):
        vectors, logits = after_layers(model, states[:8], with_logits=True)
    if not head.gives(vectors, logits):
        raise UserError(
            "this architecture changes its logits after the output embedding in a way that the probe does not know",
            "use logit_lens, which asks the model itself",
        )
    return head
