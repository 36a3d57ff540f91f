"""How long it takes to walk what a pickle makes: a few bytes may stand for a walk without end."""

from __future__ import annotations

from typing import Any, Final

from crosstrain.engine.guards import is_exact_dict, is_exact_list, is_exact_tuple

from .errors import CheckpointUnsafe
from .pickle_calls import Made

__all__ = ["check_walkable"]

_MAX_DEPTH: Final = 200


def check_walkable(root: Any, max_steps: int) -> None:
    """Makes sure that whoever walks a nest comes to an end, and soon.

    Args:
        root: the nest, of the scan's symbols.
        max_steps: how many steps a walk may take.

    Raises:
        CheckpointUnsafe: if it holds itself, is nested too deep, or takes more steps.
    """
    weights: dict[int, int] = {}
    open_: set[int] = set()
    todo: list[tuple[Any, bool]] = [(root, False)]
    while todo:
        node, leaving = todo.pop()
        children = _children(node)
        if children is None or (not leaving and id(node) in weights):
            continue
        if not leaving:
            if id(node) in open_:
                raise CheckpointUnsafe("its pickle holds a container that contains itself")
            if len(open_) >= _MAX_DEPTH:
                raise CheckpointUnsafe(f"its containers are nested over {_MAX_DEPTH} deep")
            open_.add(id(node))
            todo.append((node, True))
            todo.extend((child, False) for child in children)
            continue
        open_.discard(id(node))
        weight = 1 + sum(weights.get(id(child), 1) for child in children)
        if weight > max_steps:
            raise CheckpointUnsafe(
                "its containers share each other so often that to walk them takes more than "
                f"{max_steps:,} steps"
            )
        weights[id(node)] = weight


def _children(node: Any) -> list[Any] | tuple[Any, ...] | None:
    if is_exact_dict(node):
        return [*node.keys(), *node.values()]
    if is_exact_list(node) or is_exact_tuple(node):
        return node
    if type(node) is Made:
        return [*node.parts, *([] if node.items is None else [node.items])]
    return None
