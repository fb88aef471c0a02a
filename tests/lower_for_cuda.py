"""Lowers the gradients of a block by the kernels for CUDA, under JAX and without a GPU.

Compiles each kernel, as far as that is without the driver, and prints the number of launches.
To be run in a fresh process: Triton's LLVM and TensorFlow's cannot be in one.
"""

import functools

from jaxlib import gpu_triton


class Part:
    """In the place of what the CUDA plugin of JAX makes of a kernel or an argument."""

    def __init__(self, *arguments):
        pass

    def to_proto(self, *arguments):
        return b""


# What jax-triton looks for in the plugin.
gpu_triton.get_compute_capability = lambda device: 90
for name in (
    "TritonAutotunedKernelCall",
    "TritonKernel",
    "TritonKernelCall",
    "create_array_parameter",
    "create_scalar_parameter",
    "get_custom_call",
    "get_serialized_metadata",
):
    setattr(gpu_triton, name, Part)

# Imported last, as they read what is replaced above.
import jax  # noqa: E402
import jax_triton  # noqa: E402
import keras  # noqa: E402

from keras_hla import distribution, layers, ops, stages  # noqa: E402
from keras_hla.kernels import device  # noqa: E402
from keras_hla.kernels.operator import plan  # noqa: E402
from keras_hla.layers.state_scope import StateScope  # noqa: E402

# The kernels of stages too, which layers leave to XLA.
stages.are_fused = lambda implementation: implementation == "triton"


def check_arguments(launch):
    """A `triton_call` that asks of arguments what every jax-triton does.

    One before 0.4 has a parameter of the kernel for each output, the others for each output that
    takes the place of no input.
    """

    @functools.wraps(launch)
    def call(*arguments, kernel, input_output_aliases=None, **options):
        outputs = options.get("out_type", options.get("out_shape"))
        parameters = [x for x in kernel.params if not x.is_constexpr]
        missing = len(parameters) - len(arguments)
        for count in (len(outputs), len(outputs) - len(input_output_aliases or {})):
            assert missing == count, (
                f"{kernel.fn.__name__}: {missing} parameters are missing, of {count} outputs"
            )
        assert {x.name for x in kernel.params if x.is_constexpr} <= set(options), kernel
        launches.append(kernel.fn.__name__)
        more = {"input_output_aliases": input_output_aliases} if input_output_aliases else {}
        return launch(*arguments, kernel=kernel, **more, **options)

    return call


launches: list[str] = []
jax_triton.triton_call = check_arguments(jax_triton.triton_call)
device._capability = lambda tensor: "9.0"
plan._FEWEST_SPAN_CHUNKS = 1  # several spans of a short sequence

keras.config.set_dtype_policy("mixed_bfloat16")
block = layers.HLADecoderBlock(
    2, 16, num_key_value_heads=1, qk_norm=True, output_gate="silu", implementation="triton"
)
block.build((1, None, 16))
weights = [w.value for w in block.trainable_variables]


def loss(weights, x, segments):
    output, _ = block.stateless_call(weights, [], x, segment_ids=segments)
    return output.astype("float32").sum()


x = jax.ShapeDtypeStruct((1, 100, 16), "bfloat16")
segments = jax.ShapeDtypeStruct((1, 100), "int32")


def lower(function, *arguments):
    traced = jax.jit(function).trace(*arguments)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" in lowered


def lower_gradients(loss, *arguments):
    lower(jax.grad(loss, argnums=(0, 1)), *arguments)


def step(weights, x, states):
    """One token of a stream."""
    with StateScope([states]) as scope:
        output, _ = block.stateless_call(weights, [], x)
    return output, scope.states


lower_gradients(loss, weights, x, segments)
lower(step, weights, jax.ShapeDtypeStruct((2, 1, 16), "bfloat16"), block.get_initial_state(2))
print(*sorted(set(launches)))

# Passes that add to their outputs: what they add up, and the queries.
for options in {"ridge": 0.3}, {"ridge": 0.3, "masked": False}:
    attend = functools.partial(ops.higher_order_attention, implementation="triton", **options)
    query, key = (jax.ShapeDtypeStruct((1, 100, n, 16), "bfloat16") for n in (2, 1))
    lower_gradients(lambda *x, f=attend: f(*x).astype("float32").sum(), query, key, key)

# On each of as many devices as there are: JAX asks of results along which axes they differ.
mesh = jax.sharding.Mesh(jax.devices(), ("parts",))
part = jax.P(None, "parts")
distribution.split_sequence(block, "parts")
lower_gradients(
    jax.shard_map(
        lambda *x: jax.lax.psum(loss(*x), "parts"),
        mesh=mesh,
        in_specs=(jax.P(), part, part),
        out_specs=jax.P(),
    ),
    weights,
    x,
    segments,
)
