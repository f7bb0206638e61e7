# SPDX-License-Identifier: Apache-2.0
"""The supported architectures as data: stacks of blocks, their linears, what feeds them.

A new model is a row of ARCHITECTURES and a test. Paths are those of ``named_modules()`` of the
Hugging Face classes (transformers 5). Nothing here touches a model; ``mmq.models`` resolves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Component = Literal["vision", "connector", "language"]
LayerType = Literal["attention", "mlp", "head"]
FoldKind = Literal["norm", "linear"]
Rows = Literal["all", "value-third"]
ClipRows = Literal["all", "none", "value-third"]
Presence = Literal["every", "some"]

COMPONENTS: Final[tuple[Component, ...]] = ("vision", "connector", "language")

Condition = tuple[str, tuple[object, ...]]
"""A dotted attribute of a configuration and the values it may have."""


@dataclass(frozen=True)
class Fold:
    """Where 1/s of an input scale can be put instead of dividing at run time.

    ``producer`` is a path below the block: a norm, whose weight and bias are divided by s, or a
    linear, whose rows and bias are. ``rows="value-third"`` means the last third of the rows of a
    fused query-key-value linear. ``when`` lists conditions on the stack's configuration without
    which the fold would change the function; where one fails, s stays a run-time divisor.
    """

    kind: FoldKind
    producer: str
    rows: Rows = "all"
    when: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class LinearRow:
    """One linear of a block.

    ``shares`` names the input: rows of one block with the same name read the same tensor. With
    ``same_in_all_blocks`` that tensor is one and the same for the whole stack (the image or encoder
    states that cross-attention reads). ``stage`` is the order inside the block: a stage's inputs
    depend on the outputs of the stages before it. ``clip_rows`` are the rows whose range AWQ may
    clip. ``presence="some"`` allows blocks without this linear, but not a stack without it.
    """

    path: str
    layer_type: LayerType
    stage: int
    shares: str
    fold: Fold | None = None
    clip_rows: ClipRows = "all"
    same_in_all_blocks: bool = False
    presence: Presence = "every"


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks, run one after the other.

    ``path`` is the module list and ``config`` the dotted attribute of the model's configuration
    that describes it. Each block maps hidden states to hidden states; ``carries`` names what else
    travels: (index in the block's output tuple, parameter of the next block's ``forward``).
    ``feature_layer`` is an attribute of the model's configuration that says which hidden states
    leave the stack (0 is the embedding, negative counts from the end); blocks behind the last of
    them do not reach the model's output.
    """

    component: Component
    name: str
    path: str
    config: str
    linears: tuple[LinearRow, ...]
    carries: tuple[tuple[int, str], ...] = ()
    feature_layer: str | None = None


@dataclass(frozen=True)
class Head:
    """A linear outside the stacks. ``after`` names the stack whose output it reads.

    Dense unless a recipe selects it. ``optional`` heads exist in some configurations only.
    """

    component: Component
    path: str
    after: str
    optional: bool = False


@dataclass(frozen=True)
class Architecture:
    """One supported model class, with the conditions that its configuration must meet.

    ``parts`` gives each parameter to a component: the longest matching path prefix decides.
    ``stacks`` are in the order of calibration: each reads what the ones before it produce.
    ``passes`` are the extra arguments of the forward calls that one sample needs for every path of
    the model to be run, one mapping (as pairs) per call.
    """

    name: str
    model_class: str
    requires: tuple[Condition, ...]
    parts: tuple[tuple[str, Component], ...]
    stacks: tuple[Stack, ...]
    heads: tuple[Head, ...]
    passes: tuple[tuple[tuple[str, object], ...], ...] = ((("use_cache", False),),)


_RELU: Final[Condition] = ("activation_function", ("relu",))
_PRE_NORM: Final[tuple[Condition, ...]] = (
    ("do_layer_norm_before", (True,)),
    ("layer_norm_elementwise_affine", (True,)),
)

# Pre-norm, fused query-key-value (rows 0..d-1 query, d..2d-1 key, 2d..3d-1 value). GELU is not
# homogeneous, so nothing folds from fc1 to fc2.
_EVA_VIT: Final = (
    LinearRow(
        "self_attn.qkv",
        "attention",
        0,
        "qkv",
        Fold("norm", "layer_norm1"),
        clip_rows="value-third",
    ),
    LinearRow(
        "self_attn.projection",
        "attention",
        1,
        "projection",
        Fold("linear", "self_attn.qkv", rows="value-third"),
    ),
    LinearRow("mlp.fc1", "mlp", 2, "fc1", Fold("norm", "layer_norm2")),
    LinearRow("mlp.fc2", "mlp", 3, "fc2"),
)

_CLIP_VIT: Final = (
    *(
        LinearRow(
            f"self_attn.{name}_proj",
            "attention",
            0,
            "qkv",
            Fold("norm", "layer_norm1"),
            clip_rows="all" if name == "v" else "none",
        )
        for name in "qkv"
    ),
    LinearRow("self_attn.out_proj", "attention", 1, "out", Fold("linear", "self_attn.v_proj")),
    LinearRow("mlp.fc1", "mlp", 2, "fc1", Fold("norm", "layer_norm2")),
    LinearRow("mlp.fc2", "mlp", 3, "fc2"),
)


def _bert_attention(
    part: str, stage: int, cross: bool, presence: Presence
) -> tuple[LinearRow, ...]:
    """Rows of one post-norm attention: its norm output is also the residual, so only v folds."""

    def row(name: str, shares: str, clip_rows: ClipRows) -> LinearRow:
        return LinearRow(
            f"{part}.attention.{name}",
            "attention",
            stage,
            f"{part}.{shares}",
            clip_rows=clip_rows,
            same_in_all_blocks=cross and name != "query",
            presence=presence,
        )

    return (
        row("query", "q" if cross else "qkv", "none"),
        row("key", "kv" if cross else "qkv", "none"),
        row("value", "kv" if cross else "qkv", "all"),
        LinearRow(
            f"{part}.output.dense",
            "attention",
            stage + 1,
            f"{part}.out",
            Fold("linear", f"{part}.attention.value"),
            presence=presence,
        ),
    )


_QFORMER_QUERY: Final = (
    *_bert_attention("attention", 0, cross=False, presence="every"),
    *_bert_attention("crossattention", 2, cross=True, presence="some"),
    LinearRow("intermediate_query.dense", "mlp", 4, "intermediate_query"),
    LinearRow("output_query.dense", "mlp", 5, "output_query"),
)

# Retrieval adds a second feed-forward part, for text tokens.
_QFORMER_TEXT: Final = (
    *_QFORMER_QUERY,
    LinearRow("intermediate.dense", "mlp", 4, "intermediate"),
    LinearRow("output.dense", "mlp", 5, "output"),
)

_OPT: Final = (
    *(
        LinearRow(
            f"self_attn.{name}_proj",
            "attention",
            0,
            "qkv",
            Fold("norm", "self_attn_layer_norm", when=_PRE_NORM),
            clip_rows="all" if name == "v" else "none",
        )
        for name in "qkv"
    ),
    LinearRow("self_attn.out_proj", "attention", 1, "out", Fold("linear", "self_attn.v_proj")),
    LinearRow("fc1", "mlp", 2, "fc1", Fold("norm", "final_layer_norm", when=_PRE_NORM)),
    LinearRow("fc2", "mlp", 3, "fc2", Fold("linear", "fc1", when=(_RELU,))),
)

_LLAMA: Final = (
    *(
        LinearRow(
            f"self_attn.{name}_proj",
            "attention",
            0,
            "qkv",
            Fold("norm", "input_layernorm"),
            clip_rows="all" if name == "v" else "none",
        )
        for name in "qkv"
    ),
    LinearRow("self_attn.o_proj", "attention", 1, "out", Fold("linear", "self_attn.v_proj")),
    *(
        LinearRow(f"mlp.{name}_proj", "mlp", 2, "gate_up", Fold("norm", "post_attention_layernorm"))
        for name in ("gate", "up")
    ),
    LinearRow("mlp.down_proj", "mlp", 3, "down", Fold("linear", "mlp.up_proj")),
)


def _t5_self_attention() -> tuple[LinearRow, ...]:
    attention = "layer.0.SelfAttention"
    return (
        *(
            LinearRow(
                f"{attention}.{name}",
                "attention",
                0,
                "self.qkv",
                Fold("norm", "layer.0.layer_norm"),
                clip_rows="all" if name == "v" else "none",
            )
            for name in "qkv"
        ),
        LinearRow(f"{attention}.o", "attention", 1, "self.out", Fold("linear", f"{attention}.v")),
    )


def _t5_cross_attention() -> tuple[LinearRow, ...]:
    attention = "layer.1.EncDecAttention"
    return (
        LinearRow(
            f"{attention}.q",
            "attention",
            2,
            "cross.q",
            Fold("norm", "layer.1.layer_norm"),
            clip_rows="none",
        ),
        *(
            LinearRow(
                f"{attention}.{name}",
                "attention",
                2,
                "cross.kv",
                clip_rows="all" if name == "v" else "none",
                same_in_all_blocks=True,
            )
            for name in "kv"
        ),
        LinearRow(f"{attention}.o", "attention", 3, "cross.out", Fold("linear", f"{attention}.v")),
    )


def _t5_mlp(layer: int, stage: int) -> tuple[LinearRow, ...]:
    """Gated GELU: act(wi_0 x) * wi_1 x, so wi_1 is the linear branch that takes the fold."""
    mlp = f"layer.{layer}.DenseReluDense"
    return (
        *(
            LinearRow(
                f"{mlp}.{name}", "mlp", stage, "wi", Fold("norm", f"layer.{layer}.layer_norm")
            )
            for name in ("wi_0", "wi_1")
        ),
        LinearRow(f"{mlp}.wo", "mlp", stage + 1, "wo", Fold("linear", f"{mlp}.wi_1")),
    )


_BLIP2_VISION: Final = Stack(
    "vision", "vision", "vision_model.encoder.layers", "vision_config", _EVA_VIT
)

_BLIP2_PARTS: Final[tuple[tuple[str, Component], ...]] = (
    ("vision_model", "vision"),
    ("query_tokens", "connector"),
    ("qformer", "connector"),
    ("language_projection", "connector"),
    ("language_model", "language"),
)

_BLIP2_OPT: Final = Architecture(
    name="BLIP-2 captioning (OPT)",
    model_class="Blip2ForConditionalGeneration",
    requires=(("text_config.model_type", ("opt",)),),
    parts=_BLIP2_PARTS,
    stacks=(
        _BLIP2_VISION,
        Stack("connector", "qformer", "qformer.encoder.layer", "qformer_config", _QFORMER_QUERY),
        Stack("language", "decoder", "language_model.model.decoder.layers", "text_config", _OPT),
    ),
    heads=(
        Head("connector", "language_projection", after="qformer"),
        Head("language", "language_model.model.decoder.project_in", "qformer", optional=True),
        Head("language", "language_model.model.decoder.project_out", "decoder", optional=True),
        Head("language", "language_model.lm_head", after="decoder"),
    ),
)

_BLIP2_T5: Final = Architecture(
    name="BLIP-2 captioning (T5)",
    model_class="Blip2ForConditionalGeneration",
    requires=(
        ("text_config.model_type", ("t5",)),
        ("text_config.is_gated_act", (True,)),
    ),
    parts=_BLIP2_PARTS,
    stacks=(
        _BLIP2_VISION,
        Stack("connector", "qformer", "qformer.encoder.layer", "qformer_config", _QFORMER_QUERY),
        Stack(
            "language",
            "encoder",
            "language_model.encoder.block",
            "text_config",
            (*_t5_self_attention(), *_t5_mlp(layer=1, stage=2)),
            carries=((1, "position_bias"),),
        ),
        Stack(
            "language",
            "decoder",
            "language_model.decoder.block",
            "text_config",
            (*_t5_self_attention(), *_t5_cross_attention(), *_t5_mlp(layer=2, stage=4)),
            carries=((1, "position_bias"), (2, "encoder_decoder_position_bias")),
        ),
    ),
    heads=(
        Head("connector", "language_projection", after="qformer"),
        Head("language", "language_model.lm_head", after="decoder"),
    ),
)

_BLIP2_RETRIEVAL: Final = Architecture(
    name="BLIP-2 retrieval (ITC + ITM)",
    model_class="Blip2ForImageTextRetrieval",
    requires=(("qformer_config.use_qformer_text_input", (True,)),),
    parts=(
        ("vision_model", "vision"),
        ("query_tokens", "connector"),
        ("embeddings", "connector"),
        ("qformer", "connector"),
        ("vision_projection", "connector"),
        ("text_projection", "connector"),
        ("itm_head", "connector"),
    ),
    stacks=(
        _BLIP2_VISION,
        Stack("connector", "qformer", "qformer.encoder.layer", "qformer_config", _QFORMER_TEXT),
    ),
    heads=(
        Head("connector", "vision_projection", after="qformer"),
        Head("connector", "text_projection", after="qformer"),
        Head("connector", "itm_head", after="qformer"),
    ),
    # Contrastive: an image-only and a text-only run of the Q-Former; matching: a joint run.
    passes=(
        (("use_image_text_matching_head", False),),
        (("use_image_text_matching_head", True),),
    ),
)

_LLAVA: Final = Architecture(
    name="LLaVA-1.5 (CLIP, Llama)",
    model_class="LlavaForConditionalGeneration",
    requires=(
        ("vision_config.model_type", ("clip_vision_model",)),
        ("text_config.model_type", ("llama",)),
    ),
    parts=(
        ("model.vision_tower", "vision"),
        ("model.multi_modal_projector", "connector"),
        ("model.language_model", "language"),
        ("lm_head", "language"),
    ),
    stacks=(
        Stack(
            "vision",
            "vision",
            "model.vision_tower.encoder.layers",
            "vision_config",
            _CLIP_VIT,
            feature_layer="vision_feature_layer",
        ),
        Stack("language", "decoder", "model.language_model.layers", "text_config", _LLAMA),
    ),
    heads=(
        Head("connector", "model.multi_modal_projector.linear_1", after="vision"),
        Head("connector", "model.multi_modal_projector.linear_2", after="vision"),
        Head("language", "lm_head", after="decoder"),
    ),
)

ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    _BLIP2_OPT,
    _BLIP2_T5,
    _BLIP2_RETRIEVAL,
    _LLAVA,
)
