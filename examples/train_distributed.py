"""Trains one model on one device and on all, and compares losses and tokens per second.

    python train_distributed.py --backend jax
    python train_distributed.py --backend jax --split sequence

The batch is split over the devices: by `keras.distribution.DataParallel` under JAX, by
`tf.distribute.MirroredStrategy` under TensorFlow, and by `DistributedDataParallel` under PyTorch,
with a process for each device. With `--split sequence`, under JAX and PyTorch, each device holds
a part of each sequence, by `keras_hla.distribution.split_sequence`. Devices are all GPUs. Where
there are none they are virtual ones on the CPU, which show that losses agree, but share its cores.
"""

import argparse
import os
import tempfile
import time

parser = argparse.ArgumentParser(
    description="Train on one device and on all.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="jax")
parser.add_argument("--split", choices=("batch", "sequence"), default="batch")
parser.add_argument("--devices", type=int, default=2, help="virtual devices, without GPUs")
parser.add_argument("--steps", type=int, default=10, help="steps that are timed, after two")
parser.add_argument("--batch", type=int, default=8, help="sequences of a step, of all devices")
parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
parser.add_argument("--blocks", type=int, default=2)
parser.add_argument("--heads", type=int, default=4, help="of 64 features each")
parser.add_argument("--dtype", default="float32", help="dtype policy, as mixed_bfloat16")
arguments = parser.parse_args()
if (arguments.backend, arguments.split) == ("tensorflow", "sequence"):
    parser.error("--split sequence needs --backend jax or torch")
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402  # Keras reads the backend when it is imported.
import numpy as np  # noqa: E402

import keras_hla  # noqa: E402

VOCABULARY = 256
RATE = 0.1


def make_model():
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(arguments.dtype)
    width = 64 * arguments.heads
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, width)(tokens)
    for _ in range(arguments.blocks):
        x = keras_hla.layers.HLADecoderBlock(arguments.heads, 64)(x)
    x = keras.layers.RMSNormalization()(x)
    return keras.Model(tokens, keras.layers.Dense(VOCABULARY, dtype="float32")(x))


def make_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def batches():
    """For each step sequences of increasing tokens, from random ones, and the tokens after them."""
    rng = np.random.default_rng(0)
    for _ in range(arguments.steps + 2):
        first = rng.integers(0, VOCABULARY, (arguments.batch, 1))
        tokens = (first + np.arange(arguments.length + 1)) % VOCABULARY
        yield tokens[:, :-1].astype("int32"), tokens[:, 1:].astype("int32")


def measure(step):
    """The losses of the steps, and tokens of all devices per second."""
    losses = []
    for i, batch in enumerate(batches()):
        if i == 2:  # after what is compiled
            start = time.perf_counter()
        losses.append(step(*batch))
    seconds = time.perf_counter() - start
    return losses, arguments.steps * arguments.batch * arguments.length / seconds


def measure_keras():
    """By Keras' own training step, in the scope of what distributes it."""
    model = make_model()
    model.compile(keras.optimizers.SGD(RATE), make_loss())

    def step(tokens, targets):
        return float(model.train_on_batch(tokens, targets, return_dict=True)["loss"])

    def fit(tokens, targets):
        data = tokens, targets
        history = model.fit(*data, batch_size=arguments.batch, verbose=0)
        return history.history["loss"][0]

    return measure(fit if arguments.backend == "tensorflow" else step)


def run_jax():
    import jax

    jax.config.update("jax_num_cpu_devices", arguments.devices)
    devices = keras.distribution.list_devices()
    if arguments.split == "sequence":
        return len(devices), *(measure_parts(jax.devices()[:n]) for n in (1, len(devices)))
    alone = measure_keras()
    with keras.distribution.DataParallel(devices=devices).scope():
        return len(devices), alone, measure_keras()


def measure_parts(devices):
    """Under JAX, where each device holds a part of each sequence."""
    import jax
    from jax.sharding import Mesh, PartitionSpec

    model, loss_of = make_model(), make_loss()
    keras_hla.distribution.split_sequence(model, "sequence")
    part, same = PartitionSpec(None, "sequence"), PartitionSpec()
    logits = jax.shard_map(
        lambda weights, tokens: model.stateless_call(weights, [], tokens)[0],
        mesh=Mesh(np.array(devices), ("sequence",)),
        in_specs=(same, part),
        out_specs=part,
    )

    @jax.jit
    def update(weights, tokens, targets):
        def loss(weights):
            return loss_of(targets, logits(weights, tokens))

        value, gradients = jax.value_and_grad(loss)(weights)
        return value, [w - RATE * g for w, g in zip(weights, gradients, strict=True)]

    weights = [w.value for w in model.trainable_variables]

    def step(tokens, targets):
        nonlocal weights
        value, weights = update(weights, tokens, targets)
        return float(value)

    return measure(step)


def run_tensorflow():
    import tensorflow as tf

    devices = [f"GPU:{i}" for i, _ in enumerate(tf.config.list_physical_devices("GPU"))]
    if len(devices) < 2:
        tf.config.set_visible_devices([], "GPU")
        (cpu,) = tf.config.list_physical_devices("CPU")
        parts = [tf.config.LogicalDeviceConfiguration()] * arguments.devices
        tf.config.set_logical_device_configuration(cpu, parts)
        devices = [f"CPU:{i}" for i in range(arguments.devices)]
    alone = measure_keras()
    with tf.distribute.MirroredStrategy(devices).scope():
        return len(devices), alone, measure_keras()


def run_torch():
    import torch

    gpus = torch.cuda.device_count()
    count = gpus if gpus > 1 else arguments.devices
    with tempfile.TemporaryDirectory() as folder:
        found = [
            torch.multiprocessing.spawn(torch_process, (n, f"{folder}/{n}", gpus > 1), n)
            or torch.load(f"{folder}/{n}.results")
            for n in (1, count)
        ]
    return count, *found


def torch_process(rank, count, path, on_gpus):
    import torch

    name = f"cuda:{rank}" if on_gpus else "cpu"
    if on_gpus:
        torch.cuda.set_device(rank)
    engine = "nccl" if on_gpus else "gloo"
    torch.distributed.init_process_group(engine, f"file://{path}", rank=rank, world_size=count)
    with keras.device(name):  # the layers compute on the device of the process
        found = measure_process(rank, count, name)
    if rank == 0:
        torch.save(found, f"{path}.results")
    torch.distributed.destroy_process_group()


def measure_process(rank, count, device):
    """What a process measures. Its modules are freed before their process group is destroyed."""
    import torch

    model = make_model()
    module = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss_of = make_loss()
    if arguments.split == "sequence":
        keras_hla.distribution.split_sequence(model, torch.distributed.group.WORLD)

    def own(x):
        axis = ("batch", "sequence").index(arguments.split)
        return torch.tensor(np.split(x, count, axis)[rank], device=device)

    def step(tokens, targets):
        tokens, targets = own(tokens), own(targets)
        loss = loss_of(targets, module(tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        return total.item() / count

    return measure(step)


def main():
    run = {"jax": run_jax, "tensorflow": run_tensorflow, "torch": run_torch}[arguments.backend]
    count, (alone, speed_alone), (together, speed) = run()
    print(f"1 device: {speed_alone:,.0f} tokens/s, loss {alone[0]:.4f} to {alone[-1]:.4f}")
    print(f"{count} devices: {speed:,.0f} tokens/s, loss {together[0]:.4f} to {together[-1]:.4f}")
    difference = np.abs(np.subtract(alone, together)).max()
    tolerance = 1e-3 if arguments.dtype == "float32" else 3e-2
    assert difference < tolerance, f"losses differ by {difference}"
    print(f"losses agree to {difference:.1e}")


if __name__ == "__main__":
    main()
