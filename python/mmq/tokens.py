# SPDX-License-Identifier: Apache-2.0
"""How much each calibration token counts: weights lambda_t of H and, through H, of AWQ's loss.

They come from the teacher-forced loss of the samples (cross entropy of the tokens that have labels)
in full precision, and are normalised to mean 1 over the tokens of a block:

- ``grad``: mean |gradient| over the channels of the block's output, per token.
- ``modality`` (MBQ, Li et al., arXiv 2412.19509): its two means, over image and over text tokens;
  a block that sees one kind only is unweighted.
- ``qig``: gradients integrated along the path from the block's rounded output to the full-precision
  one, times the difference.

They apply to linears that read the block's tokens, one by one; those that read others (keys and
values of cross-attention, parts of a Q-Former) and heads are unweighted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from mmq.architectures import Architecture, Stack
from mmq.calibrate import Call, replaced_weights, without_weight_gradients
from mmq.errors import MmqError
from mmq.models import blocks_of, config_value
from mmq.options import TokenWeights
from mmq.outputs import predictions
from mmq.place import Place
from mmq.rtn import rtn
from mmq.scaling import Member, dense_linear

QIG_STEPS: Final = 32

Gradients = dict[tuple[str, int], list[Tensor]]
"""Mean |gradient| of the loss per token at a block's output, by stack and block: one float32
[rows, tokens] per batch."""


def check_weighable(architecture: Architecture) -> None:
    """Raises MmqError for a model whose blocks run more than once per sample."""
    if len(architecture.passes) > 1:
        raise MmqError(
            f"calibration.token_weights: expected none for {architecture.name}, which has no "
            "teacher-forced text"
        )


def block_gradients(
    model: nn.Module, architecture: Architecture, batches: Sequence[Mapping[str, Tensor]]
) -> Gradients:
    """One forward and one backward pass over all batches.

    Memory: the activations of one batch through the whole model. Weights get no gradient. Blocks
    that no label depends on are left out.
    """
    found: dict[tuple[str, int], dict[int, Tensor]] = {}
    current = 0

    def watch(key: tuple[str, int]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            if not hidden.requires_grad:
                hidden = hidden.requires_grad_().clone()
            hidden.register_hook(lambda g: keep(key, g))
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

        return hook

    def keep(key: tuple[str, int], gradient: Tensor) -> None:
        size = gradient.detach().float().abs().mean(dim=-1)
        batch = found.setdefault(key, {})
        batch[current] = size + batch.get(current, 0.0)

    handles = [
        block.register_forward_hook(watch((stack.name, index)))
        for stack in architecture.stacks
        for index, block in enumerate(blocks_of(model, stack))
    ]
    try:
        with without_weight_gradients(model):
            for index, batch in enumerate(batches):
                current = index  # Which ``keep`` reads.
                with torch.enable_grad():
                    loss = _loss(model, architecture, batch)
                torch.autograd.backward(loss)
    finally:
        for handle in handles:
            handle.remove()
    return {
        key: [by_batch[index] for index in range(len(batches))]
        for key, by_batch in found.items()
        if len(by_batch) == len(batches)
    }


def _loss(model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([p.loss() for p in predictions(model, architecture, batch)]).sum()


def token_weights(
    kind: TokenWeights,
    model: nn.Module,
    architecture: Architecture,
    place: Place,
    members: Sequence[Member],
    batches: Sequence[Mapping[str, Tensor]],
    gradients: Gradients,
) -> list[Tensor] | None:
    """The weights of one block's tokens, one [rows, tokens] per call; None where no label depends
    on the block.

    Args:
      kind: not none.
      model: whose blocks up to this one are quantized.
      place: of the block, dense so far; with the unquantized model's outputs for ``qig``.
      members: the block's linears and their plans.
      batches: the calibration batches; one call each.
      gradients: of :func:`block_gradients`, for ``modality`` and ``grad``.
    """
    if kind == "qig":
        rounded: dict[nn.Linear, Tensor] = {}
        for unit, layer in members:
            assert layer.spec is not None, "members are quantized"
            linear = dense_linear(model, unit.path)
            rounded[linear] = rtn(linear.weight, layer.spec, name=unit.path)[0].effective_weight()
        with replaced_weights(rounded):
            outputs = [place.advance(call).hidden for call in place.calls]
        full = [call.hidden for call in place.following]
        stack, index = place.stack, place.index
        return qig_weights(model, architecture, stack, index, batches, outputs, full)
    sizes = gradients.get((place.stack.name, place.index))
    if sizes is None:
        return None
    if kind == "grad":
        return normalized(sizes)
    images = [image_tokens(model, place.stack, call, batches[call.batch]) for call in place.calls]
    return modality_weights(sizes, images)


def image_tokens(model: nn.Module, stack: Stack, call: Call, batch: Mapping[str, Tensor]) -> Tensor:
    """Which of the block's tokens [rows, tokens] stand for the image, bool: those of the image
    token for the stack that reads the prompt, all in vision and connector, none in a T5 decoder."""
    shape = call.hidden.shape[:2]
    if stack.component != "language":
        return torch.ones(shape, dtype=torch.bool, device=call.hidden.device)
    ids = batch.get("input_ids")
    encoder_decoder = bool(config_value(model, "config.is_encoder_decoder"))
    if ids is None or ids.shape != shape or (encoder_decoder and stack.name == "decoder"):
        return torch.zeros(shape, dtype=torch.bool, device=call.hidden.device)
    image = config_value(model, "config.image_token_index")
    image = config_value(model, "config.image_token_id") if image is None else image
    return ids == int(image) if isinstance(image, int) else torch.zeros_like(ids).bool()


def modality_weights(gradients: Sequence[Tensor], images: Sequence[Tensor]) -> list[Tensor]:
    """One weight for all image tokens and one for all text tokens: the means of ``gradients``
    [rows, tokens] over them; ``images`` are bool, likewise. 1 where there is one kind only."""
    size, image = (torch.cat([x.flatten() for x in parts]) for parts in (gradients, images))
    if bool(image.all()) or not bool(image.any()):
        return [torch.ones_like(gradient) for gradient in gradients]
    means = size[image].mean(), size[~image].mean()
    return normalized([torch.where(part, *means) for part in images])


def normalized(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights over their mean; 1 everywhere where that is 0."""
    mean = torch.cat([part.flatten() for part in weights]).double().mean()
    if not float(mean) > 0:
        return [torch.ones_like(part) for part in weights]
    return [(part / mean).float() for part in weights]


def capped(weights: Sequence[Tensor]) -> list[Tensor]:
    """At most the third quartile plus 1.5 times the distance of the quartiles."""
    flat = torch.cat([part.flatten() for part in weights]).double()
    low, high = (float(x) for x in _quartiles(flat))
    return [part.clamp_max(high + 1.5 * (high - low)) for part in weights]


def _quartiles(values: Tensor) -> tuple[Tensor, Tensor]:
    """Linear interpolation; torch.quantile refuses more than 16 million values."""
    ordered = values.sort().values
    found = []
    for share in (0.25, 0.75):
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        found.append(ordered[below] + (position - below) * (ordered[above] - ordered[below]))
    return found[0], found[1]


def qig_weights(
    model: nn.Module,
    architecture: Architecture,
    stack: Stack,
    index: int,
    batches: Sequence[Mapping[str, Tensor]],
    quantized: Sequence[Tensor],
    full: Sequence[Tensor],
    steps: int = QIG_STEPS,
) -> list[Tensor]:
    """|sum over steps of gradient * (full - quantized) / steps| per token, capped, to mean 1.

    ``quantized`` and ``full`` are the block's outputs [rows, tokens, width] per batch: rounded to
    nearest on the quantized model's inputs, and in full precision. The gradient is of the loss at
    the output, at the middles of ``steps`` equal parts of the way between; the blocks after it are
    in full precision. Costs ``steps`` passes to the end of the model, forward and backward, per
    batch; blocks before it are skipped where blocks map one tensor to one tensor.
    """
    blocks = list(blocks_of(model, stack))
    found: list[Tensor] = []
    with without_weight_gradients(model), _skipped([] if stack.carries else blocks[:index]):
        for batch, start, end in zip(batches, quantized, full, strict=True):
            way, total = end - start, torch.zeros_like(start, dtype=torch.float32)
            for step in range(steps):
                point = (start + (step + 0.5) / steps * way).detach().requires_grad_()
                with torch.enable_grad(), _returning(blocks[index], point):
                    loss = _loss(model, architecture, batch)
                (gradient,) = torch.autograd.grad(loss, point, allow_unused=True)
                if gradient is not None:
                    total += gradient.float() / steps
            found.append((total * way.float()).sum(dim=-1).abs())
    return normalized(capped(found))


@contextmanager
def _returning(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """The block with ``hidden`` in the place of the hidden states that it returns.

    ``forward`` itself is replaced: what a model records of its blocks, it takes from there.
    """
    forward = block.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    block.forward = replaced
    try:
        yield
    finally:
        del block.forward


@contextmanager
def _skipped(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Blocks that return their hidden states at once."""

    def same(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    try:
        for block in blocks:
            block.forward = same
        yield
    finally:
        for block in blocks:
            del block.forward
