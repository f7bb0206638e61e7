# SPDX-License-Identifier: Apache-2.0
"""Architectures as data: paths match the real classes, folds preserve the function."""

from __future__ import annotations

import inspect
import re

import pytest
import tiny_models as tiny
import torch
from torch import nn

from mmq import models
from mmq.errors import MmqError


@pytest.fixture(scope="module", params=tiny.TINY)
def named(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, tiny.randomize(tiny.TINY[request.param](), seed=1)


def shape_of(model: nn.Module, path: str) -> tuple[int, int]:
    weight = model.get_submodule(path).weight
    return weight.shape[0], weight.shape[1]


def test_every_linear_of_the_model_is_listed_once(named: tuple[str, nn.Module]) -> None:
    _, model = named
    units = models.resolve(model)
    paths = [unit.path for unit in units]
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(paths) == sorted(linears)
    assert models.unlisted_linears(model) == []
    for unit in units:
        assert (unit.n, unit.k) == shape_of(model, unit.path), unit.path


def test_shared_inputs_are_one_tensor(named: tuple[str, nn.Module]) -> None:
    """Linears of one group, and of one source, are called with the same values, others not."""
    _, model = named
    units = [unit for unit in models.resolve(model) if unit.layer_type != "head"]
    seen: dict[str, list[torch.Tensor]] = {unit.path: [] for unit in units}
    handles = [
        model.get_submodule(unit.path).register_forward_pre_hook(
            lambda _, args, path=unit.path: seen[path].append(args[0].detach().clone())
        )
        for unit in units
    ]
    tiny.outputs(model)
    for handle in handles:
        handle.remove()
    first: dict[str, str] = {}
    for unit in units:
        assert seen[unit.path], f"{unit.path} was never called"
        leader = first.setdefault(unit.input_source, unit.path)
        assert len(seen[leader]) == len(seen[unit.path]), unit.path
        for a, b in zip(seen[leader], seen[unit.path], strict=True):
            assert torch.equal(a, b), f"{unit.path} reads another tensor than {leader}"
    leaders = list(first.values())
    for i, a in enumerate(leaders):
        for b in leaders[:i]:
            same = len(seen[a]) == len(seen[b]) and all(
                x.shape == y.shape and torch.equal(x, y)
                for x, y in zip(seen[a], seen[b], strict=True)
            )
            assert not same, f"{a} and {b} read one tensor but are listed apart"


def test_stages_follow_the_data_flow(named: tuple[str, nn.Module]) -> None:
    """Inside a block no linear is called before one of an earlier stage that feeds it."""
    _, model = named
    for unit in models.resolve(model):
        if unit.fold is not None and unit.fold.kind == "linear":
            stages = {u.path: u.stage for u in models.resolve(model)}
            assert stages[unit.fold.producer] < unit.stage, unit.path


def apply_fold(model: nn.Module, units: list[models.LinearUnit], scale: torch.Tensor) -> None:
    """W <- W diag(s) for each unit of one group, 1/s into the producer they share."""
    fold = units[0].fold
    assert fold is not None
    consumer_scale = scale[fold.source_rows()]
    for unit in units:
        model.get_submodule(unit.path).weight.data.mul_(consumer_scale)
    producer = model.get_submodule(fold.producer)
    rows = slice(fold.row_start, fold.row_stop)
    divisor = scale if fold.kind == "norm" else scale[:, None]
    producer.weight.data[rows] /= divisor
    if getattr(producer, "bias", None) is not None:
        producer.bias.data[rows] /= scale


def test_every_fold_preserves_the_function(named: tuple[str, nn.Module]) -> None:
    name, _ = named
    model = tiny.randomize(tiny.TINY[name](), seed=2).double()
    before = tiny.outputs(model)
    groups: dict[str, list[models.LinearUnit]] = {}
    for unit in models.resolve(model):
        if unit.fold is not None:
            groups.setdefault(unit.input_group, []).append(unit)
    assert groups
    generator = torch.Generator().manual_seed(3)
    for group, units in groups.items():
        assert len({unit.fold for unit in units}) == 1, group
        fold = units[0].fold
        assert fold is not None
        scale = 10.0 ** (2 * torch.rand(fold.channels, generator=generator).double() - 1)
        original = {key: value.clone() for key, value in model.state_dict().items()}
        apply_fold(model, units, scale)
        for a, b in zip(before, tiny.outputs(model), strict=True):
            error = ((a - b).abs().max() / a.abs().max()).item()
            assert error < 1e-9, f"{group} into {fold.producer}: {error:.1e}"
        model.load_state_dict(original)


def test_fold_check_can_fail() -> None:
    """GELU between the two linears, and a norm output that is also the residual, must show."""
    model = tiny.randomize(tiny.blip2_opt(), seed=2).double()
    before = tiny.outputs(model)[0]
    units = {unit.path: unit for unit in models.resolve(model)}
    block = "vision_model.encoder.layers.0"
    fc2 = units[f"{block}.mlp.fc2"]
    assert fc2.fold is None
    wrong = models.ResolvedFold("linear", f"{block}.mlp.fc1", 0, fc2.k)
    scale = torch.linspace(0.5, 2.0, fc2.k).double()
    apply_fold(model, [models.LinearUnit(**{**fc2.__dict__, "fold": wrong})], scale)
    assert ((tiny.outputs(model)[0] - before).abs().max() / before.abs().max()) > 1e-4


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_VIT = {
    "self_attn.qkv": "layer_norm1",
    "self_attn.projection": "self_attn.qkv",
    "mlp.fc1": "layer_norm2",
}
_QFORMER = {
    "attention.output.dense": "attention.attention.value",
    "crossattention.output.dense": "crossattention.attention.value",
}
_T5_SELF = {f"layer.0.SelfAttention.{name}": "layer.0.layer_norm" for name in "qkv"} | {
    "layer.0.SelfAttention.o": "layer.0.SelfAttention.v"
}


def _t5_mlp(layer: int) -> dict[str, str]:
    mlp = f"layer.{layer}.DenseReluDense"
    norm = f"layer.{layer}.layer_norm"
    return {f"{mlp}.wi_0": norm, f"{mlp}.wi_1": norm, f"{mlp}.wo": f"{mlp}.wi_1"}


# Every linear of a block that takes a fold, and its producer; no other linear does.
FOLDS: dict[tuple[str, str], dict[str, str]] = {
    ("blip2-opt", "vision"): _VIT,
    ("blip2-opt", "qformer"): _QFORMER,
    ("blip2-opt", "decoder"): {
        **dict.fromkeys(_QKV, "self_attn_layer_norm"),
        "self_attn.out_proj": "self_attn.v_proj",
        "fc1": "final_layer_norm",
        "fc2": "fc1",
    },
    ("blip2-t5", "vision"): _VIT,
    ("blip2-t5", "qformer"): _QFORMER,
    ("blip2-t5", "encoder"): {**_T5_SELF, **_t5_mlp(1)},
    ("blip2-t5", "decoder"): {
        **_T5_SELF,
        "layer.1.EncDecAttention.q": "layer.1.layer_norm",
        "layer.1.EncDecAttention.o": "layer.1.EncDecAttention.v",
        **_t5_mlp(2),
    },
    ("blip2-retrieval", "vision"): _VIT,
    ("blip2-retrieval", "qformer"): _QFORMER,
    ("llava", "vision"): {
        **dict.fromkeys(_QKV, "layer_norm1"),
        "self_attn.out_proj": "self_attn.v_proj",
        "mlp.fc1": "layer_norm2",
    },
    ("llava", "decoder"): {
        **dict.fromkeys(_QKV, "input_layernorm"),
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    },
}


def folded(model: nn.Module, stack: str, block: int) -> dict[str, str]:
    """Which linears of a block take a fold into which producer, as paths below the block."""
    prefix = re.compile(r".*?\.(?:layers|layer|block)\.\d+\.")
    return {
        prefix.sub("", unit.path, count=1): prefix.sub("", unit.fold.producer, count=1)
        for unit in models.resolve(model)
        if unit.stack == stack and unit.block == block and unit.fold is not None
    }


@pytest.mark.parametrize(("name", "stack"), FOLDS)
def test_folds_agree_with_the_table(name: str, stack: str) -> None:
    model = tiny.TINY[name]()
    assert folded(model, stack, 0) == FOLDS[name, stack]
    stacks = {unit.stack for unit in models.resolve(model) if unit.block is not None}
    assert stacks == {s for n, s in FOLDS if n == name}
    heads = [unit for unit in models.resolve(model) if unit.block is None]
    assert heads
    assert all(unit.fold is None for unit in heads)  # connectors and other heads


def test_no_fold_where_the_configuration_forbids_it() -> None:
    """OPT with norms behind the residual (as OPT-350M), and with an activation that is no ReLU."""
    gelu = tiny.blip2_opt(activation_function="gelu", do_layer_norm_before=False)
    assert folded(gelu, "decoder", 0) == {"self_attn.out_proj": "self_attn.v_proj"}
    plain = tiny.blip2_opt(layer_norm_elementwise_affine=False)
    assert folded(plain, "decoder", 0) == {
        "self_attn.out_proj": "self_attn.v_proj",
        "fc2": "fc1",
    }


def test_value_rows_and_grouped_queries() -> None:
    units = {unit.path: unit for unit in models.resolve(tiny.blip2_opt())}
    fold = units["vision_model.encoder.layers.0.self_attn.projection"].fold
    assert fold is not None
    assert (fold.row_start, fold.row_stop, fold.repeat) == (48, 72, 1)
    units = {unit.path: unit for unit in models.resolve(tiny.llava(num_key_value_heads=2))}
    fold = units["model.language_model.layers.0.self_attn.o_proj"].fold
    assert fold is not None
    assert (fold.channels, fold.repeat, fold.head_dim) == (16, 2, 8)
    assert fold.source_rows().tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]


def test_cross_attention_is_in_every_second_layer() -> None:
    units = models.resolve(tiny.blip2_opt())
    layers = {unit.block for unit in units if "crossattention" in unit.path}
    assert layers == {0, 2}
    sources = {
        unit.input_source for unit in units if unit.path.endswith("crossattention.attention.key")
    }
    assert len(sources) == 1


@pytest.mark.parametrize(
    ("layer", "unreached"), [(-2, {3}), (-1, set()), (2, {2, 3}), ([1, -3], {2, 3})]
)
def test_blocks_behind_the_feature_layer_do_not_reach_the_output(
    layer: int | list[int], unreached: set[int]
) -> None:
    model = tiny.randomize(tiny.llava(vision_feature_layer=layer), seed=4)
    blocks = {unit.block for unit in models.resolve(model) if not unit.reaches_output}
    assert blocks == unreached
    before = tiny.outputs(model)[0]
    for index, block in enumerate(model.model.vision_tower.encoder.layers):
        saved = block.mlp.fc2.weight.data.clone()
        block.mlp.fc2.weight.data.zero_()
        assert torch.equal(tiny.outputs(model)[0], before) == (index in unreached), index
        block.mlp.fc2.weight.data.copy_(saved)


def test_tied_heads_are_found_by_identity() -> None:
    def tied(model: nn.Module) -> list[str]:
        return [unit.path for unit in models.resolve(model) if unit.tied]

    assert tied(tiny.blip2_opt()) == ["language_model.lm_head"]
    assert tied(tiny.blip2_t5()) == ["language_model.lm_head"]
    assert tied(tiny.llava()) == []
    with torch.device("meta"):
        assert tied(tiny.blip2_opt()) == ["language_model.lm_head"]


def test_order_is_vision_connector_language(named: tuple[str, nn.Module]) -> None:
    _, model = named
    order = {"vision": 0, "connector": 1, "language": 2}
    ranks = [order[unit.component] for unit in models.resolve(model)]
    assert ranks == sorted(ranks)
    architecture = models.architecture_of(model)
    names = [stack.name for stack in architecture.stacks]
    if "encoder" in names:
        assert names.index("encoder") < names.index("decoder")
    for stack in architecture.stacks:
        parameters = inspect.signature(models.blocks_of(model, stack)[0].forward).parameters
        assert {name for _, name in stack.carries} <= set(parameters)


@pytest.mark.parametrize(
    ("n_blocks", "sizes"), [(39, (13, 13, 13)), (12, (4, 4, 4)), (32, (10, 11, 11)), (2, (0, 1, 1))]
)
def test_thirds_are_integer_thirds(n_blocks: int, sizes: tuple[int, int, int]) -> None:
    thirds = [models.third_of(block, n_blocks) for block in range(n_blocks)]
    assert tuple(thirds.count(third) for third in ("front", "middle", "end")) == sizes
    assert thirds == sorted(thirds, key=("front", "middle", "end").index)


def test_unknown_models_are_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(
        MmqError, match=r"expected one of Blip2ForConditionalGeneration .*got Linear"
    ):
        models.architecture_of(nn.Linear(2, 2))
    with pytest.raises(MmqError, match=r"text_config\.is_gated_act=False"):
        models.resolve(tiny.blip2_t5(feed_forward_proj="relu"))


def test_a_row_without_a_match_is_an_error_that_names_it() -> None:
    model = tiny.blip2_opt()
    del model.vision_model.encoder.layers[2].mlp.fc2
    with pytest.raises(MmqError, match=r"vision_model.encoder.layers.2.mlp.fc2: .*3 of 4 blocks"):
        models.resolve(model)
    model = tiny.blip2_retrieval()
    del model.itm_head
    with pytest.raises(MmqError, match="itm_head: expected a linear"):
        models.resolve(model)
    model = tiny.blip2_opt()
    model.vision_model.encoder.layers[0].layer_norm1 = nn.Identity()
    with pytest.raises(
        MmqError, match=r"layer_norm1: expected a norm with 24 weights, got Identity"
    ):
        models.resolve(model)


def test_packed_linears_resolve_like_dense_ones() -> None:
    """A replaced linear has the sizes and an empty ``weight`` of the compute type."""

    class Packed(nn.Module):
        def __init__(self, dense: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = dense.in_features, dense.out_features
            self.bias = dense.bias

        @property
        def weight(self) -> torch.Tensor:
            return torch.empty(0)

    model = tiny.llava()
    before = models.resolve(model)
    for unit in before:
        if unit.layer_type != "head":
            parent, _, name = unit.path.rpartition(".")
            setattr(model.get_submodule(parent), name, Packed(model.get_submodule(unit.path)))
    assert models.resolve(model) == before
