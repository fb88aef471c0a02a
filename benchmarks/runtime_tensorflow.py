"""See `benchmarks.runtime`."""

import tensorflow as tf

from benchmarks import timing


def on_gpu():
    return bool(tf.config.get_visible_devices("GPU"))


def device_name():
    if not on_gpu():
        return "cpu"
    details = tf.config.experimental.get_device_details(tf.config.get_visible_devices("GPU")[0])
    return details.get("device_name", "gpu")


def tensor(array, dtype):
    return tf.cast(tf.constant(array), dtype)


def to_numpy(x):
    return tf.cast(x, "float64").numpy()


def forward(function, jit):
    return _compiled(lambda inputs, constants: function(*inputs, *constants), jit)


def training(function, jit):
    def call(inputs, constants, cotangent):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            output = function(*inputs, *constants)
        return output, tape.gradient(output, inputs, cotangent)

    return _compiled(call, jit)


def _compiled(function, jit):
    return tf.function(function, autograph=False, jit_compile=jit != "off")


def time_calls(call, argument_sets):
    if on_gpu():
        return timing.on_gpu(call, argument_sets, _synchronize)
    return timing.on_cpu(call, argument_sets[0], _synchronize)


def kernels(call, arguments):
    return None


def train_on_batch(model, x, y):
    return lambda: model.train_on_batch(x, y)


def _synchronize(result):
    del result
    tf.test.experimental.sync_devices()


def added_memory(call, arguments):
    if not on_gpu():
        return None
    _synchronize(call(*arguments))  # may try several kernels, which takes memory
    tf.config.experimental.reset_memory_stats("GPU:0")
    before = tf.config.experimental.get_memory_info("GPU:0")["current"]
    _synchronize(call(*arguments))
    return (tf.config.experimental.get_memory_info("GPU:0")["peak"] - before) / 2**20
