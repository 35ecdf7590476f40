"""The README's usage runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_usage_runs_as_printed():
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    assert names["refined"].shape == (8, 196, 350)
    assert names["ssa_map"].shape == (8, 196, 312)
    assert names["synthesis"].shape == (8, 312, 350)
    assert names["out"].class_scores.shape == (4, 50)
    assert names["out"].vsa_map.shape == (4, 85, 196)
