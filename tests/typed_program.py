"""A program that `check_types.py` checks as its user would, by `mypy --strict`."""

import dataclasses

import keras

import keras_hla
from keras_hla import distribution, kernels, layers, operators, ops
from keras_hla.types import State, Tensor


@dataclasses.dataclass(frozen=True)
class Cascade(operators.Operator):
    """Linear attention that reads its own output."""

    state_names = ("P", "E")

    def state_shapes(
        self, key_heads: int, query_heads: int, d: int, dv: int
    ) -> tuple[tuple[int, int, int], ...]:
        return (key_heads, d, dv), (query_heads, d, dv)

    def weights(self, query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
        w = decay * operators.scores(query, key)
        return w @ w

    def step(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, decay: Tensor
    ) -> tuple[Tensor, State]:
        p = decay * state[0] + operators.outer(key, value)
        e = decay * state[1] + operators.outer(key, operators.read(p, query))
        return operators.read(e, query), (p, e)

    def chain(
        self,
        scan: operators.Scan,
        state: State,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, State]:
        first, p = scan(query, key, value, state[0])
        second, e = scan(query, key, first, state[1])
        return second, (p, e)


def make_model() -> keras.Model:
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(256, 64)(tokens)
    x = layers.HLADecoderBlock(4, 16, dropout=0.1, operator="ahla", value_dim=None)(x)
    x = layers.HLA(4, 16, operator=Cascade(), decay=[0.9, 0.8, 0.7, 0.6], output_gate="silu")(x)
    return keras.Model(tokens, keras.layers.Dense(256)(x))


def main() -> None:
    operators.register("cascade", Cascade())
    model = make_model()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    text = keras.random.randint((8, 101), 0, 256)
    model.fit(text[:, :-1], text[:, 1:])

    stream = keras_hla.streaming_model(model)
    states: dict[str, Tensor] = stream.initial_state(batch_size=8)
    outputs = stream({"inputs": text[:, :60], **states})
    states = {name: outputs[name] for name in stream.state_names}
    new = keras_hla.generate(model, [72, 101], max_new_tokens=5, temperature=0.8, seed=1)
    for piece in keras_hla.generate_stream(model, [72, 101], 5, stop_tokens=0):
        print(len(piece), len(new))

    q = k = v = keras.random.normal((2, 100, 4, 16))
    output, state = ops.higher_order_attention(q, k, v, log_decay=-0.1, return_state=True)
    output, state = ops.attention_step(q[:, 0], k[:, 0], v[:, 0], state)
    segment = ops.combine(ops.summarize(q, k, v), ops.summarize(k, q, v))
    choice: kernels.Choice = kernels.choose("hla2", implementation="portable")
    print(output.shape, len(state), segment, choice.reason)

    distribution.split_sequence(model, None)
    keras_hla.export_saved_model(model, "saved_model")


main()
