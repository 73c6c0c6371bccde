"""Loss curves as a picture."""

from pathlib import Path


def draw_losses(curves: dict[str, list[float]], path: Path) -> bool:
    """Draw them over the share of the epoch, as packed steps are not the same in number; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for (name, losses), style in zip(curves.items(), ("-", "--", ":"), strict=False):
        axes.plot([(step + 1) / len(losses) for step in range(len(losses))], losses, style, label=name)
    axes.set(xlabel="share of the epoch", ylabel="loss of a step")
    axes.legend()
    figure.savefig(path, dpi=150)
    return True
