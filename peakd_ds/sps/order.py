"""The order in which a student's stored layers run, and which runs have query and key exchanged.

Orders without the exchange are those of Takase & Kiyono (arXiv 2104.06022).
"""

from typing import Any

SHARINGS = ("none", "sps", "cycle", "cycle_rev", "sequence")
"""Values of ``sharing``; :func:`execution_order` says what each means."""


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
    exchange = resolve_shuffle_qk(sharing, shuffle_qk)
    return tuple((index, exchange and index in order[:position]) for position, index in enumerate(order))


def resolve_shuffle_qk(sharing: str, shuffle_qk: bool | None) -> bool:
    """Whether second runs exchange query and key: as set, or else with `sps` alone."""
    return sharing == "sps" if shuffle_qk is None else shuffle_qk


def order_of(config: Any) -> tuple[tuple[int, bool], ...]:
    """The (stored layer, query and key exchanged) of each effective layer of a student's config."""
    return execution_order(config.num_hidden_layers, config.sharing, config.shuffle_qk)
