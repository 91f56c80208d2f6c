"""The PyTorch side: a model, its activations, and its training by `torch.optim.AdamW`."""

import contextlib
import copy
import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import eager_mask

from flax_decoder.comparison.schedule import learning_rate
from flax_decoder.config import ModelConfig, OptimizerConfig
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.family import Family, Rule
from flax_decoder.huggingface.weights import Shape, TensorSpec, split, tensor_specs

# The name under which transformers finds `_attention`, which computes nothing new but records its inputs and outputs.
_ATTENTION = "flax_decoder_ledger"


def open_model(folder: Path) -> Any:
    """The model in a Hugging Face folder, in float32; our own reader must have accepted the folder before."""
    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and warnings of transformers."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


class PyTorchSide:
    """A model of transformers, seen through our names and axes.

    Attributes:
        loss: mean cross-entropy of the last batch, in nats per token.
        gradient_norm: norm of its gradient before clipping.
        learning_rate: learning rate of the last update.
        may_hide: some tensors of a forward pass may not be recorded; they have no row.
        inexact: names of buffers that are float32 numbers in a float64 model.
        absent: paths of our parameters that the model does not have: biases that count as 0, scales as 1.
    """

    may_hide = False
    absent: frozenset[str] = frozenset()
    inexact: tuple[str, ...] = ()

    def __init__(
        self,
        model: Any,
        family: Family,
        config: ModelConfig,
        shapes: Mapping[str, Shape],
        optimizer: OptimizerConfig,
        num_steps: int,
        *,
        exact: bool = False,
    ) -> None:
        """Prepares a copy of the model.

        Args:
            model: the model; it is not changed.
            family: its tensor names.
            config: its numbers of heads and layers.
            shapes: shapes of our parameters, by path.
            optimizer: learning rates, weight decay and clipping.
            num_steps: length of the schedule.
            exact: computes in float64, even if the model's code asks for float32.
        """
        family = FAMILIES[family.modules] if family.modules else family
        self.family, self.config, self.shapes = family, config, dict(shapes)
        self.lift = Lift() if exact else None
        with quiet():
            self.model = self._copy(model, exact)
        named = self._prepare()
        self.model.eval()  # no dropout: no two libraries draw the same
        self.places = tensor_specs(family, shapes)
        self.model.requires_grad_(False)
        self.parameters = {place.name: named[place.name] for place in self.places}
        # Parameters that only PyTorch has, such as biases, are zero and stay so.
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer_config, self.num_steps, self.num_updates = optimizer, num_steps, 0
        self.distinct = list(dict.fromkeys(self.parameters.values()))  # one may have several names
        self.optimizer = _make_optimizer(self.parameters, self.places, optimizer)
        self.loss = self.gradient_norm = self.learning_rate = 0.0
        self.batch_shape: tuple[int, ...] = ()

    @property
    def casts(self) -> list[str]:
        """Classes of modules that were kept from casting back to float32."""
        return sorted(self.lift.lifted) if self.lift else []

    def forward(self, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
        """All tensors from tokens to logits, by our names."""
        recorded: dict[str, torch.Tensor] = {}
        self.batch_shape = tokens_BT.shape
        handles = [
            self.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            for name, hook in self._hooks(recorded)
        ]
        try:
            with torch.no_grad(), self._recorded_attention() as layers:
                recorded["logits"] = self._logits(tokens_BT)
        finally:
            for handle in handles:
                handle.remove()
        for layer, tensors in enumerate(layers):
            recorded |= {f"layers.{layer}.attention.{name}": tensor for name, tensor in tensors.items()}
        before = ("query_norm", "key_norm") if self.config.normalises_before else ()
        for layer in range(self.config.num_layers):
            prefix = f"layers.{layer}.attention."
            for name, *sources in (("q", "query_norm", "query"), ("k", "key_norm", "key"), ("v", "value")):
                for source in (source for source in sources if source in before or not source.endswith("_norm")):
                    if prefix + source in recorded:
                        recorded.setdefault(prefix + name, recorded[prefix + source])
        return {name: tensor.detach().cpu().numpy() for name, tensor in recorded.items()}

    def backward(self, batch: Mapping[str, np.ndarray]) -> None:
        """Computes the loss of a batch and its gradients."""
        self.optimizer.zero_grad()
        logits_BTV = self._logits(batch["inputs"])
        targets = torch.tensor(batch["targets"], dtype=torch.int64).reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits_BTV.reshape(len(targets), -1), targets)
        loss.backward()
        self.loss = float(loss.detach())
        norms = [parameter.grad.norm() for parameter in self.distinct if parameter.grad is not None]
        self.gradient_norm = float(torch.stack(norms).norm())

    @property
    def unseen(self) -> set[str]:
        """Tensors of attention that cannot be seen in this model, or are not unique."""
        if not self.family.has_own_attention:
            return set()
        # The weights are the same if all scores of a query rise alike, as they do where ALiBi counts from the start.
        return {"q_rotated", "k_rotated"} | ({"scores"} if self.family.constants.get("positions") == "alibi" else set())

    def update(self) -> None:
        """Clips the gradients and takes a step."""
        config = self.optimizer_config
        if config.clip_norm > 0:
            # PyTorch divides by the norm + 1e-6, optax by the norm; this undoes the difference.
            limit = config.clip_norm * (1 + 1e-6 / max(self.gradient_norm, 1e-6))
            torch.nn.utils.clip_grad_norm_(self.distinct, limit)
        self.learning_rate = learning_rate(config, self.num_steps, self.num_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.num_updates += 1

    def array(self, kind: str, path: str) -> np.ndarray:
        """An array of PyTorch's training, in our shape.

        Args:
            kind: params, gradient (before `update`), clipped (after it), first moment or second moment.
            path: path of one of our parameters, such as layers/attention/query/kernel.
        """
        parts = []
        for place in self.places:
            if path in place.rule.paths:
                parameter: torch.Tensor = self.parameters[place.name]
                if kind == "params":
                    tensor = parameter
                elif kind in ("gradient", "clipped"):
                    tensor = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                else:
                    tensor = self.optimizer.state[parameter]["exp_avg" if kind == "first moment" else "exp_avg_sq"]
                rule = place.rule if kind == "params" else replace(place.rule, offset=0.0)
                array = tensor.detach().cpu().numpy().reshape(place.shape)
                parts.append(split(rule, array, place.param_shapes)[place.rule.paths.index(path)])
        return np.stack(parts) if path.startswith("layers/") else parts[0].copy()

    def _copy(self, model: Any, exact: bool) -> Any:
        """A copy of the model, in float32 or float64."""
        return _in_float64(model) if exact else copy.deepcopy(model)

    def _prepare(self) -> dict[str, torch.nn.Parameter]:
        """Makes the copy of the model ready to be recorded; returns its parameters by the family's names."""
        if self.family.has_own_attention:
            self.model.config._attn_implementation = "eager"  # without which Falcon's makes no softmax that one can see
        else:
            transformers.AttentionInterface.register(_ATTENTION, _attention)
            transformers.AttentionMaskInterface.register(_ATTENTION, eager_mask)
            with quiet():
                self.model.set_attn_implementation(_ATTENTION)
        # In memory the head may have another name than in files.
        return {**dict(self.model.named_parameters()), self.family.head: self.model.get_output_embeddings().weight}

    @contextlib.contextmanager
    def _recorded_attention(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        """Fills the list with what each layer's attention computes inside."""
        layers: list[dict[str, torch.Tensor]] = []
        if self.family.has_own_attention:
            with _SoftmaxInput() as softmax:
                yield layers
            layers += [{"scores": scores, "weights": weights} for scores, weights in softmax.pairs]
            return
        transformers.AttentionInterface.register(_ATTENTION, functools.partial(_attention, layers=layers))
        try:
            yield layers
        finally:
            transformers.AttentionInterface.register(_ATTENTION, _attention)

    def _logits(self, tokens_BT: np.ndarray) -> torch.Tensor:
        with self.lift or contextlib.nullcontext():
            result = self.model(torch.tensor(tokens_BT, dtype=torch.int64, device=self.model.device), use_cache=False)
        logits: torch.Tensor = result.logits
        return logits

    def _hooks(self, recorded: dict[str, torch.Tensor]) -> Iterator[tuple[str, Any]]:
        """Names of modules, and the hook of each. The family's table says which module is which."""
        for place in self.places:
            module_name, _, kind = place.name.rpartition(".")
            if kind == "weight" and not place.rule.paths[0].startswith(("embedding", "positions", "head")):
                yield module_name, self._output_hook(recorded, place)
        for module_name, place in self._norms_without_scale():
            yield module_name, self._output_hook(recorded, place)
        within_layer = next(rule.tensor for rule in self.family.rules if "{}" in rule.tensor)
        layer_name = self.family.prefix + within_layer.split(".{}")[0]

        def record_layer(layer: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if layer == 0:
                recorded["embeddings"] = args[0] if args else kwargs["hidden_states"]
            recorded[f"layers.{layer}.residual"] = output[0] if isinstance(output, tuple) else output

        for layer in range(self.config.num_layers):
            yield f"{layer_name}.{layer}", functools.partial(record_layer, layer)

    def _norms_without_scale(self) -> Iterator[tuple[str, TensorSpec]]:
        """The names of norms that have no tensors, and where their scales would be."""
        modules = dict(self.model.named_modules())
        for rule in self.family.rules if not self.config.norm_scale else ():
            if rule.paths[0].endswith("norm/scale") and rule.paths[0] not in self.shapes:
                for layer in range(self.config.num_layers) if "{}" in rule.tensor else [None]:
                    place = TensorSpec(self.family.prefix + rule.tensor.format(layer), (), rule, layer, [])
                    module_name = place.name.rpartition(".")[0]
                    if module_name in modules:
                        yield module_name, place

    def _output_hook(self, recorded: dict[str, torch.Tensor], place: TensorSpec) -> Any:
        rule, prefix = place.rule, "" if place.layer is None else f"layers.{place.layer}."
        names = [prefix + path.removeprefix("layers/").rpartition("/")[0].replace("/", ".") for path in rule.paths]

        limit: Any = self.config.qkv_clip  # what comes after the module is not seen otherwise, but for a norm
        clipped = ("value",) if self.config.normalises_before else ("query", "key", "value")

        def hook(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            output, *args = (  # OPT's feed-forward has positions of all texts in one axis
                x.reshape(*self.batch_shape, -1) if x.ndim == 2 else x for x in (output, *args)
            )
            if names[0].endswith("feed_forward.down"):
                recorded[prefix + "feed_forward.hidden"] = args[0]
            if names[0].endswith("attention.out"):
                B, T = args[0].shape[:2]
                recorded[prefix + "attention.heads"] = args[0].reshape(B, T, -1, self.config.head_width)
            for name, part in zip(names, self._split_output(rule, output), strict=True):
                is_clipped = limit is not None and name.endswith(clipped)
                recorded[name] = part.clamp(-limit, limit) if is_clipped else part

        return hook

    def _split_output(self, rule: Rule, output: torch.Tensor) -> list[torch.Tensor]:
        """The output of a module, split into the outputs of those of our parameters that its tensor holds."""
        if rule.paths[0].endswith("_norm/scale") and output.ndim == 4:
            # Norms of single heads: in some families the head axis comes before the positions.
            heads_first = output.shape[1] in (self.config.num_heads, self.config.kv_heads)
            return [output.transpose(1, 2) if heads_first else output]
        B, T = output.shape[:2]
        heads = {"query": self.config.num_heads, "key": self.config.kv_heads, "value": self.config.kv_heads}
        shapes: list[Shape] = []
        for path in rule.paths:
            name = path.split("/")[-2].removesuffix("_norm")
            width = output.shape[-1] // len(rule.paths)
            shapes.append((B * T, heads[name], self.config.head_width) if name in heads else (B * T, width))
        array = output.detach().cpu().numpy()
        if len(shapes) == 1:
            parts = [array.reshape(shapes[0])]
        else:
            parts = split(replace(rule, transposed=False), array.reshape(B * T, -1), shapes)
        return [torch.tensor(part.reshape(B, T, *part.shape[1:])) for part in parts]


class TwinSide(PyTorchSide):
    """A `TorchDecoder`, seen through our names and axes."""

    def _prepare(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    @contextlib.contextmanager
    def _recorded_attention(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        layers: list[dict[str, torch.Tensor]] = []

        def record(module: Any, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
            recorded = {"q_rotated": args[0], "k_rotated": args[1], "scores": softmax.scores}
            layers.append({**recorded, "weights": output[1], "heads": output[0]})

        handles = [layer.attention.dot_product.register_forward_hook(record) for layer in self.model.layers]
        try:
            with _SoftmaxInput() as softmax:
                yield layers
        finally:
            for handle in handles:
                handle.remove()

    def _logits(self, tokens_BT: np.ndarray) -> torch.Tensor:
        logits: torch.Tensor = self.model(torch.tensor(tokens_BT, dtype=torch.int64))
        return logits


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    layers: list[dict[str, torch.Tensor]] | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of the module's own family; appends its inputs, scores, weights and outputs to `layers`."""
    attend = sys.modules[type(module).__module__].eager_attention_forward
    with _SoftmaxInput() as softmax:
        heads_BTNH, weights_BNTS = attend(module, query, key, value, mask, **settings)
    if layers is not None:
        recorded = {"q_rotated": query.transpose(1, 2), "k_rotated": key.transpose(1, 2), "scores": softmax.scores}
        layers.append({**recorded, "weights": weights_BNTS, "heads": heads_BTNH})
    return heads_BTNH, weights_BNTS


class _SoftmaxInput(TorchFunctionMode):
    """Records the input and the output of each softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def scores(self) -> torch.Tensor:
        """The input of the last one."""
        return self.pairs[-1][0]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.softmax:
            self.pairs.append((args[0], output))
        return output


class Lift(TorchFunctionMode):
    """Keeps a float64 model in float64: when its code asks for float32, or makes numbers, it gets float64."""

    def __init__(self) -> None:
        super().__init__()
        self.lifted: set[str] = set()
        self._modules: list[Any] = []

    def __enter__(self) -> Any:
        self._handles = [
            module_hooks.register_module_forward_pre_hook(lambda module, _: self._modules.append(module)),
            module_hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)
        for handle in self._handles:
            handle.remove()
        self._modules.clear()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        was_float64 = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if function is torch.Tensor.float:
            self._note(was_float64)
            return torch.Tensor.double(*args)
        if any(value is torch.float32 for value in (*args, *kwargs.values())):
            self._note(was_float64)
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return function(*args, **kwargs)

    def _leave(self, *_: Any) -> None:
        self._modules.pop()

    def _note(self, was_float64: bool) -> None:
        if was_float64 and self._modules:
            self.lifted.add(type(self._modules[-1]).__name__)


def _in_float64(model: Any) -> Any:
    """A copy in float64. Buffers that the model computed in float32, such as rotary frequencies, are computed again."""
    result = copy.deepcopy(model).double()
    with Lift():
        fresh = type(model)(copy.deepcopy(model.config))
    buffers = dict(fresh.named_buffers())
    for name, buffer in result.named_buffers():
        exact = buffers.get(name)
        # A buffer that was changed by hand differs by more than rounding, and stays. In a table with a row for each
        # position, the angle of the last one is rounded most.
        rounding = 1e-7 * len(buffer) if buffer.ndim == 2 else 0.0
        if exact is None or exact.dtype != torch.float64:
            continue
        if torch.allclose(buffer, exact, rtol=1e-6, atol=rounding):
            buffer.copy_(exact)
    return result


def _make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], wanted: list[TensorSpec], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW with the usual two groups: biases and scales of norms do not decay."""
    without = {place.name for place in wanted if place.rule.paths[0].endswith(("scale", "bias"))}
    without = without if config.decay == "matrices" else set()
    decayed, others = ([p for name, p in parameters.items() if (name in without) == kind] for kind in (False, True))
    groups = [
        {"params": list(dict.fromkeys(decayed)), "weight_decay": config.weight_decay},
        {"params": list(dict.fromkeys(others)), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )
