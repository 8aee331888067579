"""Statistics of the parts of tensors: channels, heads and KV groups.

In: a checkpoint and the roles of its tensors. Out: the tables "channels" and "heads". Moments of channels are taken
block by block; a head is the merger of its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vrscope.arch.roles import HeadSplit, TensorRole
from vrscope.checkpoint.source import Checkpoint, RowBlock, TensorInfo
from vrscope.executors import Executor, Serial
from vrscope.progress import Progress, silent
from vrscope.stats.encoding import Encoding, encoding
from vrscope.stats.matrix import MatrixView, matrix_view
from vrscope.stats.measure import IDENTITY_COLUMNS, role_of
from vrscope.stats.moments import moments_of
from vrscope.stats.stream import Streaming, stream
from vrscope.tables import Column

if TYPE_CHECKING:
    import pandas as pd
