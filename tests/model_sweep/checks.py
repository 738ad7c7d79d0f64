"""Checks of a model. Each is a function of a model and its inputs that returns named tensors."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from model_sweep.inputs import SEQLEN, Inputs, padding, tokens

Tensors = dict[str, Tensor]
Check = Callable[[Any, Inputs], Tensors]
NEW_TOKENS = 5
CACHES = ("past_key_values", "cache", "memory")
WITHOUT = (*CACHES, "attentions")
LENGTHS = (5, 1, 7)  # of packed sequences; their sum is SEQLEN


class NotApplicable(Exception):
    """Raised by a check that says nothing about this model."""


def flatten(value: Any, name: str = "", without: tuple[str, ...] = WITHOUT) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors of an output, without caches and without weights of attention."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield name, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            if not any(word in str(key) for word in without):
                yield from flatten(entry, f"{name}.{key}" if name else str(key), without)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from flatten(entry, f"{name}.{index}", without)


def forward(model: Any, values: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**cast(values, model))


def cast(values: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the values with floating-point tensors of the model's dtype."""
    dtype = next((x.dtype for x in model.parameters() if x.is_floating_point()), torch.float32)
    return {key: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in values.items()}


def dense(model: Any, inputs: Inputs) -> Tensors:
    """Compute a batch without any mask."""
    return dict(flatten(forward(model, inputs.values)))


def ones(model: Any, inputs: Inputs) -> Tensors:
    """Compute a batch with masks that hide nothing."""
    return dict(flatten(forward(model, masked(inputs, "", 2).values)))


def masked(inputs: Inputs, side: str, batch: int) -> Inputs:
    """Return inputs with padding masks; NotApplicable where the model takes none."""
    if not inputs.masks:
        raise NotApplicable("takes no padding mask")
    lengths = {name: inputs.values[name.replace("attention_mask", "input_ids")].shape[1] for name in inputs.masks}
    masks = {name: padding(side, batch, length) for name, length in lengths.items()}
    return inputs.batch(batch).having(**masks)


def padded(side: str, batch: int) -> Check:
    def check(model: Any, inputs: Inputs) -> Tensors:
        given = masked(inputs, side, batch)
        found = dict(valid(forward(model, given.values), given, side))
        if not found:
            raise NotApplicable("returns nothing for single tokens")
        return found

    return check


def valid(output: Any, given: Inputs, side: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what belongs to tokens; what pools a sequence may look at its padding where that comes first."""
    where = {x.shape[1]: x.bool() for x in (given.values[name] for name in given.masks)}
    for name, x in flatten(output):
        mask = where.get(x.shape[1]) if x.ndim > 1 else None
        if mask is not None and x.shape[0] == mask.shape[0]:
            yield name, x[mask]
        elif mask is None and side == "right":
            yield name, x


def gradients(model: Any, inputs: Inputs) -> Tensors:
    """Compute the gradients of every parameter for a weighted sum of the outputs."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = dict(flatten(model(**cast(inputs.values, model))))
    generator = torch.Generator().manual_seed(5)
    total = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in output.values())
    if not isinstance(total, Tensor) or not total.requires_grad:
        raise NotApplicable("has no gradients")
    total.backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def generation(**options: Any) -> Check:
    def check(model: Any, inputs: Inputs) -> Tensors:
        if not generates(model):
            raise NotApplicable("does not generate")
        given = {name: x for name, x in inputs.values.items() if name != "decoder_input_ids"}
        if "attention_mask" in inputs.masks:
            given["attention_mask"] = padding("left", 2, given["input_ids"].shape[1])
        with greedy(model), torch.no_grad():
            torch.manual_seed(0)
            found = model.generate(
                **cast(given, model),
                do_sample=False,
                num_beams=1,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
        if not hasattr(found, "logits") or found.logits is None:
            raise NotApplicable("generates no tokens")
        return {"tokens": found.sequences} | {f"logits {i}": x for i, x in enumerate(found.logits)}

    return check


def generates(model: Any) -> bool:
    return hasattr(model, "generate") and callable(getattr(model, "can_generate", None)) and model.can_generate()


@contextlib.contextmanager
def greedy(model: Any) -> Iterator[None]:
    """Let generation go on to the last token, whatever it is."""
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    if getattr(model.generation_config, "decoder_start_token_id", 1) is None:
        model.generation_config.decoder_start_token_id = 1
    try:
        yield
    finally:
        model.generation_config = before


def chunked(model: Any, inputs: Inputs) -> Tensors:
    """Compute a sequence chunk by chunk with a cache."""
    decoder_only(model, inputs)
    import transformers

    past = transformers.DynamicCache(config=model.config)
    ids, found = inputs.values["input_ids"], {}
    for begin, end in ((0, 4), (4, 9), (9, 10), (10, SEQLEN)):
        output = forward(model, {"input_ids": ids[:, begin:end], "past_key_values": past, "use_cache": True})
        past = output.past_key_values
        found[f"logits {begin}"] = output.logits
    return found


def decoder_only(model: Any, inputs: Inputs) -> None:
    parameters = inspect.signature(model.forward).parameters
    if not generates(model) or set(inputs.values) != {"input_ids"} or "past_key_values" not in parameters:
        raise NotApplicable("is no decoder of text")


def packed(use_cache: bool, compile_it: bool = False) -> Check:
    def check(model: Any, inputs: Inputs) -> Tensors:
        """Compute three sequences in one row, separated only by their positions."""
        decoder_only(model, inputs)
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise NotApplicable("takes no position_ids")
        torch._dynamo.reset()
        run = torch.compile(model, backend="eager") if compile_it else model
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        given = {"input_ids": tokens(1), "position_ids": positions, "use_cache": use_cache}
        return {"logits": forward(run, given).logits}

    return check


def alone(model: Any, inputs: Inputs) -> Tensors:
    """Compute the sequences of `packed` one by one."""
    decoder_only(model, inputs)
    parts = []
    for ids in tokens(1).split(LENGTHS, 1):
        given = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], "use_cache": False}
        parts.append(forward(model, given).logits)
    return {"logits": torch.cat(parts, 1)}


def attentions(model: Any, inputs: Inputs) -> Tensors:
    """Compute the weights of attention."""
    if "output_attentions" not in str(inspect.signature(model.forward)) and "kwargs" not in str(
        inspect.signature(model.forward)
    ):
        raise NotApplicable("returns no attention weights")
    output = forward(model, inputs.values | {"output_attentions": True})
    found = dict(flatten(output, without=CACHES))
    if not any("attentions" in name for name in found):
        raise NotApplicable("returns no attention weights")
    return found


def without_cache(model: Any, inputs: Inputs) -> Inputs:
    """Return inputs with padding where the model takes a mask, for a result that has no cache in it."""
    given = masked(inputs, "right", 2) if inputs.masks else inputs
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return given.having(**cast(given.values, model), **more)


def compiled(model: Any, inputs: Inputs) -> Tensors:
    """Compute a padded batch by a compiled model."""
    torch._dynamo.reset()
    given = without_cache(model, inputs)
    with torch.no_grad():
        return dict(valid(torch.compile(model, backend="eager")(**given.values), given, "right"))


def exported(model: Any, inputs: Inputs) -> Tensors:
    """Compute a padded batch by an exported program."""
    given = without_cache(model, inputs)
    with torch.no_grad():
        program = torch.export.export(model, (), given.values, strict=False)
        return dict(valid(program.module()(**given.values), given, "right"))


def traced(model: Any, inputs: Inputs) -> Tensors:
    """Compute a padded batch by a traced program."""
    given = without_cache(model, inputs)
    fixed = {name: x for name, x in given.values.items() if not isinstance(x, Tensor)}
    names = [name for name in given.values if name not in fixed]

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *arrays: Tensor) -> Any:
            output = self.model(**dict(zip(names, arrays, strict=True)), **fixed)
            return tuple(x for _, x in flatten(output))

    arrays = tuple(given.values[name] for name in names)
    with torch.no_grad():
        program = torch.jit.trace(Positional(), arrays, check_trace=False, strict=False)
        return dict(valid(program(*arrays), given, "right"))


# Each takes seconds, so they run for some models only.
COMPILED: dict[str, Check] = {
    "compiled": compiled,
    "compiled packed": packed(True, compile_it=True),
    "exported": exported,
    "traced": traced,
}
COMPILED_MODELS = (
    *("llama", "mistral", "gemma2", "gpt_oss", "gpt2", "bloom", "jamba", "deepseek_v32"),
    *("bert", "modernbert", "t5", "whisper", "vit", "clip", "llava"),
)
CHECKS: dict[str, Check] = {
    "dense": dense,
    "ones": ones,
    "left 2": padded("left", 2),
    "left 1": padded("left", 1),
    "right 2": padded("right", 2),
    "right 1": padded("right", 1),
    "gradients": gradients,
    "generate": generation(),
    "static cache": generation(cache_implementation="static"),
    "no cache": generation(use_cache=False),
    "chunked": chunked,
    "packed": packed(False),
    "packed cache": packed(True),
    "attentions": attentions,
    **COMPILED,
}
