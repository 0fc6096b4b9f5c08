"""Differential privacy of whole clients: clipping, discrete Gaussian noise, and accounting.

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018. A client's
update is clipped to norm C, and the sum of updates gets discrete Gaussian noise of standard deviation z C (z is the
noise multiplier): each client adds a fraction of it in a secure round, and all of it in a compressed round.
docs/privacy.md explains the guarantee and its limits.
"""

from tofu.privacy.accounting import Accountant, check_delta, epsilon_of, noise_multiplier_for
from tofu.privacy.clipping import check_param_spec, clip
from tofu.privacy.noise import Noise, normals, rounded_norm

__all__ = [
    "Accountant",
    "Noise",
    "check_delta",
    "check_param_spec",
    "clip",
    "epsilon_of",
    "noise_multiplier_for",
    "normals",
    "rounded_norm",
]
