"""What every objective over logits gives on small random rows, in numpy: definitions, not code that is tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.methods.step import Memory, Step
from method_steps import make_step, random_outputs, random_start
from training_rows import rows, supervised

VOCABULARY, WIDTH = 11, 5
#: The sides of a step in the order of its rows.
SIDES = {
    "forget": rows(3, seed=1, vocabulary=VOCABULARY),
    "forget_alternatives": rows(3, seed=5, vocabulary=VOCABULARY),
    "retain": rows(2, seed=2, vocabulary=VOCABULARY),
    "retain_alternatives": rows(2, seed=6, vocabulary=VOCABULARY),
}
EVERY = [row for side in SIDES.values() for row in side]
TOKENS = sum(supervised(EVERY))
FORGET_TOKENS = sum(supervised(SIDES["forget"]))
#: Every second token of the forget answers.
HALF = np.arange(FORGET_TOKENS) % 2 == 0


def outputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random logits and hidden states of the model in training."""
    return random_outputs(TOKENS, VOCABULARY, WIDTH, dtype)


def step(logits: Tensor, hidden: Tensor, **given: Any) -> Step:
    """A step over all sides, or a part of them."""
    given.setdefault("memory", memory(hidden.dtype))
    alternatives = {side: SIDES[side] for side in SIDES if side.endswith("alternatives")}
    return make_step(SIDES["forget"], SIDES["retain"], logits, hidden, **alternatives, **given)


def memory(dtype: torch.dtype = torch.float64) -> Memory:
    """Nothing remembered but random mean states."""
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(2, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return Memory(means={"forget": drawn[0], "anchors": drawn[1]})


@dataclass
class Side:
    """One side, row by row: places in the answer and targets [n], logits [n, V] of the model and the start model."""

    places: list[np.ndarray]
    targets: list[np.ndarray]
    logits: list[np.ndarray]
    start: list[np.ndarray]

    @property
    def logp(self) -> list[np.ndarray]:
        """Log-probs of the targets."""
        return [log_softmax(z)[np.arange(len(y)), y] for z, y in zip(self.logits, self.targets, strict=True)]

    @property
    def reference(self) -> list[np.ndarray]:
        """The same under the start model."""
        return [log_softmax(z)[np.arange(len(y)), y] for z, y in zip(self.start, self.targets, strict=True)]

    @property
    def flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Targets, logits and start logits of all tokens."""
        return np.concatenate(self.targets), np.concatenate(self.logits), np.concatenate(self.start)


def known(mask: np.ndarray | None = None, temperature: float = 1.0) -> dict[str, Side]:
    """The sides in numpy; `mask` leaves tokens of the forget side out, its logits are divided by the temperature."""
    logits = outputs()[0].numpy()
    start = random_start(TOKENS, VOCABULARY, WIDTH, torch.float64).logits.numpy()
    made, at, token = {}, 0, 0
    for name, side in SIDES.items():
        known = Side([], [], [], [])
        for row in side:
            here = np.arange(at, at + row.supervised_tokens)
            at += len(here)
            places, targets = np.arange(len(here)), row.input_ids[row.prompt_tokens :]
            over = temperature if name in ("forget", "forget_alternatives") else 1.0
            if name == "forget" and mask is not None:
                chosen = mask[token : token + len(here)]
                token += len(here)
                here, places, targets = here[chosen], places[chosen], targets[chosen]
            known.places.append(places)
            known.targets.append(targets)
            known.logits.append(logits[here] / over)
            known.start.append(start[here] / over)
        made[name] = known
    return made


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_sigmoid(value: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-value))


def sums(values: list[np.ndarray]) -> np.ndarray:
    return np.array([part.sum() for part in values])


def means(values: list[np.ndarray]) -> np.ndarray:
    return np.array([part.mean() for part in values])


def ratio(side: Side) -> np.ndarray:
    return sums(side.logp) - sums(side.reference)


Known = Mapping[str, Side]


def ascent(k: Known) -> float:
    return float(np.concatenate(k["forget"].logp).mean())


def npo(k: Known, beta: float = 0.1, level: str = "sequence") -> float:
    tokens = [p - r for p, r in zip(k["forget"].logp, k["forget"].reference, strict=True)]
    ratios = {"sequence": sums(tokens), "mean": means(tokens), "token": np.concatenate(tokens)}[level]
    return float((-2 / beta * log_sigmoid(-beta * ratios)).mean())


def simnpo(k: Known, beta: float = 4.5, gamma: float = 0.0, coefficient: float = 0.125) -> float:
    return float(coefficient * (-2 / beta * log_sigmoid(-beta * means(k["forget"].logp) - gamma)).mean())


def dpo(k: Known, beta: float = 0.1) -> float:
    gain = ratio(k["forget_alternatives"]) - ratio(k["forget"])
    return float((-2 / beta * log_sigmoid(beta * gain)).mean())


def declining(k: Known) -> float:
    return -float(np.concatenate(k["forget_alternatives"].logp).mean())


def learning(k: Known) -> dict[str, float]:
    return {"retain_answers": -float(np.concatenate(k["retain"].logp).mean())}


def idk_ap(k: Known, beta: float = 0.1) -> dict[str, float]:
    margin = sums(k["retain"].logp) - sums(k["retain_alternatives"].logp)
    return {"forget": declining(k), "retain_preservation": float((-log_sigmoid(beta * margin) / beta).mean())}


def max_entropy(k: Known, coefficient: float = 0.1, divergence: str = "entropy") -> float:
    logp = log_softmax(k["forget"].flat[1])
    uniform = np.full(VOCABULARY, 1 / VOCABULARY)
    if divergence == "uniform":
        return float(coefficient * (uniform * (np.log(uniform) - logp)).sum(-1).mean())
    return float(coefficient * (np.exp(logp) * (logp - np.log(uniform))).sum(-1).mean())


def undial(k: Known, beta: float = 10.0) -> float:
    targets, logits, start = k["forget"].flat
    goal = np.exp(log_softmax(start - beta * np.eye(VOCABULARY)[targets]))
    return float(-(goal * log_softmax(logits)).sum(-1).mean())


def ceu(k: Known, skip: int = 0) -> float:
    targets, logits, _ = k["forget"].flat
    place = np.concatenate(k["forget"].places)
    goal = np.exp(log_softmax(logits - 1e9 * np.eye(VOCABULARY)[targets]))
    return float((-(goal * log_softmax(logits)).sum(-1) * (place >= skip)).mean())


def wga(k: Known, beta: float = 1.0) -> float:
    logp = np.concatenate(k["forget"].logp)
    return float((np.exp(logp) ** beta * logp).mean())


def wtnpo(k: Known, beta: float = 4.0, alpha: float = 1.5) -> float:
    logp = np.concatenate(k["forget"].logp)
    p, start = np.exp(logp), np.exp(np.concatenate(k["forget"].reference))
    return float((2 * p ** (beta + alpha) / (p**beta + start**beta) * logp).mean())


def satimp(k: Known, beta1: float = 5.0, beta2: float = 1.0) -> float:
    logp = np.concatenate(k["forget"].logp)
    return float((np.exp(logp) ** beta1 * (1 - np.exp(logp)) ** beta2 * logp).mean())


def pdu(k: Known, dual: float = 100.0) -> dict[str, float]:
    logits = k["forget"].flat[1]
    nll = -float(np.concatenate(k["retain"].logp).mean())
    margin = float(((logits.max(-1) - logits.mean(-1)) ** 2).mean())
    return {"forget": margin, "retain_constraint": dual * nll, "monitor_retain_nll": nll}


def eul(k: Known, power: int = 1) -> float:
    return float(((-1 / means(k["forget"].logp)) ** power).mean())


def capped(k: Known, cap: float = 4.0) -> float:
    return float(np.maximum(0, cap + means(k["forget"].logp)).mean())


def ihl(k: Known) -> float:
    targets, logits, _ = k["forget"].flat
    p, own = np.exp(log_softmax(logits)), np.eye(VOCABULARY)[targets]
    return float((1 + (p * own).sum(-1) - (p * (1 - own)).max(-1)).mean())


def erase(k: Known, depth: float = 0.0, ceiling: float = -3.0, bottom: float = -3.0, pull: float = 0.0) -> float:
    p = np.exp(np.concatenate(k["forget"].logp))
    above = np.log(p / (1 - p)) - (np.clip(-3.0, bottom, ceiling) - depth)
    return float(np.where(above > 0, above, -pull * above).mean())


def flat(k: Known, divergence: str = "total_variation") -> float:
    forget = means([np.exp(part) for part in k["forget"].logp])
    template = means([np.exp(part) for part in k["forget_alternatives"].logp])
    # f-divergences by their variational form: −g(template) + f*(g(forget))
    values = {
        "total_variation": -np.tanh(template) / 2 + np.tanh(forget) / 2,
        "kl": -template + np.exp(forget - 1),
        "pearson": -template + forget**2 / 4 + forget,
        "js": np.log1p(np.exp(-template)) + forget + np.log1p(np.exp(-forget)) - 2 * np.log(2),
    }
    return float(values[divergence].mean())


Form = Callable[..., float | dict[str, float]]

#: Every objective over logits: its closed form, and settings that change it.
FORMS: dict[str, tuple[Form, list[dict[str, Any]]]] = {
    "altpo": (dpo, [{"beta": 0.5}]),
    "ceu": (ceu, [{"skip": 1}, {"skip": 2}]),
    "dpo": (dpo, [{"beta": 0.5}]),
    "erase": (erase, [{"depth": 2.0}, {"ceiling": -2.5, "bottom": -2.5}, {"ceiling": 20.0, "pull": 0.5}]),
    "eul": (eul, [{"power": 2}]),
    "finetune": (learning, []),
    "flat": (flat, [{"divergence": name} for name in ("kl", "js", "pearson")]),
    "grad_ascent": (ascent, []),
    "grad_diff": (ascent, []),
    "idk_ap": (idk_ap, [{"beta": 0.5}]),
    "idk_nll": (declining, []),
    "ihl": (ihl, []),
    "kl_min": (ascent, []),
    "likelihood_capped_ga": (capped, [{"cap": 2.5}, {"cap": 0.5}]),
    "max_entropy": (max_entropy, [{"divergence": "uniform"}, {"coefficient": 1.0}]),
    "npo": (npo, [{"beta": 0.5}, {"level": "mean"}, {"level": "token"}]),
    "pdu": (pdu, [{"dual": 3.0}]),
    "satimp": (satimp, [{"beta1": 2.0}, {"beta2": 3.0}]),
    "simnpo": (simnpo, [{"beta": 2.5}, {"gamma": 1.5}, {"coefficient": 1.0}]),
    "undial": (undial, [{"beta": 3.0}]),
    "wga": (wga, [{"beta": 5.0}, {"beta": 0.0}]),
    "wtnpo": (wtnpo, [{"beta": 2.0}, {"alpha": 0.0}]),
}
#: Parameters that such a step does not show: `test_methods_dual.py` follows them over many steps.
OVER_STEPS = {"pdu": {"epsilon", "dual_rate", "warmup", "update"}}
