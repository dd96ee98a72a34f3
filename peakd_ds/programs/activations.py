"""Upper bounds on the activations of a micro-batch, for peakd-plan.

What a layer keeps was found by looking at the tensors that autograd saves, family by family; tests compare the bounds
with these. T tokens, B rows, S the width that rows are padded to, H hidden size.
"""

from dataclasses import dataclass
from typing import Any

from peakd_ds.families import family_of, intermediate_size, is_packed
from peakd_ds.model.build import MatchedStudent

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch (packed/packing.py)."""

    rows: int
    tokens: int  # in all rows together
    width: int  # tokens of a row in attention, padding included
    element_size: int
    on_gpu: bool = True

    @property
    def positions(self) -> int:
        """Tokens and padding."""
        return self.rows * self.width

    @property
    def mask_size(self) -> int:
        """Bytes of an element of a dropout mask: a byte on a GPU, a number on a CPU (packed/cpu.py, and PyTorch)."""
        return 1 if self.on_gpu else self.element_size

    def computed(self, encoder: Any) -> int:
        """Tokens that a layer computes: without padding if the model takes packed rows."""
        return self.tokens if is_packed(encoder) else self.positions


def layer_bytes(encoder: Any, batch: Batch, first_only: bool = False) -> int:
    """Upper bound on the bytes that a layer keeps for its backward pass, or holds at once in its forward pass.

    For each query token (all tokens, or the first of each row with `first_only`): the layer's input, the input of the
    attention's dense layer, the inputs of both LayerNorms and the first one's output (5 hidden); input and output of
    the activation function; two dropout masks, and modernbert's of the feed-forward layer; the statistics of the
    LayerNorms (16 bytes). `attention_bytes` has the rest.
    """
    e, hidden = batch.element_size, encoder.hidden_size
    queries = batch.rows if first_only else batch.computed(encoder)
    dropped = 2 * hidden + (encoder.intermediate_size if getattr(encoder, "mlp_dropout", 0) else 0)
    kept = queries * (e * (5 * hidden + 2 * intermediate_size(encoder)) + batch.mask_size * dropped + 16)
    return kept + attention_bytes(encoder, batch, first_only)


def attention_bytes(encoder: Any, batch: Batch, first_only: bool) -> int:
    """Upper bound on the bytes that attention keeps, or holds at once.

    For each padded token: query, key and value. On a GPU, where attention is fused, also its output and an fp32 number
    for each head; a mask of S x S, as a bool and as a number, if rows are padded outside of attention or it has a
    window. On a CPU, the attention weights of each head and their dropout mask (packed/cpu.py). Attention with scores
    of relative positions is not fused: it keeps the weights before and after dropout and the mask.
    """
    e, heads, width = batch.element_size, encoder.num_attention_heads, batch.width
    attended = heads * (getattr(encoder, "head_dim", None) or encoder.hidden_size // heads)
    if family_of(encoder).has_relative_scores:
        weights = batch.positions * width * heads * (2 * e + batch.mask_size)
        return batch.positions * 3 * e * attended + weights + _disentangled_bytes(encoder, batch)
    if batch.on_gpu:
        has_mask = not is_packed(encoder) or getattr(encoder, "local_attention", width) < width
        mask = batch.positions * width * (1 + e) if has_mask else 0
        return batch.positions * (4 * e * attended + FP32 * heads) + mask
    queries = batch.rows if first_only else batch.positions
    return batch.positions * 3 * e * attended + 2 * e * queries * heads * width


def _disentangled_bytes(encoder: Any, batch: Batch) -> int:
    """What deberta-v2 keeps of a layer's scores of relative positions; 0 for other models.

    For each of the two scores (of content by position, and of position by content): the scores of all distances, the
    projected distances, repeated for each row, and an int64 index. Besides: the scaled key, the distances with their
    dropout mask, and the mask of padding.
    """
    if not getattr(encoder, "relative_attention", False):
        return 0
    e, hidden, num_distances = batch.element_size, encoder.hidden_size, 2 * distance_span(encoder)
    num_scores = len({"c2p", "p2c"} & set(encoder.pos_att_type or ()))
    scores = batch.positions * encoder.num_attention_heads * e + batch.rows * hidden * e
    shared = num_distances * hidden * (e + batch.mask_size) + batch.positions * (e * hidden + batch.width)
    return num_scores * (num_distances * scores + INT64 * batch.width**2) + shared


def distance_span(encoder: Any) -> int:
    """Distances to one side that a deberta-v2 tells apart."""
    most = getattr(encoder, "max_relative_positions", -1)
    buckets = getattr(encoder, "position_buckets", -1)
    return buckets if buckets > 0 else most if most > 0 else encoder.max_position_embeddings


def embedding_bytes(encoder: Any, batch: Batch) -> int:
    """Upper bound on what is kept of the embeddings and, with relative positions, is made once for all layers."""
    e = batch.element_size
    kept = batch.computed(encoder) * (3 * e * encoder.hidden_size + 5 * INT64)
    if not family_of(encoder).has_relative_scores:
        return kept
    once = batch.positions * batch.width * (e * encoder.num_attention_heads + INT64)  # mpnet's bias; deberta's mask
    if not getattr(encoder, "relative_attention", False):
        return kept + once
    conv = batch.positions * 6 * e * encoder.hidden_size if getattr(encoder, "conv_kernel_size", 0) else 0
    return kept + once + conv + 2 * distance_span(encoder) * e * encoder.hidden_size


def student_activations(matched: MatchedStudent, teacher_hidden: int, batch: Batch) -> int:
    """Upper bound on the bytes that the student keeps for its backward pass; a layer that runs twice counts twice.

    The last layer computes only the first token of each row, unless all its tokens are matched or rows are padded.
    Besides the layers: embeddings, matched states with their gradients (kernels/fused.py computes them early) and
    pooled rows.
    """
    encoder, is_cls = matched.student.config, matched.hidden_loss == "cls"
    per_token, depth = batch.element_size * encoder.hidden_size, encoder.num_effective_layers
    first_only = is_packed(encoder) and (is_cls or all(layer < depth for layer, _ in matched.pairs))
    layers = (depth - 1) * layer_bytes(encoder, batch) + layer_bytes(encoder, batch, first_only)
    num_states = len(matched.pairs) * (batch.rows if is_cls else batch.tokens)
    matched_states = 2 * num_states * (per_token + batch.element_size * teacher_hidden)
    if not is_packed(encoder):  # the last layer's output, and where tokens lie between padding
        matched_states += batch.positions * per_token + len(matched.pairs) * INT64 * batch.tokens
    return layers + embedding_bytes(encoder, batch) + matched_states + 4 * batch.rows * per_token


def teacher_activations(encoder: Any, matched: MatchedStudent, batch: Batch) -> int:
    """Upper bound on the bytes of a forward pass without a graph.

    One layer, the states before and after it, or of all layers if rows are padded (packed/rows.py), and the outputs of
    two micro-batches (teacher/online.py).
    """
    num_states = 2 * len(matched.pairs) * (batch.rows if matched.hidden_loss == "cls" else batch.tokens)
    held = layer_bytes(encoder, batch)
    if is_packed(encoder):
        return held + batch.element_size * encoder.hidden_size * (2 * batch.tokens + num_states)
    num_states += (encoder.num_hidden_layers + 1) * batch.positions
    return held + embedding_bytes(encoder, batch) + batch.element_size * encoder.hidden_size * num_states
