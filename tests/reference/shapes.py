"""Checks a call's arrays against the function's jaxtyping annotations, letters bound across all of them."""

import inspect
import types
import typing

from jaxtyping import AbstractArray, jaxtyped


def _fits(value, annotation) -> bool:
    if typing.get_origin(annotation) is tuple:
        return all(_fits(v, a) for v, a in zip(value, typing.get_args(annotation), strict=True))
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(_fits(value, a) for a in typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields"):
        return all(_fits(v, annotation.__annotations__[f]) for f, v in zip(annotation._fields, value, strict=True))
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return isinstance(value, annotation)
    return True if not isinstance(annotation, type) else isinstance(value, annotation)


def call_checked(function, *args, **kwargs):
    """function(*args, **kwargs); AssertionError names the argument whose dtype or shape breaks its annotation."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    with jaxtyped("context"):
        for name, value in bound.arguments.items():
            annotation = signature.parameters[name].annotation
            assert annotation is not inspect.Parameter.empty, f"{function.__name__}: {name} has no annotation"
            assert _fits(value, annotation), f"{function.__name__}: {name} is {value!r}, not {annotation}"
        result = function(*args, **kwargs)
        assert _fits(result, signature.return_annotation), (
            f"{function.__name__} returned {result!r}, not {signature.return_annotation}"
        )
    return result
