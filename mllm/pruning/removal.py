"""How many tokens leave in each layer of an encoder."""

from mllm.errors import OptionError


def steady_steps(num_candidates: int, r: int, num_layers: int) -> list[int]:
    """The same number in each layer, as long as each that leaves finds another that stays."""
    steps = []
    for _ in range(num_layers):
        steps.append(min(r, num_candidates // 2))
        num_candidates -= steps[-1]
    return steps


def steps_to(num_candidates: int, budget: int, num_layers: int) -> list[int]:
    """About the same number in each layer, the first ones more, so that exactly so many are left.

    At most half of the tokens can leave in a layer, since each goes into one that stays.

    Raises:
        OptionError: There are too few layers for that.
    """
    if num_candidates > budget * 2**num_layers:
        raise OptionError(
            f"{budget} of {num_candidates} patches, through {num_layers} layers of an encoder",
            expected=f"{-(-num_candidates // 2**num_layers)} or more: at most half of them leave in each layer",
            do="raise `tokens`",
        )
    steps = []
    for layers_behind in reversed(range(num_layers)):
        excess = max(num_candidates - budget, 0)
        steps.append(max(-(-excess // (layers_behind + 1)), num_candidates - budget * 2**layers_behind))
        num_candidates -= steps[-1]
    return steps
