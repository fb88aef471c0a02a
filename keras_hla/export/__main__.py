"""Exports a `.keras` file: `python -m keras_hla.export model.keras saved_model`.

The suffix of the output chooses the format: `.onnx`, `.tflite`, or a SavedModel.
"""

import argparse
import importlib
import os
from pathlib import Path
import sys


def main():
    parser = argparse.ArgumentParser(
        prog="python -m keras_hla.export",
        description="Write a SavedModel, an ONNX or a LiteRT file from a .keras file, "
        "whatever backend wrote that.",
    )
    parser.add_argument("model", type=Path, help="the .keras file")
    parser.add_argument(
        "output", type=Path, help="folder to write, or a file that ends in .onnx or .tflite"
    )
    parser.add_argument(
        "--step",
        action="store_true",
        help="in .onnx and .tflite: take and return the states (a SavedModel has both ways)",
    )
    parser.add_argument(
        "--length",
        type=int,
        help="in .onnx and .tflite: length of the sequences (default: any, which .tflite has not)",
    )
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
        help="module to import first, that defines operators, layers or functions",
    )
    arguments = parser.parse_args()
    if not arguments.model.is_file():
        parser.error(f"there is no file {arguments.model}")
    single = arguments.output.suffix in (".onnx", ".tflite")
    if single and (arguments.stateful or arguments.backend == "jax"):
        parser.error(f"--stateful and --backend jax are for a SavedModel, not {arguments.output}")
    if not single and (arguments.step or arguments.length is not None):
        parser.error("--step and --length are for files that end in .onnx or .tflite")
    if os.environ.get("KERAS_BACKEND") != arguments.backend:
        # Keras has read the variable when this package was imported: start again.
        os.environ["KERAS_BACKEND"] = arguments.backend
        os.execv(sys.executable, [sys.executable, "-m", "keras_hla.export", *sys.argv[1:]])

    import keras

    from keras_hla.export import export_litert, export_onnx, export_saved_model

    for module in arguments.modules:
        importlib.import_module(module)
    model = keras.saving.load_model(arguments.model, compile=False)
    if single:
        export = export_onnx if arguments.output.suffix == ".onnx" else export_litert
        export(model, arguments.output, step=arguments.step, length=arguments.length)
    else:
        export_saved_model(model, arguments.output, stateful=arguments.stateful)
    print(f"Written: {arguments.output}")


if __name__ == "__main__":
    main()
