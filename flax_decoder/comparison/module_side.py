"""The PyTorch side of somebody's own module, of which only a map of names is known."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from flax_decoder.comparison.observation import EPSILON
from flax_decoder.comparison.proposal import agreement_of, patterns_of, propose_names
from flax_decoder.comparison.torch_side import Lift, PyTorchSide
from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError, as_one_line
from flax_decoder.huggingface.family import Family
from flax_decoder.huggingface.names import family_of_names, left_over, num_layers
from flax_decoder.huggingface.weights import Shape, TensorSpec, tensor_specs
from flax_decoder.nn.positions import rotary_frequencies

_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)
_WANTED = "it must take token ids (B, T) and give logits (B, T, V)"


@dataclass(frozen=True)
class ForeignModule:
    """A module that can be compared.

    Attributes:
        module: the module, in whatever state its owner left it.
        make: makes another one like it, if there is a function that does.
        family: its names.
        absent: our parameters that it does not have: biases that are 0, and scales that are 1.
        notes: what a reader should know.
    """

    module: torch.nn.Module
    make: Callable[[], Any] | None
    family: Family
    absent: frozenset[str]
    notes: tuple[str, ...]


def open_module(
    torch_model: Any,
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    names: Mapping[str, Any] | None,
    state: Mapping[str, Any] | None = None,
) -> ForeignModule:
    """Finds out which tensor of a module is which of our parameters, and whether it can be called.

    Args:
        torch_model: a module, or a function without arguments that makes one.
        config: our model.
        params: its parameters, by path.
        names: theirs -> ours, as `family_of_names` takes it; None proposes one.
        state: a state dict for the module to load.

    Raises:
        UserError: it is no such module, a matrix has no counterpart on the other side, `state` does not fit, or the
            module cannot be copied or called.
    """
    source = "torch_model"
    make = None if isinstance(torch_model, torch.nn.Module) else torch_model
    module = torch_model if make is None else _made(make)
    while isinstance(inner := getattr(module, "_orig_mod", None), torch.nn.Module):  # of torch.compile
        module = inner
    if isinstance(module, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        module = module.module
    with _reported(f"{source}: {type(module).__name__} cannot be copied; give a function that makes it"):
        copied = (module if make else copy.deepcopy(module)).eval().float()
    if state is not None:
        _load(copied, state)
    tensors = dict(copied.named_parameters(remove_duplicate=False))
    shapes = {path: tuple(leaf.shape) for path, leaf in params.items()}
    found: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    aliases = _aliases(tensors, shapes)
    patterns = patterns_of(
        {name: shape for name, shape in found.items() if name not in aliases},
        num_layers(shapes),
        functools.partial(_is_transposed, copied),
    )
    agreement = agreement_of(lambda name: tensors[name].detach().cpu().numpy(), params)
    names_source = source if names is None else "names"
    if names is None:
        names = propose_names(patterns, shapes, agreement, source)
    known = {name: pattern.transposed for name, pattern in patterns.items() if pattern.transposed is not None}
    family = family_of_names(names, found, shapes, names_source, layouts=known, agreement=agreement)
    left = left_over(family, found, shapes)
    mapped = {id(tensors[spec.name]) for spec in tensor_specs(family, shapes)}
    for name in list(left.theirs):  # a tied head has two names, and what is not trained is no parameter
        if id(tensors[name]) in mapped or not tensors[name].requires_grad:
            del left.theirs[name]
    left.matrices().refuse(f"{source} ({type(module).__name__})")
    notes = []
    if left.ours and left.theirs:
        both = _some(left.theirs), _some(left.ours)
        notes.append("Without a counterpart, computed with but not compared: {} of PyTorch, {} of ours.".format(*both))
    elif left.theirs:
        notes.append(f"Only PyTorch's module has {_some(left.theirs)}: ours has none, and they are not trained.")
    elif left.ours:
        notes.append(f"PyTorch's module has no {_some(left.ours)}: a bias counts as 0, a scale as 1.")
    _check_call(copied, config)
    return ForeignModule(copied, make, family, frozenset(left.ours), tuple(notes))


class ModuleSide(PyTorchSide):
    """Somebody's module, seen through our names and axes.

    Hooks record what the modules give that own the tensors of the map; inside of attention the softmax and
    `scaled_dot_product_attention` are recorded. What neither shows has no row.
    """

    may_hide = True

    def __init__(self, model: ForeignModule, *arguments: Any, **settings: Any) -> None:
        self.make, self.absent, self._layer, self._batch_shape = model.make, model.absent, -1, (0, 0)
        super().__init__(model.module, *arguments, **settings)

    def _copy(self, model: Any, exact: bool) -> Any:
        if not exact:
            return copy.deepcopy(model)
        if self.make is None:
            result = copy.deepcopy(model).double()
            self.inexact = _compute_again(result, self.config)
            return result
        with Lift():
            result = _made(self.make).double()
        exact_parameters = dict(result.named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            with torch.no_grad():
                exact_parameters[name].copy_(parameter)
        exact_buffers = dict(result.named_buffers())
        for name, buffer in model.named_buffers():
            other = exact_buffers[name]
            # A buffer that was changed by hand differs by more than rounding, and stays.
            if not torch.allclose(buffer.to(other.dtype), other, rtol=1e-4, atol=1e-3):
                other.copy_(buffer)
        return result

    def _prepare(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def array(self, kind: str, path: str) -> np.ndarray:
        """See `PyTorchSide.array`; a parameter that the module does not have is 0, a scale 1, and has no gradient."""
        if path not in self.absent:
            return super().array(kind, path)
        dtype = np.float64 if self.lift else np.float32
        return np.full(self.shapes[path], float(kind == "params" and path.endswith("scale")), dtype)

    def _logits(self, tokens_BT: np.ndarray) -> torch.Tensor:
        self._batch_shape, self._layer = tokens_BT.shape, -1
        with self.lift or contextlib.nullcontext():
            logits_BTV = call(self.model, torch.tensor(tokens_BT, dtype=torch.int64))
        return logits_BTV.cpu()

    def _hooks(self, recorded: dict[str, torch.Tensor]) -> Iterator[tuple[str, Any]]:
        for place in self.places:
            name, _, kind = place.name.rpartition(".")
            owner = self.model.get_submodule(name)
            # What has modules inside gives something else than the product with one tensor.
            is_its_own = not list(owner.children()) and {name for name, _ in owner.named_parameters()} <= {
                "weight",
                "bias",
            }
            is_inside = not place.rule.paths[0].startswith(("embedding", "positions", "head"))
            if kind == "weight" and is_its_own and is_inside:
                yield name, self._output_hook(recorded, place)
        for layer, name in enumerate(self._layer_modules()):
            yield name, functools.partial(self._record_layer, recorded, layer)

    def _layer_modules(self) -> list[str]:
        """The names of the modules that are the layers; none if the tensors of a layer have no module in common."""
        inside = [rule.tensor for rule in self.family.rules if "{}" in rule.tensor]
        # The part of each name up to the number: transformer.h.{} of transformer.h.{}.attn.c_attn.weight
        starts = {name[: name.index("{}") + 2] for name in inside if name[name.index("{}") + 2 :].startswith(".")}
        if len(starts) != 1:
            return []
        start = starts.pop()
        return [start.replace("{}", str(layer)) for layer in range(self.config.num_layers)]

    def _record_layer(
        self, recorded: dict[str, torch.Tensor], layer: int, module: Any, args: Any, kwargs: Any, output: Any
    ) -> None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        given = self._by_batch(output[0] if isinstance(output, tuple | list) else output)
        if layer == 0 and (taken := self._by_batch(first)) is not None:
            recorded.setdefault("embeddings", taken)
        if given is not None:
            recorded.setdefault(f"layers.{layer}.residual", given)

    def _output_hook(self, recorded: dict[str, torch.Tensor], place: TensorSpec) -> Any:
        record = super()._output_hook(recorded, place)
        prefix = "" if place.layer is None else f"layers.{place.layer}."
        first = prefix + place.rule.paths[0].removeprefix("layers/").rpartition("/")[0].replace("/", ".")

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given, taken = self._by_batch(output), self._by_batch(args[0] if args else None)
            if given is None or taken is None or first in recorded:  # of several calls, the first counts
                return
            record(module, (taken,), kwargs, given)
            if place.rule.paths == ("layers/attention/out/kernel",):
                heads = taken.reshape(*taken.shape[:2], self.config.num_heads, self.config.head_width)
                recorded[prefix + "attention.heads"] = heads

        return hook

    def _by_batch(self, tensor: Any) -> torch.Tensor | None:
        """A tensor as (B, T, ...), if it is that, or (T, B, ...), or (B * T, ...)."""
        B, T = self._batch_shape
        if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2:
            return None
        if tensor.shape[:2] == (T, B) and tensor.ndim > 2:
            return tensor.transpose(0, 1)
        if tensor.shape[0] == B * T and tensor.ndim == 2:
            return tensor.reshape(B, T, -1)
        # Norms of single heads may have the head axis before the positions.
        is_batch = tensor.shape[:2] == (B, T) or (tensor.ndim == 4 and tensor.shape[0] == B and tensor.shape[2] == T)
        return tensor if is_batch and tensor.ndim > 2 else None

    @contextlib.contextmanager
    def _recorded_attention(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        layers: list[dict[str, torch.Tensor]] = [{} for _ in range(self.config.num_layers)]
        names = self._layer_modules()

        def enter(layer: int, *_: Any) -> None:
            self._layer = layer

        def record(softmax: dict[str, torch.Tensor]) -> None:
            if not names:  # the k-th softmax over T keys is that of layer k
                self._layer += 1
            if 0 <= self._layer < len(layers):
                layers[self._layer] = softmax | layers[self._layer]

        modules = [self.model.get_submodule(name) for name in names]
        handles = [
            module.register_forward_pre_hook(functools.partial(enter, layer)) for layer, module in enumerate(modules)
        ]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no module, so no hook
        try:
            with _AttentionCalls(self, record):
                yield layers
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for handle in handles:
                handle.remove()

    def scores_shape(self, shape: Shape) -> Shape | None:
        """(B, N, T, T), if a tensor of this shape may be the scores of a layer."""
        (B, T), N = self._batch_shape, self.config.num_heads
        return (B, N, T, T) if shape in ((B, N, T, T), (B * N, T, T)) else None


class _AttentionCalls(TorchFunctionMode):
    """Records what goes through the softmax of attention, or through `scaled_dot_product_attention`."""

    def __init__(self, side: ModuleSide, record: Callable[[dict[str, torch.Tensor]], None]) -> None:
        super().__init__()
        self.side, self.record = side, record

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in _SOFTMAX:
            self._record_softmax(args[0] if args else kwargs["input"], result)
        elif function is F.scaled_dot_product_attention:
            self._record_product(result, *args, **kwargs)
        return result

    def _record_softmax(self, scores: torch.Tensor, weights: torch.Tensor) -> None:
        shape = self.side.scores_shape(tuple(scores.shape))
        if shape is not None:
            self.record({"scores": _masked(scores, weights).reshape(shape), "weights": weights.reshape(shape)})

    def _record_product(
        self,
        heads_BNTH: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Its scores and weights, by the formula in its documentation: it does not give them."""
        T, N, H = query.shape[-2], self.side.config.num_heads, self.side.config.head_width
        if (
            query.ndim != 4
            or query.shape[1] != N
            or self.side.scores_shape((query.shape[0], N, T, key.shape[-2])) is None
        ):
            return
        every = key.repeat_interleave(N // key.shape[1], dim=1) if enable_gqa else key
        scores = query @ every.transpose(-2, -1) * (H**-0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(T, T, dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(-1)
        group = key.shape[1] // self.side.config.kv_heads  # where query heads share keys, these may be copies
        rotated = {"q_rotated": query.transpose(1, 2), "k_rotated": key[:, :: max(group, 1)].transpose(1, 2)}
        self.record({**rotated, "scores": _masked(scores, weights), "weights": weights})


def _masked(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The scores, with minus infinity where they are masked by another low number, such as -1e4 or -1e9."""
    return scores.masked_fill((scores < -9000) | ((weights == 0) & (scores < -100)), -torch.inf)


def call(module: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """The logits (B, T, V) of a module.

    A module that takes targets may without them give the last position only, or take them always.
    """
    device = next((parameter.device for parameter in module.parameters()), ids_BT.device)
    ids_BT = ids_BT.to(device)
    parameters = inspect.signature(module.forward).parameters
    targets = parameters.get("targets")
    with_targets = {"targets": ids_BT} if targets is not None else {}
    needs_them = targets is not None and targets.default is inspect.Parameter.empty
    logits = _logits_of(module(ids_BT, **with_targets if needs_them else {}))
    if with_targets and logits.ndim == 3 and logits.shape[1] == 1 < ids_BT.shape[1]:
        logits = _logits_of(module(ids_BT, **with_targets))
    if logits.ndim == 2 and logits.shape[0] == ids_BT.numel():
        logits = logits.reshape(*ids_BT.shape, -1)
    return logits


def _logits_of(result: Any) -> torch.Tensor:
    """The logits in what a module gives: a tensor, the first of a tuple, or `.logits`."""
    if isinstance(result, tuple | list) and result and not hasattr(result, "logits"):
        result = result[0]
    if isinstance(result, Mapping):
        result = result.get("logits")
    logits = getattr(result, "logits", result)
    if not isinstance(logits, torch.Tensor):
        raise UserError(f"torch_model: gives {type(logits).__name__}; {_WANTED}")
    return logits


def _check_call(module: torch.nn.Module, config: ModelConfig) -> None:
    """Raises UserError unless the module maps a few tokens to logits."""
    ids_BT = torch.arange(6).reshape(2, 3) % (config.vocab_size or 1)
    kind = type(module).__name__
    with _reported(f"torch_model: {kind} cannot be called; {_WANTED}"), torch.no_grad():
        logits_BTV = call(module, ids_BT[:, : config.context_length])
    wanted = (*ids_BT[:, : config.context_length].shape, config.vocab_size)
    if tuple(logits_BTV.shape) != wanted:
        raise UserError(f"torch_model: {kind} gives {tuple(logits_BTV.shape)} for ids {tuple(wanted[:2])}; {_WANTED}")


def _made(make: Callable[[], Any]) -> torch.nn.Module:
    """What a function makes, without a change to the random numbers of its caller."""
    with torch.random.fork_rng(devices=[]), _reported("torch_model: the function that should make the module failed"):
        module = make()
    if not isinstance(module, torch.nn.Module):
        raise UserError(
            f"torch_model: must be a torch.nn.Module, or a function that makes one, not {as_one_line(module)}"
        )
    return module


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Reports what somebody's code raises in two lines."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}:\n{type(error).__name__}: {' '.join(str(error).split()):.300}") from None


def _load(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"checkpoint: does not fit {type(module).__name__}:\n{reason:.300}") from None


def _aliases(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]) -> set[str]:
    """Second names of tensors that ours has once: those of a tied head."""
    if "head" in shapes:
        return set()
    first: dict[torch.Tensor, str] = {}
    return {name for name, tensor in tensors.items() if first.setdefault(tensor, name) != name}


def _is_transposed(module: torch.nn.Module, name: str) -> bool | None:
    """Whether a tensor is (out, in): that of a Linear is, that of a Conv1D of transformers is not."""
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, torch.nn.Linear | torch.nn.MultiheadAttention):
        return True
    return False if type(owner).__name__ == "Conv1D" else None


def _compute_again(module: torch.nn.Module, config: ModelConfig) -> tuple[str, ...]:
    """Gives well-known tables of positions all digits of float64; the names of other buffers with float32 numbers."""
    inexact = []
    for name, buffer in module.named_buffers():
        if not buffer.is_floating_point() and not buffer.is_complex():
            continue
        table = next((t for t in _tables(config, buffer) if _is_rounded(buffer, t)), None)
        if table is not None:
            buffer.copy_(torch.tensor(table).reshape(buffer.shape))
        elif not torch.equal(buffer, buffer.round()):  # a mask has whole numbers
            inexact.append(name)
    return tuple(inexact)


def _tables(config: ModelConfig, buffer: torch.Tensor) -> Iterator[np.ndarray]:
    """Tables of positions as long as a buffer, in float64."""
    sizes = [size for size in buffer.shape if size != 1]
    if buffer.is_complex() or not 1 <= len(sizes) <= 2:
        return
    positions = np.arange(sizes[0])[:, None]
    if config.positions == "sinusoidal":
        angles = positions * 10_000.0 ** (-np.arange(0, config.embed_dim, 2) / config.embed_dim)
        yield np.stack([np.sin(angles), np.cos(angles)], -1).reshape(len(positions), -1)
    elif config.positions == "rotary":
        frequencies = np.asarray(rotary_frequencies(config), np.float64)
        yield frequencies
        for waves in (np.cos(positions * frequencies), np.sin(positions * frequencies)):
            yield from (waves, np.concatenate([waves, waves], axis=1), np.repeat(waves, 2, axis=1))


def _is_rounded(buffer: torch.Tensor, table: np.ndarray) -> bool:
    """Whether a buffer is a table of positions in float32, whose roundings grow with the position."""
    found = buffer.detach().cpu().numpy().squeeze()
    if found.shape != table.shape:
        return False
    growth = np.arange(len(table))[:, None] + 1 if table.ndim == 2 else 1
    return bool((np.abs(found - table) <= 8 * EPSILON * growth).all())


def _some(names: Mapping[str, Any]) -> str:
    shown = list(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
