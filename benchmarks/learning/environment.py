"""The device and the versions with which a replicate was trained."""

import platform

import jax
import keras

import keras_hla


def describe():
    """Columns of a record."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "keras": keras.__version__,
        "keras_hla": keras_hla.__version__,
    }
