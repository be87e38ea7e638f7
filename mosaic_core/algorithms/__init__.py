"""All algorithms: settings classes, and the pure functions beneath them.

One line an algorithm: its module says in ``__all__`` what it offers.
"""

from mosaic_core.algorithms._backdrop import *
from mosaic_core.algorithms._blurpool import *
from mosaic_core.algorithms._channels_last import *
from mosaic_core.algorithms._ema import *
from mosaic_core.algorithms._factorize import *
from mosaic_core.algorithms._ghost_batchnorm import *
from mosaic_core.algorithms._label_smoothing import *
from mosaic_core.algorithms._mixup import *
from mosaic_core.algorithms._noop import *
from mosaic_core.algorithms._sam import *
from mosaic_core.algorithms._weight_standardization import *
