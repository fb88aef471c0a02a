"""Exports a `.keras` file: `python -m keras_hla.export model.keras saved_model`."""

import argparse
import importlib
import os
from pathlib import Path
import sys


def main():
    parser = argparse.ArgumentParser(
        prog="python -m keras_hla.export",
        description="Write a SavedModel from a .keras file, whatever backend wrote that.",
    )
    parser.add_argument("model", type=Path, help="the .keras file")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--backend",
        choices=("tensorflow", "jax"),
        default="tensorflow",
        help="what the SavedModel is made with (default: tensorflow)",
    )
    parser.add_argument(
        "--stateful",
        action="store_true",
        help="keep the states in the SavedModel, for one session",
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="module to import first, with operators, layers or functions of your own",
    )
    arguments = parser.parse_args()
    if not arguments.model.is_file():
        parser.error(f"there is no file {arguments.model}")
    if os.environ.get("KERAS_BACKEND") != arguments.backend:
        # Keras has read the variable when this package was imported: start again.
        os.environ["KERAS_BACKEND"] = arguments.backend
        os.execv(sys.executable, [sys.executable, "-m", "keras_hla.export", *sys.argv[1:]])

    import keras

    from keras_hla.export import export_saved_model

    for module in arguments.modules:
        importlib.import_module(module)
    model = keras.saving.load_model(arguments.model, compile=False)
    export_saved_model(model, arguments.output, stateful=arguments.stateful)
    print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
