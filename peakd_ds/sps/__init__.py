"""Shuffled Parameter Sharing (SPS): a text classifier that runs its stored layers more than once.

Pea-KD (Cho & Kang, arXiv 2009.14822) lets pairs of encoder layers share all parameters and, in the second run
of a layer, exchanges its query and key projections. As K Q^T = (Q K^T)^T, the second run attends with the
transposed scores of the same parameters: more depth and a second attention pattern at no extra parameter.

Importing this package registers the architectures ``sps_bert``, ``sps_roberta`` and so on with transformers, so
``AutoConfig``, ``AutoModel`` and ``AutoModelForSequenceClassification`` load a folder that ``save_pretrained`` wrote.
order.py has the orders of layers, shared.py the sharing for every family, bert.py that of BERT alone.
"""

from peakd_ds.packed.packing import Take
from peakd_ds.sps.bert import (
    COMPUTED_VALUES,
    SPSBertConfig,
    SPSBertForSequenceClassification,
    SPSBertModel,
    init_from_encoder,
)
from peakd_ds.sps.order import SHARINGS, execution_order
from peakd_ds.sps.shared import (
    SharedClasses,
    check_init_layers,
    classes_of,
    init_shared,
    plain_config,
    unrolled_state,
)

__all__ = [
    "COMPUTED_VALUES",
    "SHARINGS",
    "SPSBertConfig",
    "SPSBertForSequenceClassification",
    "SPSBertModel",
    "SharedClasses",
    "Take",
    "check_init_layers",
    "classes_of",
    "execution_order",
    "init_from_encoder",
    "init_shared",
    "plain_config",
    "unrolled_state",
]
