"""All algorithms: settings classes, and the pure functions beneath them.

One line an algorithm: its module says in ``__all__`` what it offers.
"""

from mosaic_core.algorithms._augmix import *
from mosaic_core.algorithms._backdrop import *
from mosaic_core.algorithms._blurpool import *
from mosaic_core.algorithms._channels_last import *
from mosaic_core.algorithms._colout import *
from mosaic_core.algorithms._cutmix import *
from mosaic_core.algorithms._cutout import *
from mosaic_core.algorithms._ema import *
from mosaic_core.algorithms._factorize import *
from mosaic_core.algorithms._ghost_batchnorm import *
from mosaic_core.algorithms._gradient_clipping import *
from mosaic_core.algorithms._gyro_dropout import *
from mosaic_core.algorithms._label_smoothing import *
from mosaic_core.algorithms._lawa import *
from mosaic_core.algorithms._layer_freezing import *
from mosaic_core.algorithms._mixup import *
from mosaic_core.algorithms._noop import *
from mosaic_core.algorithms._progressive_resizing import *
from mosaic_core.algorithms._randaugment import *
from mosaic_core.algorithms._sam import *
from mosaic_core.algorithms._selective_backprop import *
from mosaic_core.algorithms._squeeze_excite import *
from mosaic_core.algorithms._stochastic_depth import *
from mosaic_core.algorithms._swa import *
from mosaic_core.algorithms._trivialaugment import *
from mosaic_core.algorithms._weight_standardization import *
