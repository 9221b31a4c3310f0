"""Matrix products that have one tensor of ids, layer by layer: models route once for two layers of experts, side by side or one
after the other.

A layer's last product is computed from its first ones with no other product in between. Up to three products are one layer: no
layer has more, and two have four or more.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

_ONE_LAYER = 3  # w1, w3, w2


def split_layers(products: Sequence[Node]) -> list[list[Node]]:
    """The products of each layer, by the place of its last one; all as one where they are not known to be several."""
    products = sorted(products)
    if len(products) <= _ONE_LAYER:
        return [products]
    layers: list[list[Node]] = []
    open_firsts: set[Node] = set()
    for product in products:
        before = _products_before(product, products)
        own = before & open_firsts
        if not own:
            open_firsts.add(product)
        elif own == before:
            layers.append([*sorted(own), product])
            open_firsts -= own
        else:
            return [products]
    return [products] if open_firsts else layers


def _products_before(product: Node, products: Sequence[Node]) -> set[Node]:
    """Those that one is computed from with none in between."""
    among, first = {*products}, products[0]
    reached, visited, pending = set[Node](), {product}, [product]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in visited or source < first:
                continue
            visited.add(source)
            if source in among:
                reached.add(source)
            else:
                pending.append(source)
    return reached
