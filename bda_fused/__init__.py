"""Fused bi-directional attention for zero-shot learning.

functional   residual_attention, ssa and vsa: the attention core, with gradients
modules      the BDA model with fused attention; ``reference`` is the same model in plain PyTorch
fuse         replaces a reference model's attention in place
frozen       inference with what no image changes computed once
backends     which implementation runs, and why the others do not
"""

from bda_fused import backends, functional, modules, reference
from bda_fused._version import __version__
from bda_fused.modules import frozen, fuse

__all__ = ["__version__", "backends", "frozen", "functional", "fuse", "modules", "reference"]
