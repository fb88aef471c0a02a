"""The chunked form with nothing around it: the base for the overhead of the portable operators.

It has no decay, no mask and no states. Each of the three backends has its own version; a pass is
two masked products and the sums of the chunks before.
"""

from benchmarks import chains
from benchmarks.contenders import Contender


def minimal_peers(case, operators, function):
    """One contender for each operator that is a plain chain.

    Args:
        case: the `Case`.
        operators: names of operators.
        function: `f(operator, query, key, value)` of the backend.
    """
    peers = []
    for operator in filter(chains.plain, operators):
        name = f"minimal {operator}"
        if case.decay:
            peers.append(Contender(name, operator, unavailable="has no decay", peer="minimal"))
        else:
            peers.append(Contender(name, operator, _bound(function, operator), peer="minimal"))
    return peers


def _bound(function, operator):
    return lambda query, key, value: function(operator, query, key, value)
