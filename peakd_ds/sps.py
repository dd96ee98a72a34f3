"""Shuffled Parameter Sharing (SPS): a BERT classifier that runs its stored layers more than once.

Pea-KD (Cho & Kang, arXiv 2009.14822) lets pairs of encoder layers share all parameters and, in the second run
of a layer, exchanges its query and key projections. As K Q^T = (Q K^T)^T, the second run attends with the
transposed scores of the same parameters: more depth and a second attention pattern at no extra parameter.

Importing this module registers the architecture ``sps_bert`` with transformers, so ``AutoConfig`` and
``AutoModelForSequenceClassification`` load a folder that ``save_pretrained`` wrote.

Orders without the exchange are those of Takase & Kiyono (arXiv 2104.06022).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEncoder,
    BertForSequenceClassification,
    BertLayer,
    BertModel,
    BertSelfAttention,
    eager_attention_forward,
)
from transformers.utils.output_capturing import OutputRecorder

from peakd_ds.packed.attention import Dropout, attend
from peakd_ds.packed.packing import Packing

SHARINGS = ("none", "sps", "cycle", "cycle_rev", "sequence")
"""Values of ``sharing``; :func:`execution_order` says what each means."""

COMPUTED_VALUES = {
    "position_embedding_type": "absolute",
    "chunk_size_feed_forward": 0,
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
"""Settings of BERT configs that the forward pass does not read, with the only value that it computes."""

_ENCODER_FIELDS = (
    "vocab_size",
    "type_vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
)


def execution_order(num_layers: int, sharing: str, shuffle_qk: bool | None = None) -> tuple[tuple[int, bool], ...]:
    """Return the layers in the order in which they run.

    With n stored layers, numbered from 1 here and from 0 in the result:

    ========== ============================= ==============================
    sharing    n other than 6                n = 6
    ========== ============================= ==============================
    none       1..n                          1..6
    sps, cycle 1..n, 1..n                    1..6, 4..6
    cycle_rev  1..n, n..1                    1..6, 6..4
    sequence   1, 1, 2, 2, .., n, n          1, 2, 3, 4, 4, 5, 5, 6, 6
    ========== ============================= ==============================

    Six stored layers repeat only their upper three, as in the SPS encoder of the method's published code.

    Args:
        num_layers: Number of stored layers n, at least 1.
        sharing: One of :data:`SHARINGS`.
        shuffle_qk: Whether the second run of a layer exchanges query and key. None: on for ``sps``, off
            for the others, which is the only difference between ``sps`` and ``cycle``.

    Returns:
        One (index of the stored layer from 0, query and key exchanged) per effective layer.

    Raises:
        ValueError: For an unknown sharing, fewer than 1 layer, or ``shuffle_qk=True`` with ``none``.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}, but a model needs a stored layer; set 1 or more")
    if sharing not in SHARINGS:
        raise ValueError(f"sharing is {sharing!r}, which is no order of layers; set one of {', '.join(SHARINGS)}")
    if sharing == "none" and shuffle_qk:
        raise ValueError(
            "shuffle_qk is True with sharing 'none', but the exchange is made in a layer's second run and no "
            "layer runs twice; set shuffle_qk to False or choose another sharing"
        )
    first = list(range(num_layers))
    second = first[3:] if num_layers == 6 else first
    if sharing == "none":
        order = first
    elif sharing == "cycle_rev":
        order = first + second[::-1]
    elif sharing == "sequence":
        order = sorted(first + second)
    else:
        order = first + second
    exchange = _resolve_shuffle_qk(sharing, shuffle_qk)
    return tuple((index, exchange and index in order[:position]) for position, index in enumerate(order))


def _resolve_shuffle_qk(sharing: str, shuffle_qk: bool | None) -> bool:
    return sharing == "sps" if shuffle_qk is None else shuffle_qk


@strict
class SPSBertConfig(BertConfig):
    """BertConfig of ``num_hidden_layers`` stored layers and the order in which they run.

    Attributes:
        sharing: Order of the layers, see :func:`execution_order`.
        shuffle_qk: Whether second runs exchange query and key. None becomes True for ``sps`` and False for
            the others at construction.

    Raises:
        ValueError: As :func:`execution_order`; and for a value other than those of :data:`COMPUTED_VALUES`, as of a
            decoder, whose cache has one entry per stored layer.
    """

    model_type = "sps_bert"

    sharing: str = "sps"
    shuffle_qk: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("num_effective_layers", None)  # derived: a value in a file must not shadow the property
        super().__post_init__(**kwargs)
        for name, value in COMPUTED_VALUES.items():
            found = getattr(self, name, value)
            if found != value:
                raise ValueError(f"{name} is {found!r}, but SPS is an encoder that computes only {value!r}; set that")
        execution_order(self.num_hidden_layers, self.sharing, self.shuffle_qk)  # raises for what cannot run
        self.shuffle_qk = _resolve_shuffle_qk(self.sharing, self.shuffle_qk)

    @property
    def num_effective_layers(self) -> int:
        """Number of layers that run: the depth of the same model with nothing shared."""
        return len(execution_order(self.num_hidden_layers, self.sharing, self.shuffle_qk))


class SPSBertSelfAttention(BertSelfAttention):
    """Self-attention whose query and key projections can change places in one call."""

    def forward(  # type: ignore[override]  # an encoder has no cache; upstream's return type omits the weights
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: None = None,
        query_states: torch.Tensor | None = None,
        swap_qk: bool = False,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend like ``BertSelfAttention``, with query and key exchanged if ``swap_qk``.

        Args:
            hidden_states: [batch, tokens, hidden]; [1, T, hidden] of packed rows.
            attention_mask: The padding mask in the form of the attention implementation, or None.
            past_key_values: Always None; the caller passes it.
            query_states: The states that attend; None for all of ``hidden_states``. [1, B, hidden], the first token of
                each packed row, if nothing reads the other tokens.
            swap_qk: Use ``key`` for the queries and ``query`` for the keys, weights and biases.
            packing: Where packed rows lie.

        Returns:
            Attention output in the shape of ``query_states``, and the weights [batch, heads, tokens, tokens] where the
            implementation gives them (eager does, for rows that are not packed).
        """
        query_states = hidden_states if query_states is None else query_states
        # Both runs call the same modules in the same order and only use the results differently: no module is
        # written to (threads, recomputed activations), and the hooks that gather ZeRO-3 parameters fire.
        inputs = (hidden_states, query_states) if swap_qk else (query_states, hidden_states)
        query, key, value = self.query(inputs[0]), self.key(inputs[1]), self.value(hidden_states)
        if swap_qk:
            query, key = key, query
        dropout_p = self.dropout.p if self.training else 0.0
        if packing is not None:
            attended = attend(
                query[0], key[0], value[0], packing, self.num_attention_heads, float(self.scaling), dropout_p
            )
            return attended[None], None
        implementation = self.config._attn_implementation
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = interface(
            self,
            *(states.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2) for states in (query, key, value)),
            attention_mask,
            dropout=dropout_p,
            scaling=self.scaling,
            **kwargs,
        )
        return output.reshape(*query_states.shape[:-1], -1).contiguous(), weights


class SPSBertAttention(BertAttention):
    """Attention and the residual connection around it, over the states that attend."""

    def forward(  # type: ignore[override]  # no decoder
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.self(hidden_states, attention_mask, **kwargs)
        query_states = kwargs.get("query_states")
        return self.output(attended, hidden_states if query_states is None else query_states), weights


@dataclass
class Take:
    """The hidden states that a packed forward pass keeps: of some layers, of first tokens or of all tokens."""

    layers: tuple[int, ...] = ()
    """Effective layers, from 1."""
    all_tokens: bool = False
    logits: bool = True
    """Whether the output is read; if not, the pass ends after the last of `layers`, and its logits mean nothing."""
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    """The states by layer: [B, hidden], or [1, T, hidden] with `all_tokens`."""

    def from_layer(self, number: int, hidden_states: torch.Tensor, packing: Packing | None) -> torch.Tensor:
        """Keep states of a layer's output: [1, T, hidden], or without `packing` [1, B, hidden] of first tokens.

        Returns:
            The states for the next layer.
        """
        if self.all_tokens:
            self.states[number] = hidden_states
        elif packing is None:
            self.states[number] = hidden_states[0]
        else:
            hidden_states, self.states[number] = _TakeFirst.apply(hidden_states, packing.starts)
        return hidden_states


class _TakeFirst(torch.autograd.Function):
    """The states [1, T, hidden] unchanged, and a copy [B, hidden] of their first tokens, at starts [B].

    The gradient of indexing would be a tensor of the full shape, zero except for these tokens, which autograd fills and
    adds to the states' gradient. Here the tokens' gradient is added in place. That is safe because autograd has summed
    the states' gradient for this node: every layer reads its input more than once (attention, residual).
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape = states.shape
        ctx.save_for_backward(starts)
        return states.view_as(states), states[0].index_select(0, starts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_states: torch.Tensor | None, grad_first: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None]:
        if grad_first is not None:
            if grad_states is None:  # no layer above reads the states
                grad_states = grad_first.new_zeros(ctx.shape)
            grad_states[0].index_add_(0, ctx.saved_tensors[0], grad_first)
        return grad_states, None


class SPSBertEncoder(BertEncoder):
    """The stored layers, run in the order of the configuration."""

    def __init__(self, config: SPSBertConfig) -> None:
        super().__init__(config)
        self.order = execution_order(config.num_hidden_layers, config.sharing, config.shuffle_qk)
        for index in range(config.num_hidden_layers):
            self.set_submodule(f"layer.{index}.attention", SPSBertAttention(config, layer_idx=index))
            self.set_submodule(f"layer.{index}.attention.self", SPSBertSelfAttention(config, layer_idx=index))

    def forward(  # type: ignore[override]  # the parent's decoder arguments pass through kwargs
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        packing: Packing | None = None,
        take: Take | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run [batch, tokens, hidden] through every effective layer; ``use_cache`` has no effect.

        For packed rows, [1, T, hidden], it returns the first tokens, [B, 1, hidden], which is all that a classifier
        reads. The last layer computes only those, unless ``take`` keeps all of its tokens.
        """
        depth = len(self.order) if take is None or take.logits else max(take.layers, default=0)
        for number, (index, swapped) in enumerate(self.order[:depth], start=1):
            # BertLayer and BertAttention hand keyword arguments on, so they reach SPSBertSelfAttention.
            more: dict[str, Any] = {"swap_qk": swapped}
            if packing is not None:
                more["packing"] = packing
                if number == depth and not (take is not None and take.all_tokens and number in take.layers):
                    more["query_states"] = hidden_states.index_select(1, packing.starts)
            hidden_states = self.layer[index](hidden_states, attention_mask, **more, **kwargs)
            if take is not None and number in take.layers:
                hidden_states = take.from_layer(number, hidden_states, None if "query_states" in more else packing)
        if packing is not None:
            is_short = hidden_states.shape[1] == packing.num_rows
            first = hidden_states if is_short else hidden_states.index_select(1, packing.starts)
            hidden_states = first.transpose(0, 1)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


def _recorded_outputs() -> dict[str, Any]:
    """What transformers records for hidden states and attentions: one of each per run of a layer."""
    hidden_states = OutputRecorder(BertLayer)
    # Negative output_hidden_states indices count from the effective depth. Set after construction because
    # transformers 5.17, which does not take such indices, has no field of this name.
    hidden_states.num_hidden_layers_key = "num_effective_layers"
    return {"hidden_states": hidden_states, "attentions": SPSBertSelfAttention}


class SPSBertModel(BertModel):
    """BertModel with :class:`SPSBertEncoder`."""

    config: SPSBertConfig
    _can_record_outputs = _recorded_outputs()

    def __init__(self, config: SPSBertConfig) -> None:
        super().__init__(config)
        self.encoder = SPSBertEncoder(config)
        self.post_init()


class SPSBertForSequenceClassification(BertForSequenceClassification):
    """``BertForSequenceClassification`` whose encoder runs its stored layers in the order of SPS.

    Parameter names are those of ``BertForSequenceClassification`` with n layers, and so is ``forward``; with
    ``output_hidden_states`` it returns ``num_effective_layers + 1`` states, the embeddings first. It also takes packed
    rows, as :func:`peakd_ds.packing.pack` makes them, and then a :class:`Take` in place of ``output_hidden_states``.

    Under DeepSpeed ZeRO, gradient checkpointing must be non-reentrant (transformers' default): the reentrant kind
    runs a backward per layer, so ZeRO meets the gradient of a shared parameter twice and stops.
    """

    config: SPSBertConfig

    def __init__(self, config: SPSBertConfig) -> None:
        super().__init__(config)
        self.bert = SPSBertModel(config)
        for name, module in list(self.named_modules()):
            if type(module) is torch.nn.Dropout:
                self.set_submodule(name, Dropout(module.p))
        self.post_init()


AutoConfig.register("sps_bert", SPSBertConfig)
AutoModel.register(SPSBertConfig, SPSBertModel)
AutoModelForSequenceClassification.register(SPSBertConfig, SPSBertForSequenceClassification)


def init_from_encoder(
    student: SPSBertForSequenceClassification, encoder: BertModel, init_layers: Sequence[int]
) -> None:
    """Copy embeddings, chosen layers and the pooler of a BERT encoder into the student.

    Pea-KD initialises the student from layers 1..n of pretrained (not fine-tuned) BERT. The student's
    classifier, and its pooler where ``encoder`` has none, keep their values.

    Args:
        student: Model to write to, with n stored layers.
        encoder: Model to read from.
        init_layers: n layer numbers of ``encoder``, from 1: the i-th becomes stored layer i.

    Raises:
        ValueError: If the number of layers is not n, a layer is out of range, or the models differ in a size
            or another setting that changes what the parameters compute. The student is then unchanged.
    """
    num_stored = student.config.num_hidden_layers
    num_source = len(encoder.encoder.layer)
    if len(init_layers) != num_stored:
        raise ValueError(
            f"init_layers {list(init_layers)} names {len(init_layers)} layers, but the student stores "
            f"{num_stored}; name {num_stored} layers between 1 and {num_source}"
        )
    for number in init_layers:
        if not 1 <= number <= num_source:
            raise ValueError(f"init_layers has {number}, but the encoder's layers are 1 to {num_source}; name those")
    for name in _ENCODER_FIELDS:
        ours, theirs = getattr(student.config, name), getattr(encoder.config, name)
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours} in the student and {theirs} in the encoder it is initialised from, but "
                f"they must be equal; set the student's {name} to {theirs} or choose another encoder"
            )
    student.bert.embeddings.load_state_dict(encoder.embeddings.state_dict())
    for layer, number in zip(student.bert.encoder.layer, init_layers, strict=True):
        layer.load_state_dict(encoder.encoder.layer[number - 1].state_dict())
    if encoder.pooler is not None and student.bert.pooler is not None:
        student.bert.pooler.load_state_dict(encoder.pooler.state_dict())
