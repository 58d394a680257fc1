"""What several commands ask about a policy, and about the episodes that it plays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashvla_ros.errors import ConfigurationError
from flashvla_ros.fields import json_object

if TYPE_CHECKING:
    from sim.evaluate import EvalConfig, Execution
    from sim.results import EpisodeKey


@dataclass(frozen=True)
class PolicyOptions:
    """How a policy is made."""

    options: str = "{}"
    """JSON object: keyword arguments of the policy's constructor."""
    compress: str = ""
    """none, flashvla, tokencarve, fastv, random, uniform, or a JSON object of its settings: which visual tokens the
    decoder goes on with."""
    keep: int | None = None
    """Visual tokens that it keeps."""
    reuse: str = ""
    """off, paper, gated, or a JSON object of its settings: when the policy's last action is used again."""

    def chosen(self) -> dict[str, Any]:
        """The policy's keyword arguments. Raises ConfigurationError: not JSON where it must be."""
        given = {"compress": name_or_object("--compress", self.compress), "keep": self.keep}
        given["reuse"] = name_or_object("--reuse", self.reuse)
        return json_object("--options", self.options) | {
            name: value for name, value in given.items() if value not in ("", None)
        }


def name_or_object(name: str, text: str) -> str | dict[str, Any]:
    """The text, or where it begins like one the JSON object. Raises ConfigurationError: it is none."""
    return json_object(name, text) if text.lstrip().startswith("{") else text


@dataclass(frozen=True)
class EpisodeOptions:
    """Which episodes are played, and how."""

    suite: tuple[str, ...] = ("libero_spatial",)
    """One or several suites."""
    tasks: str = "all"
    """all, indices such as 0-3,7, or one instruction."""
    trials: int = 50
    """Episodes a task, from --first-state on."""
    first_state: int = 0
    """First initial state."""
    states: str = ""
    """Initial states such as 20-49, in place of --trials and --first-state."""
    draw: Literal["", "sampled", "shuffled"] = ""
    """Draw fresh starts: the numbers are seeds instead of official initial states. sampled is LIBERO's way; shuffled
    asks for either bowl of libero_spatial, or for any object of libero_object, where they exchange places."""
    seed: int = 0
    """Places the fixtures, which official initial states leave open."""
    workers: int = 2
    """Environments at once, each a process."""
    executor: str = "process"
    """process (this machine) or ray (a Ray cluster)."""
    max_batch: int = 1
    """Observations that the policy answers in one call at most; more is faster on a GPU, and changes the last bits."""
    in_a_row: int = 5
    """Episodes of one task before a worker builds the next task's environment."""
    renderer: str | None = None
    """official or fast; what the policy was trained with if not given."""
    image_size: int | None = None
    """Pixels of each camera; what the policy was trained with if not given."""
    cameras: tuple[str, ...] | None = None
    """LIBERO's camera names; what the policy was trained with if not given."""
    stepper: str = "fast"
    """official or fast: the same states, bit for bit."""
    settle_steps: int = 10
    """Steps without motion before an episode."""
    step_limit: int | None = None
    """Steps before an episode is a failure; the suite's if not given."""
    record_failures: bool = False
    """Keep a video of every failure and error."""
    retry_errors: bool = False
    """Play episodes again that the run has as errors."""

    def keys(self, variant: str = "") -> list[EpisodeKey]:
        """The episodes. Raises ConfigurationError: there are none such."""
        from sim.schedule import episode_keys, parse_numbers, parse_tasks

        if self.trials < 1 or self.first_state < 0:
            raise ConfigurationError(
                f"--trials is {self.trials}, --first-state {self.first_state}: at least 1, and at least 0"
            )
        states = range(self.first_state, self.first_state + self.trials)
        numbers = parse_numbers(self.states, "--states") if self.states else tuple(states)
        return [
            key
            for suite in self.suite
            for key in episode_keys(suite, parse_tasks(suite, self.tasks), numbers, self.seed, variant, self.draw)
        ]

    def config(self, policy: str, options: dict[str, Any]) -> EvalConfig:
        """What an episode means."""
        from sim.evaluate import EvalConfig

        names = ("renderer", "image_size", "cameras", "stepper", "settle_steps", "step_limit")
        return EvalConfig(policy, options, **{name: getattr(self, name) for name in names})

    def execution(self) -> Execution:
        """How episodes are played."""
        from sim.evaluate import Execution

        names = ("workers", "executor", "max_batch", "in_a_row", "record_failures", "retry_errors")
        return Execution(**{name: getattr(self, name) for name in names})
