"""`flashvla`: one command for everything. Exit status: 0 done, 1 failed, 2 wrong usage.

Each command is a dataclass: its fields are the options, its docstring the help, its `run` the work. Heavy imports,
rclpy first of all, happen inside `run`, so that `--help` is quick and needs no ROS.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from flashvla_ros import cli_data, cli_describe, cli_eval, cli_experiment, cli_quantize, cli_sweep, cli_trace, cli_train
from flashvla_ros.cli_options import PolicyOptions
from flashvla_ros.errors import ConfigurationError, RecordingError
from mllm.errors import PolicyError
from quant.errors import QuantError
from sim.errors import ConfigurationError as SimConfigurationError
from sim.errors import SimError

WRONG_USAGE = (ConfigurationError, PolicyError, QuantError, SimConfigurationError)


def parse_overrides(settings: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """("policy.image_size=128", ...) -> {"policy": {"image_size": 128}}; values are YAML.

    Raises ConfigurationError: not of the form NODE.PARAMETER=VALUE.
    """
    overrides: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        node, dot, parameter = path.partition(".")
        if not (equals and dot and node and parameter):
            raise ConfigurationError(f"--set {setting!r} is not of the form NODE.PARAMETER=VALUE")
        try:
            overrides.setdefault(node, {})[parameter] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigurationError(f"--set {setting!r}: the value is not YAML: {error}") from error
    return overrides


Settings = Annotated[
    tuple[str, ...],
    tyro.conf.arg(name="set", metavar="NODE.PARAMETER=VALUE", help="Override a node's parameter; several allowed."),
    tyro.conf.UseAppendAction,
]


@dataclass(frozen=True)
class Demo:
    """Run one LIBERO episode through real ROS 2 processes, and record it.

    Starts simulator bridge, command gate and policy, lets the policy solve the task in lockstep, prints how it ended
    and where the time went, and writes a video, a rosbag2 MCAP and the numbers under `runs/`.
    """

    suite: str = "libero_spatial"
    task: str = "0"
    """Index or instruction."""
    init_state: int = 3
    """Official initial state."""
    policy: str = "mini"
    """Name of an installed policy, or a folder of weights."""
    how: PolicyOptions = field(default_factory=PolicyOptions)
    episode: Path | None = None
    """Recorded actions to replay instead."""
    realtime: bool = False
    """Let the world run at 20 Hz instead of waiting for each command."""
    runs: Path = Path("runs")
    """Folder for what is written."""
    json: bool = False
    """Print the result as JSON on stdout; everything else goes to stderr."""
    settings: Settings = field(default=())

    def run(self) -> int:
        from flashvla_ros.demo import driven, replayed, run_demo

        task = int(self.task) if self.task.isdigit() else self.task
        act = (
            replayed(self.episode)
            if self.episode
            else driven(self.policy, self.how.chosen(), self.suite, task, self.init_state)
        )
        overrides = parse_overrides(self.settings)
        return run_demo(act, realtime=self.realtime, runs=self.runs, json_output=self.json, overrides=overrides)


@dataclass(frozen=True)
class Up:
    """Run a node graph where ROS's own launch package is not installed. Ctrl-C stops it in order."""

    graph: tyro.conf.Positional[str]
    """libero (simulator bridge, gate, policy) or robot (camera, gate, policy)."""
    settings: Settings = field(default=())

    def run(self) -> int:
        from flashvla_ros.graph import graph
        from flashvla_ros.processes import ProcessGroup, run_until_ended
        from flashvla_ros.runner import StopRequested

        specs = graph(self.graph, parse_overrides(self.settings))
        stop = StopRequested()
        with ProcessGroup(specs) as group:
            ended = run_until_ended(group, lambda: bool(stop))
        for name, status in ended.items():
            sys.stderr.write(f"node '{name}' ended by itself with status {status}: the graph was stopped\n")
        return 1 if ended else 0


@dataclass(frozen=True)
class BenchRos:
    """Measure what ROS 2 adds to a step: the LIBERO graph in lockstep, beside a plain pipe with the same bytes."""

    steps: int = 200
    """Control steps measured."""
    image_size: int = 256
    """Pixels of both cameras."""
    json: bool = False
    """Print the result as JSON on stdout."""

    def run(self) -> int:
        from flashvla_ros.bench_ros import run_bench

        return run_bench(steps=self.steps, image_size=self.image_size, json_output=self.json)


@dataclass(frozen=True)
class BenchSim:
    """Measure the simulator: official against fast stepping and rendering, as CPU time in one run."""

    suite: str = "libero_spatial"
    task: int = 0
    image_size: int = 128
    """Pixels of both cameras."""
    json: bool = False
    """Print the result as JSON on stdout."""

    def run(self) -> int:
        from flashvla_ros.bench_sim import run_bench

        return run_bench(suite=self.suite, task=self.task, image_size=self.image_size, json_output=self.json)


@dataclass(frozen=True)
class Serve:
    """Serve a policy to openpi-client, and whatever else speaks its protocol, over a websocket. Ctrl-C ends it.

    `GET /healthz` on the same port answers 200 while the policy does.
    """

    policy: tyro.conf.Positional[str] = "mini"
    """Name of an installed policy, or a folder of weights."""
    how: PolicyOptions = field(default_factory=PolicyOptions)
    host: str = "127.0.0.1"
    """IP address to listen on; one that other machines can reach needs a token."""
    port: int = 8000
    """0 takes a free one."""
    token_file: Path | None = None
    """File with the token that clients must send (openpi-client: api_key)."""
    max_message_bytes: int = 16 * 2**20
    """A larger message closes its connection."""
    max_connections: int = 16
    """Each holds a policy of its own, weights included: 1 for a model that fills the memory."""
    ping_timeout: float = 20.0
    """s after which a client that does not answer a ping is dropped."""
    request_timeout: float = 30.0
    """s for a step, waiting for other clients' steps included."""
    debug: bool = False
    """Send tracebacks to clients."""

    def run(self) -> int:
        import logging

        from mllm.policy import make_policy
        from mllm.server import PolicyServer
        from mllm.server_config import ServerConfig

        options = self.how.chosen()
        config = ServerConfig(
            host=self.host,
            port=self.port,
            token=self.token_file.read_text(encoding="utf-8").strip() if self.token_file else None,
            max_message_bytes=self.max_message_bytes,
            max_connections=self.max_connections,
            ping_timeout=self.ping_timeout,
            request_timeout=self.request_timeout,
            debug=self.debug,
        )
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("websockets").setLevel(logging.ERROR)
        PolicyServer(lambda: make_policy(self.policy, **options), config, name=self.policy).run()
        return 0


@dataclass(frozen=True)
class BenchModel:
    """Measure an action of the model, beside the same weights in transformers and the machine's own floor."""

    model: str = "mini"
    """mini, bench-100m or openvla-7b (random weights)."""
    steps: int = 50
    """Actions measured of each."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    threads: int = 2
    """Of torch on the CPU."""
    compile: bool = False
    """Ours by torch.compile."""
    json: bool = False
    """Print the result as JSON on stdout."""

    def run(self) -> int:
        from flashvla_ros.bench_model import run_bench
        from mllm.bench import BenchConfig

        config = BenchConfig(self.model, self.steps, 18, self.device, self.dtype, self.threads, self.compile)
        return run_bench(config, self.json)


@dataclass(frozen=True)
class BenchCompress:
    """Measure what choosing visual tokens costs and saves: every method beside the uncompressed model, in one run."""

    model: str = "mini"
    """mini or mini-ar (their own weights), bench-100m or openvla-7b (random weights)."""
    methods: tuple[str, ...] = ("flashvla", "tokencarve", "fastv", "random")
    """Of flashvla, tokencarve, fastv, random and uniform."""
    keep: int = 80
    """Visual tokens that stay, of all cameras together."""
    layer: int = 2
    """Layers of the decoder that see all tokens."""
    per_camera: bool = False
    """Score every camera's tokens by themselves."""
    steps: int = 50
    """Answers measured of each."""
    demonstrations: str = ""
    """Folder of demonstrations whose frames are looked at; noise if not given."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 1
    """Of torch on the CPU."""
    json: bool = False
    """Print the result as JSON on stdout."""

    def run(self) -> int:
        from flashvla_ros.bench_compress import run_bench
        from mllm.bench_compress import BenchCompressConfig

        options = {name: value for name, value in vars(self).items() if name != "json"}
        return run_bench(BenchCompressConfig(**options), self.json)


@dataclass(frozen=True)
class BenchQuant:
    """Measure a linear layer in every number format: ours, torch's, and, if installed, those of onnxruntime and
    bitsandbytes.
    """

    shapes: tuple[str, ...] = ("4096x4096", "768x192", "192x768")
    """Outputs x inputs of layers."""
    batches: tuple[int, ...] = (1, 64, 150)
    """Rows of inputs."""
    threads: tuple[int, ...] = (1,)
    """Several to compare them with the first."""
    repeats: int = 20
    """Calls measured of each, fewer of slow ones."""
    json: bool = False
    """Print the result as JSON on stdout."""

    def run(self) -> int:
        from flashvla_ros.bench_quant import run_bench
        from quant.bench import BenchConfig

        return run_bench(BenchConfig(self.shapes, self.batches, self.threads, self.repeats), self.json)


@dataclass(frozen=True)
class Bench:
    """Measure: `ros` is what ROS 2 adds to a step, `sim` the simulator's cost, `model` the policy's, `compress` what
    dropping visual tokens saves of it, `quant` a layer in fewer bits.
    """

    what: (
        Annotated[BenchRos, tyro.conf.subcommand("ros")]
        | Annotated[BenchSim, tyro.conf.subcommand("sim")]
        | Annotated[BenchModel, tyro.conf.subcommand("model")]
        | Annotated[BenchCompress, tyro.conf.subcommand("compress")]
        | Annotated[BenchQuant, tyro.conf.subcommand("quant")]
    )

    def run(self) -> int:
        return self.what.run()


@dataclass(frozen=True)
class Record:
    """Let the scripted expert solve an episode and write its actions, as the demo replays them."""

    out: tyro.conf.Positional[Path]
    """File to write (.safetensors)."""
    suite: str = "libero_spatial"
    task: str = "0"
    """Index or instruction."""
    init_state: int = 0
    """Official initial state."""

    def run(self) -> int:
        from mllm.recording import save_recording
        from sim.env import EnvConfig, LiberoEnv
        from sim.record import record_episode

        task = int(self.task) if self.task.isdigit() else self.task
        env = LiberoEnv(EnvConfig(suite=self.suite, task=task, cameras=(), renderer="fast", stepper="fast"))
        try:
            recording = record_episode(env, self.init_state)
        finally:
            env.close()
        save_recording(self.out, recording)
        sys.stdout.write(f"{len(recording.actions)} actions written to {self.out}\n")
        return 0


def main(args: list[str] | None = None) -> int:
    """Entry point of the `flashvla` script."""
    try:
        try:
            return _main(args)
        finally:
            sys.stdout.flush()
    except OSError as error:
        # Of what is printed alone: `_main` answers for the rest. After `| head` nobody reads it, and nothing is wrong.
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"flashvla: cannot print the rest: {error}\n")
        # Python would try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(args: list[str] | None) -> int:
    command: Any = tyro.extras.subcommand_cli_from_dict(
        {
            **{"demo": Demo, "up": Up, "serve": Serve, "bench": Bench, "record": Record},
            **cli_data.COMMANDS,
            **cli_train.COMMANDS,
            **cli_eval.COMMANDS,
            **cli_quantize.COMMANDS,
            **cli_sweep.COMMANDS,
            **cli_experiment.COMMANDS,
            **cli_describe.COMMANDS,
            **cli_trace.COMMANDS,
        },
        prog="flashvla",
        description="VLA policies on ROS 2, with LIBERO in the loop.",
        args=args,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )
    try:
        return command.run()
    except WRONG_USAGE as error:
        sys.stderr.write(f"flashvla: {error}\n")
        return 2
    except (RecordingError, SimError, OSError) as error:
        sys.stderr.write(f"flashvla: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("flashvla: interrupted\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
