"""Which of many things hang together, by pairs of them."""

from __future__ import annotations

import numpy as np

from structprune.ops.relations import Ids


def joined(count: int, left: Ids, right: Ids) -> Ids:
    """A number for each of `count` things, equal for those that the pairs of `left` and `right` join: shape (count,).

    Example:
        >>> import numpy as np
        >>> joined(4, np.array([0, 2]), np.array([2, 3])).tolist()
        [0, 1, 0, 0]
    """
    # Here, since importing them takes longer than solving most models.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)
