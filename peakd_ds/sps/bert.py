"""SPS for BERT: a classifier that runs its stored layers in the order of order.py, written out.

It is the fast path that shared.py is compared with: packed rows go through its own attention, without transformers'
dispatch, and only the first tokens through its last layer.
"""

from collections.abc import Sequence
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
from peakd_ds.packed.packing import Packing, Take
from peakd_ds.sps.order import execution_order, resolve_shuffle_qk

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
        self.shuffle_qk = resolve_shuffle_qk(self.sharing, self.shuffle_qk)

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
            query, key, value = (states.squeeze(0) for states in (query, key, value))  # [0] would fill zeros backwards
            attended = attend(query, key, value, packing, self.num_attention_heads, float(self.scaling), dropout_p)
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
                if number == depth and not (take is not None and take.needs_all_tokens(number)):
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
    rows, as :func:`peakd_ds.packed.packing.pack` makes them, and then a :class:`Take` in place of
    ``output_hidden_states``.

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
