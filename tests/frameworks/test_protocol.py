"""Every framework implements every function of the protocol, with its parameters, or refuses by name."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import anyattn
from anyattn.definition.inputs import FIELDS, GRADIENTS, Extras, Gradients, Inputs, Saved
from anyattn.definition.options import Options
from anyattn.frameworks import ARRAYS, framework_of, loaded
from anyattn.frameworks.base import FUNCTIONS, Framework


@pytest.mark.parametrize("framework", ARRAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_frameworks_have_every_function_of_the_protocol(framework: str, name: str) -> None:
    wanted = inspect.signature(getattr(Framework, name)).parameters
    found = inspect.signature(getattr(getattr(loaded, framework), name)).parameters
    assert list(found) == list(wanted)[1:], "but for self"
    for parameter in found.values():
        assert parameter.kind == wanted[parameter.name].kind
        assert parameter.default == wanted[parameter.name].default


def test_list_of_functions_equals_the_protocol() -> None:
    assert set(FUNCTIONS) == {name for name in vars(Framework) if not name.startswith("_")}


def test_vulkan_arrays_refuse_gradients_by_name() -> None:
    inputs = Inputs(*(np.zeros((1, 4, 2, 8), np.float32) for _ in "qkv"))
    with pytest.raises(TypeError, match="for gradients, got DeviceArray"):
        loaded.vulkan.backward(Saved(*inputs[:3]), inputs, Options(), None, None)
    with pytest.raises(TypeError, match="for gradients, got DeviceArray"):
        loaded.vulkan.warmup(inputs, Options(), None, None, backward=True)


def test_an_array_of_no_framework_is_refused_by_name() -> None:
    kinds = r"numpy\.ndarray, a torch\.Tensor, a jax\.Array or a DeviceArray"
    with pytest.raises(TypeError, match=f"query must be a {kinds}, got list"):
        framework_of([], "query")
    with pytest.raises(TypeError, match="q must be a"):
        anyattn.attention([], [], [])


def test_tables_of_inputs_agree() -> None:
    """FIELDS has a row for each field of Extras; each gradient of an optional array has a field of Gradients."""
    assert tuple(FIELDS) == Extras._fields
    assert Gradients._fields == ("dq", "dk", "dv", *(f"d{name}" for name in GRADIENTS))


@pytest.mark.parametrize("name", ["attention_forward", "attention_backward", "explain", "warmup"])
def test_a_wrong_keyword_is_reported_under_the_name_of_the_function(name: str) -> None:
    x = np.zeros((1, 4, 2, 8), np.float32)
    arrays = (x, x, x) if name != "attention_backward" else (x, x, x, x, x, np.zeros((1, 2, 4), np.float32))
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'bogus'$"):
        getattr(anyattn, name)(*arrays, bogus=1)
