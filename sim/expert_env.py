"""The scripted expert beside its environment, in the worker's process: it reads the simulator itself."""

from __future__ import annotations

from typing import Protocol

from mllm.policy import ActionSpec, ActionStep, Observation, Policy
from sim.env import LiberoEnv
from sim.expert import make_expert

BLIND = Observation(images={})


class ExpertEnv(LiberoEnv):
    """`LiberoEnv` with its own expert."""

    _expert: Policy | None = None

    def expert_reset(self, instruction: str) -> None:
        """Starts an episode of an expert for the goal that the last reset drew.

        Raises ConfigurationError: it cannot do this task.
        """
        self._expert = make_expert(self)
        self._expert.reset(instruction)

    def expert_act(self) -> ActionStep:
        """The expert's answer to the state now."""
        assert self._expert is not None, "expert_reset comes first"
        return self._expert.act(BLIND)


class _Caller(Protocol):
    def call(self, method: str, *args: object) -> object: ...


class RemoteExpert:
    """The expert of an `ExpertEnv` in another process, as a policy; it looks at the simulator, not at observations."""

    action_spec = ActionSpec()

    def __init__(self, env: _Caller) -> None:
        self._env = env

    def reset(self, instruction: str) -> None:
        self._env.call("expert_reset", instruction)

    def act(self, observation: Observation) -> ActionStep:
        step = self._env.call("expert_act")
        assert isinstance(step, ActionStep)
        return step
