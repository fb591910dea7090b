"""Layers that Keras quantised before ``adapt``: their forward is called, updates added (docs/specification.md §5.4).

Keras puts another forward and other variables in the place of a layer's: ``quantize("int8")`` and ``("int4")`` keep
integers and scales, ``("float8")`` rounds kernel, input and gradient to eight bits as it runs. An integer kernel has a
gradient of its own in Keras, that of the dequantised kernel; so what stands before a layer trains as it does there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import dtype_policies, ops, quantizers
from numpy.typing import NDArray

from flix.core.errors import TargetError

MODES = ("int8", "int4", "float8")
"""Keras's names of what is adapted; ``gptq`` and ``awq`` are left out by name."""


class _Bare:
    """A layer without its activation, as what Keras's own forwards are called on.

    A view of its own for each call, as another thread may run the layer meanwhile.
    """

    activation = None

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def base_output(layer: Any, x: Any, training: Any) -> Any:
    """What the plain layer gives, with its bias and without its activation; its kernel is quantised.

    Args:
        layer: the adapted layer.
        x: in the form of the plain layer's input.
        training: as the layer was called.
    """
    own = getattr(layer.flix_base, f"_{layer.quantization_mode}_call")
    return own(_Bare(layer), x, training=training)


def kernel_shape(layer: Any) -> tuple[int, ...]:
    """The shape that a kernel has in the layer's formula; integers of four bits are kept in another."""
    if isinstance(layer, keras.layers.Embedding):
        return layer.input_dim, layer.output_dim
    if layer.quantization_mode == "int4":
        if isinstance(layer, keras.layers.EinsumDense):
            return tuple(layer.original_kernel_shape)
        return layer._kernel.shape[0], layer.units
    return tuple(layer._kernel.shape)


def dequantised(layer: Any) -> NDArray[np.float64]:
    """The values that a quantised kernel stands for, in :func:`kernel_shape`."""
    mode, embeds = layer.quantization_mode, isinstance(layer, keras.layers.Embedding)
    if mode == "float8":
        scale, kernel = layer.kernel_scale, ops.convert_to_tensor(layer._kernel)
        rounded = quantizers.quantize_and_dequantize(kernel, scale, "float8_e4m3fn", kernel.dtype)
        return _wide(rounded)
    name = "embeddings" if embeds else "kernel"
    scale = getattr(layer, f"{name}_scale")
    if mode == "int8":
        if isinstance(layer, keras.layers.EinsumDense):
            scale = layer._adjust_scale_for_dequant(ops.convert_to_tensor(scale))
        values, scales = _wide(getattr(layer, f"_{name}")), _wide(scale)
        return values / (scales[:, None] if embeds else scales)
    columns = kernel_shape(layer)[1] if embeds else getattr(layer, "_orig_output_dim", None)
    columns = columns or layer._int4_unpacked_column_size
    values = _wide(quantizers.unpack_int4(getattr(layer, f"_{name}"), columns, axis=-1))
    scales = _wide(scale)
    if not hasattr(layer, f"{name}_zero"):
        values = values / (scales[:, None] if embeds else scales)
    else:  # a scale and a zero for each group along the columns of an embedding, or the rows of a kernel
        groups = _wide(layer.g_idx).astype(np.int64)
        axis = 1 if embeds else 0
        zeros = _wide(getattr(layer, f"{name}_zero"))
        values = (values - zeros.take(groups, axis)) * scales.take(groups, axis)
    return values.reshape(kernel_shape(layer))


def facts(layers: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    """How each quantised layer among some is quantised, in a form for files, by path.

    Keras's own description of a layer with layers inside, such as attention, does not say it of these.
    """
    return {
        path: [mode, keras.saving.serialize_keras_object(layer.quantization_config)]
        for path, layer in layers
        if (mode := getattr(layer, "quantization_mode", None)) is not None
        and hasattr(layer, "quantization_config")
    }


def restore(layers: Iterable[tuple[str, Any]], known: Mapping[str, list[Any]]) -> None:
    """Quantise those layers of a copy that are not yet as :func:`facts` says; their values come next."""
    for path, layer in layers:
        if path in known and layer.quantization_mode is None:
            mode, settings = known[path]
            settings = keras.saving.deserialize_keras_object(settings)
            layer.quantize(mode, type_check=False, config=settings)


def make_plain(layer: Any, kernel: NDArray[Any]) -> None:
    """Turn a plain quantised layer into one that is not, with a kernel in :func:`kernel_shape`.

    What Keras's ``quantize`` did is undone: the variables go, a kernel in the dtype of before comes, and the dtype
    policy is that of before.
    """
    mode, embeds = layer.quantization_mode, isinstance(layer, keras.layers.Embedding)
    name = "embeddings" if embeds else "kernel"
    source = dtype_policies.get(layer.dtype_policy.name.partition("_from_")[2])
    layer._tracker.unlock()
    for known in layer.variable_serialization_spec[mode]:
        held = f"_{name}" if known == name else known
        variable = vars(layer).get(held)
        if known != "bias" and variable is not None:
            layer._untrack_variable(variable)
            # Keras's own collects the process's garbage for each variable: minutes for a model of many layers.
            super(keras.layers.Layer, layer).__delattr__(held)
    layer._is_quantized, layer.quantization_config = False, None
    layer._dtype_policy = source
    with layer._open_name_scope():
        made = layer.add_weight(name=name, shape=kernel.shape, initializer="zeros")
    setattr(layer, f"_{name}", made)
    made.assign(kernel.astype(made.dtype))
    layer._tracker.lock()


def refused(path: str, layer: Any) -> TargetError:
    """A quantised kernel takes no update."""
    return TargetError(
        f"layer {path!r} ({type(layer).flix_base.__name__}) cannot be merged: its kernel is quantised "
        f"({layer.quantization_mode}); merge(model, row, dequantize=True) makes a plain layer of it"
    )


def _wide(value: Any) -> NDArray[np.float64]:
    return np.asarray(ops.convert_to_numpy(value), np.float64)
