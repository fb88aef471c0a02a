"""Runs an exported language model with TensorFlow alone: neither Keras nor keras_hla is loaded.

    python serve_saved_model.py SAVED_MODEL LOGITS.npz

`LOGITS.npz` holds, as `char_lm.py` writes it, arrays `tokens_LENGTH` and the
logits that the Keras model gave for them, `logits_LENGTH`. The exit status is 0
if the exported model gives the same.
"""

import logging
import os
import sys

# What TensorFlow has to say about devices, and about gradients, which serving does without.
logging.getLogger("absl").setLevel("ERROR")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# To import any of these is an error from here on.
sys.modules.update(dict.fromkeys(("keras", "tf_keras", "keras_hla")))

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

TOLERANCE = 1e-4  # relative to the largest logit


def answer(model, tokens):
    """The logits for whole sequences."""
    return model.signatures["serving_default"](tokens=tf.constant(tokens))["logits"].numpy()


def stream(model, tokens):
    """The logits for sequences in pieces of up to 50 tokens, each with the states before it."""
    states = model.signatures["initial_state"](batch_size=tf.constant(len(tokens)))
    logits = []
    for begin in range(0, tokens.shape[1], 50):
        piece = tf.constant(tokens[:, begin : begin + 50])
        outputs = model.signatures["step"](tokens=piece, **states)
        states = {name: outputs[name] for name in states}
        logits.append(outputs["logits"].numpy())
    return np.concatenate(logits, axis=1)


def main(saved_model, logits_file):
    model = tf.saved_model.load(saved_model)
    expected = np.load(logits_file)
    worst = 0.0
    for name in expected:
        if not name.startswith("tokens_"):
            continue
        tokens, keras_logits = expected[name], expected[name.replace("tokens", "logits")]
        answers = {"at once": answer(model, tokens), "in pieces": stream(model, tokens)}
        for how, logits in answers.items():
            difference = np.max(np.abs(logits - keras_logits))
            worst = max(worst, difference / np.max(np.abs(keras_logits)))
            length = tokens.shape[1]
            print(f"  {length:5d} tokens {how}: largest difference {difference:.1e}")
    if not worst < TOLERANCE:
        sys.exit(f"The exported model differs from the Keras model by {worst:.1e} of the logits.")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
