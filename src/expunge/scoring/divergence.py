"""How far a model's next-token distributions are from the target's, without a second model in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.data.encode import Encoded
from expunge.models.forward import unwrap
from expunge.models.reference import Head, Kept
from expunge.scoring.distributed import world
from expunge.scoring.tables import DIVERGENCE

#: Positions whose distributions over the vocabulary stand in memory at once, twice.
PIECE = 64

#: exp(-1e4) is 0 in float32: a ruled-out token (−inf) counts as that, so that 0 × log 0 is 0 and no number infinite.
_FLOOR = -1e4

_HEAD, _STATES = "head.safetensors", "states.safetensors"


class TargetStates:
    """What enters the target's head at every supervised token of rows, and the head: d numbers per token from which
    its V logits come back.

    `score_tables(target, rows, …, keep=states)` fills it, as often as there are sets of rows;
    `score_tables(model, rows, …, against=states)` reads it, with the same rows in any order and selection. Beyond
    models.storage.RAM_LIMIT a set lies in a file in `folder`, if there is one. Only rows that are `wanted` are kept.
    """

    def __init__(self, folder: Path | None = None, wanted: Callable[[Encoded], bool] = lambda row: True) -> None:
        self.folder, self.wanted = folder, wanted
        self.head: Head | None = None
        self.problem: str | None = None  # why nothing can be compared with it
        self._sets: list[Kept] = []
        self._where: dict[bytes, tuple[int, int]] = {}  # row → set, and its number there
        self._pending: list[bytes] = []
        self._lengths: list[int] = []

    def open(self, model: nn.Module, rows: Sequence[Encoded]) -> None:
        """Make room for the rows, and copy the model's head, which may be changed or freed later."""
        head = unwrap(model).get_output_embeddings()  # type: ignore[operator]
        if self.head is None and isinstance(getattr(head, "weight", None), Tensor) and head.weight.is_floating_point():
            self.head = Head.of(model, copied=True)
        elif self.head is None:
            self.problem = "the target's output embedding is no plain matrix"
        chosen = [i for i, row in enumerate(rows) if row.supervised_tokens > 0 and self.wanted(row)]
        file = None if self.folder is None else self.folder / f"states-{world()[0]}-{len(self._sets)}"
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._sets.append(Kept(rows, chosen, file))
        self._pending = [_key(row) for row in rows]
        self._lengths = [row.supervised_tokens for row in rows]

    def put(self, index: Sequence[int], vectors: Float[Tensor, "N d"], logits: Float[Tensor, "N V"]) -> None:
        """What enters the head at the supervised tokens of these rows (numbers within the set that is open)."""
        if self.head is None or self.problem is not None:
            return
        if not self._where and not self.head.gives(vectors, logits):
            self.problem = "the target's architecture changes its logits after the output embedding in an unknown way"
            return
        spans = self._sets[-1].spans
        lengths = [self._lengths[row] for row in index]
        kept = torch.tensor([row in spans for row in index]).repeat_interleave(torch.tensor(lengths))
        chosen = [row for row in index if row in spans]
        self._sets[-1].put(chosen, vectors[kept.to(vectors.device)])
        for row in chosen:
            self._where[self._pending[row]] = (len(self._sets) - 1, row)

    def knows(self, row: Encoded) -> bool:
        """Whether the target saw this row, token by token."""
        return _key(row) in self._where

    def take(self, rows: Sequence[Encoded]) -> Float[Tensor, "N d"]:
        """The vectors at the supervised tokens of rows that it knows, one row after another."""
        places = [self._where[_key(row)] for row in rows]
        return torch.cat([self._sets[block].take(torch.tensor([number])) for block, number in places])

    def logits(self, vectors: Float[Tensor, "N d"]) -> Float[Tensor, "N V"]:
        """The target's logits."""
        assert self.head is not None
        if self.head.weight.device != vectors.device:
            bias = None if self.head.bias is None else self.head.bias.to(vectors.device)
            self.head = Head(self.head.weight.to(vectors.device), bias, self.head.scale, self.head.cap)
        return self.head(vectors)

    def save(self, folder: Path) -> None:
        """Write everything to a folder, for another process or a later one."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.head is None or self.problem is not None:
            raise ValueError(self.problem or "nothing was kept")
        head = {"weight": self.head.weight, "scale": torch.tensor(self.head.scale, dtype=torch.float64)}
        head |= {} if self.head.bias is None else {"bias": self.head.bias}
        head |= {} if self.head.cap is None else {"cap": torch.tensor(self.head.cap, dtype=torch.float64)}
        save_file({name: tensor.contiguous() for name, tensor in head.items()}, folder / _HEAD)
        states: dict[str, Tensor] = {}
        for number, kept in enumerate(self._sets):
            keys = [key for key, (block, _) in self._where.items() if block == number]
            if kept.values is not None and keys:
                spans = [kept.spans[self._where[key][1]] for key in keys]
                states[f"{number}.values"] = kept.values.contiguous()
                states[f"{number}.spans"] = torch.tensor(spans)
                states[f"{number}.keys"] = torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).copy())
        save_file(states, folder / _STATES)

    @classmethod
    def load(cls, folder: Path) -> TargetStates:
        """What `save` wrote; values stay in the file until they are used."""
        made = cls()
        head = load_file(folder / _HEAD)
        cap = float(head["cap"]) if "cap" in head else None
        made.head = Head(head["weight"], head.get("bias"), float(head["scale"]), cap)
        states = load_file(folder / _STATES)
        for number in sorted({int(name.partition(".")[0]) for name in states}):
            kept = Kept([], [])
            kept.values = states[f"{number}.values"]
            keys = states[f"{number}.keys"].numpy().tobytes()
            for row, (start, stop) in enumerate(states[f"{number}.spans"].tolist()):
                kept.spans[row] = (start, stop)
                made._where[keys[row * _BYTES : (row + 1) * _BYTES]] = (len(made._sets), row)
            made._sets.append(kept)
        return made


def incomparable(model: nn.Module, rows: Sequence[Encoded], states: TargetStates) -> str | None:
    """Why the model has no divergence from the target on these rows; None if it has."""
    if states.problem is not None or states.head is None:
        return states.problem or "the target's states were not kept"
    own, theirs = _vocabulary(model), len(states.head.weight)
    if own != theirs:
        return f"the model's head has {own} tokens, the target's {theirs}"
    if rows and not any(states.knows(row) for row in rows):
        return "the target did not see these rows in these tokens"
    return None


def divergences(
    logits: Float[Tensor, "N V"], vectors: Float[Tensor, "N d"], states: TargetStates
) -> Float[Tensor, " N"]:
    """KL(target ‖ model) at every position, in nats, from the model's logits and the target's head inputs; piece by
    piece, so that no more than PIECE distributions of the target stand in memory."""
    found = []
    for start in range(0, len(logits), PIECE):
        piece = slice(start, start + PIECE)
        theirs = states.logits(vectors[piece].to(logits.device))
        found.append(kl_divergence(theirs, logits[piece]))
    return torch.cat(found) if found else logits.new_zeros(0)


def kl_divergence(target: Float[Tensor, "N V"], model: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(target ‖ model) of distributions given as logits: Σ q (log q − log p), in at least float32."""
    wide = torch.promote_types(model.dtype, torch.float32)
    log_q = target.to(wide).log_softmax(-1).clamp_(min=_FLOOR)
    log_p = model.to(wide).log_softmax(-1).clamp_(min=_FLOOR)
    return torch.linalg.vecdot(log_q.exp(), log_q - log_p).clamp_(min=0)


def divergence_table(rows: Sequence[Encoded], values: dict[int, np.ndarray]) -> pa.Table:
    """The DIVERGENCE table of rows, in their order; a row without values is unscored."""
    none = np.zeros(0, np.float32)
    columns = {
        "example_id": pa.array([row.example.id for row in rows], pa.string()),
        "task": pa.array([row.example.task for row in rows], pa.string()),
        "answer_tokens": pa.array([row.answer_tokens for row in rows], pa.int32()),
        "kl": pa.array([values.get(i, none) for i in range(len(rows))], pa.list_(pa.float32())),
    }
    return pa.Table.from_arrays([columns[name] for name in DIVERGENCE.names], schema=DIVERGENCE)


_BYTES = 16


def _key(row: Encoded) -> bytes:
    said = blake2b(row.input_ids.astype(np.int32).tobytes(), digest_size=_BYTES)
    said.update(row.prompt_tokens.to_bytes(8, "little"))
    return said.digest()


def _vocabulary(model: nn.Module) -> int:
    weight = getattr(unwrap(model).get_output_embeddings(), "weight", None)  # type: ignore[operator]
    return len(weight) if isinstance(weight, Tensor) else 0
