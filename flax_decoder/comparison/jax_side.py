"""Our side: a model, its activations, and its training, with the code that `train.py` runs."""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_decoder.config import OptimizerConfig
from flax_decoder.errors import UserError
from flax_decoder.huggingface.weights import flatten
from flax_decoder.lens.capture import without_tuples
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.step import TrainState, mean_gradients


class JaxSide:
    """A model and its train state, under the names of the ledger.

    Attributes:
        loss: mean cross-entropy of the last batch, in nats per token.
        gradient_norm: norm of its gradient before clipping.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        tx: optax.GradientTransformation,
        optimizer: OptimizerConfig,
        *,
        accumulation_steps: int,
        exact: bool = False,
    ) -> None:
        """Prepares a copy of the model without dropout.

        Args:
            optimizer: the betas, epsilon and learning rates that `tx` should have.
            accumulation_steps: number of parts in which the gradient of a batch is computed.
            exact: computes in float64.
        """
        self.exact, self.optimizer_config = exact, optimizer
        dtype = "float64" if exact else model.config.dtype
        # Compiles one block instead of all; the numbers are the same. On GPUs and TPUs, products keep all their digits.
        self.config = replace(model.config, dropout=0.0, scan_layers=True, dtype=dtype, matmul_precision="highest")
        self.model = Decoder(self.config)
        with self._precision():
            as_array = functools.partial(jnp.asarray, dtype=jnp.float64 if exact else jnp.float32)
            params = jax.tree.map(lambda leaf: as_array(np.asarray(leaf)), params)
            self.state = TrainState.create(
                apply_fn=self.model.apply,
                params=params,
                tx=tx,
                seed=0,
                accumulation_steps=accumulation_steps,
                z_loss=0.0,
            ).replace(step=jnp.zeros((), jnp.int32))
        if optax.tree.get(self.state.opt_state, "mu", None) is None:
            raise UserError("the optimizer has no moments named mu and nu: it is compared with AdamW")
        self._before = self.state.params
        self._gradients: Any = None
        self._mean_gradients = jax.jit(mean_gradients)
        self._apply = jax.jit(_apply, donate_argnums=1)  # old moments are not needed: a quarter of the memory
        self.loss = self.gradient_norm = 0.0

    def forward(self, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
        """All tensors from tokens to logits, by name, such as layers.0.attention.q."""
        apply = jax.jit(functools.partial(self.model.apply, mutable=["intermediates"]))
        with self._precision():
            logits_BTV, recorded = apply({"params": self.state.params}, tokens_BT)
        result = {}
        for path, array in flatten(jax.tree.map(np.asarray, without_tuples(recorded["intermediates"]))).items():
            name = path.removesuffix("/output").replace("/", ".")
            if not name.startswith("layers."):
                result[name] = array
                continue
            if name.endswith(("scores", "weights")):
                array = array.reshape(*array.shape[:2], -1, *array.shape[-2:])  # (L, B, N, T, S)
            for layer, part in enumerate(array):
                result[name.replace("layers.", f"layers.{layer}.", 1)] = part
        return result | {"logits": np.asarray(logits_BTV)}

    def backward(self, batch: Mapping[str, np.ndarray]) -> None:
        """Computes the loss of a batch and its gradients."""
        self._gradients = None  # frees memory for the new ones
        with self._precision():
            self._gradients, metrics = self._mean_gradients(self.state, dict(batch))
            self.loss, self.gradient_norm = float(metrics["loss"]), float(metrics["gradient_norm"])

    def update(self) -> None:
        """Takes a step with the last gradients."""
        self._before = self.state.params
        with self._precision():
            self.state = self._apply(self.state.replace(opt_state=()), self.state.opt_state, self._gradients)

    @property
    def num_updates(self) -> int:
        """Number of steps taken."""
        return int(self.state.step)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last update, read off the parameters themselves.

        AdamW moves a parameter by -rate * (u + decay * p). The moments give u, so the rate can be fitted, whatever
        schedule the optimizer was given.
        """
        rate, _ = fit(*self.move("layers/attention/out/kernel"))
        return rate

    def move(self, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The last update of a parameter (of its first layer, if it has several) in float64.

        Returns:
            What was taken off it, the direction of Adam's moments, and the parameter before.
        """
        kinds = ("params", "params before", "first moment", "second moment")
        after, before, mean, square = (self.array(kind, path)[:1].astype(np.float64) for kind in kinds)
        config, count = self.optimizer_config, self.num_updates
        root = np.sqrt(square / (1 - config.beta2**count))
        return before - after, mean / (1 - config.beta1**count) / (root + config.epsilon), before

    def array(self, kind: str, path: str) -> np.ndarray:
        """An array of the training.

        Args:
            kind: params, params before (the last update), gradient, clipped (the gradient that Adam was given, read off
                the first moment after the first update), first moment or second moment.
            path: path of a parameter, such as layers/attention/query/kernel.
        """
        if kind == "clipped":
            return np.asarray(self.array("first moment", path) / (1 - self.optimizer_config.beta1))
        tree = {
            "params": lambda: self.state.params,
            "params before": lambda: self._before,
            "gradient": lambda: self._gradients,
            "first moment": lambda: optax.tree.get(self.state.opt_state, "mu"),
            "second moment": lambda: optax.tree.get(self.state.opt_state, "nu"),
        }[kind]()
        return np.asarray(flatten(tree)[path])

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return jax.enable_x64(True) if self.exact else contextlib.nullcontext()


def fit(target: np.ndarray, *directions: np.ndarray) -> list[float]:
    """The factors with which a sum of the directions comes nearest to the target; NaN if a number is not finite."""
    matrix = np.array([[np.vdot(one, other) for other in directions] for one in directions])
    vector = np.array([np.vdot(one, target) for one in directions])
    if not (np.isfinite(matrix).all() and np.isfinite(vector).all()):
        return [np.nan] * len(directions)
    return [float(factor) for factor in np.linalg.lstsq(matrix, vector, rcond=None)[0]]


def _apply(state: TrainState, opt_state: Any, gradients: Any) -> TrainState:
    """The second half of `train_step`."""
    return state.replace(opt_state=opt_state).apply_gradients(grads=gradients)
