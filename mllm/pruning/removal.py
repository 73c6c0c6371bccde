"""How many tokens leave in each layer of an encoder."""


def steady_steps(num_candidates: int, r: int, num_layers: int) -> list[int]:
    """The same number in each layer, but never more than half of those that are left, as published."""
    steps = []
    for _ in range(num_layers):
        steps.append(min(r, num_candidates // 2))
        num_candidates -= steps[-1]
    return steps


def steps_to(num_candidates: int, budget: int, num_layers: int) -> list[int]:
    """About the same number in each layer, the first ones more, so that exactly `budget` are left.

    In an encoder of few layers that may be more than half of those that are left: then several go into one.
    """
    excess = max(num_candidates - budget, 0)
    each, rest = divmod(excess, num_layers)
    return [each + (layer < rest) for layer in range(num_layers)]
