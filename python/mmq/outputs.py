# SPDX-License-Identifier: Apache-2.0
"""What a model says on calibration samples: its predictions, their loss, their divergence.

A *prediction* is a distribution over classes: the next token at every position of a language model
whose next token has a label (where the samples have no labels: is text); for retrieval, match or no
match of every pair, and the texts of the batch for every image. All of them are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmq.architectures import Architecture
from mmq.calibrate import without_weight_gradients
from mmq.errors import MmqError
from mmq.models import config_value

TEMPERATURE: Final = 0.07  # Of contrastive similarities: BLIP-2's at the start of its training.
IGNORED: Final = -100  # torch's and Hugging Face's mark for positions without a loss.


@dataclass(frozen=True, eq=False)
class Prediction:
    """``logits`` [rows, classes] and the classes that the sample itself shows, int64 [rows]."""

    logits: Tensor
    targets: Tensor

    def loss(self) -> Tensor:
        """Cross entropy with the targets, summed over rows: teacher-forced."""
        return functional.cross_entropy(self.logits.float(), self.targets, reduction="sum")


def predictions(
    model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor]
) -> list[Prediction]:
    """The predictions of every pass of the unpadded ``batch``, those without rows left out.

    Raises MmqError for a batch from which no targets follow.
    """
    found: list[Prediction] = []
    for extra in architecture.passes:
        output: Any = model(**batch, **dict(extra))
        if getattr(output, "logits", None) is not None:
            found.append(_next_tokens(model, output.logits, batch))
        else:
            logits: Tensor = output.logits_per_image
            if dict(extra)["use_image_text_matching_head"]:
                matches = torch.ones(len(logits), dtype=torch.int64, device=logits.device)
                found.append(Prediction(logits, matches))
            elif len(logits) > 1:  # One text alone is certain.
                pairs = torch.arange(len(logits), device=logits.device)
                found.append(Prediction(logits / TEMPERATURE, pairs))
    return [prediction for prediction in found if len(prediction.targets)]


def _next_tokens(model: nn.Module, logits: Tensor, batch: Mapping[str, Tensor]) -> Prediction:
    labels = batch.get("labels")
    encoder_decoder = bool(config_value(model, "config.is_encoder_decoder"))
    if encoder_decoder and labels is not None:
        targets = labels  # The decoder's inputs are the labels, shifted by the model.
    else:
        tokens = batch.get("decoder_input_ids" if encoder_decoder else "input_ids")
        tokens = tokens if labels is None else labels
        if tokens is None:
            raise MmqError(
                f"samples: expected labels or token ids to predict, got {', '.join(sorted(batch))}"
            )
        targets = tokens[:, 1:]
        for name in ("image_token_index", "image_token_id"):
            image = config_value(model, f"config.{name}")
            if isinstance(image, int):
                targets = targets.masked_fill(targets == image, IGNORED)
        logits = logits[:, -tokens.shape[1] : -1]
    real = targets != IGNORED
    return Prediction(logits[real], targets[real])


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) in nats, float64 [rows]; both are [rows, classes].

    Rounding never makes it negative.
    """
    log_p = functional.log_softmax(reference.double(), dim=-1)
    log_q = functional.log_softmax(logits.double(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0.0)


class OutputDivergence:
    """How far a model's predictions on ``batches`` are from those that it makes now.

    The predictions of the model as it is are kept: rows x classes numbers in the type of the
    logits, text positions only.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        batches: Sequence[Mapping[str, Tensor]],
    ) -> None:
        self._model = model
        self._architecture = architecture
        self._batches = batches
        self._reference = [self._logits(batch) for batch in batches]

    def _logits(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [p.logits for p in predictions(self._model, self._architecture, batch)]

    def per_batch(self) -> list[tuple[float, int]]:
        """For each batch the sum of the KL over its predictions, in nats, and their number; the sum
        is infinite where logits are not finite."""
        found: list[tuple[float, int]] = []
        for batch, reference in zip(self._batches, self._reference, strict=True):
            total, rows = 0.0, 0
            for before, now in zip(reference, self._logits(batch), strict=True):
                finite = bool(torch.isfinite(now).all())
                total += float(divergence(before, now).sum()) if finite else math.inf
                rows += len(before)
            found.append((total, rows))
        return found

    def __call__(self) -> float:
        """The mean KL over all predictions, in nats."""
        found = self.per_batch()
        return sum(total for total, _ in found) / max(sum(rows for _, rows in found), 1)


def gradient_energies(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Mapping[str, Tensor]],
    paths: Sequence[str],
    *,
    seed: int = 0,
    draws: int = 4,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information at each linear's outputs, float64 [n], by path.

    That is the sum over tokens of g^2 per prediction, g being the gradient at one output of the
    linear of a loss whose target is drawn from the model's own prediction p. Half of it times the
    mean square of an output's error is the second-order estimate of the KL divergence per
    prediction that this error causes, errors of different tokens and outputs taken as independent.

    Targets of small p are rare and weigh much, so they are not drawn: with e of random signs
    v = sqrt(p) e - p (sqrt(p) . e) has the covariance diag(p) - p p^T of the gradient at the
    logits, and v is sent backward ``draws`` times from one forward pass. Memory: the activations of
    one batch through the whole model. No gradient of a weight is computed.

    Raises MmqError where no prediction depends on a linear.
    """
    energies: dict[str, Tensor] = {}
    handles = []
    rows = 0

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:  # The first linears of a path.
                output = output.requires_grad_().clone()
            output.register_hook(lambda gradient: keep(path, gradient))  # type: ignore[no-untyped-call]
            return output

        return hook

    def keep(path: str, gradient: Tensor) -> None:
        squares = gradient.detach().double().square().flatten(0, -2).sum(dim=0)
        energies[path] = squares + energies.get(path, 0.0)

    for path in paths:
        handles.append(model.get_submodule(path).register_forward_hook(watch(path)))
    generator = torch.Generator().manual_seed(seed)
    try:
        with without_weight_gradients(model):
            for batch in batches:
                with torch.enable_grad():
                    found = predictions(model, architecture, batch)
                logits = [prediction.logits for prediction in found]
                for draw in range(draws):
                    vectors = [_fisher_vector(x.detach(), generator) for x in logits]
                    torch.autograd.backward(logits, vectors, retain_graph=draw + 1 < draws)
                rows += draws * sum(map(len, logits))
    finally:
        for handle in handles:
            handle.remove()
    missing = [path for path in paths if path not in energies]
    if missing:
        raise MmqError(f"{missing[0]}: expected a linear that predictions depend on, got none")
    return {path: energy / rows for path, energy in energies.items()}


def _fisher_vector(logits: Tensor, generator: torch.Generator) -> Tensor:
    """v of :func:`gradient_energies` for logits [rows, classes], one draw per row."""
    p = logits.double().softmax(dim=-1)
    signs = 2.0 * torch.randint(0, 2, p.shape, generator=generator).to(p) - 1.0
    v = p.sqrt() * signs
    return (v - p * v.sum(dim=-1, keepdim=True)).to(logits.dtype)
