"""Where the sides of a divergent branch meet again: at the branch's immediate post-dominator."""

from __future__ import annotations

from collections.abc import Sequence


def reconvergence(successors: Sequence[Sequence[int]]) -> dict[int, int]:
    """For each node with several successors its immediate post-dominator, -1 where that is the exit alone.

    successors: of each node; node ``len(successors)`` is the exit. Cooper, Harvey and Kennedy, "A simple, fast
    dominance algorithm" (2001), on the reversed graph.
    """
    end = len(successors)
    predecessors: list[list[int]] = [[] for _ in range(end + 1)]
    for node, nexts in enumerate(successors):
        for following in nexts:
            predecessors[following].append(node)
    order = _postorder(end, predecessors)
    number = {node: index for index, node in enumerate(order)}
    parent: dict[int, int] = {end: end}

    def meet(a: int, b: int) -> int:
        while a != b:
            while number[a] < number[b]:
                a = parent[a]
            while number[b] < number[a]:
                b = parent[b]
        return a

    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [following for following in successors[node] if following in parent]
            if not known:
                continue
            found = known[0]
            for following in known[1:]:
                found = meet(found, following)
            if parent.get(node) != found:
                parent[node] = found
                changed = True
    return {
        node: parent[node] if parent.get(node, end) != end else -1
        for node in range(end)
        if len(set(successors[node])) > 1
    }


def _postorder(root: int, edges: Sequence[Sequence[int]]) -> list[int]:
    """The nodes that can be reached from ``root``, each after those that it leads to first; ``root`` is last."""
    order: list[int] = []
    seen = {root}
    stack = [(root, iter(edges[root]))]
    while stack:
        node, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(edges[following])))
                break
        else:
            order.append(node)
            stack.pop()
    return order
