"""The server as openpi-client and other clients meet it, over real sockets on the loopback interface."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from mllm.errors import PolicyError
from mllm.policy import ActionSpec, ActionStep, HoldPolicy
from mllm.server import PolicyServer
from mllm.server_config import ServerConfig
from mllm.wire import pack, unpack

# openpi-client connects in a way that newer versions of websockets deprecate.
pytestmark = pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
OBSERVATION = {"images": {"front": IMAGE}, "proprio": {"joint_pos": np.arange(7.0)}, "stamp": 2.5}
TASK = {**OBSERVATION, "prompt": "pick"}
FIRST_ACTION = np.linspace(-1, 1, 7, dtype=np.float32)


class Recorder:
    """Remembers what it was told; the n-th action of an episode is FIRST_ACTION / n."""

    action_spec = ActionSpec(control_freq=10.0)

    def __init__(self):
        self.prompts, self.observations = [], []
        self._steps = 0

    def reset(self, instruction):
        self.prompts.append(instruction)
        self._steps = 0

    def act(self, observation):
        self.observations.append(observation)
        self._steps += 1
        return ActionStep(FIRST_ACTION / self._steps, timing={"vision": 0.25}, flags={"step": self._steps})


class Failing(HoldPolicy):
    """Raises what it is given at every other step, beginning with the first."""

    def __init__(self, error):
        self._error, self._steps = error, 0

    def act(self, observation):
        self._steps += 1
        if self._steps % 2:
            raise self._error
        return super().act(observation)


@pytest.fixture
def openpi():
    """Connects openpi-clients that leave with the test."""
    clients = []

    def start(server, **options):
        clients.append(WebsocketClientPolicy("127.0.0.1", server.port, **options))
        return clients[-1]

    yield start
    for client in clients:
        client._ws.close()


def raw(server, **options):
    return connect(f"ws://127.0.0.1:{server.port}", compression=None, max_size=None, **options)


# ---------------------------------------------------------------- openpi-client


def test_metadata_come_first(serve, openpi):
    metadata = openpi(serve(Recorder, name="recorder")).get_server_metadata()
    assert metadata["policy"] == "recorder"
    assert metadata["action_spec"] == {
        "frame": "world",
        "translation_scale": 0.05,
        "rotation_scale": 0.5,
        "control_freq": 10.0,
    }
    assert {"python", "numpy", "websockets"} <= metadata["versions"].keys()


def test_the_round_trip_is_exact(serve, openpi):
    policy = Recorder()
    reply = openpi(serve(lambda: policy)).infer(TASK)
    (seen,) = policy.observations
    np.testing.assert_array_equal(seen.images["front"], IMAGE)
    np.testing.assert_array_equal(seen.proprio["joint_pos"], np.arange(7.0))
    assert seen.stamp == 2.5
    assert (reply["actions"].dtype, reply["actions"].shape) == (np.float32, (1, 7))
    np.testing.assert_array_equal(reply["actions"][0], FIRST_ACTION)
    assert reply["flags"] == {"step": 1}
    assert reply["policy_timing"] == {"vision_ms": 250.0}


def test_server_timing_has_the_step_and_the_one_before(serve, openpi):
    client = openpi(serve())
    first, second = client.infer(TASK)["server_timing"], client.infer(TASK)["server_timing"]
    assert first.keys() == {"infer_ms"}
    assert second.keys() == {"infer_ms", "prev_total_ms"}
    assert second["prev_total_ms"] > first["infer_ms"] > 0


def test_liberos_client_needs_no_change(serve, openpi):
    policy = Recorder()
    message = {
        "observation/image": IMAGE[::-1, ::-1],
        "observation/wrist_image": IMAGE[::-1, ::-1],
        "observation/state": np.concatenate((np.zeros(6), [0.04, -0.04])),
        "prompt": "pick up the black bowl",
    }
    actions = openpi(serve(lambda: policy)).infer(message)["actions"]
    assert len(actions[0].tolist()) == 7
    np.testing.assert_array_equal(policy.observations[0].images["agentview"], IMAGE[::-1])
    np.testing.assert_array_equal(policy.observations[0].proprio["eef_quat"], [0, 0, 0, 1])
    assert policy.prompts == ["pick up the black bowl"]


def test_a_chunk_feeds_openpis_broker(serve, openpi):
    chunk = np.linspace(-1, 1, 21, dtype=np.float32).reshape(3, 7)

    class Chunks(HoldPolicy):
        def act(self, observation):
            return ActionStep(chunk)

    client = openpi(serve(Chunks))

    class ActionsOnly:
        def infer(self, observation):
            return {"actions": client.infer(observation)["actions"]}

    broker = ActionChunkBroker(ActionsOnly(), action_horizon=3)
    for expected in (*chunk, chunk[0]):
        np.testing.assert_array_equal(broker.infer(TASK)["actions"], expected)


# ---------------------------------------------------------------- episodes


def test_a_new_prompt_resets(serve, openpi):
    policy = Recorder()
    client = openpi(serve(lambda: policy))
    steps = [client.infer({**OBSERVATION, "prompt": prompt})["flags"]["step"] for prompt in ("a", "a", "b", "a")]
    assert steps == [1, 2, 1, 1]
    assert policy.prompts == ["a", "b", "a"]


def test_a_reset_message_resets(serve, openpi):
    client = openpi(serve(Recorder))
    client.infer(TASK)
    assert client.infer({"reset": True})["reset"] is True
    assert client.infer(TASK)["flags"]["step"] == 1


def test_episodes_of_two_clients_do_not_mix(serve, openpi):
    server = serve(Recorder)
    clients = [openpi(server), openpi(server)]
    assert [client.infer(TASK)["flags"]["step"] for client in clients * 3] == [1, 1, 2, 2, 3, 3]


def test_a_policy_is_used_again_and_begins_anew(serve):
    made = []

    def factory():
        made.append(Recorder())
        return made[-1]

    server = serve(factory, max_connections=1)
    steps = []
    while len(steps) < 3:
        with raw(server) as client, contextlib.suppress(ConnectionClosed):  # the one before has not quite left
            client.recv()
            client.send(pack(TASK))
            steps.append(unpack(client.recv())["flags"]["step"])
    assert steps == [1, 1, 1]
    assert len(made) == 1


# ---------------------------------------------------------------- errors of the policy


def test_a_failing_policy_is_an_error_without_traceback_and_the_server_lives(serve, openpi, caplog):
    client = openpi(serve(lambda: Failing(RuntimeError("secret path"))))
    with pytest.raises(RuntimeError, match="the policy failed: RuntimeError; see the log of the server") as caught:
        client.infer(TASK)
    assert "Traceback" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "secret path" in caplog.text
    assert client.infer(TASK)["actions"].shape == (1, 7)


def test_a_policys_own_error_tells_what_to_do(serve, openpi):
    client = openpi(serve(lambda: Failing(PolicyError("send two cameras"))))
    with pytest.raises(RuntimeError, match="the policy failed: send two cameras"):
        client.infer(TASK)


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(0), TimeoutError()])
def test_no_error_of_a_policy_ends_the_server(serve, openpi, error):
    client = openpi(serve(lambda: Failing(error)))
    with pytest.raises(RuntimeError, match=type(error).__name__):
        client.infer(TASK)
    assert client.infer(TASK)["actions"].shape == (1, 7)


def test_debugging_sends_the_traceback(serve, openpi):
    client = openpi(serve(lambda: Failing(RuntimeError("secret path")), debug=True))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback .*secret path"):
        client.infer(TASK)


def test_an_action_out_of_range_never_reaches_the_client(serve, openpi):
    class Wild(HoldPolicy):
        def act(self, observation):
            return ActionStep(np.full(7, np.nan))

    with pytest.raises(RuntimeError, match=r"action\[0\] is nan"):
        openpi(serve(Wild)).infer(TASK)


def test_an_observation_that_is_wrong_is_told_why_and_the_next_is_served(serve, openpi):
    client = openpi(serve())
    with pytest.raises(RuntimeError, match="must be \\(H, W, 3\\) uint8"):
        client.infer({"images": {"front": IMAGE / 255}, "prompt": "pick"})
    with pytest.raises(RuntimeError, match="no 'prompt'"):
        client.infer(OBSERVATION)
    assert client.infer(TASK)["actions"].shape == (1, 7)


def test_a_policy_that_cannot_be_made_fails_at_the_start():
    def broken():
        raise PolicyError("no such checkpoint")

    with pytest.raises(PolicyError, match="no such checkpoint"), PolicyServer(broken, ServerConfig(port=0)):
        pytest.fail("it serves")


def test_a_further_policy_that_cannot_be_made_costs_one_connection(serve, openpi):
    policies = [HoldPolicy()]
    server = serve(policies.pop)
    first = openpi(server)
    with raw(server) as second, pytest.raises(ConnectionClosed, match=r"1011.*no further policy can be made"):
        second.recv()
    assert first.infer(TASK)["actions"].shape == (1, 7)
