"""From the path a source publishes to the file on this machine, and never to one outside the media root."""

import os
from collections.abc import Mapping
from pathlib import Path


class PathProblem(ValueError):
    """A media path that must not be followed; the message says why."""


class MediaPaths:
    """Resolve media paths.

    First the remap table applies: its longest prefix that the path begins with, at a directory boundary, is replaced.
    Then a relative path continues the media root. The result must lie under the media root or under a target of the
    remap table: a path that leaves them by `..`, or an absolute one that points elsewhere, is a problem. Otherwise a
    data set from a stranger could show a model, and whoever reads its answers, any file of this machine. Who means an
    absolute path says so by naming its directory as `media_root`, or as both sides of an entry of `remap`.

    Rows in `eval/` that name `../images/1.png` need `remap: {"..": ".."}`, which allows the directory above.

    `..` is resolved in the text of the path, before any symbolic link is followed. Links inside the media root may
    point anywhere: whoever made the directory made them.

    Args:
        root: The media root.
        remap: Replacements of path prefixes; a relative target continues the media root.

    Example: `MediaPaths(Path("/data"), {"coco": "/mnt/coco2017"}).resolve("coco/train2017/1.jpg")` gives
    "/mnt/coco2017/train2017/1.jpg".
    """

    def __init__(self, root: Path, remap: Mapping[str, str]):
        self.root = os.path.abspath(root)
        by_length = sorted(remap.items(), key=lambda entry: len(entry[0]), reverse=True)
        self.remap = [(prefix.rstrip("/") if prefix != "/" else prefix, target) for prefix, target in by_length]
        targets = [os.path.normpath(os.path.join(self.root, target)) for _, target in by_length]
        self.allowed = tuple(dict.fromkeys(os.path.join(path, "") for path in (self.root, *targets)))

    def resolve(self, published: str) -> str:
        """The absolute path, without `..`.

        Raises:
            PathProblem: It is empty or a URL, or leaves the media root.
        """
        if not published or "\0" in published:
            raise PathProblem("no file name" if not published else "a file name with a zero byte")
        if not published.isascii() and published.encode(errors="replace").decode() != published:
            raise PathProblem("a file name that is not Unicode")
        path = self._remapped(published)
        full = os.path.normpath(os.path.join(self.root, path))
        if full.startswith(self.allowed):
            if "://" in published and not os.path.lexists(full):
                raise PathProblem("a URL; expected a file: fetch it first, and name the directory as `media_root`")
            return full
        raise PathProblem(
            f"leads to {full}, outside the media root {self.root}; expected a path under it, or under a target of "
            "`remap`"
        )

    def shortened(self, path: str) -> str:
        """A resolved path relative to the media root where it lies under it; the index stores it so."""
        prefix = self.allowed[0]
        return path[len(prefix) :] if path.startswith(prefix) else path

    def _remapped(self, path: str) -> str:
        while path.startswith("./"):
            path = path[2:]
        for prefix, target in self.remap:
            if not prefix:
                return os.path.join(target, path)
            if path.startswith(prefix) and (len(path) == len(prefix) or path[len(prefix)] == "/" or prefix == "/"):
                return os.path.join(target, path[len(prefix) :].lstrip("/"))
        return path
