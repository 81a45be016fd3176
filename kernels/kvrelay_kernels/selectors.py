"""The table of selectors: a name and where its scorer lives in each implementation.

A scorer takes (``QueryGroup``, ``SelectionConfig``, scale) and returns ``ScoredBlocks``. Adding one is one
file and one line; ``tests/kernels/test_select_blocks.py`` then runs on it by itself.
"""

from kvrelay_kernels.errors import UnknownName

SELECTORS = {
    "local": "select_blocks_flat:local",
    "mean_pool": "select_blocks_flat:mean_pool",
    "quest": "select_blocks_flat:quest",
    "antidiagonal": "select_blocks_antidiagonal:antidiagonal",
    "two_stage": "select_blocks_tree:two_stage",
    "tree": "select_blocks_tree:tree",
    "oracle": "select_blocks_oracle:oracle",
}


def selector_location(name: str) -> tuple[str, str]:
    """Module (inside an implementation's package) and function of a selector. Raises UnknownName."""
    if name not in SELECTORS:
        raise UnknownName(f"unknown selector {name!r}; expected one of {sorted(SELECTORS)}")
    module, _, function = SELECTORS[name].partition(":")
    return module, function
