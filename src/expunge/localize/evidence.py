"""What an attribution may look at: a model, rows by split, and passes of these rows that leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.data.collate import pad_right
from expunge.data.encode import Encoded
from expunge.errors import UserError
from expunge.models.forward import evaluating, unwrap
from expunge.models.packing import supports_packing
from expunge.models.passes import Forward
from expunge.models.storage import allocate, has_room
from expunge.models.token_logprobs import token_logprobs
from expunge.scoring.batches import scoring_batches

if TYPE_CHECKING:
    from expunge.localize.masks import Mask
    from expunge.localize.units import Family


class Evidence:
    """A model, its units and the rows of each split, seen through passes that keep one gradient in memory.

    The model comes out of every pass as it went in: weights, `requires_grad`, `.grad` and the mode of every module.
    `half` computes in bfloat16 autocast; sums are float32 all the same.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Mapping[str, Sequence[Encoded]],
        families: Sequence[Family],
        *,
        unit: str,
        seed: int = 42,
        batch_size: int = 8,
        region: Mask | None = None,
        folder: Path | None = None,
        half: bool = False,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self.model, self.rows, self.families = model, rows, families
        self.unit, self.seed, self.batch_size = unit, seed, batch_size
        self.region = region  # where the knowledge is known to be
        self.folder = folder  # for what is too large to stay in memory
        self.half = half
        self.used: set[str] = set()  # splits that were asked for
        self.advance = advance  # is told how many rows have just been through the model

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter that the units are made of; only these get gradients."""
        wanted = {slab.parameter for family in self.families for slab in family.slabs}
        return {name: value for name, value in unwrap(self.model).named_parameters() if name in wanted}

    def split(self, name: str) -> Sequence[Encoded]:
        """The rows of a split. Raises UserError if there are none, or none has a token to be scored."""
        rows = self.rows.get(name, ())
        if not any(row.supervised_tokens for row in rows):
            what = "no rows" if not rows else "no row with an answer"
            raise UserError(f"the attribution reads the {name} set, and there is {what}", f"give --{name} ROWS")
        self.used.add(name)
        return rows

    def gradient(self, split: str, *, mean: bool = False, aside: bool = False) -> dict[str, Tensor]:
        """Parameter name → ∇ of the answers' negative log-likelihood, summed over tokens and rows, float32, yours.

        `mean` divides it by the number of tokens. `aside` hands it over in RAM up to a limit, beyond it in a file of
        `folder`, so that a second gradient can be computed beside it. Raises UserError if the split has no rows.
        """
        found: dict[str, Tensor] = {}
        with self.only(self.parameters.values()), self._wide_sums(found):
            for forward in self.batches(split):
                self.loss(forward).backward()
            for name, parameter in self.parameters.items():
                if name not in found:
                    gradient = parameter.grad
                    found[name] = torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient
                    parameter.grad = None
        if mean:
            tokens = sum(row.supervised_tokens for row in self.rows[split])
            for gradient in found.values():
                gradient /= tokens
        return self._aside(found) if aside else found

    def squares(self, split: str, *, aside: bool = False) -> dict[str, Tensor]:
        """Parameter name → Σ over rows of the squared gradient of the row's summed negative log-likelihood, float32."""
        from expunge.localize.squares import sum_of_squares

        found = sum_of_squares(self, split)
        return self._aside(found) if aside else found

    def passes(self, split: str, *, logits: bool = True, gradients: bool = False) -> Iterator[Forward]:
        """Each batch of the split, after its pass through the model with whatever hooks the caller has registered.

        All parameters are frozen. With `gradients`, what a hook sets to require a gradient gets one, and the caller
        runs the backward pass. Without `logits` the output embedding does not run.
        """
        with self.only(()):
            for forward in self.batches(split, logits=logits):
                with torch.set_grad_enabled(gradients), self.autocast():
                    _ = forward.logits
                yield forward
                vars(forward).pop("_outputs", None)  # who still holds the pass does not hold its logits

    def batches(self, split: str, *, batch_size: int | None = None, logits: bool = True) -> Iterator[Forward]:
        """The split's rows in batches that have not run yet; packed where the model keeps packed rows apart."""
        rows = self.split(split)
        vocabulary = unwrap(self.model).config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        device = next(self.model.parameters()).device
        for index in scoring_batches(rows, batch_size or self.batch_size, vocabulary):
            batch = pad_right([rows[i] for i in index], index, 0).to(device)
            yield Forward(self.model, batch, logits=logits, packs=self._packs)
            self.advance(len(index))

    def loss(self, forward: Forward) -> Tensor:
        """−Σ log p(token) over the answers of a batch: the rows' losses, added up, so that batches add up too."""
        with torch.enable_grad():
            with self.autocast():
                logits = forward.logits
            return -token_logprobs(logits, forward.batch.targets.to(logits.device)).sum()

    def autocast(self) -> torch.autocast:
        """bfloat16 where the evidence was asked for it."""
        return torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=self.half)

    @contextmanager
    def only(self, trained: Iterable[nn.Parameter]) -> Iterator[None]:
        """Within it the model is in evaluation mode and only these parameters require a gradient.

        What is frozen gets no gradient, and layers below the first trained one are not gone back through.
        """
        wanted = {id(parameter) for parameter in trained}
        before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in self.model.parameters()]
        with evaluating(self.model):
            try:
                for parameter, _, _ in before:
                    parameter.grad = None
                    parameter.requires_grad_(id(parameter) in wanted)
                yield
            finally:
                for parameter, required, gradient in before:
                    parameter.requires_grad_(required)
                    parameter.grad = gradient

    @cached_property
    def _packs(self) -> bool:
        with evaluating(self.model), self.autocast():
            return supports_packing(self.model)

    @contextmanager
    def _wide_sums(self, sums: dict[str, Tensor]) -> Iterator[None]:
        """Within it, gradients of weights in 16 bits are added up in `sums`: in 16 bits small ones would be lost."""

        def adder(name: str) -> Callable[[Tensor], None]:
            def add(parameter: Tensor) -> None:
                gradient: Any = parameter.grad
                parameter.grad = None
                if name in sums:
                    sums[name] += gradient
                else:
                    sums[name] = gradient.float()

            return add

        narrow = {name: value for name, value in self.parameters.items() if value.dtype != torch.float32}
        hooks = [value.register_post_accumulate_grad_hook(adder(name)) for name, value in narrow.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _aside(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same numbers in one stretch of storage; the tensors are given up one by one. Raises UserError."""
        count = sum(tensor.numel() for tensor in tensors.values())
        file = None if self.folder is None else self.folder / "gradient.bin"
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not has_room(4 * count, file):
                raise UserError(
                    f"a second gradient takes {4 * count / 1e9:.1f} GB, for which {self.folder} has no room",
                    "free space there, or choose an attribution that reads no retain rows: expunge list attributions",
                )
        flat, start = allocate((count,), torch.float32, file), 0
        if file is not None:
            file.unlink(missing_ok=True)  # it lives as long as the tensor does, even if this process is killed
        kept = {}
        for name in list(tensors):
            tensor = tensors.pop(name)
            kept[name] = flat[start : start + tensor.numel()].view(tensor.shape)
            kept[name].copy_(tensor)
            start += tensor.numel()
        return kept
