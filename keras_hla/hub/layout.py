"""Where the weights of a backbone are on a mesh of devices, under JAX."""

import keras


class _LayoutByHeads(keras.distribution.TensorLayout):
    """A layout whose axes of the model go by whole heads."""


def layout_map(device_mesh, model_axis, data_axis):
    """Heads, and the features within MLPs, over one axis; the features of blocks over another."""
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(
            "Argument `device_mesh` must be a `keras.distribution.DeviceMesh`. "
            f"Received: device_mesh={device_mesh!r} (of type {type(device_mesh)})"
        )
    axes = {"model_parallel_dim_name": model_axis, "data_parallel_dim_name": data_axis}
    for argument, name in axes.items():
        if name not in device_mesh.axis_names:
            raise ValueError(
                f"Argument `{argument}` must be an axis of the mesh, one of "
                f"{list(device_mesh.axis_names)}. Received: {argument}={name!r}"
            )
    layouts = keras.distribution.LayoutMap(device_mesh)
    layouts[r"token_embedding/embeddings"] = model_axis, data_axis
    layouts[r"token_embedding/reverse_embeddings"] = data_axis, model_axis
    mixer, block = r"decoder_block_\d+/mixer/cell", r"decoder_block_\d+"
    layouts[f"{mixer}/(query|key|value|gate)/kernel"] = _LayoutByHeads((data_axis, model_axis))
    layouts[f"{mixer}/output/kernel"] = _LayoutByHeads((model_axis, data_axis))
    layouts[f"{block}/(gate|up)/kernel"] = data_axis, model_axis
    layouts[f"{block}/down/kernel"] = model_axis, data_axis
    return layouts


def check_layouts(vocabulary_size, hidden_dim, block):
    """Checks that the layouts of the current distribution fit the weights of a backbone.

    Args:
        vocabulary_size: as in `HLABackbone`, as is the next.
        hidden_dim: as there.
        block: one of its `HLADecoderBlock`s, not built yet.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.ModelParallel):
        return
    cell, path = block.cell, block.name
    vocabulary, hidden = ("vocabulary_size", vocabulary_size), ("hidden_dim", hidden_dim)
    mlp = "intermediate_dim", block.mlp_size(hidden_dim)
    heads = "num_heads", cell.num_heads
    key_heads = "num_key_value_heads", cell.num_key_value_heads
    sizes = {
        "token_embedding/embeddings": (vocabulary, hidden),
        "token_embedding/reverse_embeddings": (hidden, vocabulary),
        f"{path}/gate/kernel": (hidden, mlp),
        f"{path}/up/kernel": (hidden, mlp),
        f"{path}/down/kernel": (mlp, hidden),
    }
    of_heads = {
        f"{path}/mixer/cell/query/kernel": (hidden, heads),
        f"{path}/mixer/cell/key/kernel": (hidden, key_heads),
        f"{path}/mixer/cell/value/kernel": (hidden, key_heads),
        f"{path}/mixer/cell/gate/kernel": (hidden, heads),
        f"{path}/mixer/cell/output/kernel": (heads, hidden),
    }
    for path, named in {**sizes, **of_heads}.items():
        layout = distribution.get_tensor_layout(path)
        if layout is not None and (path in sizes or isinstance(layout, _LayoutByHeads)):
            _check_layout(path, named, layout)


def _check_layout(path, sizes, layout):
    counts = dict(zip(layout.device_mesh.axis_names, layout.device_mesh.shape, strict=True))
    for (argument, size), axis in zip(sizes, layout.axes, strict=True):
        if axis is not None and size % counts[axis]:
            raise ValueError(
                f"Argument `{argument}` must be a multiple of the {counts[axis]} devices along "
                f"the axis {axis!r} of the mesh, over which the layout map splits {path!r}. "
                f"Received: {argument}={size}"
            )
