"""The weights of attention heads, read from a model folder one head at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lit_align.localizers.stored import StoredParameters, read_config, stored_shapes
from lit_align.masks import HeadLayout

Q, K, V = range(3)


class StoredHeads:
    """The q, k and v rows of a folder's heads.

    Nothing but the safetensors' headers and the rows that are asked for is read, and no model is
    built.

    Attributes:
        layout: where the heads lie, under the names that the files have.
        shapes: name in the files -> shape, of every projection.

    Raises:
        MaskError: heads that cannot be told apart.
        ModelError: the folder cannot be read.
        LocalizationError: weights that are not stored as floats.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        shapes = stored_shapes(folder)
        self.layout = HeadLayout.from_shapes(read_config(folder), shapes)
        names = dict.fromkeys(p.name for block in self.layout.blocks for p in block)
        self.shapes = {name: shapes[name] for name in names}
        self._stored = StoredParameters(folder, self.shapes)

    def read(self, index: int, part: int, head: int) -> Tensor:
        """(head_dim, hidden), in fp32 (fp64 where it is stored so); not to be written.

        Args:
            index: of the block, among those with attention.
            part: `Q`, `K` or `V`.
            head: of q, or key-value head of k and v.
        """
        projection = self.layout.blocks[index][part]
        start, axis = projection.starts[head], projection.axis
        rows = self._stored.read_rows(projection.name, start, self.layout.head_dim, axis)
        rows = rows if axis == 0 else rows.T
        return rows.to(torch.promote_types(rows.dtype, torch.float32))
