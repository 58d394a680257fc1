"""An environment somewhere on a Ray cluster, with the same supervision there as here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from mllm.policy import Observation
from sim.env import EnvConfig, LiberoEnv
from sim.errors import ConfigurationError, EnvironmentFault
from sim.remote_env import RemoteEnv
from sim.supervisor import SupervisedEnv

_HOP_LIMIT = 30.0  # s that a call may take beyond its own limit: a busy node, a slow network
_PLACE_LIMIT = 600.0  # s until the cluster has room for an environment


class RayEnv(RemoteEnv):
    """`SupervisedEnv` on a node of a Ray cluster that has a core to spare: the same calls, the same errors.

    The cluster is the one that the variable RAY_ADDRESS names, else one that is started here. Its nodes need this
    package with its extra `sim`. A node that is lost raises EnvironmentFault; the next `reset` asks for another.
    start_limit, call_limit, factory: see `SupervisedEnv`.
    """

    def __init__(
        self,
        config: EnvConfig | None = None,
        start_limit: float = 180.0,
        call_limit: float = 60.0,
        factory: Callable[[EnvConfig], LiberoEnv] = LiberoEnv,
    ) -> None:
        super().__init__(config)
        self._arguments = (self.config, start_limit, call_limit, factory)
        self._limit = start_limit + call_limit + _HOP_LIMIT
        self._actor: Any = None
        self._ray = connect()

    def begin(self) -> None:
        """Asks the cluster for a place where there is none, and has the environment made there."""
        limit = self._limit
        if self._actor is None:
            self._actor = self._ray.remote(num_cpus=1)(SupervisedEnv).remote(*self._arguments)
            limit += _PLACE_LIMIT
        self._ask("begin", limit)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See `RemoteEnv.call`."""
        return self._ask("call", self._limit, method, *args, **kwargs)

    def observation_for_policy(self, observation: dict[str, Any]) -> Observation:
        """See `LiberoEnv.observation_for_policy`."""
        # Ray's arrays are read-only views of its memory; a policy may write to what it is given.
        images = {name: image.copy() for name, image in observation["images"].items()}
        return super().observation_for_policy({**observation, "images": images})

    def close(self) -> None:
        """Gives the place on the cluster back; a second call does nothing."""
        if self._actor is not None:
            self._ray.kill(self._actor)  # its process dies, and the environment's with it
            self._actor = None

    def _ask(self, method: str, limit: float, *args: Any, **kwargs: Any) -> Any:
        asked = args[0] if method == "call" else method
        if self._actor is None:
            raise EnvironmentFault(f"there is no environment for {asked}(): call reset() first")
        errors = self._ray.exceptions
        try:
            return self._ray.get(getattr(self._actor, method).remote(*args, **kwargs), timeout=limit)
        except errors.RayTaskError as error:  # the environment's own, raised at the other end
            cause = error.cause
            if isinstance(cause, ConfigurationError | EnvironmentFault):
                raise cause from error
            raise EnvironmentFault(f"{asked}() failed on the cluster:\n{error}") from error
        except errors.GetTimeoutError as error:
            self.close()
            raise EnvironmentFault(f"the cluster did not answer {asked}() within {limit:g} s") from error
        except errors.RayError as error:
            self.close()
            raise EnvironmentFault(
                f"the environment's place on the cluster was lost during {asked}(): {error}"
            ) from error


def connect() -> Any:
    """The `ray` module, connected to a cluster. Raises ConfigurationError: Ray is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError(
            f"the executor 'ray' needs Ray ({error}); install it with: pip install 'flashvla_ros[ray]', or use the "
            "executor 'process'"
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
    return ray
