"""AdaLomo, LOMO and Adafactor, composed from optstate's public parts."""

from adalomo.adafactor import Adafactor
from adalomo.adalomo import AdaLomo
from adalomo.lomo import Lomo

__all__ = ["AdaLomo", "Adafactor", "Lomo"]
