"""Where the arrays of a stage lie: mesh, parameters, optimizer state, activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from mm_jax.models import Execution, MultimodalConfig
from mm_jax.parallel.mesh import Demand, make_mesh
from mm_jax.parallel.rules import Rules, place_tree
from mm_jax.train import partition
from mm_jax.train.config import RunConfig, Stage
from mm_jax.train.optimizer import optimizer, tree_bytes
from mm_jax.train.setup import abstract_params
from mm_jax.train.state import TrainState, Usual


@dataclass(frozen=True)
class Plan:
    """Placement of a stage on its mesh.

    Attributes:
      execution: for the model.
      shapes: of all parameters.
      params: their shardings.
      transform: the optimizer of the stage.
    """

    mesh: Mesh
    rules: Rules
    execution: Execution
    shapes: dict[str, Any]
    params: dict[str, Any]
    transform: optax.GradientTransformation
    trainable: tuple[str, ...]

    def shard(self, tree: Any) -> Any:
        """The shardings of a tree with the paths of parameters in its paths."""
        return place_tree(tree, self.shapes, self.mesh, self.rules)

    def abstract_state(self) -> tuple[TrainState, dict[str, Any]]:
        """The train state and the frozen parameters as shapes with shardings."""
        trainable, frozen = partition.split(self.shapes, self.trainable)
        opt_state = jax.eval_shape(self.transform.init, trainable)
        step, key = jax.eval_shape(lambda: (jax.numpy.int32(0), jax.random.key(0)))
        everything = (TrainState(step, trainable, opt_state, key), frozen)
        return jax.tree.map(_placed, everything, self.shard(everything))

    def begin(
        self,
        params: dict[str, Any],
        key: jax.Array,
        opt_state: Any = None,
        step: int = 0,
        usual: Usual | None = None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """The train state and the frozen parameters of parameters that lie where they belong.

        opt_state: that of a checkpoint, None for a new one. step: updates done.
        """
        trainable, frozen = partition.split(params, self.trainable)
        places = shardings_of(self.abstract_state()[0])
        if opt_state is None:
            opt_state = jax.jit(self.transform.init, out_shardings=places.opt_state)(trainable)
        # a program, and no device_put: devices of other processes can only be reached so
        put = jax.jit(lambda x: x, out_shardings=(places.step, places.key, places.usual))
        step, key, usual = put((np.int32(step), key, usual or Usual()))
        return TrainState(step, trainable, opt_state, key, usual), frozen


def _placed(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def plan_stage(
    config: RunConfig, model: MultimodalConfig, stage: Stage, devices: Sequence[Any] | None = None
) -> Plan:
    """The plan of a stage on `devices`, all of them without.

    Raises:
        UserError: the mesh does not fit the devices, or does not divide the rows or a parameter.
    """
    shapes = abstract_params(model)
    trainable, _ = partition.split(shapes, stage.trainable)
    transform = optimizer(stage.optimizer, stage.steps)
    state = tree_bytes(shapes) + tree_bytes(trainable) + tree_bytes(jax.eval_shape(transform.init, trainable))
    decoder = model.decoder
    demand = Demand(stage.batch.rows, state, math.gcd(decoder.num_heads, decoder.num_kv_heads))
    mesh = make_mesh(config.mesh, demand, devices)
    execution = Execution(mesh, config.rules.axes(), config.remat, config.attention, config.context)
    shardings = place_tree(shapes, shapes, mesh, config.rules)
    return Plan(mesh, config.rules, execution, shapes, shardings, transform, stage.trainable)


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree of abstract arrays that have them."""
    return jax.tree.map(lambda x: x.sharding, tree)
